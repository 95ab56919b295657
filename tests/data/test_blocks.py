"""Slides read a block of patches at a time, from every kind of file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from momkd.data import write_trident
from momkd.data.batches import BagLoader
from momkd.data.cohort import open_cohort
from momkd.data.pack import pack
from momkd.errors import InputError

N, L = 23, 6
X = np.random.default_rng(0).standard_normal((N, L), np.float32)


def write(folder: Path, kind: str, x: np.ndarray = X) -> Path:
    folder.mkdir()
    if kind == "pt":
        torch.save(torch.from_numpy(x), folder / "a.pt")
    elif kind == "npy":
        np.save(folder / "a.npy", x.astype(np.float16))
    elif kind == "one more dimension":
        with h5py.File(folder / "a.h5", "w") as file:
            file["features"] = x[None].astype(np.float64)
    else:
        coords = np.arange(2 * len(x)).reshape(-1, 2)
        write_trident(folder / "a.h5", x, coords, patch_size_level0=1, encoder="e", row_chunks=kind == "rows")
    if kind != "packed":
        return folder
    pack(folder, folder.with_name("all.h5"), dtype="float32")
    return folder.with_name("all.h5")


@pytest.mark.parametrize("rows", [1, 7, N, 100])
@pytest.mark.parametrize("kind", ["whole", "rows", "one more dimension", "pt", "npy", "packed"])
def test_blocks_are_the_slide(tmp_path: Path, kind: str, rows: int) -> None:
    cohort = open_cohort(write(tmp_path / "features", kind))
    blocks = list(cohort.blocks("a", rows))
    assert [len(block) for block in blocks] == [min(rows, N - first) for first in range(0, N, rows)]
    assert torch.equal(torch.cat(blocks), cohort.read("a"))


@pytest.mark.parametrize("kind", ["whole", "pt"])
def test_a_bad_value_is_told_by_its_row_in_the_slide(tmp_path: Path, kind: str) -> None:
    x = X.copy()
    x[17, 2] = np.nan
    blocks = open_cohort(write(tmp_path / "features", kind, x)).blocks("a", 5)
    assert len([next(blocks) for _ in range(3)]) == 3
    with pytest.raises(InputError, match="1 NaN or infinite, the first in row 17"):
        next(blocks)


def test_a_file_that_changes_between_blocks(tmp_path: Path) -> None:
    folder = write(tmp_path / "features", "npy")
    blocks = open_cohort(folder).blocks("a", 10)
    next(blocks)
    np.save(folder / "a.npy", X[:3])
    with pytest.raises(InputError, match=r"a\.npy: expected the file that was there"):
        list(blocks)


def test_the_cache_keeps_what_it_has_room_for() -> None:
    slides, read = {"a": torch.randn(9, 4), "b": torch.randn(30, 4)}, []

    def blocks(slide: str, rows: int) -> Iterator[Tensor]:
        read.append(slide)
        yield from slides[slide].split(rows)

    def loader(cache_bytes: int) -> BagLoader:
        sizes = {slide: len(x) for slide, x in slides.items()}
        options = {"patch_budget": 8, "cache_bytes": cache_bytes, "read_blocks": blocks}
        return BagLoader(list(slides), np.array([0, 1]), sizes, slides.__getitem__, **options)

    for room, wanted in ((0, ["a", "b", "a", "b"]), (9 * 16, ["a", "b", "b"])):
        read.clear()
        made = loader(room)
        assert [made.comes_in_blocks(batch) for batch in made.once()] == [True, True]
        for _ in range(2):
            for row, slide in enumerate(slides):
                assert torch.equal(torch.cat(list(made.blocks(row))), slides[slide])
        assert read == wanted

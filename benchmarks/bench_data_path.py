"""An epoch of reading: the packed store against one HDF5 file a slide in chunks of one row, as TRIDENT writes them.

Both give the same ragged batches of the same plan, ready for a model. Peers: h5py as one would write it by hand (in
float32 as the files hold it, nothing checked), and momkd's own reader of such a folder. The real cohort is repeated to
a realistic number and size of slides. All files are in the page cache: the path is measured and not the disk.
Floor: the bytes of the store at the rate of a large copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.measure import copy_rate, interleaved
from momkd.bags import Bags
from momkd.data import find_slides, read_slide, write_trident
from momkd.data.batches import BagLoader
from momkd.data.cohort import Cohort, open_cohort
from momkd.data.pack import pack
from momkd.data.packed import PackedStore

COLON = Path(__file__).resolve().parents[2] / "shared" / "data" / "colon" / "features"
BUDGET = 50_000


def write(folder: Path, slide: str, x: np.ndarray[Any, Any], coords: np.ndarray[Any, Any]) -> None:
    write_trident(folder / f"{slide}.h5", x, coords, patch_size_level0=256, encoder="benchmark", row_chunks=True)


def from_colon(folder: Path, megabytes: int) -> None:
    """Slides whose rows are those of ten real tiles each, drawn anew for every slide."""
    if not COLON.is_dir():
        pytest.skip("the real cohort is not on this machine: no ../shared/data/colon beside the repository")
    tiles = [read_slide(path) for path in find_slides(COLON).values()]
    rng, written, slide = np.random.default_rng(0), 0, 0
    while written < megabytes << 20:
        chosen = [tiles[i] for i in rng.choice(len(tiles), 10)]
        x = np.concatenate([tile.features for tile in chosen])
        coords = np.concatenate(
            [t.coords + np.array([500 * i, 0]) for i, t in enumerate(chosen) if t.coords is not None]
        )
        write(folder, f"slide{slide:04d}", x, coords)
        written, slide = written + x.nbytes, slide + 1


def simulated(folder: Path, megabytes: int) -> None:
    """Slides of 500 to 15,000 patches of width 1024."""
    rng, written, slide = np.random.default_rng(0), 0, 0
    while written < megabytes << 20:
        n = int(np.clip(rng.lognormal(7.8, 0.7), 500, 15_000))
        x = rng.standard_normal((n, 1024), np.float32)
        write(folder, f"slide{slide:04d}", x, np.stack([np.arange(n) % 100, np.arange(n) // 100], 1) * 256)
        written, slide = written + x.nbytes, slide + 1


def by_hand(paths: dict[str, Path]) -> Callable[[str], Tensor]:
    def read(slide: str) -> Tensor:
        with h5py.File(paths[slide]) as file:
            return torch.from_numpy(file["features"][:])

    return read


def loader(cohort: Cohort, read: Callable[[str], Tensor]) -> BagLoader:
    slides = list(cohort.paths)
    return BagLoader(slides, np.arange(len(slides)) % 2, cohort.sizes, read, patch_budget=BUDGET)


def epoch(made: BagLoader, number: Iterator[int]) -> Callable[[], int]:
    """Every slide once in a new order; each value is used, as a model would."""

    def run() -> int:
        plan, rows = made.training(0, next(number), balanced=False), 0
        for batch in made.batches(plan):
            batch.bags.features[:, 0].sum()
            batch.bags.features.view(torch.uint8).view(-1)[::4096].sum()  # a byte of every page: maps are read
            rows += batch.bags.num_rows
        return rows

    return run


def same(one: Bags, other: Bags) -> bool:
    return one.lengths == other.lengths and torch.equal(one.features.half(), other.features.half())


@pytest.mark.parametrize("source", ["colon", "simulated"])
def test_epoch(benchmark: Any, full: bool, source: str, tmp_path: Path) -> None:
    folder, store = tmp_path / "features", tmp_path / "cohort.h5"
    folder.mkdir()
    (from_colon if source == "colon" else simulated)(folder, 5000 if full else 600)
    pack(folder, store)
    pack(folder, tmp_path / "float32.h5", dtype="float32")
    files, packed, wide = (open_cohort(path) for path in (folder, store, tmp_path / "float32.h5"))
    loaders = {
        "packed store, float16": loader(packed, packed.read),
        "packed store, float32": loader(wide, wide.read),
        "one file a slide, h5py": loader(files, by_hand(dict(files.paths))),
        "one file a slide, momkd": loader(files, files.read),
    }
    plan = loaders["packed store, float16"].training(0, 0, balanced=False)
    for batches in zip(*(made.batches(plan) for made in loaders.values()), strict=True):
        first = batches[0]
        assert all(same(first.bags, b.bags) for b in batches[1:]), "another batch: no time is reported"

    def first_epoch() -> int:
        """A store that was just opened compares every slide with its checksum."""
        opened = open_cohort(store)
        return epoch(loader(opened, opened.read), iter([1]))()

    calls = {name: epoch(made, iter(range(10**6))) for name, made in loaders.items()}
    calls["packed store, float16, first epoch"] = first_epoch
    seconds = interleaved(calls, rounds=3 if full else 5, warmup=1)
    ours = "packed store, float16"
    best = seconds[ours]
    for name, each in seconds.items():
        benchmark.extra_info[f"seconds of {name}"] = each
        if name != ours:
            benchmark.extra_info[f"times as fast as {name}"] = each / best
    with PackedStore(store) as opened:
        size = sum(opened.header(slide)[0] for slide in opened.paths) * opened.width * 2
    benchmark.extra_info |= {
        "slides": len(files),
        "patches": sum(files.sizes.values()),
        "MB of rows, float16": size / 2**20,
        "GB/s": size / best / 1e9,
        "attained": 2 * size / copy_rate() / best,
    }
    benchmark.pedantic(calls[ours], rounds=3)

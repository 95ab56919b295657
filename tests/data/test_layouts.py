"""Feature files as STAMP, CLAM, TRIDENT and others write them: names, units, sizes of patches, and damage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from momkd.data import read_slide, write_trident
from momkd.data.cohort import open_cohort
from momkd.data.hdf5_text import text_attributes
from momkd.data.pack import pack
from momkd.data.packed import PackedStore
from momkd.data.pickles import check_nesting
from momkd.data.sources import SlideFiles
from tests.data.conftest import refused

GRID = np.stack(np.meshgrid(np.arange(6), np.arange(5)), -1).reshape(-1, 2)  # 30 patches
X = np.arange(60, dtype=np.float32).reshape(30, 2)
TRIDENT = {"patch_size": 256, "patch_size_level0": 256}
UM = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "stamp_version": "2.4.0", "code_hash": "0" * 64}


def write(path: Path, coords: Any, attrs: Mapping[str, Any], *, name: str = "features", **options: Any) -> Path:
    with h5py.File(path, "w", **options) as file:
        file[name] = X
        file["coords"] = coords
        file.attrs.update(attrs)
    return path


@pytest.mark.parametrize(
    ("attrs", "scale", "size", "words"),
    [
        (UM | {"mpp_level0": 0.5}, 512, 512, "became level-0 pixels of 0.5 µm"),
        (UM | {"mpp": 0.25}, 1024, 1024, "became level-0 pixels of 0.25 µm"),
        (UM | {"patch_size_level0": 512}, 512, 512, "became level-0 pixels of 0.5 µm"),
        (UM, 25_600, 25_600, "kept in hundredths of a µm"),
        (UM | {"mpp": 256 / 224}, 25_600, 25_600, "kept in hundredths of a µm"),  # that of the tiles
        ({"tile_size_um": 256.0}, 25_600, 25_600, "kept in hundredths"),
        ({"unit": "µm", "tile_size": 256.0}, 25_600, 25_600, "kept in hundredths"),  # the first files of STAMP
        ({"unit": "mm", "mpp_level0": 0.5}, 512_000, None, "became level-0 pixels"),
    ],
)
def test_micrometres(tmp_path: Path, attrs: dict[str, Any], scale: int, size: int | None, words: str) -> None:
    slide = read_slide(write(tmp_path / "a.h5", GRID * 256.0, attrs, name="feats"))
    np.testing.assert_array_equal(slide.coords, GRID * scale)
    np.testing.assert_array_equal(slide.features, X)
    assert slide.attrs.get("patch_size_level0") == size
    assert slide.attrs.get("coords_unit") == ("0.01 um" if "hundredths" in words else None)
    assert "unit" not in slide.attrs
    assert [part in note for part, note in zip(("from dataset 'feats'", words), slide.notes, strict=True)] == [True] * 2


def test_pixels_are_rounded_the_same_in_every_row(tmp_path: Path) -> None:
    slide = read_slide(write(tmp_path / "a.h5", GRID * 112.5, UM | {"tile_size_um": 112.5, "mpp_level0": 0.2631}))
    assert slide.coords is not None
    assert sorted(set(slide.coords[:, 0].tolist())) == np.rint(np.arange(6) * 112.5 / 0.2631).astype(int).tolist()


@pytest.mark.parametrize(
    ("attrs", "size"),
    [
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}, 1024),
        ({"patch_size": 1024, "patch_level": 0, "downsample": (1.0, 1.0)}, 1024),
        ({"patch_size": 1024, "patch_level": 0}, 1024),
        ({"patch_size": 256, "patch_level": 1}, None),
        ({"patch_size": 256}, None),  # nobody says of which level
        ({"patch_size": 256, "patch_size_level0": 1024, "patch_level": 1}, 1024),
        ({"unit": "px", "patch_size_level0": 1024}, 1024),
    ],
)
def test_patches_of_another_level(tmp_path: Path, attrs: dict[str, Any], size: int | None) -> None:
    path = write(tmp_path / "a.h5", GRID * 1024, attrs)
    slide = read_slide(path)
    np.testing.assert_array_equal(slide.coords, GRID * 1024)
    assert slide.attrs.get("patch_size_level0") == size
    assert SlideFiles({"a": path}).attributes("a").get("patch_size_level0") == size
    notes = ["patches of 256 pixels of level 1 are 1024 level-0 pixels wide"] if "downsample" in attrs else []
    assert list(slide.notes) == (notes if attrs.get("patch_level") == 1 else [])


@pytest.mark.parametrize(
    ("step", "attrs"),
    [
        (4096, {"patch_size": 256, "patch_level": 1, "downsample": 4.0}),
        (512, {"patch_size": 256, "patch_level": 0, "downsample": 2.0}),
        (1024, {"patch_size_level0": 256, "patch_size": 256, "patch_level": 1}),
        (512, {"patch_size_level0": 256, "patch_size": 256, "patch_level": 1, "downsample": (2.0, 2.0)}),
        (512, TRIDENT | {"level0_magnification": 40, "target_magnification": 20}),
        (512, TRIDENT | {"overlap": 0}),
        (256, TRIDENT | {"overlap": -256}),
        (1024, TRIDENT | {"overlap": -256}),
        (256, {"patch_size_level0": 512, "patch_size": 256, "overlap": 0}),
        (512, {"patch_size_level0": 512, "patch_size": 256, "overlap": 128}),
    ],
)
def test_a_grid_that_contradicts_the_size_of_patches(tmp_path: Path, step: int, attrs: dict[str, Any]) -> None:
    path = write(tmp_path / "a.h5", GRID * step, attrs)
    with refused(path, "expected a grid of ", f"got one of {step}: one of them is of another level"):
        read_slide(path)
    assert read_slide(path, with_coords=False).coords is None
    assert read_slide(write(path, GRID * step, attrs | {"stride_level0": step})).coords is not None


@pytest.mark.parametrize("step", [64, 128, 255, 256, 257, 384])
def test_grids_that_overlap(tmp_path: Path, step: int) -> None:
    slide = read_slide(write(tmp_path / "a.h5", GRID * step, {"patch_size_level0": 256}))
    assert (slide.coords is not None, slide.notes) == (True, ())


@pytest.mark.parametrize(
    ("step", "attrs", "times"),
    [
        (512, {"patch_size_level0": 256}, "2"),
        (768, {"patch_size_level0": 256}, "3"),
        (1024, {"patch_size_level0": 256}, "4"),
        (512, {"patch_size": 256, "patch_level": 0, "downsample": (1.0, 1.0)}, "2"),
        (512, {"patch_size": 256, "patch_level": 0}, "2"),
        (512, TRIDENT | {"level0_magnification": 20, "target_magnification": 20}, "2"),
        (3072, {"patch_size": 256, "patch_level": 1, "downsample": 4.0}, "3"),
        (512, TRIDENT | {"overlap": -256}, ""),
        (768, TRIDENT | {"overlap": -512}, ""),
        (1024, {"patch_size": 256, "patch_size_level0": 512, "overlap": -256}, ""),
        (512, {"patch_size": 256, "patch_level": 0, "overlap": -256}, ""),
    ],
)
def test_grids_that_lie_apart(tmp_path: Path, step: int, attrs: dict[str, Any], times: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = write(folder / "a.h5", GRID * step, attrs)
    told = f"the grid is {times} times as wide as a patch: patches lie apart, or the patch size is of another level"
    assert [note for note in read_slide(path).notes if "the grid is" in note] == ([told] if times else [])
    files = SlideFiles({"a": path})
    for _ in range(2):
        files.coords("a")
    assert [(note, ids) for note, ids in files.noted.items() if "the grid is" in note] == (
        [(told, ["a"])] if times else []
    )
    assert [note for note in open_cohort(folder, neighbours=3).notes if "the grid is" in note] == (
        [f"{path}: {told}"] if times else []
    )
    assert [note for note in pack(folder, tmp_path / "all.h5").notes if "the grid is" in note] == (
        [f"{path}: {told}"] if times else []
    )


def test_few_and_scattered_patches(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for scale in (2, 4):  # of 30 patches among 2,500, hardly two are neighbours
        cells = np.stack(np.divmod(rng.choice(2500, 30, replace=False), 50), 1)
        assert read_slide(write(tmp_path / "a.h5", cells * 256 * scale, {"patch_size_level0": 256})).coords is not None
    nuclei = rng.integers(0, 10**5, (30, 2))
    assert read_slide(write(tmp_path / "a.h5", nuclei, {"patch_size_level0": 256})).coords is not None


def test_an_unknown_unit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", GRID, {"unit": "inch"})
    with refused(path, "unit: expected px or um, got 'inch'"):
        read_slide(path)
    assert read_slide(path, with_coords=False).notes == ()
    with refused(write(path, GRID, {"unit": 3}), "unit: expected px or um, got '3'"):
        read_slide(path)


@pytest.mark.parametrize("libver", [None, "latest"])
@pytest.mark.parametrize("userblock", [0, 512])
def test_short_texts_of_any_length(tmp_path: Path, libver: str | None, userblock: int) -> None:
    texts = {"unit": "µm", "empty": "", "long": "x" * 999, "name": "a" * 99}
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver=libver, userblock_size=userblock) as file:
        for holder in (file, file.create_dataset("x", data=[1])):
            holder.attrs.update({**texts, "many": ["a", "b"], "number": 1, "fixed": np.bytes_("y")})
    with h5py.File(path) as file:
        for holder in (file, file["x"]):
            wanted = {name: texts[name] for name in ("unit", "empty", "name")}
            assert text_attributes(holder, [*wanted, "long", "many", "number", "fixed"]) == wanted
            assert text_attributes(holder, ["unit"]) == {"unit": "µm"}


def test_texts_in_a_heap_without_end(tmp_path: Path) -> None:
    """HDF5 itself may look for this text for ever: the heap begins with an empty space of no size."""
    for attrs in (UM, {"unit": "um"}):
        path = write(tmp_path / "a.h5", GRID, attrs)
        made = bytearray(path.read_bytes())
        at = made.index(b"GCOL")
        made[at + 16 : at + 40] = bytes(24)
        path.write_bytes(made)
        if "tile_size_um" in attrs:
            np.testing.assert_array_equal(read_slide(path).coords, GRID * 100)
        else:
            with refused(path, "unit: expected px or um, got a text that does not read"):
                read_slide(path)


@pytest.mark.parametrize("name", ["feats", "embeddings", "x", "anything", "deep/er"])
def test_features_under_another_name(tmp_path: Path, name: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file[name] = X[None]
        file["coords"] = GRID.astype(float)
        file["scores"] = X[:, 0]
        file["codes"] = X.astype(int)
    torch.save({name: torch.from_numpy(X), "coords": torch.from_numpy(GRID), "s": torch.ones(30)}, tmp_path / "b.pt")
    for path, place in ((tmp_path / "a.h5", "dataset"), (tmp_path / "b.pt", "key")):
        slide = read_slide(path)
        np.testing.assert_array_equal(slide.features, X)
        np.testing.assert_array_equal(slide.coords, GRID)
        assert slide.notes == (f"features were read from {place} {name!r}, there is no 'features'",)
    cohort = open_cohort(tmp_path)
    assert len(cohort.notes) == 2
    assert f"{tmp_path / 'a.h5'}: features were read from dataset {name!r}" in cohort.notes[0]
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["embeddings" if name in ("feats", "x") else "feats"] = X
        file["other"] = X
    if name in ("anything", "deep/er"):
        assert read_slide(tmp_path / "a.h5").notes == (
            "features were read from dataset 'feats', there is no 'features'",
        )
    elif name != "embeddings":
        with refused(tmp_path / "a.h5", "expected a dataset 'features', got codes, coords, embeddings"):
            read_slide(tmp_path / "a.h5")


def test_a_store_keeps_what_was_converted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.h5", GRID * 256.0, UM | {"mpp_level0": 0.5}, name="feats")
    write(tmp_path / "in" / "b.h5", GRID * 256.0, UM, name="feats")
    made = pack(tmp_path / "in", tmp_path / "all.h5", neighbours=2)
    assert [note.partition(": ")[0].removeprefix(str(tmp_path / "in")) for note in made.notes] == [
        "/a.h5 and 1 more slides",
        "/a.h5",
        "/b.h5",
    ]
    with PackedStore(tmp_path / "all.h5") as store:
        for slide, scale in (("a", 512), ("b", 25_600)):
            coords, attrs = store.coords(slide)
            np.testing.assert_array_equal(coords, GRID * scale)
            assert attrs["patch_size_level0"] == scale
            assert "unit" not in attrs
        assert attrs["coords_unit"] == "0.01 um"


def pickled_key(levels: int) -> bytes:
    """A dict whose key is a tuple of twice a tuple of twice a tuple …: its hash takes 2^levels steps."""
    made = b"\x80\x02})q\x00"  # the innermost is kept as number 0
    for level in range(levels):
        made += b"h%c\x86q%c" % (level, level + 1)
    return made + b"K\x01s."


def test_tuples_of_tuples(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({("a", ("b", 1)): torch.ones(2, 2)}, path)
    check_nesting(path, zipped=True)
    for content in (pickled_key(90), b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s."):
        path.write_bytes(content)
        began = time.perf_counter()
        with refused(path, "that do not read (tuples within tuples without end)"):
            read_slide(path)
        assert time.perf_counter() - began < 5


def test_a_file_that_another_program_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, store = tmp_path / "in" / "a.h5", tmp_path / "all.h5"
    path.parent.mkdir()
    write_trident(path, X, GRID, patch_size_level0=1, encoder="e")
    pack(path.parent, store)

    def locked(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Unable to synchronously open file (unable to lock file, errno = 11)")

    monkeypatch.setattr(h5py, "File", locked)
    for read in (lambda: read_slide(path), lambda: PackedStore(store)):
        with refused("got one that another program has open for writing; close it there"):
            read()

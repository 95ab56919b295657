"""Feature files of other projects, coordinates of any type, folders of any form, and files that change while in use."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch

from momkd.data import find_slides, read_slide, write_trident
from momkd.data.batches import BagLoader
from momkd.data.cohort import open_cohort
from momkd.data.graphs import SlideGraphs
from momkd.data.pack import pack
from momkd.data.slides import files_below
from momkd.data.sources import SlideFiles
from momkd.errors import InputError
from momkd.graph import knn
from tests.fuzz.kinds import NUMBERS, WORK, Kind, Trap, mutate

GRID = np.stack(np.divmod(np.arange(20), 5), 1)
X = np.ones((20, 3), np.float32)
TEXTS = ("um", "µm", "mm", "px", "inch", "", "x" * 300, "\udcff".encode("utf-8", "surrogatepass"))
NAMES = ("features", "feats", "embeddings", "x", "y", "deep/er", "coords", "coordinates")
KEYS = (
    *("tile_size_um", "tile_size", "tile_size_px", "mpp", "mpp_level0", "patch_size_level0", "patch_size"),
    *("patch_level", "downsample", "overlap", "stride_level0", "unit", "level0_magnification", "target_magnification"),
)


def layout_file(attrs: dict[str, Any], names: tuple[str, ...], coords: Any, **options: Any) -> bytes:
    made = io.BytesIO()
    with h5py.File(made, "w", **options) as file:
        for name in names:
            if name not in file:
                file[name] = X
        if "coords" not in file:
            file["coords"] = coords
        for key, value in attrs.items():
            (file if len(key) % 2 else file["coords"]).attrs[key] = value
    return made.getvalue()


def layout_files(folder: Path) -> None:
    stamp = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "stamp_version": "2.4.0"}
    clam = {"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}
    for name, attrs, names, scale in (
        ("stamp", stamp, ("feats",), 256.0),
        ("level0", stamp | {"mpp_level0": 0.5}, ("feats",), 256.0),
        ("clam", clam, ("features",), 1024),
        ("hostile_level", {"patch_size_level0": 256}, ("features",), 512),
        ("hostile_names", {}, ("feats", "embeddings"), 1),
    ):
        (folder / f"{name}.h5").write_bytes(layout_file(attrs, names, GRID * scale))
    heap = bytearray((folder / "stamp.h5").read_bytes())
    at = heap.index(b"GCOL")  # a heap that HDF5 searches without end
    heap[at + 16 : at + 40] = bytes(24)
    (folder / "hostile_heap.h5").write_bytes(heap)


def any_layout(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """A damaged file, or a whole one whose attributes contradict one another."""
    if rng.random() < 0.4:
        return mutate(path.read_bytes(), rng, others)
    values = (*NUMBERS[:12], -1, -256, 0.5, 1e300, 5e-324, float("nan"), float("inf"), (4.0, 4.0), *TEXTS)
    attrs = {key: rng.choice(values) for key in rng.sample(KEYS, rng.randrange(6))}
    coords = GRID * rng.choice((1, 0.5, 256.0, 512, 2**40, 1e17))
    options = {"libver": rng.choice((None, "latest")), "userblock_size": rng.choice((0, 512))}
    return layout_file(attrs, tuple(rng.sample(NAMES, rng.randrange(1, 4))), coords, **options)


def use_layout(path: Path) -> None:
    files = SlideFiles({"a": path})
    read_slide(path, with_coords=False)
    n = files.header("a")[0]
    coords, attrs = files.coords("a")
    json.dumps(attrs)
    assert all(note == " ".join(note.split()) for note in files.noted)
    assert coords is None or (coords.dtype == np.int64 and coords.shape == (n, 2) and (abs(coords) < 2**52).all())
    if coords is not None:
        assert SlideGraphs(files, 3)("a").num_nodes == n


def pickle_files(folder: Path) -> None:
    tensor, canary = torch.ones(3, 2), folder.parent / "canary"
    for name, value in {
        "feats": {"feats": tensor, "coords": torch.zeros(3, 2)},
        "keys": {("a", 1): 1, "x": tensor},
        "hostile_array": np.ones((3, 2)),
        "hostile_list": [tensor, tensor],
        "hostile_trap": {"x": [Trap(canary)]},
    }.items():
        torch.save(value, folder / f"{name}.pt")
        torch.save(value, folder / f"{name}_old.pt", _use_new_zipfile_serialization=False)


def any_pickle(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """A damaged file, or a pickle of tuples of tuples, kept and named again, as the key of a dict."""
    if rng.random() < 0.3:
        return mutate(path.read_bytes(), rng, others)
    made, kept = bytearray(b"\x80\x02})q\x00"), 1
    for _ in range(rng.choice((3, 30, 120))):
        made += rng.choice((b"h%c\x86", b"h%c\x86", b"h%ch%c\x87", b"\x85", b"K\x01\x86"))
        made = bytearray(bytes(made).replace(b"%c", bytes([kept - 1])))
        made += b"q%c" % kept
        kept += 1
    return bytes(made + b"K\x01s.")


def use_pickle(path: Path) -> None:
    told = ""
    try:
        slide = read_slide(path)
    except InputError as error:
        told = str(error)
    assert told.isprintable()
    assert len(told) < 500
    if told:
        raise InputError(told)
    assert slide.features.ndim == 2


def place_files(folder: Path) -> None:
    np.save(folder / "grid.npy", GRID * 256)
    np.save(folder / "apart.npy", np.vstack([GRID, GRID + 60_000]).astype(np.int32))
    np.save(folder / "hostile_far.npy", np.array([[0, -(2**63)], [0, 2**63 - 1]]))


def any_places(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """Few places of any type, near its ends or in pieces far apart."""
    kind = np.dtype(rng.choice(("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">i4", ">u8")))
    ends = np.iinfo(kind) if kind.kind in "iu" else None
    low, high = (int(ends.min), int(ends.max)) if ends else (-1000, 1000)
    centres = [
        rng.choice((low, high - 9, 0, *(n for n in NUMBERS if n <= high - 9))) for _ in range(rng.randrange(1, 4))
    ]
    rows = [[rng.choice(centres) + rng.randrange(9) for _ in range(2)] for _ in range(rng.choice((1, 2, 9, 30)))]
    made = io.BytesIO()
    np.save(made, np.array(rows, kind))
    return made.getvalue()


def use_places(path: Path) -> None:
    points = np.load(path)
    try:
        edges = knn(points, 3)
    except ValueError as error:
        raise InputError(str(error)) from error
    exact = points.astype(object) if points.dtype.kind in "iu" else points.astype(np.float64)
    found = sorted(map(tuple, edges.edge_index().T.tolist()))
    wanted = []
    for i, point in enumerate(exact):
        squared = ((exact - point) ** 2).sum(1)
        wanted += [(i, j) for j in sorted((j for j in range(len(exact)) if j != i), key=lambda j: (squared[j], j))[:3]]
    assert found == sorted(wanted)


def folder_files(folder: Path) -> None:
    for name, tree in {
        "flat": ["a.h5", "b.pt", ".hidden.h5"],
        "nested": ["p1/a.h5", "p2/deep/b.h5", ".hidden/c.h5"],
        "circle": ["p/a.h5", "p/back -> .."],
        "hostile_twice": ["p/a.h5", "q/a.pt"],
        "stray": ["stray.h5", "20x/p/a.h5", "20x/p/b.h5", "20x/p/back -> .."],
        "hostile_empty": ["p/q/notes.txt"],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))


def any_folder(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """Folders, links that may lead back, out or nowhere, pipes, and files with names of slides."""
    parts = ("p", "q", ".hidden", "a.h5", "a.b.PT", "c.npy", "d.h5", "e.hdf5", "x" * 200, "[b]", "notes.txt")
    tree = ["/".join(rng.choices(parts, k=rng.randrange(1, 5))) for _ in range(rng.randrange(8))]
    ends = (" -> ..", " -> .", " -> p", " -> nowhere", " |", "")
    return json.dumps([name + rng.choice((*ends, "", "", "")) for name in tree]).encode()


def use_folder(path: Path) -> None:
    root = path.parent / WORK / "top"
    shutil.rmtree(root.parent, ignore_errors=True)
    root.mkdir(parents=True)
    for entry in sorted(
        json.loads(path.read_text()), key=lambda entry: " -> " in entry
    ):  # nothing is made behind links
        name, _, target = entry.partition(" -> ")
        place = root / name.removesuffix(" |")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if target:
                place.symlink_to(target)
            elif entry.endswith(" |"):
                os.mkfifo(place)
            else:
                place.touch()
        except OSError:  # a file where a folder is wanted
            continue
    found = find_slides(root)
    assert list(found) == sorted(found)
    missed = find_slides(root / "20x") if path.stem == "stray" and (root / "20x").is_dir() else {}
    number, whole = files_below(root, found)
    assert whole
    assert number >= len(missed.keys() - found.keys()) * (root / "stray.h5").is_file()
    assert all(file.is_file() and slide == file.stem and root in file.parents for slide, file in found.items())
    assert not any(part.startswith(".") for file in found.values() for part in file.relative_to(root).parts)


CHANGES = ("shrink", "grow", "replace", "cut", "remove", "touch", "pipe", "nothing", "link")


def change_files(folder: Path) -> None:
    for name, steps in {
        "read": ["read", "read"],
        "hostile_shrink": ["read", "shrink", "read"],
        "hostile_store": ["store", "read", "replace", "read"],
        "hostile_plant": ["plant", "pack"],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(steps))


def any_changes(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    steps = ["store"] * (rng.random() < 0.5)
    for _ in range(rng.randrange(1, 4)):
        steps += ["read", rng.choice(CHANGES)]
    return json.dumps([*steps, "read", *rng.choice(((), ("plant", "pack"), ("pack",)))]).encode()


def slide_of(path: Path, n: int, value: float) -> None:
    grid = np.stack(np.divmod(np.arange(n), 5), 1)
    write_trident(path, np.full((n, 3), value, np.float16), grid, patch_size_level0=1, encoder="e")


@mock.patch("os.fsync", new=bool)  # nothing: a power cut is not among the changes
def use_changes(path: Path) -> None:
    """Batches hold what was there at first, or an error says that it was changed; nothing is lost behind a link."""
    root, victim = path.parent / WORK, path.parent / WORK / "victim"
    shutil.rmtree(root, ignore_errors=True)
    (root / "in").mkdir(parents=True)
    victim.write_text("precious")
    slide, store, steps = root / "in" / "a.h5", root / "all.h5", json.loads(path.read_text())
    slide_of(slide, 20, 1)
    used = slide
    if steps[0] == "store":
        pack(root / "in", store)
        used = store
    cohort = open_cohort(store if used == store else root / "in", neighbours=3)
    loader = BagLoader(["a"], np.zeros(1, np.int64), cohort.sizes, cohort.read, max_patches=15, graph=cohort.graphs)
    for number, step in enumerate(steps):
        if step in ("read", "pack"):
            try:
                if step == "pack":
                    pack(root / "in", root / "new.h5")
                    continue
                (batch,) = loader.batches([[0]], seed=[number])
            finally:
                assert victim.read_text() == "precious"
            assert batch.bags.lengths == (15,)
            assert (batch.bags.features == 1).all()
        elif step == "plant":
            (root / ".new.h5.partial").symlink_to(victim)
        elif used.is_file():
            changed(used, step, number, root / "fresh")


def changed(used: Path, step: str, number: int, fresh: Path) -> None:
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    slide_of(fresh / "a.h5", {"shrink": 4, "grow": 50}.get(step, 20), 2)
    if used.name == "all.h5" and step in ("shrink", "grow", "replace"):
        pack(fresh, used.parent / "made.h5")
        shutil.copyfile(used.parent / "made.h5", used)  # into the same file
    elif step in ("shrink", "grow", "replace"):
        shutil.copyfile(fresh / "a.h5", used)
    elif step == "cut":
        os.truncate(used, used.stat().st_size // 2)
    elif step in ("remove", "pipe", "link"):
        used.unlink()
        if step == "pipe":
            os.mkfifo(used)
        elif step == "link":
            used.symlink_to(fresh / "a.h5")
    if step not in ("nothing", "remove"):
        os.utime(used, ns=(0, number * 10**9))  # whatever the clock of the disk says


KINDS = {
    "layouts": Kind(layout_files, use_layout, 500, any_layout),
    "pickles": Kind(pickle_files, use_pickle, 400, any_pickle),
    "places": Kind(place_files, use_places, 200, any_places),
    "folders": Kind(folder_files, use_folder, 200, any_folder),
    "changes": Kind(change_files, use_changes, 40, any_changes),
}

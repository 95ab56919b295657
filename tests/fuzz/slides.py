"""Feature files, packed stores and graphs."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import h5py
import numpy as np
import torch

from momkd.data import read_slide, write_trident
from momkd.data.graphs import SlideGraphs
from momkd.data.pack import pack
from momkd.data.packed import SEALED, PackedStore, seal
from momkd.data.sources import SlideFiles
from momkd.graph import check_lists
from tests.fuzz.kinds import NUMBERS, WORK, Kind, Trap, mutate


def slide_files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number, (n, chunked) in enumerate(((7, True), (30, False), (0, False))):
        x = rng.standard_normal((n, 6)).astype(np.float32)
        write_trident(
            folder / f"{number}.h5", x, np.zeros((n, 2)), patch_size_level0=1, encoder="e", row_chunks=chunked
        )
    with h5py.File(folder / "gzip.h5", "w") as file:
        file.create_dataset("features", data=x[:0].repeat(0, 0).reshape(0, 6), maxshape=(None, 6), chunks=(4, 6))
        file.create_dataset("coords", data=np.zeros((0, 2)), compression="gzip", maxshape=(None, 2), chunks=(4, 2))
    with h5py.File(folder / "new.h5", "w", libver="latest") as file:
        file.create_dataset("features", data=rng.random((9, 6), np.float32), compression="gzip", chunks=(2, 6))
        file["features"].attrs["text"] = "of any length"
    heap = bytearray((folder / "0.h5").read_bytes())
    at = heap.index(b"GCOL")  # where texts of variable length are: the first is said to be empty space of no size
    heap[at + 16 : at + 40] = bytes(24)
    (folder / "hostile_heap.h5").write_bytes(heap)
    with h5py.File(folder / "hostile_fill.h5", "w") as file:  # 400 TB of zeros that nobody wrote
        file.create_dataset("features", (10**11, 1024), np.float32, chunks=(1, 1024))
    with h5py.File(folder / "hostile_late.h5", "w") as file:
        file.create_dataset("features", (10**7, 1024), np.float32)
    with h5py.File(folder / "hostile_link.h5", "w") as file:
        file["features"] = h5py.ExternalLink("/dev/zero", "features")
    with h5py.File(folder / "hostile_external.h5", "w") as file:
        file.create_dataset("features", (10**4, 1024), np.float32, external=[("/dev/zero", 0, 10**4 * 4096)])


def tensor_files(folder: Path) -> None:
    x = torch.randn(6, 4)
    torch.save(x, folder / "a.pt")
    torch.save({"features": x.half(), "coords": torch.zeros(6, 2, dtype=torch.int64)}, folder / "b.pt")
    torch.save(x.bfloat16(), folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.zeros(1).expand(10**7, 10**3), folder / "hostile_expanded.pt")
    torch.save(torch.ones(6, 4, device="meta"), folder / "hostile_meta.pt")
    torch.save(torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), folder / "hostile_nested.pt")
    (folder / "hostile_pickle.pt").write_bytes(pickle.dumps(Trap(folder.parent / "canary")))
    torch.save({"features": Trap(folder.parent / "canary")}, folder / "hostile_inside.pt")
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive, zipfile.ZipFile(folder / "a.pt") as plain:
        for entry in plain.infolist():
            archive.writestr(entry.filename, bytes(10**8) if "data/" in entry.filename else plain.read(entry))
    (folder / "hostile_bomb.pt").write_bytes(zipped.getvalue())


def array_files(folder: Path) -> None:
    np.save(folder / "a.npy", np.ones((5, 4), np.float16))
    np.save(folder / "b.npy", np.asfortranarray(np.ones((1, 5, 4), ">f8")))
    np.save(folder / "empty.npy", np.ones((0, 4), np.float32))
    np.save(folder / "hostile_object.npy", np.array([Trap(folder.parent / "canary")], object), allow_pickle=True)
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s, 1024), }" % 10**15
    (folder / "hostile_shape.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header.encode() + b"\n"
    )


def packed_files(folder: Path) -> None:
    source = folder.parent / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for slide, n in (("a", 5), ("b", 1), ("c", 12)):
        grid = rng.permutation(100)[:n, None] * [[1, 3]]
        write_trident(
            source / f"{slide}.h5", rng.standard_normal((n, 4), np.float32), grid, patch_size_level0=1, encoder="e"
        )
    pack(source, folder / "graph.h5", neighbours=2)
    pack(source, folder / "plain.h5", dtype="float32")


def graph_files(folder: Path) -> None:
    features = folder.parent / "slide.h5"
    write_trident(features, np.ones((9, 2), np.float32), np.arange(18).reshape(9, 2), patch_size_level0=1, encoder="e")
    SlideGraphs(SlideFiles({"a": features}), 2, folder)("a")


def use_slide(path: Path) -> None:
    slide = read_slide(path)
    x, coords = slide.features, slide.coords
    assert x.ndim == 2
    assert x.dtype in (np.float16, np.float32)
    assert np.isfinite(x).all()
    assert coords is None or (coords.shape == (len(x), 2) and coords.dtype == np.int64)


def use_store(path: Path) -> None:
    with PackedStore(path) as store:
        for slide in store.paths:
            assert Path(slide).name == slide
            n, width, _ = store.header(slide)
            x, (coords, attrs) = store.read(slide), store.coords(slide)
            assert x.shape == (n, width)
            assert np.isfinite(x).all()
            assert isinstance(attrs, dict)
            assert coords is None or coords.shape == (n, 2)
            edges = store.graph(slide, store.neighbours) if store.neighbours is not None else None
            if edges is not None:
                check_lists(edges.offsets, edges.sources, edges.order)


def use_graph(path: Path) -> None:
    kept = path.parent / WORK
    kept.mkdir(exist_ok=True)
    os.replace(path, kept / "a.h5")
    edges = SlideGraphs(SlideFiles({"a": path.parent / "slide.h5"}), 2, kept)("a")
    check_lists(edges.offsets, edges.sources, edges.order)


def resealed(path: Path, rng: random.Random) -> bytes:
    """A store whose small datasets were changed by somebody who knows how they are sealed."""
    with h5py.File(path) as file:
        arrays = {name: file[name][:] for name in SEALED if name in file}
        places = {name: file[name].id.get_offset() for name in (*arrays, "seal")}
    made = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(list(arrays))
        raw = bytearray(arrays[name].tobytes())
        at, number = rng.randrange(len(raw)), rng.choice((*NUMBERS, ord("/"), ord("."), 10))
        width = min(rng.choice((1, 1, 4, 8)), len(raw) - at)
        raw[at : at + width] = (number % 256**width).to_bytes(width, "little")
        arrays[name] = np.frombuffer(bytes(raw), arrays[name].dtype).reshape(arrays[name].shape)
        made[places[name] : places[name] + len(raw)] = raw
    made[places["seal"] : places["seal"] + 4] = seal(arrays).to_bytes(4, "little")
    return bytes(made)


def mutated_store(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """Half of them by somebody who knows how stores are sealed."""
    return resealed(path, rng) if rng.random() < 0.5 else mutate(path.read_bytes(), rng, others)


KINDS = {
    "hdf5": Kind(slide_files, use_slide, 2500),
    "pt": Kind(tensor_files, use_slide, 1500),
    "npy": Kind(array_files, use_slide, 1000),
    "packed": Kind(packed_files, use_store, 2000, mutated_store),
    "graph": Kind(graph_files, use_graph, 300),
}

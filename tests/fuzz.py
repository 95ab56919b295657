"""Readers against damaged and hostile files: `python -m tests.fuzz KIND --cases N --seed S`.

Each case is a good file that was mutated, and momkd reads it: to something valid, or to an InputError of one line.
Anything else, a case that takes too long, or memory above the limit is printed, and the exit code is 1. A crash ends
the process: `test_fuzz.py` starts it, so that a crash in a library is a failed test and not the end of the tests.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

from momkd.config import Config
from momkd.convert import _read as read_checkpoint
from momkd.data import read_labels, read_omics, read_slide, read_splits, write_trident
from momkd.data.graphs import SlideGraphs
from momkd.data.pack import pack
from momkd.data.packed import SEALED, PackedStore, seal
from momkd.data.sources import SlideFiles
from momkd.errors import InputError
from momkd.graph import check_lists
from momkd.runs import Run, RunInfo, build_model, load_state, save_model

SECONDS = 10  # a case may take
MEGABYTES = 1500  # of address space that reading may take beyond what is there after the imports
GROWTH = 400  # megabytes of resident memory that all cases together may add
NUMBERS = (0, 1, 2, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A few of: bits, bytes, numbers, cuts, gaps, zeros, repeats, pieces of another file."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not made:
            break
        # Headers are at the ends of most formats.
        near = rng.choice((len(made), len(made), min(len(made), 600)))
        at = rng.randrange(near) if rng.random() < 0.8 else len(made) - 1 - rng.randrange(near)
        size = rng.choice((1, 2, 4, 8, 64, 512))
        match rng.randrange(9):
            case 0:
                made[at] ^= 1 << rng.randrange(8)
            case 1:
                made[at] = rng.randrange(256)
            case 2 | 3:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(NUMBERS) % 256**width
                made[at : at + width] = number.to_bytes(width, rng.choice(("little", "little", "big")))
            case 4:
                del made[at:]
            case 5:
                del made[at : at + size]
            case 6:
                made[at : at + size] = bytes(size)
            case 7:
                made[at:at] = made[at : at + size]
            case _:
                other = rng.choice(others)
                start = rng.randrange(len(other)) if other else 0
                made[at : at + size] = other[start : start + size]
    return bytes(made)


# Good files, and hostile ones that are whole


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


def label_files(folder: Path) -> None:
    (folder / "a.csv").write_text("slide_id,case_id,label\ns1,c1,0\ns2,c2,1\n../../x,c3,\n/etc/y,c4,1.0\n")
    (folder / "b.tsv").write_text("\ufeffslide_id\tsubtype\n" + "".join(f"s{i}\tt{i % 3}\n" for i in range(9)))
    (folder / "digits.csv").write_text("slide_id,label\ns1,1\ns2," + "9" * 9000 + "\n")
    (folder / "quote.csv").write_text('slide_id,label\n"s,""1",0\ns2,"1\n')


def split_files(folder: Path) -> None:
    (folder / "a.csv").write_text(",train,val,test\n0,a,b,c\n1,d,,e\n2,../../x,,\n")
    (folder / "b.csv").write_text("train,val,test\n1.0,2.0,3.0\n4.0,,\n")


def omics_files(folder: Path) -> None:
    text = "case_id,ACTB,B,C\n" + "".join(f"p{i},{i}.5,{i}e3,-1\n" for i in range(9))
    (folder / "a.csv").write_text(text)
    (folder / "b.tsv").write_text("\t".join(("", "A", "B")) + "\nx\t1\t2\ny\t3\t4\n")
    (folder / "c.csv.gz").write_bytes(gzip.compress(text.encode()))
    import pandas as pd

    pd.DataFrame({"case_id": ["x", "y"], "A": [1.0, 2], "B": [3, 4]}).to_parquet(folder / "d.parquet")


def graph_files(folder: Path) -> None:
    features = folder.parent / "slide.h5"
    write_trident(features, np.ones((9, 2), np.float32), np.arange(18).reshape(9, 2), patch_size_level0=1, encoder="e")
    SlideGraphs(SlideFiles({"a": features}), 2, folder)("a")


CONFIG = [
    "model.hidden_features=4", "model.gate_features=4", "model.projection_features=4", "memory.slots=2",
    "omics.features=4", "omics.hidden_features=4",
]  # fmt: skip


def run_files(folder: Path) -> None:
    config = Config.preset("fast").with_settings(CONFIG)
    info = RunInfo(["0", "1"], "label", 5, [0], 1, {}, {}, {})
    run = Run.create(folder.parent / "run", config, info)
    run.fold(0).mkdir()
    save_model(run.fold(0), build_model(config, 5, 2), {"epoch": 3})
    for path in (run.folder / "config.toml", run.folder / "run.json", run.fold(0) / "model.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "hostile.toml").write_text(config.to_toml().replace("hidden_features = 4", "hidden_features = 65536"))
    values = json.loads((folder / "run.json").read_text())
    for name, changes in {
        "wide": {"in_features": 2**31 - 1},
        "out": {"folds": ["../../x"]},
        "one": {"classes": ["a"]},
    }.items():
        (folder / f"hostile_{name}.json").write_text(json.dumps(values | changes))
    (folder / "hostile_deep.json").write_text("[" * 100_000)
    (folder / "hostile_deep.toml").write_text("a = " + "[" * 100_000)
    save_file({"x": torch.zeros(3)}, folder / "hostile.safetensors", metadata={"momkd": "[" * 100_000})


def checkpoint_files(folder: Path) -> None:
    torch.save({"model": {"a": torch.zeros(3)}}, folder / "a.pt")
    save_file({"a": torch.zeros(3), "b": torch.ones(2, 2)}, folder / "b.safetensors")
    torch.save({"epoch": 1, "best": (0.5, 1.0), "model": {"a": torch.zeros(3)}}, folder / "state.pt")
    torch.save({"model": Trap(folder.parent / "canary")}, folder / "hostile.pt")


# Reading, and what a valid result is


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


def use_labels(path: Path) -> None:
    labels = read_labels(path)
    assert labels.table.index.is_unique
    assert labels.table["label"].between(-1, len(labels.classes) - 1).all()


def use_splits(path: Path) -> None:
    folder = path.parent / "splits"
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / "splits_0.csv")
    (split,) = read_splits(folder)
    every = [slide for part in split.parts().values() for slide in part]
    assert len(every) == len(set(every)) > 0


def use_omics(path: Path) -> None:
    table = read_omics(path).table
    assert np.isfinite(table.to_numpy()).all()
    assert table.index.is_unique


def use_graph(path: Path) -> None:
    kept = path.parent / "graphs"
    kept.mkdir(exist_ok=True)
    os.replace(path, kept / "a.h5")
    edges = SlideGraphs(SlideFiles({"a": path.parent / "slide.h5"}), 2, kept)("a")
    check_lists(edges.offsets, edges.sources, edges.order)


def use_run(path: Path) -> None:
    folder = path.parent / "run"
    place = {".toml": "config.toml", ".json": "run.json"}.get(path.suffix, "fold_0/model.safetensors")
    good = (folder / place).read_bytes()
    try:
        (folder / place).write_bytes(path.read_bytes())
        run = Run(folder)
        for fold in run.info.folds:
            run.load_model(fold)
    finally:
        (folder / place).write_bytes(good)


def use_checkpoint(path: Path) -> None:
    if path.name.startswith("state"):
        load_state(path, ("epoch", "best", "model"))
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_checkpoint(path).values())


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "hdf5": (slide_files, use_slide),
    "pt": (tensor_files, use_slide),
    "npy": (array_files, use_slide),
    "packed": (packed_files, use_store),
    "labels": (label_files, use_labels),
    "splits": (split_files, use_splits),
    "omics": (omics_files, use_omics),
    "graph": (graph_files, use_graph),
    "run": (run_files, use_run),
    "checkpoint": (checkpoint_files, use_checkpoint),
}


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


def resident() -> int:
    """Megabytes at most so far."""
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) // 1024


def limit_memory() -> None:
    import resource

    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def too_long(*_: object) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def main(kind: str, cases: int, seed: int) -> int:
    make, use = KINDS[kind]
    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    (root / "good").mkdir()
    make(root / "good")
    files = sorted(path for path in (root / "good").iterdir() if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    warnings.simplefilter("ignore")
    limit_memory()
    signal.signal(signal.SIGALRM, too_long)
    before, bad, refused = resident(), 0, 0
    there = {path.name for path in root.iterdir()}
    for case in range(cases):
        rng = random.Random(f"{kind} {seed} {case}")
        path = files[case % len(files)]
        data = contents[path]
        if case >= len(files):  # first each as it is
            hostile = kind == "packed" and rng.random() < 0.5
            data = resealed(path, rng) if hostile else mutate(data, rng, list(contents.values()))
        target = root / path.name
        target.write_bytes(data)
        print(case, flush=True)  # what a crash or a hang can be told by
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            use(target)
        except InputError as error:
            refused += 1
            if len(str(error).splitlines()) != 1:
                bad += 1
                print(f"{kind} case {case} of {path.name}: more than one line: {error!r}", file=sys.stderr)
        except BaseException as error:
            bad += 1
            print(f"{kind} case {case} of {path.name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            target.unlink(missing_ok=True)
    made = {path.name for path in root.iterdir()} - there - {"splits", "graphs"}
    if made:
        bad += 1
        print(f"{kind}: something was written or executed: {sorted(made)}", file=sys.stderr)
    grown = resident() - before
    if grown > GROWTH:
        bad += 1
        print(f"{kind}: {grown} MB more were resident", file=sys.stderr)
    print(f"{cases} cases, {refused} refused, {bad} bad, {grown} MB", flush=True)
    import shutil

    shutil.rmtree(root)
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    raise SystemExit(main(**vars(parser.parse_args())))

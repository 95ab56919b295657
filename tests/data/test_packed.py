"""The packed store: what goes in comes out, whatever interrupts it, and what is wrong with it is found and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from momkd import graph
from momkd.data import pack as packing
from momkd.data import packed, read_slide, write_trident
from momkd.data.cohort import open_cohort
from momkd.data.pack import pack, verify
from momkd.data.packed import PackedStore
from tests.data.conftest import refused

POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="no signals and limits there")
NOTES = {"long": np.bytes_("n" * 999), "short": np.bytes_("n" * 99)}
SIZES = {"a": 40, "b": 1, "c": 300, "d": 9}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Slides in every format; one without coordinates."""
    rng, where = np.random.default_rng(0), tmp_path / "features"
    where.mkdir()
    for slide, n in SIZES.items():
        grid = np.stack(np.unravel_index(rng.permutation(400)[:n], (20, 20)), 1) * 256 - 512
        x = rng.standard_normal((n, 5)).astype(np.float32)
        if slide == "c":
            torch.save({"features": torch.from_numpy(x), "coords": torch.from_numpy(grid)}, where / "c.pt")
        elif slide == "d":
            np.save(where / "d.npy", x)
        else:
            write_trident(where / f"{slide}.h5", x, grid, patch_size_level0=512, encoder="e", row_chunks=True, **NOTES)
    return where


def located(folder: Path) -> Path:
    """The folder without the slide that has no coordinates."""
    (folder / "d.npy").unlink()
    return folder


# What goes in comes out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_slides_come_back(folder: Path, tmp_path: Path, dtype: str) -> None:
    made = pack(folder, tmp_path / "all.h5", dtype=dtype)
    assert (made.slides, made.patches, made.skipped) == (4, sum(SIZES.values()), {})
    assert made.nbytes == (tmp_path / "all.h5").stat().st_size
    store = PackedStore(tmp_path / "all.h5")
    assert list(store.paths) == list("abcd")
    for slide, n in SIZES.items():
        want = read_slide(next(folder.glob(f"{slide}.*")))
        assert store.header(slide) == (n, 5, dtype)
        np.testing.assert_array_equal(store.read(slide), want.features.astype(dtype))
        coords, attrs = store.coords(slide)
        assert store.has_coords(slide) == (want.coords is not None)
        if want.coords is None:
            assert coords is None
        else:
            np.testing.assert_array_equal(coords, want.coords)
        assert attrs == {name: value for name, value in want.attrs.items() if name != "long"}
        assert (attrs != {}) == (slide in "ab")
    assert verify(tmp_path / "all.h5") == {}


def test_float16_slides_need_no_check_and_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    tiny = np.full((3, 2), 6e-8, np.float16)
    np.save(tmp_path / "f/a.npy", tiny)
    pack(tmp_path / "f", tmp_path / "all.h5")
    assert PackedStore(tmp_path / "all.h5").read("a").tobytes() == tiny.tobytes()


def test_it_is_an_hdf5_file_that_others_read(folder: Path, tmp_path: Path) -> None:
    pack(located(folder), tmp_path / "all.h5", neighbours=3)
    with h5py.File(tmp_path / "all.h5") as file:
        assert [name.decode() for name in file["ids"]] == ["a", "b", "c"]
        first, last = file["offsets"][2:4]
        np.testing.assert_array_equal(
            file["features"][first:last], read_slide(folder / "c.pt").features.astype(np.float16)
        )
        assert all(file[name].chunks is None for name in ("features", "coords", "graph/sources"))
        assert json.loads(file["attrs"][0])["patch_size_level0"] == 512
        assert file["state"][:].tolist() == [3, 3, 3]


def test_the_same_slides_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("one.h5", "two.h5"):
        pack(folder, tmp_path / name)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_graphs_are_those_built_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(located(folder), tmp_path / "all.h5", neighbours=3)
    want = {slide: graph.knn(read_slide(next(folder.glob(f"{slide}.*"))).coords, 3) for slide in "abc"}
    anew = open_cohort(tmp_path / "all.h5", neighbours=2).graphs
    assert anew is not None
    assert anew("a").num_edges == 2 * SIZES["a"]  # of another k it is built
    monkeypatch.setattr("momkd.data.graphs.knn", None)
    stored = open_cohort(tmp_path / "all.h5", neighbours=3).graphs
    assert stored is not None
    for slide, edges in want.items():
        assert all(torch.equal(x, y) for x, y in zip(stored(slide).tensors(), edges.tensors(), strict=True))


def test_what_was_read_is_a_view_of_its_own(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "all.h5")
    before = (tmp_path / "all.h5").read_bytes()
    store = PackedStore(tmp_path / "all.h5")
    x = store.read("c")
    assert not x.flags.owndata
    kept = x.copy()
    x[:] = 7
    np.testing.assert_array_equal(store.read("c"), kept)
    store.close()
    assert (x == 7).all()
    assert (tmp_path / "all.h5").read_bytes() == before


def test_without_maps_it_is_copied(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(folder, tmp_path / "all.h5")
    want = PackedStore(tmp_path / "all.h5").read("c").copy()

    def none(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(packed.mmap, "mmap", none)
    np.testing.assert_array_equal(PackedStore(tmp_path / "all.h5").read("c"), want)


# What does not go in


@pytest.mark.parametrize(
    ("value", "came"),
    [(7e4, "values up to 7e+04, and float16 ends at 65504"), (1e-6, "values of about 1e-06, of which float16")],
)
def test_what_float16_cannot_hold_is_refused(tmp_path: Path, value: float, came: str) -> None:
    (tmp_path / "f").mkdir()
    np.save(tmp_path / "f/a.npy", np.full((3, 2), value, np.float32))
    with refused("f/a.npy: features: expected values for float16", came, "--dtype float32"):
        pack(tmp_path / "f", tmp_path / "all.h5", skip_bad=True)
    assert not (tmp_path / "all.h5").exists()
    pack(tmp_path / "f", tmp_path / "two.h5", dtype="float32")
    assert (PackedStore(tmp_path / "two.h5").read("a") == np.float32(value)).all()


def test_zeros_are_no_small_numbers(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    np.save(tmp_path / "f/a.npy", np.zeros((3, 2), np.float32))
    assert pack(tmp_path / "f", tmp_path / "all.h5").patches == 3


def test_a_slide_that_cannot_be_read_is_an_error_or_left_out(folder: Path, tmp_path: Path) -> None:
    x = np.ones((300, 5), np.float32)
    x[17, 2] = np.nan
    torch.save(torch.from_numpy(x), folder / "c.pt")
    out = tmp_path / "all.h5"
    with refused("c.pt: features: expected finite values"):
        pack(folder, out)
    assert not out.exists()
    made = pack(folder, out, skip_bad=True)
    assert list(made.skipped) == ["c"]
    assert made.patches == 50
    store = PackedStore(out)
    assert list(store.paths) == ["a", "b", "d"]
    np.testing.assert_array_equal(store.read("d"), np.load(folder / "d.npy").astype(np.float16))
    with refused("expected slide 'c', got no such slide"):
        store.read("c")
    with refused("expected a feature file of slide 'c' of labels.csv, got none"):
        open_cohort(out, ["a", "c"], source="labels.csv")


def test_targets_that_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with refused("notes.txt: expected a new file or a packed store to replace"):
        pack(folder, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with refused("all.h5: expected a file outside"):
        pack(folder, folder / "all.h5")
    with refused("got a folder; name a file in it"):
        pack(folder, tmp_path)
    with refused("cannot write it: No such file or directory; create the folder first"):
        pack(folder, tmp_path / "nowhere/all.h5")
    pack(folder, tmp_path / "all.h5")
    pack(folder, tmp_path / "all.h5", dtype="float32")  # a store is replaced
    assert PackedStore(tmp_path / "all.h5").header("a")[2] == "float32"
    with refused("all.h5: expected a folder of feature files, got a packed store"):
        pack(tmp_path / "all.h5", tmp_path / "again.h5")
    shutil.copy(tmp_path / "all.h5", folder)
    with refused("all.h5: expected one slide, got a packed store"):
        open_cohort(folder)


# Faults

RUN = """
import os, resource, signal, sys
from momkd.data import pack as packing
from momkd.errors import InputError
packing._SYNC_BYTES = 1  # every slide is on the disk before the next
fault, folder, out = sys.argv[1:]
if fault == "small disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
def report(done, total, nbytes):
    if done == 3 and fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if done == 2 and fault == "full disk":  # from now on nothing can be written but what lies in front
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    packing.pack(folder, out, dtype="float32", report=report)
except InputError as error:
    print(error)
"""


def interrupted(fault: str, folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, fault, str(folder), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The slides that packing reads from now on."""
    seen: list[str] = []
    plain = packing.read_slide

    def read(path: Path, **options: Any) -> Any:
        seen.append(path.stem)
        return plain(path, **options)

    monkeypatch.setattr(packing, "read_slide", read)
    return seen


@POSIX
@pytest.mark.parametrize("cut", [False, True])
def test_a_kill_and_going_on_give_the_same_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    pack(folder, tmp_path / "whole.h5", dtype="float32")
    out = tmp_path / "all.h5"
    assert interrupted("kill", folder, out).returncode == -9
    assert not out.exists()
    journal = tmp_path / ".all.h5.journal"
    done = [json.loads(line)["slide"] for line in journal.read_text().splitlines()[1:]]
    assert done in (["a"], ["a", "b"], ["a", "b", "c"])  # what is done is told before it is on the disk
    if cut:  # the kill fell while a line was written
        journal.write_text(journal.read_text()[:-20])
        done = done[:-1]
    seen = reads(monkeypatch)
    pack(folder, out, dtype="float32")
    assert seen == [slide for slide in "abcd" if slide not in done]
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.h5", "features", "whole.h5"]


@POSIX
def test_a_disk_that_is_too_small_is_known_at_once(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.h5"
    told = interrupted("small disk", folder, out)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"{out}: cannot write it: File too large (the store takes ")
    assert "MB are free); raise the file size limit" in told.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["features"]


@POSIX
def test_a_disk_that_fills_up_leaves_nothing_half_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.h5"
    pack(folder, out)
    old = out.read_bytes()
    told = interrupted("full disk", folder, out)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"{out}: cannot write it: File too large")
    assert out.read_bytes() == old
    pack(folder, out, dtype="float32")
    pack(folder, tmp_path / "whole.h5", dtype="float32")
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def stop_after(slides: int, folder: Path, out: Path) -> None:
    def report(done: int, total: int, nbytes: int) -> None:
        if done > slides:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(folder, out, report=report)


def test_going_on_with_something_else(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "all.h5"
    stop_after(2, folder, out)
    with refused(".all.h5.partial: expected to go on packing the same slides with the same options, got others"):
        pack(folder, out, dtype="float32")
    x = np.full((1, 5), 3, np.float32)  # of the same size, so that the plan stays
    write_trident(folder / "b.h5", x, [[0, 0]], patch_size_level0=512, encoder="e", row_chunks=True, **NOTES)
    seen = reads(monkeypatch)
    pack(folder, out)
    assert seen[0] == "b"
    assert "a" not in seen
    np.testing.assert_array_equal(PackedStore(out).read("b"), x)


@POSIX
def test_one_process_packs_at_a_time(folder: Path, tmp_path: Path) -> None:
    def again(done: int, total: int, nbytes: int) -> None:
        with refused(".all.h5.partial: expected to be the only one packing into it"):
            pack(folder, tmp_path / "all.h5")

    pack(folder, tmp_path / "all.h5", report=again)
    assert verify(tmp_path / "all.h5") == {}


# Damage


def place(path: Path, name: str, row: int) -> int:
    with h5py.File(path) as file:
        return int(file[name].id.get_offset()) + row * int(np.prod(file[name].shape[1:])) * file[name].dtype.itemsize


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("part", ["features", "coords", "graph/sources", "graph/order"])
def test_a_damaged_slide_is_found_and_named(folder: Path, tmp_path: Path, part: str) -> None:
    out = tmp_path / "all.h5"
    pack(located(folder), out, neighbours=3)
    row = SIZES["a"] + SIZES["b"] + 5  # of slide c
    flip(out, place(out, part, row * 3 if part == "graph/sources" else row))
    (wrong,) = verify(out).items()
    assert wrong[0] == "c"
    name = part.split("/")[0]
    assert f"{out}: slide 'c': {name}: expected the bytes that were packed, got others" in wrong[1]
    store = PackedStore(out)
    store.read("a"), store.graph("a", 3)
    use: dict[str, Callable[[], object]] = {
        "features": lambda: store.read("c"),
        "coords": lambda: store.coords("c"),
        "graph": lambda: store.graph("c", 3),
    }
    for _ in range(2):  # it does not pass the second time
        with refused(f"slide 'c': {name}: expected the bytes that were packed"):
            use[name]()


@pytest.mark.parametrize("name", ["ids", "attrs", "offsets", "state", "checksums", "seal"])
def test_a_damaged_header_is_found(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "all.h5"
    pack(folder, out)
    flip(out, place(out, name, 0))
    with refused(f"{out}: expected a whole packed store, got its header does not fit its checksum"):
        PackedStore(out)


def test_a_file_that_was_cut(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.h5"
    pack(folder, out)
    store = PackedStore(out)
    os.truncate(out, out.stat().st_size - 5000)
    with refused("expected a whole packed store, got fewer bytes than its header says"):
        store.read("d")
    for size in (out.stat().st_size, 0):
        os.truncate(out, size)
        with refused("expected a packed store, got a file that does not read", "or remove it and pack again"):
            PackedStore(out)
        with refused("expected a new file or a packed store to replace, got another file"):
            pack(folder, out)
    out.unlink()
    pack(folder, out)


def reseal(path: Path) -> None:
    """What somebody with intent would do."""
    with h5py.File(path, "r+") as file:
        file["seal"][0] = packed.seal({name: file[name][:] for name in packed.SEALED if name in file})


@pytest.mark.parametrize("slide", ["../../x", "/etc/x", "a/b", "a\\b", "..", "", "a\nb", "a\u202eb"])
def test_ids_that_lead_elsewhere_are_refused(folder: Path, tmp_path: Path, slide: str) -> None:
    np.save(folder / ("y" * 240 + ".npy"), np.ones((2, 5), np.float32))  # so that there is room
    out = tmp_path / "all.h5"
    pack(folder, out)
    with h5py.File(out, "r+") as file:
        file["ids"][0] = slide.encode()
    reseal(out)
    with refused(f"{out}: expected slide ids that can name a file, got"):
        PackedStore(out)


def test_other_files_are_no_store(folder: Path, tmp_path: Path) -> None:
    with refused("a.h5: expected a packed store, got another HDF5 file"):
        PackedStore(folder / "a.h5")
    (tmp_path / "x.h5").write_bytes(b"nothing")
    with refused("x.h5: expected a packed store, got a file that does not read"):
        open_cohort(tmp_path / "x.h5")
    with refused("y.h5: expected a packed store, got nothing there"):
        PackedStore(tmp_path / "y.h5")
    pack(folder, tmp_path / "all.h5")
    with h5py.File(tmp_path / "all.h5", "r+") as file:
        file.attrs["version"] = 9
    with refused("expected version 1 of the store, got 9; update momkd"):
        PackedStore(tmp_path / "all.h5")


@pytest.mark.parametrize("kind", ["chunks", "external", "link", "type", "rows"])
def test_a_store_of_another_shape_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "all.h5"
    pack(folder, out)
    with h5py.File(out, "r+") as file:
        x = file["features"][:]
        del file["features"]
        if kind == "chunks":
            file.create_dataset("features", data=x, chunks=(1, 5))
        elif kind == "external":
            (tmp_path / "raw").write_bytes(x.tobytes())
            file.create_dataset("features", x.shape, x.dtype, external=[(str(tmp_path / "raw"), 0, x.nbytes)])
        elif kind == "link":
            file["features"] = h5py.ExternalLink(str(folder / "a.h5"), "features")
        elif kind == "type":
            file["features"] = x.astype(np.int16)
        else:
            file["features"] = x[:-1]
    with refused(f"{out}: expected a packed store, got a file that does not read"):
        PackedStore(out)

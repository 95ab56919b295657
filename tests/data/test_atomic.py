"""Files that are whole or absent: an exception, a kill or a full disk leaves the old file, and no litter."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from momkd.data import atomic, atomic_write, write_csv, write_json, write_text
from momkd.data.splits import Split, read_splits, write_splits
from momkd.data.text import read_text_table
from tests.data.conftest import refused


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file that must survive."""
    path = tmp_path / "scores.csv"
    path.write_text("old")
    return path


def only(path: Path) -> bool:
    """Nothing else is in its folder: no temporary file stays."""
    return [p.name for p in path.parent.iterdir()] == [path.name]


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_file_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path  # the same disk, so that the rename is one step
        assert temporary.name.startswith(".")
    assert path.read_text() == "new"
    assert only(path)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_the_old_file_survives_an_exception(old: Path, kind: type[BaseException]) -> None:
    def interrupted() -> None:
        with atomic_write(old) as temporary:
            temporary.write_text("half of the n")
            raise kind

    with pytest.raises(kind):
        interrupted()
    assert old.read_text() == "old"
    assert only(old)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_at_the_end(old: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(os, call, full)
    with refused(f"{old}: cannot write it: No space left on device; free some space or choose another folder"):
        write_text(old, "new")
    assert old.read_text() == "old"
    assert only(old)


LIMITED = """
import resource, sys
import numpy as np, pandas as pd
from momkd.data import write_csv, write_json, write_text, write_trident
from momkd.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
features = np.zeros((5000, 8), np.float32)
writers = {
    "text": lambda path: write_text(path, "x" * 100_000),
    "json": lambda path: write_json(path, list(range(50_000))),
    "csv": lambda path: write_csv(path, pd.DataFrame(features)),
    "h5": lambda path: write_trident(path, features, np.zeros((5000, 2)), patch_size_level0=1, encoder="e"),
}
for name, write in writers.items():
    try:
        write(f"{sys.argv[1]}/{name}")
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file size there")
def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    for name in ("text", "json", "csv", "h5"):
        (tmp_path / name).write_text("old")
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    remedy = "cannot write it: File too large; raise the file size limit (ulimit -f) or choose another folder"
    assert result.stdout.splitlines() == [f"{tmp_path / name}: {remedy}" for name in ("text", "json", "csv", "h5")]
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(("text", "json", "csv", "h5"), "old")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_error_without_a_file_name_is_about_this_one(old: Path) -> None:
    def write() -> None:
        with atomic_write(old):
            Path("/dev/full").write_text("x" * 100)  # the kernel says that the disk is full, and not where

    with refused(f"{old}: cannot write it: No space left on device"):
        write()
    assert old.read_text() == "old"
    assert only(old)


def test_the_text_of_an_error_of_another_library_is_understood(old: Path) -> None:
    class ForeignError(Exception):
        pass

    def write(text: str) -> None:
        with atomic_write(old):
            raise ForeignError(text)

    with refused(f"{old}: cannot write it: No space left on device; free some space"):
        write("Can't write data (file write failed: errno = 28, error message = 'No space left on device')")
    with pytest.raises(ForeignError, match="something else"):
        write("something else")
    assert old.read_text() == "old"


def test_an_error_about_another_file_is_not_blamed_on_this_one(old: Path, tmp_path: Path) -> None:
    def write() -> None:
        with atomic_write(old):
            (tmp_path / "none" / "input").read_text()

    with pytest.raises(FileNotFoundError, match="input"):
        write()
    assert old.read_text() == "old"
    assert only(old)


def test_any_writer_may_use_the_temporary_path(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with atomic_write(path) as temporary, h5py.File(temporary, "w") as file:
        file["x"] = np.arange(3)
    with h5py.File(path) as file:
        assert file["x"][...].tolist() == [0, 1, 2]
    array = tmp_path / "b.npy"
    with atomic_write(array, suffix=".npy") as temporary:
        np.save(temporary, np.arange(3))  # would append an ending of its own
    assert np.load(array).tolist() == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "b.npy"]


def test_a_writer_that_replaces_the_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        other = tmp_path / "other"
        other.write_text("new")
        other.replace(temporary)
    assert path.read_text() == "new"
    assert only(path)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_is_followed_and_stays_one(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "target.txt", tmp_path / "link.txt"
    for content in ("first", "second"):  # a link to nothing, then to a file
        link.unlink(missing_ok=True)
        link.symlink_to("store/target.txt")
        write_text(link, content)
        assert link.is_symlink()
        assert target.read_text() == content
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["link.txt", "store", "target.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="modes are of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_content_and_name_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    really_sync, really_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        really_sync(handle)

    def replace(source: Any, target: Any) -> None:
        done.append("rename")
        really_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(tmp_path / "a.txt", "new")
    if sys.platform == "linux":
        assert done == ["file", "rename", "folder"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("none/a.txt", ("No such file or directory; create the folder first",)),
        ("file/a.txt", ("Not a directory; choose a folder, not a file",)),
        ("folder", ("Is a directory; give the name of a file, not of a folder",)),
        ("x" * 400, ("File name too long; give a shorter name",)),
    ],
)
def test_a_place_that_cannot_be_written_to(tmp_path: Path, name: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    short = name if len(name) < 100 else ""
    with refused(f"{tmp_path / short}", "cannot write it: ", *parts) if short else refused(*parts):
        write_text(tmp_path / name, "new")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "you may write to"), (errno.EROFS, "you may write to"), (errno.EDQUOT, "free some of your quota")],
)
def test_no_right_to_write(old: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str) -> None:
    def deny(path: str, *args: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(atomic.os, "open", deny)
    with refused(f"{old}: cannot write it: {os.strerror(number)}; ", remedy):
        write_text(old, "new")
    assert only(old)


def test_text_is_utf8_with_line_feeds(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "Grün\nλ\n")
    assert (tmp_path / "a.txt").read_bytes() == "Grün\nλ\n".encode()


def test_json_comes_back_and_refuses_what_is_not_json(old: Path) -> None:
    value = {"é": [1, 0.1, None, True], "b": {}}
    write_json(old, value)
    assert json.loads(old.read_text(encoding="utf-8")) == value
    assert old.read_text(encoding="utf-8").startswith('{\n  "é"')
    before = old.read_text(encoding="utf-8")
    writers: list[Callable[[], None]] = [lambda: write_json(old, [float("nan")]), lambda: write_json(old, {1, 2})]
    for write in writers:
        with pytest.raises((ValueError, TypeError)):
            write()
    assert old.read_text(encoding="utf-8") == before
    assert only(old)


FORMULAS = ["=1+1", "@x", "+cmd", "-a", "'=x", "''=x", "'", "'a", "=", "-1", "+2.5e3", "-inf", "'-1", "＝x", "plain"]


def test_no_spreadsheet_runs_a_text_and_it_reads_back(tmp_path: Path) -> None:
    table = pd.DataFrame({"slide_id": FORMULAS, "=head": FORMULAS, "x": np.linspace(-1, 1, len(FORMULAS))})
    write_csv(tmp_path / "t.csv", table)
    raw = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    for text in raw["slide_id"]:
        assert text in ("=", "-1", "+2.5e3", "-inf") or text[0] not in "=+-@＝", text
    assert raw["x"][0] == "-1.0"
    assert list(raw.columns) == ["slide_id", "'=head", "x"]
    back = read_text_table(tmp_path / "t.csv")
    assert list(back["slide_id"]) == FORMULAS
    assert list(back["=head"]) == FORMULAS
    splits = [Split(("=1+1", "-a"), ("@x",), ("+cmd", "'=x"))]
    write_splits(tmp_path / "splits", splits)
    assert read_splits(tmp_path / "splits") == splits
    assert list(table["slide_id"]) == FORMULAS, "what was written is not changed"


def test_csv_leaves_missing_cells_empty(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["007", None], "value": [0.1, np.nan]}, index=["a", "b"])
    write_csv(tmp_path / "a.csv", table)
    assert (tmp_path / "a.csv").read_bytes() == b"id,value\n007,0.1\n,\n"
    write_csv(tmp_path / "a.csv", table, index=True)
    assert (tmp_path / "a.csv").read_bytes() == b",id,value\na,007,0.1\nb,,\n"


@pytest.mark.skipif(sys.platform == "win32", reason="modes are of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_mode(old: Path, mode: int) -> None:
    old.chmod(mode)
    with atomic_write(old) as temporary:
        assert temporary.stat().st_mode & 0o777 & ~mode == 0  # nobody else may read it meanwhile
        temporary.write_text("new")
    assert (old.read_text(), old.stat().st_mode & 0o777) == ("new", mode)


@pytest.mark.skipif(sys.platform == "win32", reason="modes are of POSIX")
def test_a_library_that_writes_a_file_of_its_own_does_not_decide_the_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.zeros(2)}, temporary)
            temporary.chmod(0o600)  # as some versions of safetensors leave it
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_devices_and_pipes_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/null")
    for place in (tmp_path / "fifo", tmp_path / "link", Path("/dev/null")):
        with refused(f"{place}: expected a file to write, got a device or a pipe; choose another name"):
            write_text(place, "new")
    assert Path("/dev/null").is_char_device()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "link"]

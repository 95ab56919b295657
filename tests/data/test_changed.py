"""Slides and stores that change while they are used, and what somebody puts where momkd writes files of known names."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from momkd.data import pack as packing
from momkd.data import write_trident
from momkd.data.batches import BagLoader
from momkd.data.cohort import Cohort, open_cohort
from momkd.data.lock import locked
from momkd.data.pack import pack
from momkd.data.packed import PackedStore
from tests.data.conftest import refused

LINKS = pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="no links there that could be refused")


def write(path: Path, n: int, value: float = 1.0) -> Path:
    grid = np.stack(np.divmod(np.arange(n), 10), 1) * 256
    write_trident(path, np.full((n, 3), value, np.float16), grid, patch_size_level0=256, encoder="e")
    os.utime(path, ns=(0, n * 10**9 + int(value)))  # whatever the clock of the disk says, it is another time
    return path


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number, slide in enumerate("abc"):
        write(tmp_path / "in" / f"{slide}.h5", 20 + number)
    return tmp_path / "in"


def loader(cohort: Cohort, **options: object) -> BagLoader:
    slides = list(cohort.paths)
    labels = np.zeros(len(slides), np.int64)
    return BagLoader(slides, labels, cohort.sizes, cohort.read, slides_per_step=1, graph=cohort.graphs, **options)


CHANGES: dict[str, Callable[[Path], object]] = {
    "shrunk": lambda path: write(path, 5),
    "grown": lambda path: write(path, 99),
    "replaced": lambda path: write(path, 21, 2.0),
    "cut": lambda path: os.truncate(path, 500),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("max_patches", [0, 15])
def test_a_slide_that_changes_between_epochs(folder: Path, change: str, max_patches: int) -> None:
    cohort = open_cohort(folder, neighbours=2)
    made = loader(cohort, max_patches=max_patches)
    assert len(list(made.batches(made.once(), seed=[0]))) == 3
    CHANGES[change](folder / "b.h5")
    with refused(folder / "b.h5", "that was changed since; start again"):
        list(made.batches(made.once(), seed=[0]))
    skipped: dict[str, str] = {}
    made = loader(cohort, max_patches=max_patches, skipped=skipped)
    assert [batch.slide_ids for batch in made.batches(made.once(), seed=[0])] == [("a",), ("c",)]
    assert list(skipped) == ["b"]
    assert len(open_cohort(folder, skip_bad=True)) == (3 if change in ("shrunk", "grown", "replaced") else 2)


def test_rows_that_a_plan_does_not_know(folder: Path) -> None:
    """Whoever reads: a loader and a cohort compare what comes with the sizes that batches were planned by."""
    cohort = open_cohort(folder, neighbours=2)
    cohort.sizes["b"] = 30  # type: ignore[index]
    with refused("b.h5", "expected 30 patches as before, got 21"):
        cohort.read("b")
    other = open_cohort(folder)
    made = BagLoader(["b"], np.zeros(1, np.int64), cohort.sizes, other.read, graph=cohort.graphs)
    with refused("b: expected features of 30 patches as before, got 21"):
        list(made.batches([[0]]))
    made = BagLoader(["b"], np.zeros(1, np.int64), {"b": 22}, lambda _: other.read("c"), graph=cohort.graphs)
    with refused("b: expected coordinates of 22 patches as before, got 21"):
        list(made.batches([[0]]))


def test_a_store_that_is_overwritten_in_place(folder: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "all.h5", tmp_path / "other.h5"
    pack(folder, path, neighbours=2)
    write(folder / "b.h5", 21, 7.0)
    pack(folder, other, neighbours=2)
    store = PackedStore(path)
    before = {slide: np.array(store.read(slide)) for slide in store.paths}
    os.utime(path, ns=(0, 10**9))  # touched: the bytes are the same
    np.testing.assert_array_equal(store.read("b"), before["b"])
    made = os.stat(path).st_ino
    shutil.copyfile(other, path)  # into the same file
    os.utime(path, ns=(0, 2 * 10**9))
    assert os.stat(path).st_ino == made
    for use in (store.read, store.coords, lambda slide: store.graph(slide, 2)):
        with refused(path, "expected the packed store that was opened, got one that was overwritten since"):
            use("b")
    os.truncate(path, 100)
    with refused(path, "overwritten since"):
        store.read("a")
    pack(folder, other)
    store = PackedStore(other)
    with other.open("r+b") as file:  # values alone: the header is as it was
        file.seek(-6, os.SEEK_END)
        file.write(b"\0\0\0\0\0\0")
    os.utime(other, ns=(0, 10**9))
    with refused("slide 'c'", "the checksum differs"):
        store.read("c")
    assert store.read("a").shape == (20, 3)


def test_a_store_whose_name_another_takes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.h5"
    pack(folder, path)
    store = PackedStore(path)
    write(folder / "b.h5", 21, 7.0)
    pack(folder, path)
    assert float(store.read("b")[0, 0]) == 1.0
    assert float(PackedStore(path).read("b")[0, 0]) == 7.0


@LINKS
@pytest.mark.parametrize("name", [".all.h5.partial", ".all.h5.journal", "run.lock"])
@pytest.mark.parametrize("way", ["link", "dangling link", "second name", "pipe"])
def test_what_lies_where_momkd_writes_is_never_written_to(folder: Path, tmp_path: Path, name: str, way: str) -> None:
    victim, planted = tmp_path / "victim.txt", tmp_path / name
    if way != "dangling link":
        victim.write_text("precious")
    if way == "pipe":
        os.mkfifo(planted)
    elif way == "second name":
        os.link(victim, planted)
    else:
        planted.symlink_to(victim)
    fresh = name.endswith("journal")  # it is begun anew under its name
    with contextlib.nullcontext() if fresh else refused(f"{planted}: expected a file that momkd made, got a"):
        if name == "run.lock":
            with locked(tmp_path):
                pass
        else:
            pack(folder, tmp_path / "all.h5")
    assert not victim.exists() if way == "dangling link" else victim.read_text() == "precious"


@LINKS
def test_a_journal_that_goes_on_behind_a_link(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing._Writer, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, tmp_path / "all.h5")
    journal = tmp_path / ".all.h5.journal"
    text = journal.read_text()
    journal.rename(tmp_path / "victim.txt")
    journal.symlink_to(tmp_path / "victim.txt")
    with refused(journal, "expected a file that momkd made, got a link; remove it"):
        pack(folder, tmp_path / "all.h5")
    assert (tmp_path / "victim.txt").read_text() == text
    journal.unlink()
    foreign = [
        {"slide": "a"},
        {"slide": ["a"]},
        {"slide": "a", "state": 7, "checksums": [0, 0, 0], "stamp": 1},
        3,
        None,
    ]
    lines = text.splitlines()[:1] + [packing.json.dumps(line) for line in foreign]
    journal.write_text("\n".join(lines))
    assert pack(folder, tmp_path / "all.h5").slides == 3
    with PackedStore(tmp_path / "all.h5") as store:
        assert all(store.damage(slide) is None for slide in store.paths)


@LINKS
def test_a_store_that_was_finished_between_opening_and_locking(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partial file that was opened is now the store: it must not be begun anew."""
    path, plain, began = tmp_path / "all.h5", packing._lock, []

    def finish_first(file: int, partial: Path) -> None:
        if not began:
            began.append(1)
            pack(folder, path)
            os.link(path, tmp_path / "kept")  # what was finished
        plain(file, partial)

    monkeypatch.setattr(packing, "_lock", finish_first)
    pack(folder, path)
    with PackedStore(tmp_path / "kept") as store:
        assert all(store.damage(slide) is None for slide in store.paths)


def test_a_target_that_is_a_pipe(folder: Path, tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes there")
    os.mkfifo(tmp_path / "all.h5")
    with refused("expected a new file or a packed store to replace, got a named pipe"):
        pack(folder, tmp_path / "all.h5")
    with refused("got a named pipe"):
        PackedStore(tmp_path / "all.h5")
    os.mkfifo(folder / "d.h5")
    assert list(open_cohort(folder).paths) == ["a", "b", "c"]


def test_a_store_is_not_written_among_nested_slides(folder: Path, tmp_path: Path) -> None:
    (folder / "p1").mkdir()
    pack(folder, folder / "p1" / "all.h5")  # slides lie in the folder itself: nobody looks there
    (folder / "p1" / "all.h5").unlink()
    for slide in "abc":
        (folder / f"{slide}.h5").rename(folder / "p1" / f"{slide}.h5")
    with refused("all.h5: expected a file outside", "where it would pass for a slide"):
        pack(folder, folder / "p1" / "all.h5")
    assert pack(folder, tmp_path / "all.h5").slides == 3

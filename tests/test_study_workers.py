"""Processes of a study: what is done, and that none outlives an interrupt, an error or its parent."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from momkd.cli.ending import one_clear_line
from momkd.errors import InputError
from momkd.study import workers
from tests import processes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here, to be quick")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "get_context", lambda _: processes._context)


def work(folder: Path, item: str) -> None:
    """Leave a file with the number of this process while it works."""
    mine = folder / f"{item}.{os.getpid()}"
    mine.touch()
    try:
        if item.startswith("wait"):
            time.sleep(60)
        if item.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if item.startswith("refuse"):
            raise InputError(f"{item}: bad")
        if item.startswith("full"):
            raise OSError(28, "No space left on device", item)
        if item.startswith("bug"):
            raise KeyError(item)
    finally:
        mine.unlink()
    (folder / item).touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(true: object, limit: float = 20) -> None:
    assert callable(true)
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_item_is_done_once(tmp_path: Path) -> None:
    items = [f"a{n}" for n in range(7)]
    assert sorted(workers.in_processes(functools.partial(work, tmp_path), items, 3)) == items
    assert names(tmp_path) == items


@pytest.mark.parametrize(
    ("item", "kind", "told"),
    [
        ("refuse", InputError, "^refuse: bad$"),
        ("kill", InputError, r"^cell kill: its process was killed \(signal 9\), .*the same command again, with fewer"),
        ("full", OSError, "No space left"),
        ("bug", RuntimeError, "Traceback.*KeyError: 'bug'"),
    ],
)
def test_an_error_ends_all_and_keeps_what_is_done(tmp_path: Path, item: str, kind: type[Exception], told: str) -> None:
    items = ["a", "wait1", item, "wait2", "b"]
    with pytest.raises(kind, match=rf"(?s){told}"):
        list(workers.in_processes(functools.partial(work, tmp_path), items, 2, lambda item: f"cell {item}"))
    assert [name for name in names(tmp_path) if not name.startswith("kill.")] == ["a"]  # the other cleaned up


def _study(folder: Path, jobs: int) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
    workers.get_context = lambda _: multiprocessing.get_context("fork")  # type: ignore[assignment]
    items = [f"wait{n}" for n in range(4)]
    with one_clear_line():
        for _ in workers.in_processes(functools.partial(work, folder), items, jobs):
            pass


def test_an_interrupt_ends_all_processes_and_starts_no_more(tmp_path: Path) -> None:
    study = processes.start(_study, tmp_path, 2)
    wait_until(lambda: len(names(tmp_path)) == 2)
    pids = [int(name.rpartition(".")[2]) for name in names(tmp_path)]
    for pid in (*pids, study.pid):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    assert study.wait(20) == 130
    assert study.stderr == "momkd: interrupted\n"
    assert names(tmp_path) == []
    assert not any(map(is_alive, pids))


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    study = processes.start(_study, tmp_path, 1)
    wait_until(lambda: len(names(tmp_path)) == 1)
    pid = int(names(tmp_path)[0].rpartition(".")[2])
    os.kill(study.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))
    assert names(tmp_path) == []

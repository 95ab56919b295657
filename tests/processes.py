"""Processes that tests start, kill and look into, in a moment each.

A process that imports torch, pandas and momkd anew takes eight seconds before it does anything. These are forked from
one that has imported them once, waits, and never had a second thread (multiprocessing's fork server).

    process = start(train_until, out, epoch=3)
    assert process.wait() == -signal.SIGKILL, process.stderr
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["torch._dynamo", "torch.distributed.nn", "matplotlib.pyplot", "momkd.experiment", "momkd.plots", "pytest"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def environment() -> dict[str, str]:
    """The variables of now, and one thread: two processes give the same bits only with the same number of threads."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **one, "PYTHONPATH": str(ROOT)}


class Started:
    """A process and what it prints."""

    def __init__(self, function: Callable[..., object], given: tuple[object, ...], named: dict[str, object]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.process = _context.Process(
            target=_call, args=(self.folder.name, environment(), function, given, named), daemon=True
        )
        self.process.start()

    @property
    def pid(self) -> int:
        return int(self.process.pid or 0)

    def _said(self, stream: str) -> str:
        path = Path(self.folder.name, stream)
        return path.read_text() if path.exists() else ""

    @property
    def stdout(self) -> str:
        return self._said("stdout")

    @property
    def stderr(self) -> str:
        return self._said("stderr")

    def wait(self, limit: float = 240) -> int:
        """The exit status, negative for a signal; after `limit` seconds it is killed, and the test fails."""
        self.process.join(limit)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {limit:g} s; it said:\n{self.stdout}\n{self.stderr}")
        return self.process.exitcode

    def wait_for_line(self, line: str, limit: float = 60) -> None:
        """Until it has printed `line`."""
        end = time.monotonic() + limit
        while line not in self.stdout.splitlines():
            assert self.process.is_alive(), f"it ended with {self.process.exitcode}:\n{self.stderr}"
            assert time.monotonic() < end, f"no line {line!r} after {limit:g} s:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def start(function: Callable[..., object], *given: object, **named: object) -> Started:
    """Calls a function of a module in a process of its own, with the environment of now and one thread.

    Args:
        function: of a module's top level; an exception ends the process with 1, its traceback on stderr.
        given, named: its arguments, which can be pickled.
    """
    return Started(function, given, named)


def _call(folder: str, variables: dict[str, str], function: Callable[..., Any], given: Any, named: Any) -> None:
    for number, stream in ((1, "stdout"), (2, "stderr")):
        to = os.open(Path(folder, stream), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(to, number)
        os.close(to)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    function(*given, **named)

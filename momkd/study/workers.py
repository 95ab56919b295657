"""Processes that work on the cells of a study, and end with an interrupt, with an error, and with their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

import torch

from momkd import env
from momkd.errors import InputError

Item = TypeVar("Item")
_TO_CLEAN_UP = 5.0  # seconds that a process has to remove its temporary files and give back its locks


def in_processes(
    work: Callable[[Item], None], items: Sequence[Item], jobs: int, describe: Callable[[Item], str] = str
) -> Iterator[Item]:
    """Call `work` with each item in one of several processes; yields the items as they are done, in any order.

    The processes import anew (spawn), so that a GPU may be in use here; each takes its share of the threads. Whatever
    ends this loop ends all of them: an error of one item, an interrupt, the death of this process.

    Args:
        work: a function of a module, or a partial of one; it and the items are pickled.
        items: what there is to do.
        jobs: processes at once.
        describe: how an item is named in messages.

    Raises:
        InputError: of an item, or because its process was killed.
        RuntimeError: `work` had an error of another kind; its traceback is in the text.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    context, waiting, workers = get_context("spawn"), list(reversed(items)), []
    try:
        with env.child_threads(threads):
            for _ in range(min(jobs, len(items))):
                workers.append(_Worker(context, work, threads))
        for worker in workers:
            worker.give(waiting.pop())
        while busy := {worker.connection: worker for worker in workers if worker.item is not None}:
            for ready in connection.wait(list(busy)):
                worker = busy[ready]
                yield worker.take(describe)
                if waiting:
                    worker.give(waiting.pop())
    finally:
        _end(workers)


class _Worker:
    """A process that does one item after the other."""

    def __init__(self, context: Any, work: Callable[[Any], None], threads: int) -> None:
        self.connection, theirs = context.Pipe()
        self.item: Any = None
        self.process = context.Process(target=_serve, args=(theirs, work, threads), daemon=True)
        with _without_interrupts():  # which a process inherits: an interrupt while it imports would show a traceback
            self.process.start()
        theirs.close()

    def give(self, item: Any) -> None:
        self.item = item
        self.connection.send(item)

    def take(self, describe: Callable[[Any], str]) -> Any:
        """Return the item, which is done, or raise what became of it."""
        item, self.item = self.item, None
        try:
            error = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(_TO_CLEAN_UP)
            code = self.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise InputError(
                f"{describe(item)}: its process was killed ({how}), by the system where memory ran out; what is "
                "finished is kept: give the same command again, with fewer --jobs"
            ) from None
        if error is not None:
            raise error
        return item


def _end(workers: Sequence[_Worker]) -> None:
    """End processes and wait for them: those that wait for an item at once, the others once they have cleaned up."""
    for worker in workers:
        worker.connection.close()
        if worker.process.is_alive() and worker.item is not None:
            worker.process.terminate()
    until = time.monotonic() + _TO_CLEAN_UP
    for worker in workers:
        worker.process.join(max(0.0, until - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _serve(tasks: Any, work: Callable[[Any], None], threads: int) -> None:
    """Do items until there are no more; in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal it goes to all: the parent ends this one
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            item = tasks.recv()
        except (EOFError, OSError):
            return
        error: Exception | None = None
        try:
            work(item)
        except InputError as refused:
            error = InputError(str(refused))
        except (OSError, MemoryError, OverflowError, UnicodeError, RecursionError) as of_the_system:
            error = of_the_system
        except Exception:
            error = RuntimeError(traceback.format_exc())
        tasks.send(error)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # by way of every `finally`


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one, however that ends, and end too."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TO_CLEAN_UP)
    os._exit(1)

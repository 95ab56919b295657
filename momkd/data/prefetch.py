"""Batches on their way to a device: made ahead by threads, copied on a stream of their own, features kept there.

A batch passes through two threads. The reader makes it in page-locked memory; the copier queues its copy on a side
stream, so that it runs beside the computation. Whoever takes the batch lets its own stream wait for that copy.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def ahead(tasks: Iterable[Callable[[], T]], depth: int, name: str) -> Generator[T, None, None]:
    """Yield the results of tasks in their order; a thread runs up to `depth` of them before they are asked for.

    What a task raises is raised here in its turn. Closing the iterator drops the tasks that have not begun and waits
    for the one that runs: no thread is left. `tasks` is iterated by the consumer's thread, just before each is queued.
    A single task, of which nothing could be ahead, is run where it is asked for.
    """
    tasks = iter(tasks)
    begun = list(islice(tasks, 2))
    if len(begun) < 2:
        yield from (task() for task in begun)
        return
    pool = ThreadPoolExecutor(1, name)
    waiting: deque[Future[T]] = deque()
    try:
        for task in chain(begun, tasks):
            waiting.append(pool.submit(task))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Transfer:
    """The copies of one device. This class serves devices without streams: copies are made at once, nothing waits."""

    overlaps = False  # whether copies can run beside the computation

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event | None:
        """Return an event that follows all work queued so far by the calling thread."""
        return None

    def copy(self, make: Callable[[], T], after: torch.cuda.Event | None) -> tuple[T, torch.cuda.Event | None]:
        """Return what `make` copies to the device once `after` has come, and the event that follows the copies."""
        return make(), None

    def receive(self, tensors: Iterable[Tensor], copied: torch.cuda.Event | None) -> None:
        """Let the calling thread's stream wait for copies, and their memory live until it has used them."""


class StreamTransfer(Transfer):
    """The copies of a GPU, on one side stream for the whole process."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        # blocking: the copier sleeps until the event comes
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, make: Callable[[], T], after: torch.cuda.Event | None) -> tuple[T, torch.cuda.Event]:
        if after is not None:
            after.synchronize()  # the host waits: an earlier batch's memory can be used again, and no more is taken
        with torch.cuda.stream(self.side):
            made = make()
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self.side)
        return made, copied

    def receive(self, tensors: Iterable[Tensor], copied: torch.cuda.Event | None) -> None:
        stream = torch.cuda.current_stream(self.device)
        if copied is not None:
            stream.wait_event(copied)
        for t in tensors:
            t.record_stream(stream)  # it belongs to the side stream, which must not use its memory again before


def transfer_to(device: torch.device) -> Transfer:
    """Return the transfer of a device: the same object for the same device, whoever asks."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _transfer(device)


@cache
def _transfer(device: torch.device) -> Transfer:
    return (StreamTransfer if device.type == "cuda" else Transfer)(device)


class KeptSlide:
    """The features (N, L) of a slide, which are copied to a device when they are first used there, and then stay."""

    def __init__(self, x: Tensor, device: torch.device) -> None:
        self.width, self.dtype, self.size = x.shape[1], x.dtype, x.shape[0]
        self._x, self._device, self._lock = x, device, threading.Lock()

    def features(self) -> Tensor:
        """Return the features on the device; the copy is queued on the current stream."""
        with self._lock:
            if self._x.device != self._device:
                self._x = self._x.to(self._device, non_blocking=True)
            return self._x


@dataclass(frozen=True, eq=False)
class KeptRows:
    """The rows of a kept slide that a batch takes: those of `drawn` (n,) int64, or all."""

    slide: KeptSlide
    drawn: Tensor | None

    def __len__(self) -> int:
        return self.slide.size if self.drawn is None else len(self.drawn)

    def none(self) -> Tensor:
        """Return (0, L) in host memory, of the same type and width."""
        return torch.empty(0, self.slide.width, dtype=self.slide.dtype)

    def write(self, rows: Tensor) -> None:
        """Copy into `rows` (n, L) on the device."""
        x = self.slide.features()
        if self.drawn is None:
            rows.copy_(x)
        else:
            torch.index_select(x, 0, self.drawn.to(x.device, non_blocking=True), out=rows)


class DeviceCache:
    """Features of slides that stay on a device, up to a number of bytes.

    The first slides that fit are kept, and none is replaced: an epoch visits all slides about once, so that the least
    recently used one is that which comes next. Loaders may share a cache if their slides are of one cohort.

    Args:
        device: where they stay; batches must go there too.
        limit: bytes of features at most.
    """

    def __init__(self, device: torch.device | str, limit: int) -> None:
        self.device, self.limit, self.held = transfer_to(torch.device(device)).device, limit, 0
        self._slides: dict[str, KeptSlide] = {}
        self._lock = threading.Lock()

    def get(self, slide: str) -> KeptSlide | None:
        """Return a slide that is kept, or None."""
        return self._slides.get(slide)

    def keep(self, slide: str, x: Tensor, *, pin: bool) -> KeptSlide | None:
        """Return the slide, kept from now on, or None where there is no room for its features."""
        with self._lock:
            if slide in self._slides or self.held + x.nbytes > self.limit:
                return self._slides.get(slide)
            self._slides[slide] = kept = KeptSlide(x.pin_memory() if pin else x, self.device)
            self.held += x.nbytes
        return kept

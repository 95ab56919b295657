"""Streams and events that only write down what they are asked, in place of those of a GPU; copies stay on the CPU."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from momkd.data import batches, prefetch


class FakeStreams:
    """What happened, in order: (what, with what, on which stream, in which thread)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, object, str, str]] = []
        self.current = threading.local()
        self.numbers = itertools.count()

    def note(self, what: str, subject: object, stream: str) -> None:
        self.log.append((what, subject, stream, threading.current_thread().name))

    def stream_name(self) -> str:
        return getattr(self.current, "name", "compute")

    def of(self, *kinds: str) -> list[tuple[str, object, str, str]]:
        return [entry for entry in self.log if entry[0] in kinds]


def install(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    """Every device counts as one with streams, and page-locked memory is plain memory, until the test ends."""
    fake = FakeStreams()

    class Stream:
        def __init__(self, device: object = None, name: str = "side") -> None:
            self.device, self.name = device, name

        def wait_event(self, event: Event) -> None:
            fake.note("wait", event.number, self.name)

    class Event:
        def __init__(self, blocking: bool = False) -> None:
            self.number, self.blocking = next(fake.numbers), blocking

        def record(self, stream: Stream) -> None:
            fake.note("record", self.number, stream.name)

        def synchronize(self) -> None:
            assert self.blocking
            fake.note("synchronize", self.number, fake.stream_name())

    @contextlib.contextmanager
    def stream(side: Stream) -> Iterator[None]:
        fake.current.name = side.name
        yield
        del fake.current.name

    def noted_copy(assembled: Any, device: torch.device) -> Any:
        fake.note("copy", assembled.batch.number, fake.stream_name())
        return copy(assembled, device)

    copy = batches.Assembled.to
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, fake.stream_name()))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, stream: fake.note("keep", t.data_ptr(), stream.name), raising=False
    )
    monkeypatch.setattr(batches.Assembled, "to", noted_copy)
    transfers = {torch.device("cpu"): prefetch.StreamTransfer(torch.device("cpu"))}
    monkeypatch.setattr(prefetch, "_transfer", transfers.__getitem__)
    return fake


def pinned(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """The tensors that were page-locked, by address; their memory is plain."""
    locked: dict[int, torch.Tensor] = {}

    def lock(t: torch.Tensor) -> torch.Tensor:
        made = t.clone()
        locked[made.data_ptr()] = made
        return made

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = plain(*shape, **options)
        if pin_memory:
            locked[made.data_ptr()] = made
        return made

    plain = torch.empty
    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(torch, "empty", empty)
    return locked

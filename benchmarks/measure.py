"""Timing side by side: the call and its peers take turns in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch


def interleaved(calls: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each call; every round runs each of them once, beginning with another one each time."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + warmup):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            began = time.perf_counter()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def copy_rate(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes a second of a large copy, reads and writes counted: the ceiling of what is bound by memory."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return 2 * source.nbytes / seconds


def product_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a large matrix product: the ceiling of what is bound by arithmetic."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = interleaved({"product": lambda: a @ b}, rounds=9)["product"]
    return 2 * n**3 / seconds


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most memory that torch's allocator held during a call, above what it held before.

    On the CPU what the profiler saw allocated and freed is added up; a kernel's own small buffers are not seen.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))

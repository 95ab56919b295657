"""Timing side by side: the call and its peers take turns in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

on_each_device = pytest.mark.parametrize("device", ["cpu", "cuda"])


def require(device: str) -> None:
    """Skip where the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")


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


@cache
def copy_rate(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes a second of a large copy, reads and writes counted: the ceiling of what is bound by memory."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return 2 * source.nbytes / seconds


@cache
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


def forward_and_backward(form: Callable[[], Tensor], leaves: Iterable[Tensor]) -> Callable[[], None]:
    """One step of training with `form`: its gradients are formed anew each time."""
    leaves = tuple(leaves)

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        form().sum().backward()

    return run


def must_agree(got: Tensor, want: Tensor, tolerance: float) -> None:
    """A wrong result is not timed."""
    got, want = got.detach(), want.detach()
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < tolerance, f"wrong by {error:.1e}, allowed {tolerance:.0e}: no time is reported"


def compare(
    benchmark: Any,
    device: str,
    calls: Mapping[str, Callable[[], object]],
    *,
    work: tuple[float, float],
    dtype: torch.dtype = torch.float32,
    rounds: int = 7,
    **facts: object,
) -> None:
    """Time the first of the calls beside the others, its peers, and write what came out into `extra_info`.

    `work` are the operations of the products and the bytes that it can't do without: their times at the rates of a
    large product and a large copy are the floor, the longer of the two.
    """
    (operations, moved), (mine, *peers) = work, calls
    floor = max(operations / product_rate(device, dtype), moved / copy_rate(device))
    info = benchmark.extra_info
    for name, call in calls.items():
        info[f"peak MB of {name}"] = peak_bytes(call, device) / 1e6
    seconds = interleaved(calls, rounds=rounds)
    for name, each in seconds.items():
        info[f"seconds of {name}"] = each
    for name in peers:
        info[f"times as fast as {name}"] = seconds[name] / seconds[mine]
    info |= {
        "attained": floor / seconds[mine],
        "floor": "product" if floor > moved / copy_rate(device) else "copy",
        "TFLOP/s": operations / seconds[mine] / 1e12,
        "GB/s": moved / seconds[mine] / 1e9,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **facts,
    }
    benchmark.pedantic(calls[mine], rounds=3)

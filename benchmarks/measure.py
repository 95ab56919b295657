"""Timing side by side: the call and its peers take turns in one process, so that what disturbs one disturbs all.

On a GPU a call returns before its kernels have run. So every time here ends in a synchronisation, and three times are
told apart: that of the device, that of the host, and both together.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from momkd.native import recycle

on_each_device = pytest.mark.parametrize("device", ["cpu", "cuda"])

_CYCLES = 2e9  # of a GPU in a second, about
_LONGEST_WAIT = 0.2  # seconds


def commit() -> str:
    """Return the commit that is measured: MOMKD_COMMIT, else what git says, else why it is unknown."""
    if told := os.environ.get("MOMKD_COMMIT", "").strip():
        return told
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError as error:
        return f"unknown: {error}"
    return done.stdout.strip() or f"unknown: {done.stderr.strip()}"


def require(device: str) -> None:
    """Skip where the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")


class Timing(NamedTuple):
    """Median seconds of a call. On the CPU all three are the same."""

    device: float  # between two CUDA events, with the call queued before the first of them
    wall: float  # until the device has finished
    host: float  # until the call has returned; nothing is waited for


def synchronize(device: str) -> None:
    """Wait until the device has finished: a GPU wherever one is in use, also where a caller says nothing of it."""
    if device == "cuda" or torch.cuda.is_initialized():
        torch.cuda.synchronize()


def synchronized(call: Callable[[], object], device: str) -> Callable[[], None]:
    """Return the call with a synchronisation at its end."""

    def run() -> None:
        call()
        synchronize(device)

    return run


def record(benchmark: Any, call: Callable[[], object], device: str, rounds: int = 3) -> None:
    """Let pytest-benchmark time a call until the device has finished. Every benchmark that may use a GPU ends here."""
    benchmark.pedantic(synchronized(call, device), rounds=rounds)


def _once(call: Callable[[], object], device: str) -> Timing:
    synchronize(device)
    began = time.perf_counter()
    call()
    returned = time.perf_counter()
    if device != "cuda":
        synchronize(device)
        return Timing(*3 * [time.perf_counter() - began])
    torch.cuda.synchronize()
    host, wall = returned - began, time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(_CYCLES * min(1.3 * host + 5e-5, _LONGEST_WAIT)))  # the host gets ahead meanwhile
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return Timing(start.elapsed_time(end) / 1e3, wall, host)


def timings(
    calls: Mapping[str, Callable[[], object]], device: str = "cpu", *, rounds: int = 15, warmup: int = 2
) -> dict[str, Timing]:
    """Median times of each call; every round runs each of them, beginning with another one each time.

    The device's time leaves out what the host takes to launch a call, up to about a thousand kernels: more don't fit
    the queue of launches.
    """
    names = list(calls)
    taken: dict[str, list[Timing]] = {name: [] for name in names}
    for number in range(rounds + warmup):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            once = _once(calls[name], device)
            if number >= warmup:
                taken[name].append(once)
    return {name: Timing(*map(statistics.median, zip(*each, strict=True))) for name, each in taken.items()}


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: str = "cpu", *, rounds: int = 15, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each call on its device, in turns."""
    return {name: each.device for name, each in timings(calls, device, rounds=rounds, warmup=warmup).items()}


def rotating(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a call that runs one of the calls, the next one each time: its inputs are not in the cache."""
    turns = cycle(calls)
    return lambda: next(turns)()


@cache
def copy_rate(device: str = "cpu", megabytes: int = 0) -> float:
    """Bytes a second of a large copy, reads and writes counted: the ceiling of what is bound by memory."""
    source = torch.ones((megabytes or (2048 if device == "cuda" else 256)) << 18, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, device, rounds=9)["copy"]
    return 2 * source.nbytes / seconds


@cache
def product_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 0) -> float:
    """Operations a second of a large matrix product: the ceiling of what is bound by arithmetic."""
    n = size or (8192 if device == "cuda" else 1536)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = interleaved({"product": lambda: a @ b}, device, rounds=9)["product"]
    return 2 * n**3 / seconds


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most memory that torch's allocator held during a call, above what it held before.

    On the CPU what the profiler saw allocated and freed is added up; a kernel's own small buffers are not seen. What
    earlier calls left to be used again is given up first: it counts too.
    """
    call()
    recycle.clear()
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
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def forward_and_backward(form: Callable[[], Tensor], leaves: Iterable[Tensor]) -> Callable[[], None]:
    """One step of training with `form`. Its gradients are given up at its end, so that peak memory counts them."""
    leaves = tuple(leaves)

    def run() -> None:
        torch.autograd.grad(form().sum(), leaves)

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
    taken = timings(calls, device, rounds=rounds)
    seconds = {name: each.device for name, each in taken.items()}
    for name, each in taken.items():
        info[f"seconds of {name}"] = each.device
        if device == "cuda":
            info[f"seconds until the end of {name}"] = each.wall
            info[f"host µs of {name}"] = 1e6 * each.host
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
    record(benchmark, calls[mine], device)

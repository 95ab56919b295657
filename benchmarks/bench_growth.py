"""Growth: time over the number of patches, and over how they are spread on bags.

Slope: of log seconds over log patches by least squares, over the upper half of the sizes; 1 is linear. A batch of
ragged bags should cost what its patches cost: the same number of patches in equal bags, in bags of lognormal size, and
nearly all in one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.measure import interleaved, on_each_device, peak_bytes, record, require
from momkd import Bags
from momkd import functional as F

S, K, C, WIDTH, HIDDEN = 64, 16, 2, 128, 64
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
FULL = (*SIZES, 300_000, 1_000_000)
OPS = ("gated_attention_pool", "memory_guided_pool", "ema_scatter_")


def lengths_of(kind: str, patches: int, bags: int = 32) -> list[int]:
    """How many patches each bag has; they sum to `patches`."""
    if kind == "one giant":
        return [patches - bags + 1, *[1] * (bags - 1)]
    share = np.ones(bags)
    if kind == "lognormal":
        share = np.exp(1.0 * np.random.default_rng(0).standard_normal(bags))
    lengths = np.floor(patches * share / share.sum()).astype(int)
    lengths[0] += patches - lengths.sum()
    return [int(n) for n in lengths]


def call_of(op: str, lengths: list[int], device: str) -> Callable[[], object]:
    """One forward pass of an op, by the backend that dispatch takes; inputs are made here."""
    torch.manual_seed(0)
    n = sum(lengths)
    memory = torch.nn.functional.normalize(torch.randn(C, K, S, device=device), dim=-1)
    if op == "ema_scatter_":
        usage, z = torch.zeros(C, K, device=device), torch.randn(n, S, device=device)
        row_class = torch.randint(0, C, (n,), device=device)
        return lambda: F.ema_scatter_(memory, usage, z, row_class, momentum=0.99)
    bags = Bags.from_lengths(torch.randn(n, WIDTH, device=device), lengths)
    if op == "memory_guided_pool":
        z = torch.randn(n, S, device=device)
        return lambda: F.memory_guided_pool(z, bags.features, memory, bags.offsets, 0.2)
    w_v, w_u = (torch.randn(HIDDEN, WIDTH, device=device) / WIDTH**0.5 for _ in range(2))
    w_a = torch.randn(1, HIDDEN, device=device) / HIDDEN**0.5
    return lambda: F.gated_attention_pool(bags.features, bags.offsets, w_v, None, w_u, None, w_a, None)


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Of the upper half of the sizes, in logarithms: below, what a call costs however small it is shows."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


@on_each_device
@pytest.mark.parametrize("op", OPS)
def test_growth(benchmark: Any, full: bool, device: str, op: str) -> None:
    require(device)
    sizes = FULL if full or device == "cuda" else SIZES
    calls = {n: call_of(op, lengths_of("lognormal", n), device) for n in sizes}
    seconds = interleaved({str(n): call for n, call in calls.items()}, device, rounds=7)
    info = benchmark.extra_info
    info["growth"] = {n: seconds[str(n)] for n in sizes}
    info["slope of time"] = slope(sizes, list(seconds.values()))
    info["nanoseconds a patch"] = 1e9 * seconds[str(sizes[-1])] / sizes[-1]
    info["peak MB"] = {n: peak_bytes(call, device) / 1e6 for n, call in calls.items()}
    info["bytes a patch"] = 1e6 * info["peak MB"][sizes[-1]] / sizes[-1]
    record(benchmark, calls[sizes[-1]], device)


@on_each_device
@pytest.mark.parametrize("op", OPS[:2])
def test_spread_over_bags(benchmark: Any, full: bool, device: str, op: str) -> None:
    require(device)
    patches = 1_000_000 if full or device == "cuda" else 60_000
    kinds = ("equal bags", "lognormal", "one giant")
    calls = {kind: call_of(op, lengths_of(kind, patches), device) for kind in kinds}
    seconds = interleaved(calls, device, rounds=9)
    for kind in kinds:
        benchmark.extra_info[f"seconds of {kind}"] = seconds[kind]
        benchmark.extra_info[f"{kind} / equal bags"] = seconds[kind] / seconds["equal bags"]
    benchmark.extra_info["patches"] = patches
    record(benchmark, calls["one giant"], device)

"""Native kernels and torch take turns: one OpenMP pool for both, so that neither waits for the other's threads.

Two pools would show as a ratio over 1: the threads of one still spin when the other's begin.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.measure import interleaved
from momkd import dispatch, reference
from momkd import functional as F

TURNS = 20


@pytest.mark.parametrize("threads", [1, 2])
def test_taking_turns(benchmark: Any, threads: int) -> None:
    able, reason = dispatch.can_run("ema_scatter_", "native")
    if not able:
        pytest.skip(f"the native kernel can't run: {reason}")
    torch.manual_seed(0)
    memory = torch.nn.functional.normalize(torch.randn(2, 16, 64), dim=-1)
    usage, z, row_class = torch.zeros(2, 16), torch.randn(20_000, 64), torch.randint(0, 2, (20_000,))
    weight = torch.randn(64, 64)
    wanted = memory.double()
    reference.ema_scatter_(wanted, usage.double(), z.double(), row_class, None, 0.9)
    F.ema_scatter_(memory, usage, z, row_class, momentum=0.9, backend="native")
    assert float((memory - wanted).norm() / wanted.norm()) < 1e-5, "the kernel is wrong; no time is reported"

    def native() -> None:
        F.ema_scatter_(memory, usage, z, row_class, momentum=0.9, backend="native")

    def by_torch() -> None:
        torch.relu(z @ weight)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = interleaved(
            {
                "native": lambda: [native() for _ in range(TURNS)],
                "torch": lambda: [by_torch() for _ in range(TURNS)],
                "in turn": lambda: [(native(), by_torch()) for _ in range(TURNS)],
            }
        )
        benchmark.extra_info.update({f"seconds of {name}": each for name, each in seconds.items()})
        benchmark.extra_info["in turn / each alone"] = seconds["in turn"] / (seconds["native"] + seconds["torch"])
        benchmark.pedantic(native, rounds=5)
    finally:
        torch.set_num_threads(before)

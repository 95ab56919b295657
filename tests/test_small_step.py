"""Small bags are bound by the number of calls of torch: a step of momkd makes fewer than the same written by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bench_small_step import Small, small_calls


class Calls(TorchDispatchMode):
    """Counts what torch's dispatcher is asked for, backward and optimizer included."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made[str(op)] += 1
        return op(*args, **(kwargs or {}))


def calls_of(function: Callable[[], object]) -> Counter[str]:
    with Calls() as counted:
        function()
    return counted.made


@pytest.fixture(scope="module")
def small() -> Small:
    return small_calls()  # which compares losses, weights, prototypes and probabilities of both


@pytest.mark.parametrize(("what", "share"), [("step", 0.8), ("validation", 1.4)])
def test_calls_of_torch_are_few(small: Small, what: str, share: float) -> None:
    ours, by_hand = (calls_of(each) for each in getattr(small, what).values())
    assert ours.total() <= share * by_hand.total(), ours.most_common(20)

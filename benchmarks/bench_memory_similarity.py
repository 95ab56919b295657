"""memory_similarity forward and backward, to rows and memory, against its definition and against eager torch.

Floor: z read forward and again backward, its gradient written.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measure import compare, must_agree, on_each_device, require
from momkd import dispatch, reference
from momkd import functional as F

C, K, S, TAU = 2, 16, 64, 5.0


def eager(z: Tensor, memory: Tensor, reduce: str) -> Tensor:
    unit = torch.nn.functional.normalize(memory, dim=-1).flatten(0, 1)
    cosines = (torch.nn.functional.normalize(z, dim=1) @ unit.T).view(-1, C, K)
    return cosines.amax(2) if reduce == "max" else torch.logsumexp(TAU * cosines, 2) / TAU


def make_case(device: str, n: int, reduce: str) -> Case:
    """The op and its peers on n rows; rows and memory get gradients."""
    torch.manual_seed(0)
    z = torch.randn(n, S, device=device, requires_grad=True)
    memory = torch.randn(C, K, S, device=device, requires_grad=True)
    return Case(
        {
            "momkd": lambda: F.memory_similarity(z, memory, reduce=reduce, tau=TAU)[0],
            "reference": lambda: F.memory_similarity(z, memory, reduce=reduce, tau=TAU, backend="torch")[0],
            "eager": lambda: eager(z, memory, reduce),
        },
        (z, memory),
        lambda z, memory: reference.memory_similarity(z, memory, reduce, TAU)[0],
        ((3 if reduce == "lse" else 1) * 2 * n * C * K * S, 3 * z.nbytes),
        facts={"rows": n, "backend": dispatch.choose("memory_similarity", None, (z, memory))},
    )


@pytest.mark.parametrize("reduce", ["max", "lse"])
@on_each_device
def test_memory_similarity(benchmark: Any, full: bool, device: str, reduce: str) -> None:
    require(device)
    case = make_case(device, 1 << 20 if device == "cuda" else 200_000 if full else 40_000, reduce)
    want = case.exact(*(leaf.detach().double() for leaf in case.leaves))
    must_agree(case.forms["momkd"](), want, 1e-5)
    compare(benchmark, device, case.steps(), work=case.work, **case.facts)

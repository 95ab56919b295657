"""memory_similarity forward and backward, to rows and memory, against its definition and against eager torch.

Floor: z read forward and again backward, its gradient written.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import compare, forward_and_backward, must_agree, on_each_device, require
from momkd import dispatch, reference
from momkd import functional as F

C, K, S, TAU = 2, 16, 64, 5.0


def eager(z: Tensor, memory: Tensor, reduce: str) -> Tensor:
    unit = torch.nn.functional.normalize(memory, dim=-1).flatten(0, 1)
    cosines = (torch.nn.functional.normalize(z, dim=1) @ unit.T).view(-1, C, K)
    return cosines.amax(2) if reduce == "max" else torch.logsumexp(TAU * cosines, 2) / TAU


@pytest.mark.parametrize("reduce", ["max", "lse"])
@on_each_device
def test_memory_similarity(benchmark: Any, full: bool, device: str, reduce: str) -> None:
    require(device)
    n = 1 << 20 if device == "cuda" else 200_000 if full else 40_000
    torch.manual_seed(0)
    z = torch.randn(n, S, device=device, requires_grad=True)
    memory = torch.randn(C, K, S, device=device, requires_grad=True)
    want, _ = reference.memory_similarity(z.detach().double(), memory.detach().double(), reduce, TAU)
    must_agree(F.memory_similarity(z, memory, reduce=reduce, tau=TAU)[0], want, 1e-5)
    forms = {
        "momkd": lambda: F.memory_similarity(z, memory, reduce=reduce, tau=TAU)[0],
        "reference": lambda: F.memory_similarity(z, memory, reduce=reduce, tau=TAU, backend="torch")[0],
        "eager": lambda: eager(z, memory, reduce),
    }
    compare(
        benchmark,
        device,
        {name: forward_and_backward(form, (z, memory)) for name, form in forms.items()},
        work=((3 if reduce == "lse" else 1) * 2 * n * C * K * S, 3 * z.nbytes),
        rows=n,
        backend=dispatch.choose("memory_similarity", None, (z, memory)),
    )

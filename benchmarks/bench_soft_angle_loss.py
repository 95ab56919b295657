"""soft_angle_loss forward and backward against its definition and against eager torch as one would write it.

Floor: z read forward and again backward, its gradient written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measure import compare, must_agree, on_each_device, require
from momkd import dispatch, reference
from momkd import functional as F

C, K, S = 2, 16, 64
MARGIN, TAU, BETA = 0.3, 5.0, 20.0


def eager(z: Tensor, memory: Tensor, labels: Tensor) -> Tensor:
    cosines = (torch.nn.functional.normalize(z, dim=1) @ memory.flatten(0, 1).T).view(-1, C, K)
    s = torch.logsumexp(TAU * cosines, 2) / TAU
    own = s.gather(1, labels[:, None])[:, 0]
    other = s.gather(1, 1 - labels[:, None])[:, 0]
    return torch.nn.functional.softplus(BETA * (MARGIN - own + other))


def make_case(device: str, n: int) -> Case:
    """The op and its peers on n rows, which get gradients."""
    torch.manual_seed(0)
    z, labels = torch.randn(n, S, device=device, requires_grad=True), torch.randint(0, C, (n,), device=device)
    memory = torch.nn.functional.normalize(torch.randn(C, K, S, device=device), dim=-1)
    settings: dict[str, Any] = {"margin": MARGIN, "tau": TAU, "beta": BETA, "reduction": "none"}
    return Case(
        {
            "momkd": lambda: F.soft_angle_loss(z, memory, labels, **settings),
            "reference": lambda: F.soft_angle_loss(z, memory, labels, **settings, backend="torch"),
            "eager": lambda: eager(z, memory, labels),
        },
        (z,),
        lambda z: reference.soft_angle_loss(z, memory.double(), labels, MARGIN, TAU, BETA),
        (3 * 2 * n * C * K * S, 3 * z.nbytes),
        facts={"rows": n, "backend": dispatch.choose("soft_angle_loss", None, (z, memory, labels))},
    )


@on_each_device
def test_soft_angle_loss(benchmark: Any, full: bool, device: str) -> None:
    require(device)
    case = make_case(device, 1 << 20 if device == "cuda" else 200_000 if full else 40_000)
    want = case.exact(*(leaf.detach().double() for leaf in case.leaves))
    must_agree(case.forms["momkd"](), want, 1e-5)
    compare(benchmark, device, case.steps(), work=case.work, **case.facts)

"""How far a case is from float64, forward and backward, and how far it may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tests.compare import FORWARD, GRADIENT, HALVES, cosine, relative
from tests.gpu.cases import Case, Outputs


class Finding(NamedTuple):
    """One figure; NaN is never right."""

    name: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.1e}, allowed {self.allowed:.1e}"


def leaves(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in case.tensors]


def cotangents(case: Case, outputs: Outputs, seed: int = 0) -> list[Tensor]:
    """Gradients of the outputs, in float64: random, and none of them far from 1 on average."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (1 + torch.randn(out.shape, generator=generator)).to(out.device, torch.float64)
        for out in outputs[: case.differentiable]
    ]


def gradients(case: Case, outputs: Outputs, given: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    used = outputs[: case.differentiable]
    return list(torch.autograd.grad(used, given, [g.to(o.dtype) for g, o in zip(grads, used, strict=True)]))


def forward(case: Case, got: Outputs, want: Outputs, dtype: torch.dtype) -> Iterator[Finding]:
    half = dtype in HALVES
    low = case.plain(*(t.to(dtype) if half else t for t in case.tensors)) if half else got
    for number, (a, b, c) in enumerate(zip(got, want, low, strict=True)):
        allowed = 2 * relative(c, b) + 1e-7 if half else FORWARD
        yield Finding(f"output {number}", relative(a, b), allowed)


def backward(
    case: Case, got: list[Tensor], want: list[Tensor], grads: list[Tensor], dtype: torch.dtype
) -> Iterator[Finding]:
    size = sum(float(g.norm()) for g in grads)
    for name, a, b in zip(case.names, got, want, strict=True):
        if float(b.norm()) <= 1e-9 * size:  # zero by the mathematics: rounding is all there is
            yield Finding(f"d {name}, which is zero", float(a.double().norm()), GRADIENT * max(size, 1.0))
        elif dtype not in HALVES:
            yield Finding(f"d {name}", relative(a, b), GRADIENT)
        else:
            yield Finding(f"1 - cosine of d {name}", 1 - cosine(a, b), 1e-3)


def findings(case: Case, dtype: torch.dtype, *, seed: int = 0) -> Iterator[Finding]:
    """All figures of a case whose inputs are of `dtype`, forward first."""
    mine, exact = leaves(case), leaves(case, torch.float64)
    got, want = case.call(*mine), case.exact(*exact)
    grads = cotangents(case, want, seed)
    yield from forward(case, got, want, dtype)
    yield from backward(case, gradients(case, got, mine, grads), gradients(case, want, exact, grads), grads, dtype)


def assert_right(case: Case, dtype: torch.dtype, *, seed: int = 0) -> None:
    wrong = [str(finding) for finding in findings(case, dtype, seed=seed) if not finding.right]
    assert not wrong, f"{case.op} {dtype}: " + "; ".join(wrong)

"""How far a case is from float64, forward and backward, and how far it may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tests.compare import FORWARD, GRADIENT, HALVES, cosine, relative
from tests.gpu.cases import Case, Outputs

FEW = 8  # values: of so few, the error of plain torch is no measure of its precision


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


def cotangents(outputs: Outputs, count: int, seed: int = 0) -> list[Tensor]:
    """Gradients of the first `count` outputs, in float64: random, and 1 on average."""
    generator = torch.Generator().manual_seed(seed)
    return [(1 + torch.randn(out.shape, generator=generator)).to(out.device, torch.float64) for out in outputs[:count]]


def gradients(outputs: Outputs, given: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Of the first outputs, as many as there are `grads`; nothing comes from one without elements. May be repeated."""
    used = [(out, g.to(out.dtype)) for out, g in zip(outputs, grads, strict=False) if out.numel() or out.requires_grad]
    if not used:
        return [torch.zeros_like(t) for t in given]
    heads, cotangent = zip(*used, strict=True)
    return list(torch.autograd.grad(heads, given, cotangent, retain_graph=True))


def forward(case: Case, got: Outputs, want: Outputs, dtype: torch.dtype) -> Iterator[Finding]:
    half = dtype in HALVES
    low = case.plain(*(t.to(dtype) if half else t for t in case.tensors)) if half else got
    for number, (a, b, c) in enumerate(zip(got, want, low, strict=True)):
        allowed = 2 * relative(c, b) + 1e-7 if half else FORWARD
        if half and b.numel() < FEW:  # plain torch may be right by luck
            allowed = max(allowed, torch.finfo(dtype).eps)
        yield Finding(f"output {number}", relative(a, b), allowed)


def backward(
    case: Case, got: list[Tensor], want: list[Tensor], grads: list[Tensor], dtype: torch.dtype
) -> Iterator[Finding]:
    size = sum(float(g.norm()) for g in grads)
    for name, a, b in zip(case.names, got, want, strict=True):
        if float(b.norm()) <= 1e-9 * size:  # zero by the mathematics: rounding is all there is
            allowed = (torch.finfo(dtype).eps if dtype in HALVES else GRADIENT) * max(size, 1.0)
            yield Finding(f"d {name}, which is zero", float(a.double().norm()), allowed)
        elif dtype not in HALVES:
            yield Finding(f"d {name}", relative(a, b), GRADIENT)
        else:
            yield Finding(f"1 - cosine of d {name}", 1 - cosine(a, b), 1e-3)


def findings(case: Case, dtype: torch.dtype, *, seed: int = 0) -> Iterator[Finding]:
    """All figures of a case that computes in `dtype`: forward, then the gradients that come from pooled rows alone,
    where scores would drown them, and those from all outputs."""
    mine, exact = leaves(case), leaves(case, torch.float64)
    got, want = case.call(*mine), case.exact(*exact)
    yield from forward(case, got, want, dtype)
    for count in range(1, case.differentiable + 1):
        grads = cotangents(want, count, seed)
        yield from backward(case, gradients(got, mine, grads), gradients(want, exact, grads), grads, dtype)


def wrong(case: Case, dtype: torch.dtype, *, seed: int = 0) -> list[str]:
    return [str(finding) for finding in findings(case, dtype, seed=seed) if not finding.right]

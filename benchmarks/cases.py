"""What a benchmark times: an op and its peers on the same inputs, and how its result is checked first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import forward_and_backward

FORWARD, GRADIENT, COSINE = 1e-5, 1e-4, 0.999


class Case(NamedTuple):
    """An op and its peers on the same inputs."""

    forms: dict[str, Callable[[], Tensor]]  # forward passes, the first is ours
    leaves: tuple[Tensor, ...]  # what gets a gradient
    exact: Callable[..., Tensor]  # the definition, given the leaves in float64
    work: tuple[float, float]  # operations and bytes of forward and backward that can't be avoided
    dtype: torch.dtype = torch.float32
    plain: Callable[[], Tensor] | None = None  # in 16-bit types: plain torch, whose error is the measure
    facts: Mapping[str, Any] = MappingProxyType({})

    def steps(self) -> dict[str, Callable[[], None]]:
        """Each form forward and backward."""
        return {name: forward_and_backward(form, self.leaves) for name, form in self.forms.items()}


def relative(got: Tensor, want: Tensor) -> float:
    """|got − want| / |want| in float64; the absolute error where want is zero."""
    got, want = got.detach().double(), want.detach().double()
    size = float(want.norm())
    return float((got - want).norm()) / (size or 1.0)


def _with_gradients(form: Callable[..., Tensor], leaves: tuple[Tensor, ...], *given: Tensor) -> list[Tensor]:
    out = form(*given)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def check(case: Case) -> float:
    """Return the relative error of the result; the gradients are compared too.

    float32: at most 1e-5 forward and 1e-4 for gradients. 16-bit types: at most twice the error of plain torch in that
    type, and for gradients a cosine of at least 0.999.

    Raises:
        AssertionError: the result is wrong, so that no time may be reported.
    """
    form = next(iter(case.forms.values()))
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in case.leaves)
    want = _with_gradients(case.exact, wide, *wide)
    got = _with_gradients(form, case.leaves)
    plain = None if case.plain is None else _with_gradients(case.plain, case.leaves)
    largest = max((float(g.norm()) for g in want[1:]), default=0.0)
    errors = []
    for i, (mine, exact) in enumerate(zip(got, want, strict=True)):
        what = "the result" if i == 0 else f"gradient {i}"
        if i and float(exact.norm()) < 1e-6 * largest:
            continue  # of a bias before a softmax: zero but for rounding
        allowed = FORWARD if i == 0 else GRADIENT
        if plain is not None:
            allowed = 2 * relative(plain[i], exact) + 1e-7
            cosine = float(
                torch.nn.functional.cosine_similarity(mine.detach().double().flatten(), exact.detach().flatten(), 0)
            )
            assert i == 0 or cosine >= COSINE, f"{what} has a cosine of {cosine:.5f}: no time is reported"
        errors.append(relative(mine, exact))
        assert errors[-1] <= allowed, f"{what} is wrong by {errors[-1]:.1e}, allowed {allowed:.1e}: no time is reported"
    return errors[0]

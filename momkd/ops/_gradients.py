"""A backward op returns a list of the gradients that are needed, and of no others: its schema has no place for None."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def pack(grads: Iterable[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """The gradients that are needed."""
    return [g for g, need in zip(grads, needs, strict=True) if need and g is not None]


def fake(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """The shapes that `pack` will give."""
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(inputs, needs, strict=True)
        if need and t is not None
    ]


def unpack(grads: Iterable[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients in the order of the inputs, None for autograd where none is needed."""
    rest = iter(grads)
    return [next(rest) if need else None for need in needs]

"""A backward op returns one tensor an input; where no gradient is needed an empty one stands in for None."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def pack(grads: Iterable[Tensor | None], like: Tensor) -> list[Tensor]:
    """None -> an empty tensor, so that the result fits an op's schema."""
    return [like.new_empty(0) if g is None else g for g in grads]


def fake(inputs: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """The shapes that `pack` will give."""
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and need else like.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    ]


def unpack(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Back to None for autograd."""
    return [g if need else None for g, need in zip(grads, needs, strict=True)]

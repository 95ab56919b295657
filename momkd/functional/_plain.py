"""The gate of one bag in plain torch, as one would write it: quicker than a kernel where there is little to do."""

from __future__ import annotations

import torch
from torch import Tensor

_linear = torch.nn.functional.linear


def gate(
    x: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
) -> Tensor:
    """x (N, L) -> scores (N, H) in float32."""
    hidden = torch.tanh(_linear(x, w_v, b_v))
    if w_u is not None:
        hidden = hidden * torch.sigmoid(_linear(x, w_u, b_u))
    scores = _linear(hidden, w_a, b_a)
    return scores if scores.dtype == torch.float32 else scores.float()


def pool_one_bag(x: Tensor, scores: Tensor) -> Tensor:
    """x (N, L), scores (N, H) -> (1, H, L) in the dtype of x; N ≥ 1."""
    weights = torch.softmax(scores, 0)
    if x.dtype != torch.float32:
        weights = weights.to(x.dtype)
    return (weights.T @ x)[None]

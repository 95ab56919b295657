"""gated_attention_pool: the attention of Ilse et al. over ragged bags, with H branches and CLAM's dropout.

s_ih = w_a[h] · (drop(tanh(W_v x_i + b_v)) ⊙ drop(σ(W_u x_i + b_u))) + b_a[h]
α = softmax of s over the bag, per branch;  out[b, h] = Σ_{i in b} α_ih x_i.

Source: Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", ICML 2018, equations 7 to 9.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from momkd.reference.philox import gate_dropout_masks, keep_scale
from momkd.reference.segments import (
    accumulate_dtype,
    check_offsets,
    segment_softmax,
    softmax_pool_backward,
    softmax_stats,
    spread_to_rows,
    weighted_sum,
)


class GateParameters(NamedTuple):
    """w_v, w_u (D, L); b_v, b_u (D,); w_a (H, D); b_a (H,). `w_u` None is the ungated form; a bias may be None."""

    w_v: Tensor
    b_v: Tensor | None
    w_u: Tensor | None
    b_u: Tensor | None
    w_a: Tensor
    b_a: Tensor | None


class _Gate(NamedTuple):
    tanh: Tensor  # (N, D) before dropout
    sigma: Tensor | None  # (N, D) before dropout
    keep_tanh: Tensor | None  # (N, D) 0 or the scale of kept values
    keep_sigma: Tensor | None
    hidden: Tensor  # (N, D) the product that w_a sees


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _gate(x: Tensor, parameters: GateParameters, dropout_p: float, seed: Tensor | None) -> _Gate:
    w_v, b_v, w_u, b_u, _, _ = parameters
    tanh = torch.tanh(_linear(x, w_v, b_v))
    sigma = None if w_u is None else torch.sigmoid(_linear(x, w_u, b_u))
    keep_tanh = keep_sigma = None
    if dropout_p > 0:
        assert seed is not None
        masks = gate_dropout_masks(seed, x.shape[0], w_v.shape[0], dropout_p)
        keep_tanh, keep_sigma = (m.to(x.dtype) * keep_scale(dropout_p) for m in masks)
    hidden = tanh if keep_tanh is None else tanh * keep_tanh
    if sigma is not None:
        hidden = hidden * (sigma if keep_sigma is None else sigma * keep_sigma)
    return _Gate(tanh, sigma, keep_tanh, keep_sigma, hidden)


def gated_attention_pool(
    x: Tensor, offsets: Tensor, parameters: GateParameters, dropout_p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, L), offsets (B+1,) -> pooled (B, H, L) in the dtype of x, scores (N, H) before softmax, stats (B, H, 2)."""
    check_offsets(offsets, x.shape[0])
    xa = x.to(accumulate_dtype(x.dtype))
    scores = _linear(_gate(xa, parameters, dropout_p, seed).hidden, parameters.w_a, parameters.b_a)
    stats = softmax_stats(scores, offsets)
    pooled = weighted_sum(segment_softmax(scores, stats, offsets), xa, offsets)
    return pooled.to(x.dtype), scores, stats


def gated_attention_pool_backward(
    grad_pooled: Tensor,
    grad_scores: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    seed: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_v, b_v, w_u, b_u, w_a, b_a in this order, None where `needs` says so; gates are recomputed."""
    check_offsets(offsets, x.shape[0])
    xa = x.to(accumulate_dtype(x.dtype))
    g = grad_pooled.to(xa.dtype)
    w_v, b_v, w_u, b_u, w_a, b_a = parameters
    gate = _gate(xa, parameters, dropout_p, seed)
    weights = segment_softmax(scores, stats, offsets)  # (N, H)
    d_scores = softmax_pool_backward(weights, xa, pooled.to(xa.dtype), g, offsets)
    if grad_scores is not None:
        d_scores = d_scores + grad_scores.to(xa.dtype)

    d_hidden = d_scores @ w_a.to(xa.dtype)  # (N, D)
    kept_tanh = gate.tanh if gate.keep_tanh is None else gate.tanh * gate.keep_tanh
    d_tanh, d_u = d_hidden, None
    if gate.sigma is not None:
        kept_sigma = gate.sigma if gate.keep_sigma is None else gate.sigma * gate.keep_sigma
        d_tanh = d_hidden * kept_sigma
        d_sigma = d_hidden * kept_tanh
        if gate.keep_sigma is not None:
            d_sigma = d_sigma * gate.keep_sigma
        d_u = d_sigma * gate.sigma * (1 - gate.sigma)  # (N, D) at the input of σ
    if gate.keep_tanh is not None:
        d_tanh = d_tanh * gate.keep_tanh
    d_v = d_tanh * (1 - gate.tanh**2)  # (N, D) at the input of tanh

    grads: list[Tensor | None] = [None] * 7
    if needs[0]:
        d_x = spread_to_rows(weights, g, offsets) + d_v @ w_v.to(xa.dtype)
        if w_u is not None and d_u is not None:
            d_x = d_x + d_u @ w_u.to(xa.dtype)
        grads[0] = d_x.to(x.dtype)
    if needs[1]:
        grads[1] = (d_v.T @ xa).to(w_v.dtype)
    if needs[2] and b_v is not None:
        grads[2] = d_v.sum(0).to(b_v.dtype)
    if needs[3] and w_u is not None and d_u is not None:
        grads[3] = (d_u.T @ xa).to(w_u.dtype)
    if needs[4] and b_u is not None and d_u is not None:
        grads[4] = d_u.sum(0).to(b_u.dtype)
    if needs[5]:
        grads[5] = (d_scores.T @ gate.hidden).to(w_a.dtype)
    if needs[6] and b_a is not None:
        grads[6] = d_scores.sum(0).to(b_a.dtype)
    return tuple(grads)

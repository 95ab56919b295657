"""gated_attention_pool: the attention of Ilse et al. over ragged bags, with H branches and CLAM's dropout.

s_ih = w_a[h] · (drop(tanh(W_v x_i + b_v)) ⊙ drop(σ(W_u x_i + b_u))) + b_a[h] + score_bias_ih
α = softmax of s over the bag, per branch;  out[b, h] = Σ_{i in b} α_ih x_i.

`gated_attention_scores` is its first line alone, without score_bias.

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

    def tanh_dropped(self) -> Tensor:
        return self.tanh if self.keep_tanh is None else self.tanh * self.keep_tanh

    def sigma_dropped(self) -> Tensor:
        assert self.sigma is not None
        return self.sigma if self.keep_sigma is None else self.sigma * self.keep_sigma

    def hidden(self) -> Tensor:
        """(N, D) the product that w_a sees."""
        return self.tanh_dropped() if self.sigma is None else self.tanh_dropped() * self.sigma_dropped()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _gate(
    x: Tensor, parameters: GateParameters, dropout_p: float, seed: Tensor | None, kept: Tensor | None = None
) -> _Gate:
    w_v, b_v, w_u, b_u, _, _ = parameters
    if kept is not None:
        tanh, sigma = kept[:, 0].to(x.dtype), None if w_u is None else kept[:, 1].to(x.dtype)
    else:
        tanh = torch.tanh(_linear(x, w_v, b_v))
        sigma = None if w_u is None else torch.sigmoid(_linear(x, w_u, b_u))
    keep_tanh = keep_sigma = None
    if dropout_p > 0:
        assert seed is not None
        masks = gate_dropout_masks(seed, x.shape[0], w_v.shape[0], dropout_p)
        keep_tanh, keep_sigma = (m.to(x.dtype) * keep_scale(dropout_p) for m in masks)
    return _Gate(tanh, sigma, keep_tanh, keep_sigma)


def gated_attention_scores(
    x: Tensor, parameters: GateParameters, dropout_p: float = 0.0, seed: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """x (N, L) -> scores (N, H), and with `keep` tanh(·) and σ(·) before dropout, (N, 2, D) or (N, 1, D) in x's dtype.

    Without `keep` the second is (0,).
    """
    gate = _gate(x.to(accumulate_dtype(x.dtype)), parameters, dropout_p, seed)
    scores = _linear(gate.hidden(), parameters.w_a, parameters.b_a)
    if not keep:
        return scores, x.new_empty(0)
    branches = [gate.tanh] if gate.sigma is None else [gate.tanh, gate.sigma]
    return scores, torch.stack(branches, 1).to(x.dtype)


def gated_attention_scores_backward(
    d_scores: Tensor,
    x: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    seed: Tensor | None,
    kept: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_v, b_v, w_u, b_u, w_a, b_a in this order, None where `needs` says so.

    `kept` is what forward kept; without it, the gate is computed again.
    """
    d_x, *grads = _gate_gradients(d_scores, x, parameters, dropout_p, seed, kept, needs)
    return (None if d_x is None else d_x.to(x.dtype), *grads)


def _gate_gradients(
    d_scores: Tensor,
    x: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    seed: Tensor | None,
    kept: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """As `gated_attention_scores_backward`, but the gradient of x in the dtype that sums have."""
    xa = x.to(accumulate_dtype(x.dtype))
    w_v, b_v, w_u, b_u, w_a, b_a = parameters
    d_scores = d_scores.to(xa.dtype)
    grads: list[Tensor | None] = [None] * 7
    if needs[6] and b_a is not None:
        grads[6] = d_scores.sum(0).to(b_a.dtype)
    if not any(needs[:6]):
        return tuple(grads)
    gate = _gate(xa, parameters, dropout_p, seed, kept)
    d_hidden = d_scores @ w_a.to(xa.dtype)  # (N, D)
    d_tanh, d_u = d_hidden, None
    if gate.sigma is not None:
        d_tanh = d_hidden * gate.sigma_dropped()
        d_sigma = d_hidden * gate.tanh_dropped()
        if gate.keep_sigma is not None:
            d_sigma = d_sigma * gate.keep_sigma
        d_u = d_sigma * gate.sigma * (1 - gate.sigma)  # (N, D) at the input of σ
    if gate.keep_tanh is not None:
        d_tanh = d_tanh * gate.keep_tanh
    d_v = d_tanh * (1 - gate.tanh**2)  # (N, D) at the input of tanh

    if needs[0]:
        d_x = d_v @ w_v.to(xa.dtype)
        if w_u is not None and d_u is not None:
            d_x = d_x + d_u @ w_u.to(xa.dtype)
        grads[0] = d_x
    if needs[1]:
        grads[1] = (d_v.T @ xa).to(w_v.dtype)
    if needs[2] and b_v is not None:
        grads[2] = d_v.sum(0).to(b_v.dtype)
    if needs[3] and w_u is not None and d_u is not None:
        grads[3] = (d_u.T @ xa).to(w_u.dtype)
    if needs[4] and b_u is not None and d_u is not None:
        grads[4] = d_u.sum(0).to(b_u.dtype)
    if needs[5]:
        grads[5] = (d_scores.T @ gate.hidden()).to(w_a.dtype)
    return tuple(grads)


def gated_attention_pool(
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    score_bias: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, L), offsets (B+1,) -> pooled (B, H, L) in the dtype of x, scores (N, H) before softmax, stats (B, H, 2).

    The fourth is what `gated_attention_scores` keeps. The scores hold `score_bias` (N, H).
    """
    check_offsets(offsets, x.shape[0])
    xa = x.to(accumulate_dtype(x.dtype))
    scores, kept = gated_attention_scores(x, parameters, dropout_p, seed, keep)
    if score_bias is not None:
        scores = scores + score_bias.to(scores.dtype)
    stats = softmax_stats(scores, offsets)
    pooled = weighted_sum(segment_softmax(scores, stats, offsets), xa, offsets)
    return pooled.to(x.dtype), scores, stats, kept


def gated_attention_pool_backward(
    grad_pooled: Tensor | None,
    grad_scores: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    seed: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    kept: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_v, b_v, w_u, b_u, w_a, b_a and of the scores (N, H), None where `needs` says so.

    A gradient that is None is zero. The last is that of `score_bias`, in the dtype of the scores.
    """
    check_offsets(offsets, x.shape[0])
    xa = x.to(accumulate_dtype(x.dtype))
    d_scores, d_pooled = torch.zeros_like(scores), None
    if grad_pooled is not None:
        g, weights = grad_pooled.to(xa.dtype), segment_softmax(scores, stats, offsets)  # (N, H)
        d_scores = softmax_pool_backward(weights, xa, pooled.to(xa.dtype), g, offsets)
        d_pooled = spread_to_rows(weights, g, offsets) if needs[0] else None
    if grad_scores is not None:
        d_scores = d_scores + grad_scores.to(xa.dtype)
    d_x, *grads = _gate_gradients(d_scores, x, parameters, dropout_p, seed, kept, needs[:7])
    if d_x is not None:
        d_x = (d_x if d_pooled is None else d_x + d_pooled).to(x.dtype)
    return (d_x, *grads, d_scores if needs[7] else None)

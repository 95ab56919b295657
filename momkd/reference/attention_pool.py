"""attention_pool: softmax of given scores over each bag, and the weighted sum of the bag's rows.

α_ih = exp(scores_ih) / Σ_{j in bag} exp(scores_jh);  out[b, h] = Σ_{i in b} α_ih · values_i.
An empty bag gives zeros, and so does a bag whose scores are all −inf.
"""

from __future__ import annotations

from torch import Tensor

from momkd.reference.segments import (
    accumulate_dtype,
    check_offsets,
    segment_softmax,
    softmax_pool_backward,
    softmax_stats,
    spread_to_rows,
    weighted_sum,
)


def attention_pool(values: Tensor, scores: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """values (N, L), scores (N, H), offsets (B+1,) -> pooled (B, H, L) in the dtype of values, stats (B, H, 2)."""
    check_offsets(offsets, values.shape[0])
    dtype = accumulate_dtype(values.dtype)
    s = scores.to(dtype)
    stats = softmax_stats(s, offsets)
    weights = segment_softmax(s, stats, offsets)
    return weighted_sum(weights, values.to(dtype), offsets).to(values.dtype), stats


def attention_pool_backward(
    grad: Tensor,
    values: Tensor,
    scores: Tensor,
    offsets: Tensor,
    pooled: Tensor,
    stats: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of values and scores, each None where `needs` says so."""
    check_offsets(offsets, values.shape[0])
    dtype = accumulate_dtype(values.dtype)
    g, v = grad.to(dtype), values.to(dtype)
    weights = segment_softmax(scores.to(dtype), stats, offsets)
    d_values = spread_to_rows(weights, g, offsets).to(values.dtype) if needs[0] else None
    d_scores = None
    if needs[1]:
        d_scores = softmax_pool_backward(weights, v, pooled.to(dtype), g, offsets).to(scores.dtype)
    return d_values, d_scores

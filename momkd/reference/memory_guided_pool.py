"""memory_guided_pool: attention that asks the memory which patches look like which class.

s_ic = max_k cos(z_i, M_ck). Branch `positive` (two classes): score_i = (s_i1 − s_i0) / temperature. One branch a class:
score_ic = (s_ic − max_{c' ≠ c} s_ic') / temperature. Softmax over the bag, weighted sum of the values. The memory is a
constant: no gradient reaches it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.reference.memory_similarity import memory_similarity, unit_rows, unit_rows_backward
from momkd.reference.segments import (
    accumulate_dtype,
    check_offsets,
    segment_softmax,
    softmax_pool_backward,
    softmax_stats,
    spread_to_rows,
    weighted_sum,
)


def _rivals(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """For each class the largest similarity of the others, and which: both (N, C)."""
    classes = similarity.shape[1]
    own = torch.eye(classes, dtype=torch.bool, device=similarity.device)
    others = similarity[:, None, :].masked_fill(own, -torch.inf)  # (N, C, C)
    top, index = others.max(dim=2)
    return top, index


def margins(similarity: Tensor, per_class: bool) -> Tensor:
    """(N, C) similarities -> (N, H) differences before the temperature: H = C per class, else 1."""
    if per_class:
        return similarity - _rivals(similarity)[0]
    return similarity[:, 1:2] - similarity[:, 0:1]


def memory_guided_pool(
    z: Tensor, values: Tensor, memory: Tensor, offsets: Tensor, temperature: Tensor, per_class: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """z (N, S), values (N, L), memory (C, K, S), offsets (B+1,), temperature () ->

    pooled (B, H, L) in the dtype of values, attention (N, H), slots (N, C) int32.
    """
    check_offsets(offsets, values.shape[0])
    if memory.shape[0] < 2 or (memory.shape[0] > 2 and not per_class):
        raise ValueError(f"memory: expected 2 classes, or more with per_class, got {memory.shape[0]}")
    dtype = accumulate_dtype(values.dtype)
    similarity, slots = memory_similarity(z.to(dtype), memory.detach())
    scores = margins(similarity, per_class) / temperature.to(dtype)
    attention = segment_softmax(scores, softmax_stats(scores, offsets), offsets)
    return weighted_sum(attention, values.to(dtype), offsets).to(values.dtype), attention, slots


def memory_guided_pool_backward(
    grad: Tensor,
    z: Tensor,
    values: Tensor,
    memory: Tensor,
    offsets: Tensor,
    temperature: Tensor,
    per_class: bool,
    pooled: Tensor,
    attention: Tensor,
    slots: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of z, values and temperature, each None where `needs` says so."""
    check_offsets(offsets, values.shape[0])
    dtype = accumulate_dtype(values.dtype)
    g, v, t = grad.to(dtype), values.to(dtype), temperature.to(dtype)
    d_z = d_values = d_temperature = None
    if needs[1]:
        d_values = spread_to_rows(attention, g, offsets).to(values.dtype)
    if not (needs[0] or needs[2]):
        return None, d_values, None

    d_scores = softmax_pool_backward(attention, v, pooled.to(dtype), g, offsets)  # (N, H)
    unit, norm = unit_rows(z.to(dtype))
    bank, _ = unit_rows(memory.to(dtype))
    classes = torch.arange(memory.shape[0], device=z.device)
    nearest = bank[classes, slots.long()]  # (N, C, S)
    similarity = torch.einsum("ns,ncs->nc", unit, nearest)
    if needs[2]:
        d_temperature = -(d_scores * margins(similarity, per_class)).sum() / t**2
        d_temperature = d_temperature.reshape(temperature.shape).to(temperature.dtype)
    if needs[0]:
        d_margin = d_scores / t
        if per_class:
            _, rival = _rivals(similarity)
            d_similarity = d_margin - torch.zeros_like(d_margin).scatter_add_(1, rival, d_margin)
        else:
            d_similarity = torch.cat([-d_margin, d_margin], dim=1)
        d_unit = torch.einsum("nc,ncs->ns", d_similarity, nearest)
        d_z = unit_rows_backward(d_unit, unit, norm).to(z.dtype)
    return d_z, d_values, d_temperature

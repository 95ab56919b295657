"""Sums and softmax over the rows of each bag: the few shapes of work that all pooling ops share.

On the CPU a loop over bags is both the plainest definition and the fastest one in torch (each bag is one matrix
product). On other devices reading the offsets would make the host wait, so the same sums are written with indices.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is in float32, or in float64 when the input is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_offsets(offsets: Tensor, rows: int) -> None:
    """Raise ValueError for offsets that are not those of `rows` rows; on the CPU only, where looking costs nothing."""
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets: expected (B+1,), got {tuple(offsets.shape)}; use Bags.from_list")
    if offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != rows:
        raise ValueError(f"offsets: expected to run from 0 to N = {rows}, got {first} to {last}; use Bags.from_list")
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(
            "offsets: expected never to decrease, got a bag that ends before it begins; use Bags.from_list"
        )


def check_labels(name: str, labels: Tensor, classes: int) -> None:
    """Raise ValueError for a label that is neither −1 nor a class; on the CPU only."""
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < -1 or high >= classes:
        bad = high if high >= classes else low
        raise ValueError(f"{name}: expected 0 to {classes - 1}, or -1 for none, got {bad}; use -1 for rows without one")


def bag_index(offsets: Tensor, rows: int) -> Tensor:
    """The bag of every row, (N,) int64. `rows` is N, given so that the device is not asked."""
    bags = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(bags, offsets.diff().long(), output_size=rows)


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(offsets.tolist()))


def softmax_stats(scores: Tensor, offsets: Tensor) -> Tensor:
    """The largest score of each bag and Σ exp(score − largest): (N, H) -> (B, H, 2).

    Kept apart, because their log-sum would round a large score and with it every weight. An empty bag, or one whose
    scores are all −inf, has 0 and 0.
    """
    bags, heads = offsets.numel() - 1, scores.shape[1]
    index = bag_index(offsets, scores.shape[0])  # (N,)
    top = scores.new_full((bags, heads), -torch.inf)
    top = top.scatter_reduce(0, index[:, None].expand(-1, heads), scores.detach(), "amax")
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    total = scores.new_zeros(bags, heads).index_add(0, index, torch.exp(scores - top[index]))
    return torch.stack([top, total], dim=2)


def segment_softmax(scores: Tensor, stats: Tensor, offsets: Tensor) -> Tensor:
    """exp(score − largest) / Σ: (N, H). Zero where the whole bag is −inf."""
    top, total = stats[bag_index(offsets, scores.shape[0])].unbind(2)  # (N, H) each
    return torch.exp(scores - top) / torch.where(total == 0, torch.ones_like(total), total)


def weighted_sum(weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """Σ_i weights_ih · values_i over each bag: (N, H), (N, L) -> (B, H, L)."""
    if values.device.type == "cpu":
        parts = [weights[a:b].T @ values[a:b] for a, b in _spans(offsets)]
        return torch.stack(parts) if parts else values.new_zeros(0, weights.shape[1], values.shape[1])
    out = values.new_zeros(offsets.numel() - 1, weights.shape[1], values.shape[1])
    return out.index_add(0, bag_index(offsets, values.shape[0]), weights[:, :, None] * values[:, None, :])


def dot_with_bag(values: Tensor, per_bag: Tensor, offsets: Tensor) -> Tensor:
    """values_i · per_bag[bag of i, h]: (N, L), (B, H, L) -> (N, H)."""
    if values.device.type == "cpu":
        out = values.new_zeros(values.shape[0], per_bag.shape[1])
        for bag, (a, b) in enumerate(_spans(offsets)):
            out[a:b] = values[a:b] @ per_bag[bag].T
        return out
    return torch.einsum("nl,nhl->nh", values, per_bag[bag_index(offsets, values.shape[0])])


def spread_to_rows(weights: Tensor, per_bag: Tensor, offsets: Tensor) -> Tensor:
    """Σ_h weights_ih · per_bag[bag of i, h]: (N, H), (B, H, L) -> (N, L)."""
    if weights.device.type == "cpu":
        out = weights.new_zeros(weights.shape[0], per_bag.shape[2])
        for bag, (a, b) in enumerate(_spans(offsets)):
            out[a:b] = weights[a:b] @ per_bag[bag]
        return out
    return torch.einsum("nh,nhl->nl", weights, per_bag[bag_index(offsets, weights.shape[0])])


def softmax_pool_backward(
    weights: Tensor, values: Tensor, pooled: Tensor, grad_pooled: Tensor, offsets: Tensor
) -> Tensor:
    """Gradient of pooled = Σ softmax(scores)·values with respect to the scores: (N, H).

    dscore_ih = α_ih (dpooled_bh · v_i − dpooled_bh · pooled_bh).
    """
    inner = (grad_pooled * pooled).sum(2)  # (B, H)
    per_row = inner[bag_index(offsets, values.shape[0])]  # (N, H)
    return weights * (dot_with_bag(values, grad_pooled, offsets) - per_row)

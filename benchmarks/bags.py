"""The bags that benchmarks run on, and the plain ways to pool them that one finds in MIL code."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd import Bags

COUNT = 32


def ragged(device: str, median: int, width: int, dtype: torch.dtype) -> Bags:
    """32 bags whose lengths are log-normal, as numbers of patches of slides are."""
    generator = torch.Generator().manual_seed(0)
    lengths = (median * torch.exp(0.6 * torch.randn(COUNT, generator=generator))).long().tolist()
    torch.manual_seed(0)
    return Bags.from_lengths(torch.randn(sum(lengths), width, device=device).to(dtype), lengths)


def bag_of_each_row(bags: Bags) -> Tensor:
    device = bags.features.device
    return torch.repeat_interleave(torch.arange(len(bags), device=device), torch.tensor(bags.lengths, device=device))


def pool_flattened(values: Tensor, scores: Tensor, index: Tensor, count: int = COUNT) -> Tensor:
    """Softmax of one branch over the bags of a flattened batch and the weighted sum, by scatters.

    Sums are of float32 at least: in bfloat16 that of the weights would stop at 256.
    """
    exact = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(exact)
    top = scores.new_full((count,), -torch.inf).scatter_reduce(0, index, scores, "amax")
    weight = torch.exp(scores - top[index])
    total = weight.new_zeros(count).index_add(0, index, weight)
    weighted = (weight / total[index])[:, None] * values
    summed = weight.new_zeros(count, values.shape[1]).index_add(0, index, weighted)
    return summed.to(values.dtype)[:, None]

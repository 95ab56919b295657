"""attention_pool by `momkd._C`."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.native import bags_of, expect, extension, fresh, laid_out, rows


def attention_pool(values: Tensor, scores: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    values, about = rows("values", values)
    heads = scores.shape[1]
    expect("scores", scores, (values.shape[0], heads))
    scores, (offsets, bags) = laid_out(scores), bags_of(offsets)
    pooled = scores.new_empty(bags, heads, values.shape[1])
    stats = scores.new_empty(bags, heads, 2)
    extension()[0].attention_pool(
        about,
        scores.data_ptr(),
        offsets.data_ptr(),
        bags,
        heads,
        pooled.data_ptr(),
        stats.data_ptr(),
        torch.get_num_threads(),
    )
    return pooled.to(values.dtype), stats


def attention_pool_backward(
    grad: Tensor,
    values: Tensor,
    scores: Tensor,
    offsets: Tensor,
    pooled: Tensor,
    stats: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    values, about = rows("values", values)
    heads, (offsets, bags) = scores.shape[1], bags_of(offsets)
    expect("scores", scores, (values.shape[0], heads))
    expect("grad", grad, (bags, heads, values.shape[1]))
    expect("stats", stats, (bags, heads, 2))
    grad, scores_single, stats = laid_out(grad), laid_out(scores), laid_out(stats)
    d_values = fresh(torch.empty_like(values, memory_format=torch.contiguous_format)) if needs[0] else None
    d_scores = torch.empty_like(scores_single) if needs[1] else None
    extension()[0].attention_pool_backward(
        grad.data_ptr(),
        about,
        scores_single.data_ptr(),
        offsets.data_ptr(),
        bags,
        heads,
        stats.data_ptr(),
        0 if d_scores is None else d_scores.data_ptr(),
        0 if d_values is None else d_values.data_ptr(),
        torch.get_num_threads(),
    )
    return d_values, None if d_scores is None else d_scores.to(scores.dtype)

"""attention_pool: softmax of given scores over each bag, and the weighted sum of its rows.

α_ih = exp(s_ih) / Σ_{j in bag} exp(s_jh);  out[b, h] = Σ_{i in b} α_ih v_i. One pass over scores and values.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import (
    INF,
    alignment,
    launch,
    locate_tile,
    padded_heads,
    pool_tile,
    precision,
    rows_of,
    tile_programs,
    work,
)
from momkd.kernels._tuning import POOL, Tiles
from momkd.kernels.segment_pool import combine, pool_backward


@triton.jit(do_not_specialize=["bags"], launch_metadata=work("values", lambda a: 2 * a.values.numel() * a.HEADS))
def attention_pool_fwd_kernel(
    values,
    value_stride,
    scores,  # (N, H)
    offsets,
    bags,
    partial,  # (T, H, L) float32
    partial_stats,  # (T, H, 2) float32
    L,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, first, end = locate_tile(offsets, bags, BLOCK)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK)
    heads = tl.arange(0, HEADS_PADDED)
    both = (rows < end)[:, None] & (heads < HEADS)[None, :]
    s = tl.load(scores + rows[:, None] * HEADS + heads[None, :], both, -INF).to(tl.float32)
    pool_tile(
        *(s, values, value_stride, first, end, partial, partial_stats, L),
        *(HEADS, HEADS_PADDED, BLOCK, COLUMNS, ALIGN, PRECISION),
    )


def attention_pool(values: Tensor, scores: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """values (N, L), scores (N, H), offsets (B+1,) -> pooled (B, H, L) in the dtype of values, stats (B, H, 2)."""
    values, scores = rows_of(values), scores.contiguous()
    sizes = values.shape[1], scores.shape[1], alignment(values)
    run = partial(_attention_pool, values, scores, offsets)
    return run(POOL.choose("attention_pool", values, *sizes, run=run))


def _attention_pool(values: Tensor, scores: Tensor, offsets: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    bags, (rows, width), heads = offsets.shape[0] - 1, values.shape, scores.shape[1]
    programs = tile_programs(rows, bags, tiles.rows)
    parts = values.new_empty(programs, heads, width, dtype=torch.float32)
    part_stats = values.new_empty(programs, heads, 2, dtype=torch.float32)
    launch(
        attention_pool_fwd_kernel,
        (programs,),
        values,
        values.stride(0),
        scores,
        offsets,
        bags,
        parts,
        part_stats,
        width,
        HEADS=heads,
        HEADS_PADDED=padded_heads(heads),
        BLOCK=tiles.rows,
        COLUMNS=tiles.columns,
        ALIGN=alignment(values),
        PRECISION=precision(values.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return combine(parts, part_stats, offsets, values, tiles)


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
    d_values, d_scores = pool_backward(grad, rows_of(values), scores, stats, offsets, pooled, needs)
    return d_values, None if d_scores is None else d_scores.to(scores.dtype)

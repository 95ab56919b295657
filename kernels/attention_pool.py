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
    cdiv,
    launch,
    locate_tile,
    multiple,
    padded_heads,
    pool_tile,
    precision,
    row_pointers,
    rows_of,
    tile_programs,
    work,
)
from momkd.kernels._tuning import POOL, POOL_ONE_HEAD, Tiles
from momkd.kernels.segment_pool import combine, pool_backward

STEPS = 8  # of rows that a program sums of one head


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


@triton.jit(do_not_specialize=["bags"], launch_metadata=work("values", lambda a: 2 * a.values.numel()))
def attention_pool_one_head_kernel(
    values,
    value_stride,
    scores,  # (N,)
    offsets,
    bags,
    partial,  # (T, L) float32
    partial_stats,  # (T, 2) float32
    L,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """A program owns some columns of a tile, STEP rows at a time, and sums over rows once, at its end."""
    _, first, end = locate_tile(offsets, bags, BLOCK)
    if first >= end:
        return
    program = tl.program_id(0).to(tl.int64)
    rows = first + tl.arange(0, BLOCK)
    s = tl.load(scores + rows, rows < end, -INF).to(tl.float32)
    top = tl.max(s, 0)
    top = tl.where(top == -INF, 0.0, top)
    if tl.program_id(1) == 0:
        tl.store(partial_stats + 2 * program, top)
        tl.store(partial_stats + 2 * program + 1, tl.sum(tl.exp(s - top), 0))
    L = multiple(L, ALIGN)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    summed = tl.zeros([STEP, COLUMNS], tl.float32)
    for start in range(0, tl.minimum(end - first, BLOCK), STEP):
        some = first + start + tl.arange(0, STEP)
        inside = some < end
        weights = tl.exp(tl.load(scores + some, inside, -INF).to(tl.float32) - top)
        there = inside[:, None] & (columns < L)[None, :]
        x = tl.load(row_pointers(values, some, value_stride, columns, ALIGN), there, 0.0)
        summed += weights[:, None] * x.to(tl.float32)
    tl.store(partial + program * L + columns, tl.sum(summed, 0), columns < L)


def attention_pool(values: Tensor, scores: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """values (N, L), scores (N, H), offsets (B+1,) -> pooled (B, H, L) in the dtype of values, stats (B, H, 2)."""
    values, scores = rows_of(values), scores.contiguous()
    sizes = values.shape[1], scores.shape[1], alignment(values)
    run = partial(_one_head if scores.shape[1] == 1 else _attention_pool, values, scores, offsets, sizes[2])
    table, name = (POOL_ONE_HEAD, "attention_pool 1") if scores.shape[1] == 1 else (POOL, "attention_pool")
    return run(table.choose(name, values, *sizes, run=run))


def _one_head(values: Tensor, scores: Tensor, offsets: Tensor, align: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
    bags, (rows, width) = offsets.shape[0] - 1, values.shape
    whole = tiles._replace(rows=tiles.rows * STEPS)
    programs = tile_programs(rows, bags, whole.rows)
    parts = values.new_empty(programs, 1, width, dtype=torch.float32)
    part_stats = values.new_empty(programs, 1, 2, dtype=torch.float32)
    launch(
        attention_pool_one_head_kernel,
        (programs, cdiv(width, tiles.columns)),
        values,
        values.stride(0),
        scores,
        offsets,
        bags,
        parts,
        part_stats,
        width,
        BLOCK=whole.rows,
        STEP=tiles.rows,
        COLUMNS=tiles.columns,
        ALIGN=align,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return combine(parts, part_stats, offsets, values, whole)


def _attention_pool(values: Tensor, scores: Tensor, offsets: Tensor, align: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
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
        ALIGN=align,
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
    d_values, d_scores = pool_backward(grad, rows_of(values), scores, stats, offsets, needs)
    return d_values, None if d_scores is None else d_scores.to(scores.dtype)

"""What every pooling op does after its tiles: combine them to bags, and the backward of softmax and weighted sum.

out[b, h] = Σ_i α_ih v_i with α = exp(s − max) / Σ. Backward: ds_ih = α_ih (g_bh · v_i − Σ_j α_jh g_bh · v_j),
dv_i = Σ_h α_ih g_bh.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._combine import combine
from momkd.kernels._common import (
    alignment,
    launch,
    locate_tile,
    multiple,
    padded_heads,
    precision,
    product,
    row_pointers,
    spread,
    tile_programs,
    work,
)
from momkd.kernels._tuning import POOL_BACKWARD, Tiles

__all__ = ["combine", "pool_backward"]


def _backward_operations(a: Any) -> float:
    return 2 * a.values.numel() * a.HEADS * (a.NEED_SCORES + a.NEED_VALUES)


def _backward_passes(a: Any) -> dict[str, float]:
    return {"values": a.NEED_SCORES, "d_values": a.NEED_VALUES + a.ADD_VALUES, "dots": a.NEED_SCORES}


@triton.jit
def attention_of(
    weights, stats, at, rows, inside,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, FROM_SCORES: tl.constexpr,
):  # fmt: skip
    """(BLOCK, HP) float32: the weights α of rows of a bag whose heads lie at `at`; 0 outside."""
    heads = tl.arange(0, HEADS_PADDED)
    is_head = heads < HEADS
    both = inside[:, None] & is_head[None, :]
    alpha = tl.load(weights + rows[:, None] * HEADS + heads[None, :], both, 0.0).to(tl.float32)
    if FROM_SCORES:
        top = tl.load(stats + 2 * at, is_head, 0.0)
        total = tl.load(stats + 2 * at + 1, is_head, 0.0)
        alpha = tl.exp(alpha - top[None, :]) / tl.where(total == 0, 1.0, total)[None, :]
        alpha = tl.where(both, alpha, 0.0)
    return alpha


@triton.jit(do_not_specialize=["bags"], launch_metadata=work("values", _backward_operations, _backward_passes))
def pool_backward_kernel(
    grad,  # (B, H, L)
    values,
    value_stride,
    weights,  # scores (N, H), or the weights α themselves
    stats,  # (B, H, 2) float32, read with FROM_SCORES
    offsets,
    bags,
    d_values,  # (N, L)
    dots,  # (N, H) float32: g · v_i
    inner,  # (T, H) float32: Σ α_i g · v_i of a tile
    L,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    FROM_SCORES: tl.constexpr,
    NEED_VALUES: tl.constexpr,
    ADD_VALUES: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    bag, first, end = locate_tile(offsets, bags, BLOCK)
    if first >= end:
        return
    L = multiple(L, ALIGN)
    heads = tl.arange(0, HEADS_PADDED)
    is_head = heads < HEADS
    rows = first + tl.arange(0, BLOCK)
    inside = rows < end
    at = bag.to(tl.int64) * HEADS + heads  # (HP,)
    alpha = attention_of(weights, stats, at, rows, inside, HEADS, HEADS_PADDED, FROM_SCORES)

    t = tl.zeros([BLOCK, HEADS_PADDED], tl.float32)
    for start in range(0, L, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        g = tl.load(
            grad + at[:, None] * L + columns[None, :], is_head[:, None] & (columns < L)[None, :], 0.0
        )  # (HP, C)
        there = inside[:, None] & (columns < L)[None, :]
        if NEED_SCORES:
            x = tl.load(row_pointers(values, rows, value_stride, columns, ALIGN), there, 0.0)
            if HEADS_PADDED == 1:
                t += tl.sum(x.to(tl.float32) * g.to(tl.float32), 1)[:, None]
            else:
                t += product(x, tl.trans(g.to(x.dtype)), PRECISION)
        if NEED_VALUES:
            target = d_values + rows[:, None] * L + columns[None, :]
            d = spread(alpha, g, HEADS_PADDED, PRECISION)
            if ADD_VALUES:
                d += tl.load(target, there, 0.0).to(tl.float32)
            tl.store(target, d.to(d_values.dtype.element_ty), there)
    if NEED_SCORES:
        both = inside[:, None] & is_head[None, :]
        tl.store(dots + rows[:, None] * HEADS + heads[None, :], t, both)
        slot = tl.program_id(0).to(tl.int64) * HEADS + heads
        tl.store(inner + slot, tl.sum(tl.where(both, alpha * t, 0.0), 0), is_head)


@triton.jit(launch_metadata=work("partial", lambda a: a.partial.numel()))
def bag_sums_kernel(
    partial,  # (T, H) float32
    offsets,
    sums,  # (B, H) float32
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    tiles = (end - begin + BLOCK - 1) // BLOCK
    origin = (begin // BLOCK + bag).to(tl.int64)
    heads = tl.arange(0, HEADS_PADDED)
    is_head = heads < HEADS
    summed = tl.zeros([TILES, HEADS_PADDED], tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = partial + (origin + tile)[:, None] * HEADS + heads[None, :]
        summed += tl.load(at, (tile < tiles)[:, None] & is_head[None, :], 0.0)
    tl.store(sums + bag * HEADS + heads, tl.sum(summed, 0), is_head)


@triton.jit(
    do_not_specialize=["bags"],
    launch_metadata=work("d_scores", lambda a: 2 * a.d_scores.numel(), lambda _: {"d_scores": 2}),
)
def score_gradient_kernel(
    d_scores,  # (N, H) float32: g · v_i on entry, α_i (g · v_i − inner) on return
    inner,  # (B, H) float32
    weights,
    stats,
    offsets,
    bags,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    FROM_SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    bag, first, end = locate_tile(offsets, bags, BLOCK)
    if first >= end:
        return
    heads = tl.arange(0, HEADS_PADDED)
    rows = first + tl.arange(0, BLOCK)
    inside = rows < end
    at = bag.to(tl.int64) * HEADS + heads  # (HP,)
    alpha = attention_of(weights, stats, at, rows, inside, HEADS, HEADS_PADDED, FROM_SCORES)
    both = inside[:, None] & (heads < HEADS)[None, :]
    target = d_scores + rows[:, None] * HEADS + heads[None, :]
    known = tl.load(inner + at, heads < HEADS, 0.0)
    tl.store(target, alpha * (tl.load(target, both, 0.0) - known[None, :]), both)


def pool_backward(
    grad: Tensor,
    values: Tensor,
    weights: Tensor,
    stats: Tensor | None,
    offsets: Tensor,
    needs: tuple[bool, bool],
    *,
    add_to: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of values and scores, each None where `needs` says so.

    `weights` are scores (N, H) with the `stats` of their softmax, or, with None for these, the weights α themselves.
    `add_to` (N, L): the gradient of the values is added to it in place.
    """
    grad, weights = grad.contiguous(), weights.contiguous()
    sizes = values.shape[1], weights.shape[1], alignment(values)
    run = partial(_pool_backward, grad, values, weights, stats, offsets, needs, sizes[2])
    # What the gradient asks for is part of the op: each is another kernel. Tried out, nothing is added to.
    op = f"pool_backward{' values' * needs[0]}{' scores' * needs[1]}"
    return run(POOL_BACKWARD.choose(op, values, *sizes, run=run), add_to)


def _pool_backward(
    grad: Tensor,
    values: Tensor,
    weights: Tensor,
    stats: Tensor | None,
    offsets: Tensor,
    needs: tuple[bool, bool],
    align: int,
    tiles: Tiles,
    add_to: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    bags, (rows, heads), width = offsets.shape[0] - 1, weights.shape, values.shape[1]
    d_values = add_to if add_to is not None else values.new_empty(rows, width) if needs[0] else None
    d_scores = weights.new_empty(rows, heads, dtype=torch.float32) if needs[1] else None
    programs = tile_programs(rows, bags, tiles.rows)
    by_tile = weights.new_empty(programs if needs[1] else 0, heads, dtype=torch.float32)
    how = {"HEADS": heads, "HEADS_PADDED": padded_heads(heads), "BLOCK": tiles.rows}
    from_scores, stats = stats is not None, weights if stats is None else stats
    launch(
        pool_backward_kernel,
        (programs,),
        grad,
        values,
        values.stride(0),
        weights,
        stats,
        offsets,
        bags,
        weights if d_values is None else d_values,
        weights if d_scores is None else d_scores,
        by_tile,
        width,
        FROM_SCORES=from_scores,
        NEED_VALUES=d_values is not None,
        ADD_VALUES=add_to is not None,
        NEED_SCORES=d_scores is not None,
        COLUMNS=tiles.columns,
        ALIGN=align,
        PRECISION=precision(values.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **how,
    )
    if d_scores is not None:
        # Σ α g · v of the bag is summed from the same dots: where it is one row, the difference is exactly zero.
        inner = by_tile.new_empty(bags, heads)
        launch(bag_sums_kernel, (bags,), by_tile, offsets, inner, TILES=256, **how)
        launch(
            score_gradient_kernel,
            (programs,),
            d_scores,
            inner,
            weights,
            stats,
            offsets,
            bags,
            FROM_SCORES=from_scores,
            **how,
        )
    return d_values, d_scores

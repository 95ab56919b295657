"""memory_guided_pool: attention that asks the memory which patches look like which class.

s_ic = max_k cos(z_i, M_ck). Two classes, one branch: score_i = (s_i1 − s_i0) / temperature. One branch a class:
score_ic = (s_ic − max_{c' ≠ c} s_ic') / temperature. Softmax over the bag, weighted sum of the values: one pass over z
and values. The memory is a constant. Backward: that of the pooling gives the scores' gradient; from there a second
kernel goes to z, by the cosines with the nearest slots, and to the temperature.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
    padded_heads,
    pool_tile,
    precision,
    rows_of,
    tile_programs,
    work,
)
from momkd.kernels._slots import (
    Bank,
    class_similarities,
    comparisons,
    nearest_backward,
    nearest_comparisons,
    nearest_cosines,
    tile_rows,
    with_bank,
)
from momkd.kernels._tuning import POOL
from momkd.kernels.segment_pool import combine, pool_backward


@triton.jit
def class_rivals(s, C, CLASSES: tl.constexpr):
    """For each class the largest similarity of the others; and where the largest of all and the next one are."""
    classes = tl.arange(0, CLASSES)[None, :]
    s = tl.where(classes < C, tl.where(s != s, INF, s), -INF)
    top, best = tl.max(s, 1, return_indices=True)
    is_best = classes == best[:, None]
    second, next_best = tl.max(tl.where(is_best, -INF, s), 1, return_indices=True)
    return tl.where(is_best, second[:, None], top[:, None]), is_best, classes == next_best[:, None]


@triton.jit
def class_margins(s, C, PER_CLASS: tl.constexpr, CLASSES: tl.constexpr):
    """(BLOCK, CLASSES) similarities -> (BLOCK, CLASSES) differences one branch a class, or (BLOCK, 1)."""
    classes = tl.arange(0, CLASSES)[None, :]
    if PER_CLASS:
        rival, _, _ = class_rivals(s, C, CLASSES)
        # Where one class is NaN, so is every difference.
        total = tl.sum(s, 1)[:, None]
        return tl.where(total != total, total, s - rival)
    else:
        return tl.sum(tl.where(classes == 1, s, -s), 1)[:, None]


def _forward_operations(a: Any) -> float:
    return comparisons(1)(a) + 2 * a.values.numel() * a.HEADS


@triton.jit(do_not_specialize=["bags"], launch_metadata=work("z", _forward_operations))
def memory_guided_pool_fwd_kernel(
    z,
    z_stride,
    values,
    value_stride,
    bank,
    offsets,
    bags,
    temperature,
    scores,  # (N, H) float32
    nearest,  # (N, C) int32
    partial,  # (T, H, L) float32
    partial_stats,  # (T, H, 2) float32
    C,
    K,
    S: tl.constexpr,
    L,
    PER_CLASS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    VALUE_PRECISION: tl.constexpr,
):
    _, first, end = locate_tile(offsets, bags, BLOCK)
    if first >= end:
        return
    rows, inside = tile_rows(first, end, BLOCK)
    s, slots = class_similarities(
        *(z, z_stride, rows, bank, C, K, S, 1.0),
        *(False, CLASSES, SLOTS, BLOCK, COLUMNS, ALIGN, PRECISION),
    )
    classes = tl.arange(0, CLASSES)
    tl.store(nearest + rows[:, None] * C + classes[None, :], slots, inside[:, None] & (classes < C)[None, :])

    heads = tl.arange(0, HEADS_PADDED)
    both = inside[:, None] & (heads < HEADS)[None, :]
    score = class_margins(s, C, PER_CLASS, CLASSES) / tl.load(temperature).to(tl.float32)  # (BLOCK, HP)
    score = tl.where(both, score, -INF)
    tl.store(scores + rows[:, None] * HEADS + heads[None, :], score, both)
    pool_tile(
        *(score, values, value_stride, first, end, partial, partial_stats, L),
        *(HEADS, HEADS_PADDED, BLOCK, VALUE_COLUMNS, VALUE_ALIGN, VALUE_PRECISION),
    )


@triton.jit(do_not_specialize=["bags"], launch_metadata=work("scores", lambda _: 0, lambda _: {"scores": 2}))
def attention_kernel(
    scores,  # (N, H) float32, turned into attention in place
    stats,  # (B, H, 2) float32
    offsets,
    bags,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    bag, first, end = locate_tile(offsets, bags, BLOCK)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK)
    heads = tl.arange(0, HEADS_PADDED)
    both = (rows < end)[:, None] & (heads < HEADS)[None, :]
    at = bag.to(tl.int64) * HEADS + heads
    top = tl.load(stats + 2 * at, heads < HEADS, 0.0)
    total = tl.load(stats + 2 * at + 1, heads < HEADS, 0.0)
    here = scores + rows[:, None] * HEADS + heads[None, :]
    weights = tl.exp(tl.load(here, both, -INF) - top[None, :]) / tl.where(total == 0, 1.0, total)[None, :]
    tl.store(here, weights, both)


@triton.jit(do_not_specialize=["N"], launch_metadata=work("z", nearest_comparisons))
def memory_guided_pool_bwd_kernel(
    d_scores,  # (N, H) float32
    z,
    z_stride,
    bank,
    nearest,  # (N, C) int32
    temperature,
    d_z,  # (N, S)
    partial,  # (tiles,) float32: Σ d_score · margin
    N,
    C,
    K,
    S: tl.constexpr,
    PER_CLASS: tl.constexpr,
    NEED_Z: tl.constexpr,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    tile = tl.program_id(0)
    rows, inside = tile_rows(tile.to(tl.int64) * BLOCK, N, BLOCK)
    s, norm = nearest_cosines(z, z_stride, rows, bank, nearest, C, K, S, CLASSES, SLOTS, BLOCK, COLUMNS, ALIGN)
    classes = tl.arange(0, CLASSES)[None, :]
    if PER_CLASS:
        both = inside[:, None] & (classes < C)
        d = tl.load(d_scores + rows[:, None] * C + classes, both, 0.0)
    else:
        both = inside[:, None]
        d = tl.load(d_scores + rows, inside, 0.0)[:, None]
    margins = class_margins(s, C, PER_CLASS, CLASSES)
    tl.store(partial + tile, tl.sum(tl.sum(tl.where(both, d * margins, 0.0), 1), 0))
    if NEED_Z:
        d = d / tl.load(temperature).to(tl.float32)
        if PER_CLASS:
            # The best class is the rival of all others, the next one is that of the best.
            _, is_best, is_next = class_rivals(s, C, CLASSES)
            of_best = tl.sum(tl.where(is_best, d, 0.0), 1)[:, None]
            of_others = tl.sum(tl.where(is_best, 0.0, d), 1)[:, None]
            d -= tl.where(is_best, of_others, tl.where(is_next, of_best, 0.0))
        else:
            d = tl.where(classes == 1, d, -d)
        nearest_backward(
            *(d, s, norm, z, z_stride, rows, inside, bank, nearest, d_z, C, K, S),
            *(CLASSES, SLOTS, BLOCK, COLUMNS, ALIGN),
        )


def memory_guided_pool(
    z: Tensor, values: Tensor, memory: Tensor, offsets: Tensor, temperature: Tensor, per_class: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """z (N, S), values (N, L), memory (C, K, S), offsets (B+1,), temperature () ->

    pooled (B, H, L) in the dtype of values, attention (N, H) float32, slots (N, C) int32.
    """
    z, values = rows_of(z), rows_of(values)
    op = f"memory_guided_pool {'per_class ' * per_class}{values.shape[1]} {values.dtype}"
    return with_bank(op, memory, z, partial(_forward, z, values, offsets, temperature, per_class))


def _forward(
    z: Tensor, values: Tensor, offsets: Tensor, temperature: Tensor, per_class: bool, bank: Bank
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), bags, classes = values.shape, offsets.shape[0] - 1, bank.sizes[0]
    heads, align = classes if per_class else 1, alignment(values)
    tiles = POOL.fitted(values, width, heads, align)[0]._replace(rows=bank.tiles.rows)
    programs = tile_programs(rows, bags, tiles.rows)
    attention = z.new_empty(rows, heads, dtype=torch.float32)
    slots = z.new_empty(rows, classes, dtype=torch.int32)
    parts = z.new_empty(programs, heads, width, dtype=torch.float32)
    part_stats = z.new_empty(programs, heads, 2, dtype=torch.float32)
    launch(
        memory_guided_pool_fwd_kernel,
        (programs,),
        *(z, z.stride(0), values, values.stride(0), bank.unit, offsets, bags, temperature),
        *(attention, slots, parts, part_stats, *bank.sizes, width),
        PER_CLASS=per_class,
        HEADS=heads,
        HEADS_PADDED=padded_heads(heads),
        PRECISION=bank.precision,
        VALUE_COLUMNS=tiles.columns,
        VALUE_ALIGN=align,
        VALUE_PRECISION=precision(values.dtype),
        **_meta(bank, per_class),
    )
    pooled, stats = combine(parts, part_stats, offsets, values, tiles)
    launch(
        attention_kernel,
        (programs,),
        *(attention, stats, offsets, bags),
        HEADS=heads,
        HEADS_PADDED=padded_heads(heads),
        BLOCK=tiles.rows,
    )
    return pooled, attention, slots


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
    asked = needs[1], needs[0] or needs[2]
    d_values, d_scores = pool_backward(grad, rows_of(values), attention, None, offsets, asked)
    if d_scores is None:
        return None, d_values, None
    z = rows_of(z)
    run = partial(_rows_backward, d_scores, z, temperature, per_class, slots, needs[0])
    d_z, by_tile = with_bank("memory_guided_pool_backward" + " per_class" * per_class, memory, z, run)
    d_temperature = None
    if needs[2]:
        d_temperature = (-by_tile.sum() / temperature.float() ** 2).to(temperature.dtype)
    return d_z, d_values, d_temperature


def _rows_backward(
    d_scores: Tensor, z: Tensor, temperature: Tensor, per_class: bool, slots: Tensor, need_z: bool, bank: Bank
) -> tuple[Tensor | None, Tensor]:
    """d_z (N, S), and of each tile the sum of d_score · margin."""
    programs = cdiv(z.shape[0], bank.tiles.rows)
    by_tile = d_scores.new_empty(programs)
    d_z = z.new_empty(z.shape) if need_z else None
    launch(
        memory_guided_pool_bwd_kernel,
        (programs,),
        *(d_scores, z, z.stride(0), bank.unit, slots, temperature, z if d_z is None else d_z, by_tile),
        *(z.shape[0], *bank.sizes),
        PER_CLASS=per_class,
        NEED_Z=need_z,
        **_meta(bank, per_class),
    )
    return d_z, by_tile


def _meta(bank: Bank, per_class: bool) -> dict[str, Any]:
    """With one branch a class, a tile of classes is one of heads."""
    return bank.meta | ({"CLASSES": padded_heads(bank.sizes[0])} if per_class else {})

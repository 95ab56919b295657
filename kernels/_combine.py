"""From what tiles give to what bags get: softmax partials are scaled to the largest score of the bag and summed.

A tile has its own largest score m, Σ exp(s − m) and Σ exp(s − m) · v; those of several tiles merge to those of all of
them. A giant bag has thousands of tiles, which one program after the other would take long to read. So where a bag may
have more than GROUP tiles, programs first merge GROUP tiles each, and then what these give. Groups are counted from the
first tile of a bag, and one group merges to itself: a bag gets the same bits whatever else is in its batch.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import INF, cdiv, launch, multiple, next_power_of_2, work
from momkd.kernels._tuning import Tiles

GROUP = 256  # tiles: 16,384 rows of a bag where a tile has 64
_TILES = 32  # that a program reads at once
_COLUMNS = 128


@triton.jit
def tiles_of(offsets, bag, BLOCK: tl.constexpr):
    """Slot of the first tile of a bag (int64), and how many tiles it has."""
    begin, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    return begin.to(tl.int64) // BLOCK + bag, (end - begin + BLOCK - 1) // BLOCK


@triton.jit
def merge(
    partial,  # (T, H, L) float32
    partial_stats,  # (T, H, 2) float32
    origin,
    count,
    head,
    columns,
    L,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Largest score, Σ exp and the weighted sum (COLUMNS,) of the `count` slots from `origin` on."""
    top = -INF
    total = 0.0
    summed = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, TILES):
        tile = start + tl.arange(0, TILES)
        there = tile < count
        slot = (origin + tile) * HEADS + head
        tile_total = tl.load(partial_stats + 2 * slot + 1, there, 0.0)
        # A tile whose scores are all −inf says 0 for its maximum; it must not raise that of the bag.
        tile_top = tl.load(partial_stats + 2 * slot, there, -INF)
        tile_top = tl.where(tile_total == 0, -INF, tile_top)
        new_top = tl.maximum(top, tl.max(tile_top, 0))
        safe = tl.where(new_top == -INF, 0.0, new_top)
        scale = tl.exp(tile_top - safe)  # (TILES,)
        kept = tl.exp(top - safe)
        rows = tl.load(
            partial + slot[:, None] * L + columns[None, :], there[:, None] & (columns < L)[None, :], 0.0
        )  # (TILES, COLS)
        summed = summed * kept + tl.sum(scale[:, None] * rows, 0)
        total = total * kept + tl.sum(scale * tile_total, 0)
        top = new_top
    return tl.where(top == -INF, 0.0, top), total, summed


@triton.jit
def split_program(L, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """Slot (int64), head and columns of a program of a one-dimensional grid; the columns change quickest."""
    program = tl.program_id(0)
    chunks = tl.cdiv(L, COLUMNS)
    head = program // chunks % HEADS
    return (program // (chunks * HEADS)).to(tl.int64), head, program % chunks * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit(do_not_specialize=["bags", "group"], launch_metadata=work("partial", lambda a: 2 * a.partial.numel()))
def group_kernel(
    partial,  # (T, H, L) float32
    partial_stats,  # (T, H, 2) float32
    offsets,
    bags,
    group,
    grouped,  # (T // group + B, H, L) float32
    grouped_stats,  # (T // group + B, H, 2) float32
    L,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """A program merges `group` tiles. Bags find their groups among the programs as they find their tiles."""
    L = multiple(L, ALIGN)
    slot, head, columns = split_program(L, HEADS, COLUMNS)
    low = slot * 0
    high = low + bags
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(offsets + middle).to(tl.int64) // BLOCK + middle) // group + middle <= slot:
            low = middle
        else:
            high = middle
    origin, tiles = tiles_of(offsets, low, BLOCK)
    first = (slot - origin // group - low) * group
    if first >= tiles:
        return
    count = tl.minimum(tiles - first, group).to(tl.int32)
    top, total, summed = merge(partial, partial_stats, origin + first, count, head, columns, L, HEADS, TILES, COLUMNS)
    at = slot * HEADS + head
    tl.store(grouped + at * L + columns, summed, columns < L)
    if tl.program_id(0) % tl.cdiv(L, COLUMNS) == 0:
        tl.store(grouped_stats + 2 * at, top)
        tl.store(grouped_stats + 2 * at + 1, total)


@triton.jit(do_not_specialize=["group"], launch_metadata=work("partial", lambda a: 2 * a.partial.numel()))
def combine_kernel(
    partial,  # (T, H, L) float32, of tiles or of groups
    partial_stats,  # (T, H, 2) float32
    offsets,
    group,  # tiles of a group; 1: they are not grouped
    pooled,  # (B, H, L)
    stats,  # (B, H, 2) float32
    L,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    L = multiple(L, ALIGN)
    bag, head, columns = split_program(L, HEADS, COLUMNS)
    origin, count = tiles_of(offsets, bag, BLOCK)
    if group > 1:
        origin = origin // group + bag
        count = (count + group - 1) // group
    top, total, summed = merge(partial, partial_stats, origin, count, head, columns, L, HEADS, TILES, COLUMNS)
    result = tl.where(total == 0, 0.0, summed / tl.where(total == 0, 1.0, total))
    at = bag * HEADS + head
    tl.store(pooled + at * L + columns, result.to(pooled.dtype.element_ty), columns < L)
    if tl.program_id(0) % tl.cdiv(L, COLUMNS) == 0:
        tl.store(stats + 2 * at, top)
        tl.store(stats + 2 * at + 1, total)


def combine(parts: Tensor, part_stats: Tensor, offsets: Tensor, like: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Partials of tiles (T, H, L), (T, H, 2) -> pooled (B, H, L) in the dtype of `like`, stats (B, H, 2)."""
    bags, (slots, heads, width) = offsets.shape[0] - 1, parts.shape
    pooled, stats = like.new_empty(bags, heads, width), parts.new_empty(bags, heads, 2)
    columns = min(_COLUMNS, max(16, next_power_of_2(width)))
    programs = cdiv(width, columns) * heads  # of a bag or a group
    meta = {"HEADS": heads, "BLOCK": tiles.rows, "TILES": _TILES, "COLUMNS": columns, "ALIGN": math.gcd(16, width)}
    group = 1
    if slots > GROUP:
        group, groups = GROUP, slots // GROUP + bags
        grouped = parts.new_empty(groups, heads, width)
        grouped_stats = parts.new_empty(groups, heads, 2)
        launch(
            group_kernel,
            (groups * programs,),
            *(parts, part_stats, offsets, bags, group, grouped, grouped_stats, width),
            **meta,
        )
        parts, part_stats = grouped, grouped_stats
    launch(combine_kernel, (bags * programs,), parts, part_stats, offsets, group, pooled, stats, width, **meta)
    return pooled, stats

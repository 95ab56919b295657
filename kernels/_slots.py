"""What the ops on the memory share: the bank of unit prototypes, cosines with it, and the gradient through the cosines.

A program owns a tile of rows. The bank lies as (C, K', S') in the type of the rows, K' and S' padded with zeros to
whole tiles, so that it is read without masks. A row that fits into one chunk of columns is read once; a longer one is
read again, chunk by chunk, for each block of slots. S is a constant of the compiler, as a model's width is. A row that
is not finite has NaN for its cosines, and slot 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import INF, alignment, next_power_of_2, precision, product, row_pointers
from momkd.kernels._tuning import MEMORY, SlotTiles, register_limit

R = TypeVar("R")
EPS = tl.constexpr(1e-12)


class Bank(NamedTuple):
    """The memory as kernels read it."""

    unit: Tensor  # (C, K', S') in the type of the rows
    sizes: tuple[int, int, int]  # C, K, S
    norm: Tensor  # (C, K, 1) float32, what the prototypes were divided by
    tiles: SlotTiles
    align: int  # of the rows

    @property
    def meta(self) -> dict[str, Any]:
        """What every kernel here is compiled for."""
        tiles = self.tiles
        return {
            "CLASSES": max(2, next_power_of_2(self.sizes[0])),
            "SLOTS": tiles.slots,
            "BLOCK": tiles.rows,
            "COLUMNS": tiles.columns,
            "ALIGN": self.align,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            **register_limit(self.unit.device),
        }

    @property
    def precision(self) -> str:
        """Of the products with it."""
        return precision(self.unit.dtype)


def comparisons(times: float) -> Callable[[Any], float]:
    """Operations of `times` products of all rows with all prototypes."""
    return lambda a: times * 2 * a.z.numel() * a.C * a.K


def nearest_comparisons(a: Any) -> float:
    """Operations of a product of all rows with their nearest prototypes, and of that which goes back."""
    return 4 * a.z.numel() * a.C


def with_bank(op: str, memory: Tensor, z: Tensor, run: Callable[[Bank], R]) -> R:
    """What `run` makes of the bank for these rows (N, S), cut as is best for `op`."""
    classes, slots, width = memory.shape
    tiles = MEMORY.choose(f"{op} {classes}", z, width, slots, run=lambda tiles: run(unit_bank(memory, z, tiles)))
    return run(unit_bank(memory, z, tiles))


def unit_bank(memory: Tensor, z: Tensor, tiles: SlotTiles) -> Bank:
    """The bank for these rows (N, S)."""
    _, slots, width = memory.shape
    single = memory.float()
    norm = torch.linalg.vector_norm(single, dim=-1, keepdim=True).clamp_min(EPS.value)
    padding = (0, -width % tiles.columns, 0, -slots % tiles.slots)
    unit = torch.nn.functional.pad((single / norm).to(z.dtype), padding).contiguous()
    return Bank(unit, tuple(memory.shape), norm, tiles, alignment(z))


def unit_bank_backward(d_unit: Tensor, memory: Tensor, bank: Bank) -> Tensor:
    """(C, K, S) gradient of the unit prototypes -> that of the memory."""
    unit = memory.float() / bank.norm
    radial = (d_unit * unit).sum(-1, keepdim=True).masked_fill(bank.norm <= EPS.value, 0.0)
    return ((d_unit - unit * radial) / bank.norm).to(memory.dtype)


@triton.jit
def tile_rows(first, end, BLOCK: tl.constexpr):
    """(BLOCK,) rows from `first` on, and which of them lie before `end`; those after it are the last one again.

    So rows are read without masks, and only what is written, or summed over rows, looks at the second result.
    """
    rows = first + tl.arange(0, BLOCK)
    return tl.minimum(rows, end - 1), rows < end


@triton.jit
def row_columns(z, z_stride, rows, start, S: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr):
    """(BLOCK, COLUMNS) of the rows from column `start` on; zero after the last column."""
    columns = start + tl.arange(0, COLUMNS)
    here = row_pointers(z, rows, z_stride, columns, ALIGN)
    if S % COLUMNS == 0:
        return tl.load(here)
    else:
        return tl.load(here, (columns < S)[None, :], 0.0)


@triton.jit
def row_norms(
    first, z, z_stride, rows, S: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr
):
    """max(|z|, eps) (BLOCK,). `first` are the first columns; where there are more, they too are read here."""
    if S <= COLUMNS:
        x = first.to(tl.float32)
        square = tl.sum(x * x, 1)
    else:
        square = tl.zeros([BLOCK], tl.float32)
        for start in range(0, S, COLUMNS):
            x = row_columns(z, z_stride, rows, start, S, COLUMNS, ALIGN).to(tl.float32)
            square += tl.sum(x * x, 1)
    norm = tl.sqrt(square)
    return tl.where(norm <= EPS, EPS, norm)


@triton.jit
def bank_columns(bank, c, slots, K, S, start, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """(slots, COLUMNS) of prototypes of class c; `c` is one class or one for each slot."""
    row = c * (tl.cdiv(K, SLOTS) * SLOTS) + slots
    columns = start + tl.arange(0, COLUMNS)
    return tl.load(bank + row[:, None] * (tl.cdiv(S, COLUMNS) * COLUMNS) + columns[None, :])


@triton.jit
def slot_cosines(
    first,
    norm,
    z,
    z_stride,
    rows,
    bank,
    c,
    slots,
    K,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK, SLOTS) cosines of the rows with some slots of class c; −inf for slots that there are not."""
    if S <= COLUMNS:
        dots = product(first, tl.trans(bank_columns(bank, c, slots, K, S, 0, SLOTS, COLUMNS)), PRECISION)
    else:
        dots = tl.zeros([BLOCK, SLOTS], tl.float32)
        for start in range(0, S, COLUMNS):
            x = row_columns(z, z_stride, rows, start, S, COLUMNS, ALIGN)
            dots += product(x, tl.trans(bank_columns(bank, c, slots, K, S, start, SLOTS, COLUMNS)), PRECISION)
    return tl.where((slots < K)[None, :], dots / norm[:, None], -INF)


@triton.jit
def class_similarities(
    z,
    z_stride,
    rows,
    bank,
    C,
    K,
    S: tl.constexpr,
    tau,
    LSE: tl.constexpr,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK, CLASSES) similarities, 0 for classes that there are not, and the slots of the largest cosines."""
    first = row_columns(z, z_stride, rows, 0, S, COLUMNS, ALIGN)
    norm = row_norms(first, z, z_stride, rows, S, BLOCK, COLUMNS, ALIGN)
    classes = tl.arange(0, CLASSES)
    similarities = tl.zeros([BLOCK, CLASSES], tl.float32)
    nearest = tl.zeros([BLOCK, CLASSES], tl.int32)
    for c in range(0, C):
        top = tl.full([BLOCK], -INF, tl.float32)
        slot = tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, SLOTS):
            cosines = slot_cosines(
                *(first, norm, z, z_stride, rows, bank, c, start + tl.arange(0, SLOTS)),
                *(K, S, SLOTS, BLOCK, COLUMNS, ALIGN, PRECISION),
            )
            # What is larger than any cosine is found by the maximum, a NaN may be not.
            cosines = tl.where(cosines != cosines, INF, cosines)
            here, index = tl.max(cosines, 1, return_indices=True)
            slot = tl.where(here > top, start + index, slot)
            new = tl.maximum(top, here)
            if LSE:
                total = total * tl.exp(tau * (top - new)) + tl.sum(tl.exp(tau * (cosines - new[:, None])), 1)
            top = new
        value = top
        if LSE:
            value = top + tl.log(total) / tau
        value = tl.where(top == INF, float("nan"), value)
        own = (classes == c)[None, :]
        similarities = tl.where(own, value[:, None], similarities)
        nearest = tl.where(own, slot[:, None], nearest)
    return similarities, nearest


@triton.jit
def nearest_columns(bank, nearest, rows, c, C, K, S, start, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """(BLOCK, COLUMNS) float32 of the prototype of class c that is nearest to each row."""
    slot = tl.load(nearest + rows * C + c)
    return bank_columns(bank, c, slot, K, S, start, SLOTS, COLUMNS).to(tl.float32)


@triton.jit
def nearest_cosines(
    z,
    z_stride,
    rows,
    bank,
    nearest,
    C,
    K,
    S: tl.constexpr,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(BLOCK, CLASSES) cosines of the rows with their nearest slots (N, C), 0 where no class is; and max(|z|, eps)."""
    first = row_columns(z, z_stride, rows, 0, S, COLUMNS, ALIGN)
    norm = row_norms(first, z, z_stride, rows, S, BLOCK, COLUMNS, ALIGN)
    classes = tl.arange(0, CLASSES)
    cosines = tl.zeros([BLOCK, CLASSES], tl.float32)
    for c in range(0, C):
        if S <= COLUMNS:
            m = nearest_columns(bank, nearest, rows, c, C, K, S, 0, SLOTS, COLUMNS)
            dot = tl.sum(first.to(tl.float32) * m, 1)
        else:
            dot = tl.zeros([BLOCK], tl.float32)
            for start in range(0, S, COLUMNS):
                x = row_columns(z, z_stride, rows, start, S, COLUMNS, ALIGN).to(tl.float32)
                dot += tl.sum(x * nearest_columns(bank, nearest, rows, c, C, K, S, start, SLOTS, COLUMNS), 1)
        cosines = tl.where((classes == c)[None, :], (dot / norm)[:, None], cosines)
    return cosines, norm


@triton.jit
def store_row_gradient(
    d_unit,
    radial,
    live,
    norm,
    z,
    z_stride,
    rows,
    inside,
    start,
    d_z,
    S: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """d_z of some columns from the gradient of the unit rows and its product with them; 0 for rows not `live`."""
    columns = start + tl.arange(0, COLUMNS)
    unit = row_columns(z, z_stride, rows, start, S, COLUMNS, ALIGN).to(tl.float32) / norm[:, None]
    # Where the norm was clamped, the division was by a constant.
    along = tl.where(norm <= EPS, 0.0, radial)
    d = tl.where(live[:, None], (d_unit - unit * along[:, None]) / norm[:, None], 0.0)
    target = d_z + rows[:, None] * S + columns[None, :]
    tl.store(target, d.to(d_z.dtype.element_ty), inside[:, None] & (columns < S)[None, :])


@triton.jit
def nearest_backward(
    d_similarities,  # (BLOCK, CLASSES), 0 where no class is
    cosines,  # (BLOCK, CLASSES)
    norm,
    z,
    z_stride,
    rows,
    inside,
    bank,
    nearest,
    d_z,
    C,
    K,
    S: tl.constexpr,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """d_z (N, S) from the gradient of the cosines with the nearest slots. A row whose gradient is 0 gets exactly 0."""
    classes = tl.arange(0, CLASSES)
    radial = tl.sum(d_similarities * cosines, 1)
    live = tl.max((d_similarities != 0).to(tl.int32), 1) > 0
    for start in range(0, S, COLUMNS):
        d_unit = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for c in range(0, C):
            g = tl.sum(tl.where((classes == c)[None, :], d_similarities, 0.0), 1)
            d_unit += g[:, None] * nearest_columns(bank, nearest, rows, c, C, K, S, start, SLOTS, COLUMNS)
        store_row_gradient(d_unit, radial, live, norm, z, z_stride, rows, inside, start, d_z, S, COLUMNS, ALIGN)

"""memory_similarity: cosine of every row with every slot of the memory, reduced over the slots of each class.

max: s_ic = max_k cos(z_i, M_ck);  lse: s_ic = (1/τ) · log Σ_k exp(τ · cos(z_i, M_ck)). Nothing of (N, C, K) is stored.

Backward: with p_ick = [k is the slot] or exp(τ (cos − s_ic)) and u = z / |z|, du_i = Σ_ck g_ic p_ick M_ck, and
dM_ck = Σ_i g_ic p_ick u_i: sums over some tiles of rows, then the sum of these. A row whose gradient is 0 gives exactly
0 to both, also where the row itself is not finite.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import cdiv, launch, product, rows_of, work
from momkd.kernels._slots import (
    Bank,
    bank_columns,
    class_similarities,
    comparisons,
    nearest_backward,
    nearest_comparisons,
    nearest_cosines,
    row_columns,
    row_norms,
    slot_cosines,
    store_row_gradient,
    tile_rows,
    unit_bank_backward,
    with_bank,
)

_PARTS = 64  # sums of the memory's gradient before the last one, at most
_PARTIAL_NUMBERS = 1 << 24  # and numbers in them


@triton.jit(do_not_specialize=["N"], launch_metadata=work("z", comparisons(1)))
def memory_similarity_fwd_kernel(
    z,
    z_stride,
    bank,
    similarities,  # (N, C) float32
    nearest,  # (N, C) int32
    N,
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
    rows, inside = tile_rows(tl.program_id(0).to(tl.int64) * BLOCK, N, BLOCK)
    s, slots = class_similarities(
        *(z, z_stride, rows, bank, C, K, S, tau),
        *(LSE, CLASSES, SLOTS, BLOCK, COLUMNS, ALIGN, PRECISION),
    )
    classes = tl.arange(0, CLASSES)
    at = rows[:, None] * C + classes[None, :]
    both = inside[:, None] & (classes < C)[None, :]
    tl.store(similarities + at, s, both)
    tl.store(nearest + at, slots, both)


@triton.jit(do_not_specialize=["N"], launch_metadata=work("z", nearest_comparisons))
def max_backward_kernel(
    grad,  # (N, C) float32
    z,
    z_stride,
    bank,
    nearest,  # (N, C) int32
    d_z,  # (N, S)
    N,
    C,
    K,
    S: tl.constexpr,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    rows, inside = tile_rows(tl.program_id(0).to(tl.int64) * BLOCK, N, BLOCK)
    classes = tl.arange(0, CLASSES)
    g = tl.load(grad + rows[:, None] * C + classes[None, :], inside[:, None] & (classes < C)[None, :], 0.0)
    cosines, norm = nearest_cosines(z, z_stride, rows, bank, nearest, C, K, S, CLASSES, SLOTS, BLOCK, COLUMNS, ALIGN)
    nearest_backward(
        *(g, cosines, norm, z, z_stride, rows, inside, bank, nearest, d_z, C, K, S),
        *(CLASSES, SLOTS, BLOCK, COLUMNS, ALIGN),
    )


@triton.jit(do_not_specialize=["N"], launch_metadata=work("z", comparisons(2)))
def lse_backward_kernel(
    grad,  # (N, C) float32
    z,
    z_stride,
    bank,
    similarities,  # (N, C) float32
    d_z,  # (N, S)
    N,
    C,
    K,
    S: tl.constexpr,
    tau,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns a tile of rows and a chunk of columns of d_z."""
    rows, inside = tile_rows(tl.program_id(0).to(tl.int64) * BLOCK, N, BLOCK)
    start = tl.program_id(1) * COLUMNS
    first = row_columns(z, z_stride, rows, 0, S, COLUMNS, ALIGN)
    norm = row_norms(first, z, z_stride, rows, S, BLOCK, COLUMNS, ALIGN)
    d_unit = tl.zeros([BLOCK, COLUMNS], tl.float32)
    radial = tl.zeros([BLOCK], tl.float32)
    live = tl.zeros([BLOCK], tl.int32)
    for c in range(0, C):
        g = tl.load(grad + rows * C + c, inside, 0.0)
        s = tl.load(similarities + rows * C + c)
        live |= (g != 0).to(tl.int32)
        for block in range(0, K, SLOTS):
            slots = block + tl.arange(0, SLOTS)
            cosines = slot_cosines(
                *(first, norm, z, z_stride, rows, bank, c, slots, K, S, SLOTS, BLOCK, COLUMNS, ALIGN, PRECISION)
            )
            shares = tl.exp(tau * (cosines - s[:, None]))  # (BLOCK, SLOTS)
            radial += g * tl.sum(shares * tl.where((slots < K)[None, :], cosines, 0.0), 1)
            m = bank_columns(bank, c, slots, K, S, start, SLOTS, COLUMNS)
            d_unit += g[:, None] * product(shares.to(m.dtype), m, PRECISION)
    store_row_gradient(d_unit, radial, live > 0, norm, z, z_stride, rows, inside, start, d_z, S, COLUMNS, ALIGN)


def _bank_operations(a: Any) -> float:
    return comparisons(1 + a.LSE)(a)


@triton.jit(do_not_specialize=["N"], launch_metadata=work("z", _bank_operations))
def bank_backward_kernel(
    grad,  # (N, C) float32
    z,
    z_stride,
    bank,
    similarities,  # (N, C) float32, read for lse
    nearest,  # (N, C) int32, read for max
    partial,  # (parts, C, K, S) float32
    N,
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
    """A program owns every parts-th tile of rows, a block of slots of one class, and a chunk of columns."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    c, block = tl.program_id(1) // tl.cdiv(K, SLOTS), tl.program_id(1) % tl.cdiv(K, SLOTS)
    slots = block * SLOTS + tl.arange(0, SLOTS)
    start = tl.program_id(2) * COLUMNS
    summed = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for tile in range(part, tl.cdiv(N, BLOCK), parts):
        rows, inside = tile_rows((part * 0 + tile).to(tl.int64) * BLOCK, N, BLOCK)
        first = row_columns(z, z_stride, rows, 0, S, COLUMNS, ALIGN)
        norm = row_norms(first, z, z_stride, rows, S, BLOCK, COLUMNS, ALIGN)
        g = tl.load(grad + rows * C + c, inside, 0.0)
        # As shares of the largest gradient in the tile: small ones would vanish in float16.
        largest = tl.max(tl.abs(g), 0)
        largest = tl.where(largest == 0, 1.0, largest)
        scaled = (g / largest)[:, None]
        if LSE:
            cosines = slot_cosines(
                *(first, norm, z, z_stride, rows, bank, c, slots, K, S, SLOTS, BLOCK, COLUMNS, ALIGN, PRECISION)
            )
            s = tl.load(similarities + rows * C + c)
            shares = scaled * tl.exp(tau * (cosines - s[:, None]))
        else:
            slot = tl.load(nearest + rows * C + c)
            shares = tl.where(slot[:, None] == slots[None, :], scaled, 0.0)
        live = (g != 0)[:, None]
        x = row_columns(z, z_stride, rows, start, S, COLUMNS, ALIGN)
        unit = tl.where(live, x.to(tl.float32) / norm[:, None], 0.0)
        shares = tl.where(live, shares, 0.0)
        summed += largest * product(tl.trans(shares.to(x.dtype)), unit.to(x.dtype), PRECISION)
    columns = start + tl.arange(0, COLUMNS)
    target = partial + ((part.to(tl.int64) * C + c) * K + slots)[:, None] * S + columns[None, :]
    tl.store(target, summed, (slots < K)[:, None] & (columns < S)[None, :])


def memory_similarity(z: Tensor, memory: Tensor, reduce: str = "max", tau: float = 5.0) -> tuple[Tensor, Tensor]:
    """z (N, S), memory (C, K, S) -> similarities (N, C) float32, slots (N, C) int32."""
    z = rows_of(z)
    return with_bank("memory_similarity", memory, z, lambda bank: _similarity(z, bank, reduce, tau))


def memory_similarity_backward(
    grad: Tensor, z: Tensor, memory: Tensor, reduce: str, tau: float, slots: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and memory, each None where `needs` says so."""
    z = rows_of(z)

    def run(bank: Bank) -> tuple[Tensor | None, Tensor | None]:
        similarities = _similarity(z, bank, reduce, tau)[0] if reduce == "lse" and any(needs) else None
        return similarity_backward(grad.float(), z, memory, bank, tau, slots, similarities, needs)

    return with_bank(f"memory_similarity_backward {reduce}", memory, z, run)


def similarity_backward(
    grad: Tensor,
    z: Tensor,
    memory: Tensor,
    bank: Bank,
    tau: float,
    slots: Tensor,
    similarities: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The same with the bank at hand, and with the `similarities` of lse, or None for max."""
    grad, slots = grad.contiguous(), slots.contiguous()
    d_z = d_memory = None
    if needs[0]:
        d_z = z.new_empty(z.shape)
        tiles = cdiv(z.shape[0], bank.tiles.rows)
        rows = grad, z, z.stride(0), bank.unit
        if similarities is None:
            launch(max_backward_kernel, (tiles,), *rows, slots, d_z, z.shape[0], *bank.sizes, **bank.meta)
        else:
            grid = (tiles, cdiv(z.shape[1], bank.tiles.columns))
            launch(
                *(lse_backward_kernel, grid, *rows, similarities, d_z, z.shape[0], *bank.sizes, tau),
                **bank.meta,
                PRECISION=bank.precision,
            )
    if needs[1]:
        d_memory = unit_bank_backward(_bank_backward(grad, z, bank, tau, slots, similarities), memory, bank)
    return d_z, d_memory


def _similarity(z: Tensor, bank: Bank, reduce: str, tau: float) -> tuple[Tensor, Tensor]:
    shape = (z.shape[0], bank.sizes[0])
    similarities, slots = z.new_empty(shape, dtype=torch.float32), z.new_empty(shape, dtype=torch.int32)
    launch(
        memory_similarity_fwd_kernel,
        (cdiv(z.shape[0], bank.tiles.rows),),
        *(z, z.stride(0), bank.unit, similarities, slots, z.shape[0], *bank.sizes, tau),
        LSE=reduce == "lse",
        PRECISION=bank.precision,
        **bank.meta,
    )
    return similarities, slots


def _bank_backward(
    grad: Tensor, z: Tensor, bank: Bank, tau: float, slots: Tensor, similarities: Tensor | None
) -> Tensor:
    """The gradient of the unit prototypes (C, K, S)."""
    (rows, columns), (classes, prototypes, _) = z.shape, bank.sizes
    room = _PARTIAL_NUMBERS // (classes * prototypes * columns)
    parts = min(cdiv(rows, bank.tiles.rows), _PARTS, max(1, room))
    partial = z.new_empty(parts, *bank.sizes, dtype=torch.float32)
    blocks = cdiv(prototypes, bank.tiles.slots)
    launch(
        bank_backward_kernel,
        (parts, classes * blocks, cdiv(columns, bank.tiles.columns)),
        *(grad, z, z.stride(0), bank.unit, grad if similarities is None else similarities, slots, partial),
        *(rows, *bank.sizes, tau),
        LSE=similarities is not None,
        PRECISION=bank.precision,
        **bank.meta,
    )
    return partial.sum(0)

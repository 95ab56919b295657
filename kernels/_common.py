"""What all kernels share: launching, which tile of which bag a program owns, dropout bits, and pooling of a tile.

A tile is BLOCK rows of one bag. Bag b is given the programs from offsets[b] // BLOCK + b to those of bag b + 1: never
fewer than it has tiles, at most one more, and N // BLOCK + B in all. So the grid follows on the host from N and B
alone, a program finds its bag by a binary search, no tile crosses a bag, and a giant bag is spread over many programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INF = tl.constexpr(float("inf"))
# Interpreted, bfloat16 lies as bits in NumPy arrays, which a product would take for integers.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **meta: Any
) -> None:
    """The one place where kernels are started: on the device of the first tensor; an empty grid starts nothing."""
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **meta)


def work(
    of: str, operations: Callable[[Any], float], passes: Callable[[Any], Mapping[str, float]] = lambda _: {}
) -> Callable[[Any, Any, Mapping[str, Any]], dict[str, Any]]:
    """A `launch_metadata` hook of `triton.jit`, which Triton's profiler Proton asks at every launch.

    `operations` counts those of the products from the kernel's arguments; they are reported under the width of argument
    `of`. Bytes: every tensor moved once, or as often as `passes` says. One that stands for another that is absent, at
    the same address, is not counted again. Nothing of the device is read.
    """

    def metadata(grid: Any, compiled: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        given = SimpleNamespace(**arguments)
        tensors = {name: t for name, t in arguments.items() if hasattr(t, "data_ptr")}
        often = passes(given)
        moved = {
            t.data_ptr(): often.get(name, 1) * t.numel() * t.element_size() for name, t in reversed(tensors.items())
        }
        bits = 8 * tensors[of].element_size()
        return {"name": compiled.name, f"flops{bits}": operations(given), "bytes": int(sum(moved.values()))}

    return metadata


def tile_programs(rows: int, bags: int, block: int) -> int:
    """Programs that cover every tile of every bag."""
    return rows // block + bags


def padded_heads(heads: int) -> int:
    """Heads of a tile: 1 is summed elementwise, more go through a matrix product, which wants 16 at least."""
    return 1 if heads == 1 else max(16, next_power_of_2(heads))


def next_power_of_2(n: int) -> int:
    """The least power of two that is not under n ≥ 1, without Triton's own wrapper, which takes microseconds."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, without Triton's own wrapper, which takes microseconds."""
    return -(-a // b)


def rows_of(x: Tensor) -> Tensor:
    """`x` with columns one after the other; rows may lie apart."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def alignment(x: Tensor) -> int:
    """The power of two, 16 at most, of elements of which every row of `x` begins and ends at a multiple.

    Triton sees by itself only what 16 divides, and reads all else value by value.
    """
    return math.gcd(16, x.shape[1], x.stride(0), x.data_ptr() // x.element_size())


def precision(dtype: torch.dtype) -> str:
    """Return how float32 products are computed in an op on `dtype`.

    "ieee" (exactly) where the op is of float32 and torch is not told to use TF32; "tf32" where it is, and where the op
    is of half precision, whose own products don't ask. torch's newer switch also shows what the older ones set.
    """
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    try:
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    except AttributeError:  # torch 2.8 has the older switch alone; where both are, reading that one may raise
        return "tf32" if matmul.allow_tf32 else "ieee"


@triton.jit
def multiple(number, OF: tl.constexpr):
    """`number` as it is, which the compiler is to know as a multiple of OF."""
    return number // OF * OF


@triton.jit
def row_pointers(base, rows, stride, columns, ALIGN: tl.constexpr):
    """(rows, columns) pointers; rows `stride` apart begin at multiples of ALIGN elements, and so does `columns`."""
    size: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(base + rows[:, None] * multiple(stride, ALIGN) + columns[None, :], [1, ALIGN * size])


@triton.jit
def locate_tile(offsets, bags, BLOCK: tl.constexpr):
    """Bag of this program, its first row, and the row after the last of the bag (int64); a spare tile has no rows."""
    program = tl.program_id(0)
    low = program * 0
    high = low + bags
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offsets + middle) // BLOCK + middle <= program:
            low = middle
        else:
            high = middle
    begin = tl.load(offsets + low)
    end = tl.load(offsets + low + 1)
    first = begin.to(tl.int64) + (program - begin // BLOCK - low).to(tl.int64) * BLOCK
    return low, first, end.to(tl.int64)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a (M, K) times b (K, N) of one type, summed in float32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dropout_words(seed, rows, first_column, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """(BLOCK, COLUMNS) words of Philox 4x32-10: the low 16 bits are of the tanh branch, the high 16 of the σ branch.

    Counter (row mod 2^32, row div 2^32, column div 4, 0); column d takes word d mod 4. `first_column` divides by 4.
    """
    zero = tl.zeros([BLOCK, COLUMNS // 4], tl.uint32)
    low = zero + (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = zero + (rows >> 32).to(tl.uint32)[:, None]
    column = zero + (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, low, high, column, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK, COLUMNS))


@triton.jit
def spread(weights, per_bag, HEADS_PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """weights (BLOCK, HP) times per_bag (HP, COLS) -> (BLOCK, COLS) float32.

    Normalised weights of a large bag are too small for float16, so both factors are float32 (tf32 for half precision).
    """
    if HEADS_PADDED == 1:
        return weights * per_bag.to(tl.float32)
    else:
        return product(weights, per_bag.to(tl.float32), PRECISION)


@triton.jit
def gather(weights, rows, HEADS_PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """weights (BLOCK, HP) transposed times rows (BLOCK, COLS) -> (HP, COLS) float32.

    Weights are rounded to the type of the rows: the largest of a head should be about 1, as in the softmax of a tile.
    """
    if HEADS_PADDED == 1:
        return tl.sum(weights * rows.to(tl.float32), 0)[None, :]
    else:
        return product(tl.trans(weights.to(rows.dtype)), rows, PRECISION)


@triton.jit
def pool_tile(
    scores,  # (BLOCK, HP) float32, −inf outside the bag
    values,
    value_stride,
    first,
    end,
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
    """Softmax of a tile's scores by itself: largest score, Σ exp, and the weighted sum of its rows, unnormalised."""
    program = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS_PADDED)
    top = tl.max(scores, 0)  # (HP,)
    top = tl.where(top == -INF, 0.0, top)
    weights = tl.exp(scores - top[None, :])  # (BLOCK, HP)
    total = tl.sum(weights, 0)
    slot = program * HEADS + heads
    tl.store(partial_stats + 2 * slot, top, heads < HEADS)
    tl.store(partial_stats + 2 * slot + 1, total, heads < HEADS)

    rows = first + tl.arange(0, BLOCK)
    inside = rows < end
    L = multiple(L, ALIGN)
    for start in range(0, L, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = inside[:, None] & (columns < L)[None, :]
        x = tl.load(row_pointers(values, rows, value_stride, columns, ALIGN), there, 0.0)
        summed = gather(weights, x, HEADS_PADDED, PRECISION)  # (HP, COLS)
        target = partial + slot[:, None] * L + columns[None, :]
        tl.store(target, summed, (heads < HEADS)[:, None] & (columns < L)[None, :])

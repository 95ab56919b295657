"""The gate as its kernels see it: parameters packed for one product, activations of the products, and dropout.

p = x [W_v | W_u]ᵀ is a plain product of the library. The two weights are packed so that column 2d of p belongs to tanh
and column 2d + 1 to σ: a thread that reads neighbouring columns holds both sides of the gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import dropout_words, launch, multiple, next_power_of_2, work
from momkd.kernels._tuning import chip
from momkd.reference.gated_attention_pool import GateParameters
from momkd.reference.philox import keep_scale, keep_threshold


class Gate(NamedTuple):
    """Parameters of the gate as the kernels take them, but for the large weights (`pack_weights`).

    Args:
        tensors: b_v, b_u, w_a, b_a and the seed of dropout; absent ones get a placeholder that no kernel reads.
        flags: the kernels' switches.
        hidden, heads, branches: D, H, and 2 with the σ branch, else 1.
        columns, align: of the products, and the power of two, 16 at most, that divides them.
        threshold, scale: of dropout.
    """

    tensors: list[Tensor]
    flags: dict[str, Any]
    hidden: int
    heads: int
    branches: int
    columns: int
    align: int
    threshold: int
    scale: float


@triton.jit(launch_metadata=work("packed", lambda _: 0))
def pack_gate_kernel(
    w_v,  # (D, L)
    w_u,  # (D, L)
    packed,  # (2D, L)
    L,
    COLUMNS: tl.constexpr,
):
    d = tl.program_id(0).to(tl.int64)
    for start in range(0, L, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = columns < L
        v, u = tl.load(w_v + d * L + columns, there, 0.0), tl.load(w_u + d * L + columns, there, 0.0)
        tl.store(packed + 2 * d * L + columns, v.to(packed.dtype.element_ty), there)
        tl.store(packed + (2 * d + 1) * L + columns, u.to(packed.dtype.element_ty), there)


def pack_weights(x: Tensor, w_v: Tensor, w_u: Tensor | None) -> Tensor:
    """Return (branches · D, L) in the dtype of x, by one launch; with two branches, rows of w_v and w_u alternate."""
    if w_u is None:
        return w_v.to(x.dtype)
    hidden, width = w_v.shape
    packed = x.new_empty(2 * hidden, width)
    launch(pack_gate_kernel, (hidden,), _dense(w_v), _dense(w_u), packed, width, COLUMNS=1024)
    return packed


def gate_of(x: Tensor, parameters: GateParameters, dropout_p: float, seed: Tensor | None) -> Gate:
    """Return the parameters for features `x`."""
    _, b_v, w_u, b_u, w_a, b_a = parameters
    heads, hidden = w_a.shape
    branches = 1 if w_u is None else 2
    columns = branches * hidden
    align = min(16, columns & -columns)
    seed = seed if dropout_p > 0 else None
    flags = {
        "HEADS": heads,
        "HEADS_PADDED": next_power_of_2(heads),
        "GATED": w_u is not None,
        "BIAS_V": b_v is not None,
        "BIAS_U": b_u is not None,
        "BIAS_A": b_a is not None,
        "DROPOUT": seed is not None,
        "FAST": x.dtype != torch.float32 and not _INTERPRETED and has_tanh_approx(chip(x.device)),
        "ALIGN": align,
    }
    w_a = _dense(w_a)
    tensors = [w_a if t is None else _dense(t) for t in (b_v, b_u, None, b_a, seed)]
    dropped = keep_threshold(dropout_p), keep_scale(dropout_p)
    return Gate(tensors, flags, hidden, heads, branches, columns, align, *dropped)


def has_tanh_approx(chip: str) -> bool:
    """Return whether a chip has the instruction tanh.approx: NVIDIA's from compute capability 7.5 on."""
    return chip.startswith("sm_") and int(chip.removeprefix("sm_")) >= 75


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


_INTERPRETED = triton.knobs.runtime.interpret  # in Python there are no special function units


@triton.jit
def tanh(x):
    """From exp where |x| is large, by its series where that would cancel: relative error of a few float32 roundings."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    ratio = (1 - e) / (1 + e)
    return tl.where(square < 0.09, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def tanh_approx(x):
    """The tanh of NVIDIA's special function units: relative error of at most 2^-11."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def activations(v, u, GATED: tl.constexpr, FAST: tl.constexpr):
    """tanh(v) and σ(u), float32; σ is 1 without the gate. FAST: as exact as 16-bit values can tell."""
    if FAST:
        hidden = tanh_approx(v)
        sigma = 0.5 + 0.5 * tanh_approx(0.5 * u) if GATED else tl.full(u.shape, 1.0, tl.float32)
    else:
        hidden = tanh(v)
        sigma = tl.sigmoid(u) if GATED else tl.full(u.shape, 1.0, tl.float32)
    return hidden, sigma


@triton.jit
def load_gate(
    products, local, inside, start, D, b_v, b_u,
    GATED: tl.constexpr, BIAS_V: tl.constexpr, BIAS_U: tl.constexpr, FAST: tl.constexpr,
    BLOCK: tl.constexpr, GATE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """tanh(·) and σ(·) of rows of products for GATE columns from `start` on: (BLOCK, GATE) float32 each."""
    gate = start + tl.arange(0, GATE)
    is_gate = gate < D
    if GATED:
        width = multiple(2 * D, ALIGN)
        columns = 2 * start + tl.arange(0, 2 * GATE)
        at = products + local[:, None] * width + columns[None, :]
        both = tl.load(at, inside[:, None] & (columns < width)[None, :], 0.0).to(tl.float32)
        v, u = tl.split(tl.reshape(both, (BLOCK, GATE, 2)))
    else:
        width = multiple(D, ALIGN)
        at = products + local[:, None] * width + gate[None, :]
        v = tl.load(at, inside[:, None] & (gate < width)[None, :], 0.0).to(tl.float32)
        u = v
    if BIAS_V:
        v += tl.load(b_v + gate, is_gate, 0.0).to(tl.float32)[None, :]
    if BIAS_U:
        u += tl.load(b_u + gate, is_gate, 0.0).to(tl.float32)[None, :]
    return activations(v, u, GATED, FAST)


@triton.jit
def keep_masks(seed, rows, first_column, threshold, scale, BLOCK: tl.constexpr, GATE: tl.constexpr):
    """What dropout multiplies tanh(·) and σ(·) with: 0 or the scale of kept values."""
    words = dropout_words(tl.load(seed), rows, first_column, BLOCK, GATE)
    keep_tanh = tl.where((words & 0xFFFF) >= threshold, scale, 0.0)
    keep_sigma = tl.where((words >> 16) >= threshold, scale, 0.0)
    return keep_tanh, keep_sigma

"""The gate as kernels see it: tanh and σ of both products for a tile and a slice of the gate, and dropout of each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import dropout_words, multiple, product, row_pointers
from momkd.reference.gated_attention_pool import GateParameters


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
def gate_slice(
    x,
    x_stride,
    rows,
    inside,
    w_v,
    b_v,
    w_u,
    b_u,
    gate,
    L,
    D,
    GATED: tl.constexpr,
    BIAS_V: tl.constexpr,
    BIAS_U: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """tanh(·) and σ(·) of some rows for the columns `gate`: (BLOCK, GATE) float32 each; σ is 1 without the gate."""
    is_gate = gate < D
    L = multiple(L, ALIGN)
    acc_v = tl.zeros([BLOCK, GATE], tl.float32)
    acc_u = tl.zeros([BLOCK, GATE], tl.float32)
    for start in range(0, L, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < L
        part = tl.load(row_pointers(x, rows, x_stride, columns, ALIGN), inside[:, None] & is_column[None, :], 0.0)
        at = gate[None, :] * L + columns[:, None]
        both = is_gate[None, :] & is_column[:, None]
        acc_v += product(part, tl.load(w_v + at, both, 0.0), PRECISION)
        if GATED:
            acc_u += product(part, tl.load(w_u + at, both, 0.0), PRECISION)
    if BIAS_V:
        acc_v += tl.load(b_v + gate, is_gate, 0.0).to(tl.float32)[None, :]
    if BIAS_U:
        acc_u += tl.load(b_u + gate, is_gate, 0.0).to(tl.float32)[None, :]
    sigma = tl.sigmoid(acc_u) if GATED else acc_u + 1.0
    return tanh(acc_v), sigma


@triton.jit
def keep_masks(seed, rows, first_column, threshold, scale, BLOCK: tl.constexpr, GATE: tl.constexpr):
    """What dropout multiplies tanh(·) and σ(·) with: 0 or the scale of kept values."""
    words = dropout_words(tl.load(seed), rows, first_column, BLOCK, GATE)
    keep_tanh = tl.where((words & 0xFFFF) >= threshold, scale, 0.0)
    keep_sigma = tl.where((words >> 16) >= threshold, scale, 0.0)
    return keep_tanh, keep_sigma


GateArguments = tuple[list[Tensor], dict[str, object]]


def gate_arguments(x: Tensor, parameters: GateParameters, seed: Tensor | None) -> GateArguments:
    """Pointers of the parameters in the type of x, and the flags; what is absent points to something that is there."""
    given = [None if p is None else p.to(x.dtype).contiguous() for p in parameters]
    w_v, b_v, w_u, b_u, w_a, b_a = given
    assert w_v is not None
    assert w_a is not None
    flags = {
        "GATED": w_u is not None,
        "BIAS_V": b_v is not None,
        "BIAS_U": b_u is not None,
        "DROPOUT": seed is not None,
    }
    tensors = [w_v if p is None else p for p in (w_v, b_v, w_u, b_u, w_a, b_a)]
    return [*tensors, w_v if seed is None else seed], flags

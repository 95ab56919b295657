"""The gate after its matrix product: scores from products, and gradients at the products from those of the scores.

p = x [W_v | W_u]ᵀ is a plain product of the library, the two weights packed so that column 2d is of tanh and column
2d + 1 of σ: a thread that reads neighbouring columns holds both sides of the gate.

s_ih = w_a[h] · (drop(tanh(p_v + b_v)) ⊙ drop(σ(p_u + b_u))) + b_a[h]. Rows come in chunks whose products stay in L2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import launch, multiple, work
from momkd.kernels._gate import activations, keep_masks
from momkd.kernels._tuning import chip
from momkd.reference.gated_attention_pool import GateParameters
from momkd.reference.philox import keep_scale, keep_threshold

CHUNK = 24 << 20  # bytes of products that forward makes at once: they are read again while still in L2
ROWS, GATE, WARPS = 32, 64, 4


class Gate(NamedTuple):
    """The parameters as the kernels take them.

    Args:
        packed: (branches · D, L) in the dtype of the features; with the gate, rows of W_v and W_u take turns.
        tensors: b_v, b_u, w_a, b_a and the seed of dropout; absent ones get a placeholder that no kernel reads.
        flags: the switches of the kernels.
        threshold, scale: of dropout.
    """

    packed: Tensor
    tensors: list[Tensor]
    flags: dict[str, Any]
    threshold: int
    scale: float

    @property
    def hidden(self) -> int:
        """D."""
        return self.packed.shape[0] // (2 if self.flags["GATED"] else 1)


@triton.jit
def pack_gate_kernel(w_v, w_u, packed, L, COLUMNS: tl.constexpr):
    d = tl.program_id(0).to(tl.int64)
    for start in range(0, L, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = columns < L
        v, u = tl.load(w_v + d * L + columns, there, 0.0), tl.load(w_u + d * L + columns, there, 0.0)
        tl.store(packed + 2 * d * L + columns, v.to(packed.dtype.element_ty), there)
        tl.store(packed + (2 * d + 1) * L + columns, u.to(packed.dtype.element_ty), there)


def gate_of(x: Tensor, parameters: GateParameters, dropout_p: float, seed: Tensor | None) -> Gate:
    """Pack the parameters for features `x`, by one launch."""
    w_v, b_v, w_u, b_u, w_a, b_a = (None if p is None else p.contiguous() for p in parameters)
    assert w_v is not None
    assert w_a is not None
    hidden, width = w_v.shape
    if w_u is None:
        packed = w_v.to(x.dtype)
    else:
        packed = x.new_empty(2 * hidden, width)
        columns = min(1024, triton.next_power_of_2(max(width, 16)))
        launch(pack_gate_kernel, (hidden,), w_v, w_u, packed, width, COLUMNS=columns)
    seed = seed if dropout_p > 0 else None
    heads = w_a.shape[0]
    flags = {
        "HEADS": heads,
        "GATED": w_u is not None,
        "BIAS_V": b_v is not None,
        "BIAS_U": b_u is not None,
        "BIAS_A": b_a is not None,
        "DROPOUT": seed is not None,
        "FAST": x.dtype != torch.float32 and x.device.type == "cuda" and chip(x.device).startswith("sm_"),
    }
    tensors = [w_a if p is None else p for p in (b_v, b_u, w_a, b_a, seed)]
    return Gate(packed, tensors, flags, keep_threshold(dropout_p), keep_scale(dropout_p))


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
def first_scores(b_a, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BIAS_A: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK, HP) float32: the bias of each head."""
    heads = tl.arange(0, HEADS_PADDED)
    s = tl.zeros([BLOCK, HEADS_PADDED], tl.float32)
    if BIAS_A:
        s += tl.load(b_a + heads, heads < HEADS, 0.0).to(tl.float32)[None, :]
    return s


@triton.jit
def add_scores(
    s, gated, w_a, start, D, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """Add the part of the scores that comes from gated values (BLOCK, GATE) of columns from `start` on.

    Heads are few: each is summed in float32 by itself, for which no tile has to be padded to the matrix unit's 16.
    """
    gate = start + tl.arange(0, GATE)
    heads = tl.arange(0, HEADS_PADDED)
    for head in tl.static_range(HEADS):
        a = tl.load(w_a + head * D + gate, gate < D, 0.0).to(tl.float32)
        part = tl.sum(gated * a[None, :], 1)[:, None]
        s += part if HEADS == 1 else tl.where(heads[None, :] == head, part, 0.0)
    return s


@triton.jit
def store_scores(scores, rows, inside, s, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr):
    heads = tl.arange(0, HEADS_PADDED)
    tl.store(scores + rows[:, None] * HEADS + heads[None, :], s, inside[:, None] & (heads < HEADS)[None, :])


def _score_operations(a: Any) -> float:
    return 2 * (a.end_row - a.first_row) * a.HEADS * a.D


def _score_passes(a: Any) -> dict[str, float]:
    return {"scores": (a.end_row - a.first_row) / a.scores.shape[0]}


VARYING = ["first_row", "end_row", "threshold"]


@triton.jit(do_not_specialize=VARYING, launch_metadata=work("products", _score_operations, _score_passes))
def gate_scores_kernel(
    products,  # (R, branches · D): of rows first_row to end_row
    b_v,  # (D,)
    b_u,
    w_a,  # (H, D)
    b_a,  # (H,)
    seed,  # () int64
    scores,  # (N, H) float32
    first_row,
    end_row,
    D,
    threshold,
    scale,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    GATED: tl.constexpr,
    BIAS_V: tl.constexpr,
    BIAS_U: tl.constexpr,
    BIAS_A: tl.constexpr,
    DROPOUT: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = first_row + local
    inside = rows < end_row
    s = first_scores(b_a, HEADS, HEADS_PADDED, BIAS_A, BLOCK)
    for start in range(0, D, GATE):
        hidden, sigma = load_gate(
            *(products, local, inside, start, D, b_v, b_u),
            *(GATED, BIAS_V, BIAS_U, FAST, BLOCK, GATE, ALIGN),
        )
        if DROPOUT:
            keep_tanh, keep_sigma = keep_masks(seed, rows, start, threshold, scale, BLOCK, GATE)
            hidden *= keep_tanh
            if GATED:
                sigma *= keep_sigma
        s = add_scores(s, hidden * sigma, w_a, start, D, HEADS, HEADS_PADDED, GATE)
    store_scores(scores, rows, inside, s, HEADS, HEADS_PADDED)


def _gradient_operations(a: Any) -> float:
    return 2 * (a.end_row - a.first_row) * a.D * 2 * a.HEADS


def _gradient_passes(a: Any) -> dict[str, float]:
    return {"d_scores": (a.end_row - a.first_row) / a.d_scores.shape[0]}


@triton.jit(do_not_specialize=VARYING, launch_metadata=work("products", _gradient_operations, _gradient_passes))
def gate_gradient_kernel(
    products,  # (R, branches · D): of rows first_row to end_row
    d_products,  # the same shape; may be the same tensor
    d_scores,  # (N, H) float32
    d_scale,  # () float32: the gradients at the products are written times this
    b_v,
    b_u,
    w_a,
    seed,
    d_head,  # (T, H, D) float32: each tile's part of the gradient of w_a
    d_bias,  # (T, branches, D) float32: each tile's part of those of b_v and b_u
    first_row,
    end_row,
    D,
    threshold,
    scale,
    HEADS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS_V: tl.constexpr,
    BIAS_U: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALED: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BRANCHES: tl.constexpr = 2 if GATED else 1
    SLICES = tl.cdiv(D, GATE)
    tile = (tl.program_id(0) // SLICES).to(tl.int64)
    start = tl.program_id(0) % SLICES * GATE  # slices of a tile run side by side: they share its scores' gradients
    local = tile * BLOCK + tl.arange(0, BLOCK)
    rows = first_row + local
    inside = rows < end_row
    gate = start + tl.arange(0, GATE)
    is_gate = gate < D
    hidden, sigma = load_gate(
        *(products, local, inside, start, D, b_v, b_u),
        *(GATED, BIAS_V, BIAS_U, FAST, BLOCK, GATE, ALIGN),
    )
    slope_tanh = 1 - hidden * hidden
    slope_sigma = sigma * (1 - sigma)
    if DROPOUT:
        keep_tanh, keep_sigma = keep_masks(seed, rows, start, threshold, scale, BLOCK, GATE)
        hidden *= keep_tanh
        slope_tanh *= keep_tanh
        if GATED:
            sigma *= keep_sigma
            slope_sigma *= keep_sigma

    gated = hidden * sigma
    d_gated = tl.zeros([BLOCK, GATE], tl.float32)
    for head in tl.static_range(HEADS):
        ds = tl.load(d_scores + rows * HEADS + head, inside, 0.0)[:, None]
        a = tl.load(w_a + head * D + gate, is_gate, 0.0).to(tl.float32)[None, :]
        d_gated += ds * a
        tl.store(d_head + (tile * HEADS + head) * D + gate, tl.sum(ds * gated, 0), is_gate)

    d_v = d_gated * sigma * slope_tanh
    tl.store(d_bias + tile * (BRANCHES * D) + gate, tl.sum(d_v, 0), is_gate)
    factor = tl.load(d_scale) if SCALED else 1.0
    width = multiple(BRANCHES * D, ALIGN)
    if GATED:
        d_u = d_gated * hidden * slope_sigma
        tl.store(d_bias + tile * (BRANCHES * D) + D + gate, tl.sum(d_u, 0), is_gate)
        columns = 2 * start + tl.arange(0, 2 * GATE)
        d = tl.reshape(tl.join(d_v, d_u), (BLOCK, 2 * GATE))
    else:
        columns = gate
        d = d_v
    target = d_products + local[:, None] * width + columns[None, :]
    there = inside[:, None] & (columns < width)[None, :]
    tl.store(target, (d * factor).to(d_products.dtype.element_ty), there)


def chunk_rows(gate: Gate, x: Tensor, size: int) -> int:
    """Rows whose products take about `size` bytes: whole waves of 128-row tiles where that is not too few."""
    rows = max(1, size // (gate.packed.shape[0] * x.element_size()))
    wave = 128 * (torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 1)
    return rows // wave * wave if rows >= wave else max(128, rows // 128 * 128)


def _cut(gate: Gate, x: Tensor) -> dict[str, Any]:
    width = gate.packed.shape[0]
    return {
        "BLOCK": ROWS,
        "GATE": min(GATE, max(16, triton.next_power_of_2(gate.hidden))),
        "ALIGN": min(16, width & -width),
        "num_warps": WARPS,
    }


def gate_scores(x: Tensor, gate: Gate, keep: bool, size: int = CHUNK) -> tuple[Tensor, Tensor]:
    """x (N, L) -> scores (N, H) float32, products (N, branches · D) where they are kept, else (0,)."""
    rows = x.shape[0]
    step = min(rows, chunk_rows(gate, x, size))
    scores = x.new_empty(rows, gate.flags["HEADS"], dtype=torch.float32)
    products = x.new_empty(rows if keep else step, gate.packed.shape[0])
    cut, packed = _cut(gate, x), gate.packed.T
    for first in range(0, rows, max(step, 1)):
        end = min(first + step, rows)
        part = products[first:end] if keep else products[: end - first]
        torch.mm(x[first:end], packed, out=part)
        launch(
            gate_scores_kernel,
            (triton.cdiv(end - first, cut["BLOCK"]),),
            part,
            *gate.tensors,
            scores,
            first,
            end,
            gate.hidden,
            gate.threshold,
            gate.scale,
            HEADS_PADDED=triton.next_power_of_2(gate.flags["HEADS"]),
            **gate.flags,
            **cut,
        )
    return scores, products if keep else x.new_empty(0)


class GateGradients(NamedTuple):
    """Gradients of a gate: d_packed (branches · D, L), d_bias (branches, D), d_head (H, D), all in float32."""

    d_packed: Tensor | None
    d_bias: Tensor
    d_head: Tensor


WORKSPACE = 256 << 20  # bytes of gradients at the products that backward holds at once


def power_of_two_below(values: Tensor) -> Tensor:
    """() float32: the power of two that brings the largest of `values` to between 1 and 2; 1 where there is none.

    Gradients at the products are some thousandths of 1 / N: without it, most of them are zero in float16.
    """
    largest = values.abs().amax() if values.numel() else values.new_zeros(())
    exponent = torch.frexp(largest).exponent - 1
    usable = (largest > 0) & largest.isfinite()
    return torch.where(usable, torch.exp2(-exponent.float().clamp(-120, 120)), 1.0)


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (K, N) of one dtype, summed and returned in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cuda" and torch.version.cuda is not None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float()) if a.device.type == "cpu" else torch.mm(a, b).float()


def gate_backward(
    x: Tensor, gate: Gate, d_scores: Tensor, kept: Tensor, d_x: Tensor | None, need_weights: bool, size: int = WORKSPACE
) -> GateGradients:
    """Write the gate's part of the gradient of x into d_x (N, L), and return the other gradients.

    Products that were kept are read; else they are made again, a chunk at a time.
    """
    rows, columns, hidden, heads = x.shape[0], gate.packed.shape[0], gate.hidden, gate.flags["HEADS"]
    step = min(rows, chunk_rows(gate, x, size))
    cut = _cut(gate, x)
    tiles = triton.cdiv(rows, cut["BLOCK"])
    d_head = x.new_empty(tiles, heads, hidden, dtype=torch.float32)
    d_bias = x.new_empty(tiles, columns, dtype=torch.float32)
    d_packed = x.new_zeros(columns, x.shape[1], dtype=torch.float32) if need_weights else None
    space = x.new_empty(step, columns)
    scaled = x.dtype == torch.float16
    flags = {name: value for name, value in gate.flags.items() if name != "BIAS_A"}
    b_v, b_u, w_a, _, seed = gate.tensors
    for first in range(0, rows, max(step, 1)):
        end = min(first + step, rows)
        count, tile = end - first, first // cut["BLOCK"]
        chunk, d_products = x[first:end], space[: end - first]
        products = kept[first:end] if kept.numel() else torch.mm(chunk, gate.packed.T, out=d_products)
        factor = power_of_two_below(d_scores[first:end]) if scaled else d_scores
        launch(
            gate_gradient_kernel,
            (triton.cdiv(count, cut["BLOCK"]) * triton.cdiv(hidden, cut["GATE"]),),
            products,
            d_products,
            d_scores,
            factor,
            b_v,
            b_u,
            w_a,
            seed,
            d_head[tile:],
            d_bias[tile:],
            first,
            end,
            hidden,
            gate.threshold,
            gate.scale,
            SCALED=scaled,
            **flags,
            **cut,
        )
        if d_x is not None:
            torch.mm(d_products, gate.packed, out=d_x[first:end])
            if scaled:
                d_x[first:end] /= factor
        if d_packed is not None:
            part = product_in_float32(d_products.T, chunk)
            d_packed += part / factor if scaled else part
    return GateGradients(d_packed, d_bias.sum(0).view(-1, hidden), d_head.sum(0))

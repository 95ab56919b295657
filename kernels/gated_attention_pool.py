"""gated_attention_pool: scores of a gate, softmax over each bag and the weighted sum, in one pass over the features.

s_ih = w_a[h] · (drop(tanh(W_v x_i + b_v)) ⊙ drop(σ(W_u x_i + b_u))) + b_a[h];  out[b, h] = Σ_i softmax(s)_ih x_i.

Forward: a program owns a tile of rows of one bag. It forms both gate products a slice of the gate at a time, so that
the accumulators stay in registers, adds the slice to the scores, and pools the tile while its rows are still in L2. Of
the (N, D) activations nothing is stored. Backward recomputes them: a kernel writes the gradient at the inputs of tanh
and σ for a bounded chunk of rows, and matrix products of the library turn it into those of features and weights.
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
    launch,
    locate_tile,
    padded_heads,
    pool_tile,
    precision,
    product,
    rows_of,
    tile_programs,
    work,
)
from momkd.kernels._gate import GateArguments, gate_arguments, gate_slice, keep_masks
from momkd.kernels._tuning import (
    GATE_BACKWARD,
    GATE_FORWARD,
    GATE_FORWARD_DROPOUT,
    GateTiles,
    Tiles,
    register_limit,
)
from momkd.kernels.segment_pool import combine, pool_backward
from momkd.reference.gated_attention_pool import GateParameters
from momkd.reference.philox import keep_scale, keep_threshold

WORKSPACE = 32 << 20  # bytes of gate gradients held at once in backward


def _forward_operations(a: Any) -> float:
    return 2 * a.x.shape[0] * ((1 + a.GATED) * a.L * a.D + a.HEADS * (a.D + a.L))


@triton.jit(do_not_specialize=["bags", "threshold"], launch_metadata=work("x", _forward_operations))
def gated_attention_pool_fwd_kernel(
    x,
    x_stride,
    offsets,
    bags,
    w_v,  # (D, L)
    b_v,  # (D,)
    w_u,
    b_u,
    w_a,  # (H, D)
    b_a,  # (H,)
    seed,  # () int64
    scores,  # (N, H) float32
    partial,  # (T, H, L) float32
    partial_stats,  # (T, H, 2) float32
    L,
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
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, first, end = locate_tile(offsets, bags, BLOCK)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK)
    inside = rows < end
    heads = tl.arange(0, HEADS_PADDED)
    s = tl.zeros([BLOCK, HEADS_PADDED], tl.float32)
    if BIAS_A:
        s += tl.load(b_a + heads, heads < HEADS, 0.0).to(tl.float32)[None, :]
    for start in range(0, D, GATE):
        gate = start + tl.arange(0, GATE)
        hidden, sigma = gate_slice(
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
            GATED,
            BIAS_V,
            BIAS_U,
            BLOCK,
            GATE,
            COLUMNS,
            ALIGN,
            PRECISION,
        )
        if DROPOUT:
            keep_tanh, keep_sigma = keep_masks(seed, rows, start, threshold, scale, BLOCK, GATE)
            hidden *= keep_tanh
            if GATED:
                sigma *= keep_sigma
        hidden *= sigma
        at = heads[:, None] * D + gate[None, :]
        a = tl.load(w_a + at, (heads < HEADS)[:, None] & (gate < D)[None, :], 0.0)  # (HP, GATE)
        if HEADS_PADDED == 1:
            s += tl.sum(hidden * a.to(tl.float32), 1)[:, None]
        else:
            s += product(hidden.to(a.dtype), tl.trans(a), PRECISION)
    both = inside[:, None] & (heads < HEADS)[None, :]
    tl.store(scores + rows[:, None] * HEADS + heads[None, :], s, both)
    s = tl.where(both, s, -INF)
    pool_tile(
        *(s, x, x_stride, first, end, partial, partial_stats, L),
        *(HEADS, HEADS_PADDED, BLOCK, COLUMNS, ALIGN, PRECISION),
    )


def _gradient_operations(a: Any) -> float:
    return 2 * (a.end_row - a.first_row) * a.D * ((1 + a.GATED) * a.L + 2 * a.HEADS)


def _gradient_passes(a: Any) -> dict[str, float]:
    """Of x, the gradients of scores and those of the gate, a chunk of rows."""
    rows = a.end_row - a.first_row
    return {name: rows / getattr(a, name).shape[0] for name in ("x", "d_scores", "d_gate")}


@triton.jit(
    do_not_specialize=["first_row", "end_row", "threshold"],
    launch_metadata=work("x", _gradient_operations, _gradient_passes),
)
def gate_gradient_kernel(
    x,
    x_stride,
    first_row,
    end_row,
    d_scores,  # (N, H) float32
    w_v,
    b_v,
    w_u,
    b_u,
    w_a,
    seed,
    d_gate,  # (R, branches, D): at the inputs of tanh and σ
    d_head,  # (T, H, D) float32: each tile's part of the gradient of w_a
    d_bias,  # (T, branches, D) float32: each tile's part of those of b_v and b_u
    L,
    D,
    threshold,
    scale,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    GATED: tl.constexpr,
    BIAS_V: tl.constexpr,
    BIAS_U: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BRANCHES: tl.constexpr = 2 if GATED else 1
    tile = tl.program_id(0).to(tl.int64)
    local = tile * BLOCK + tl.arange(0, BLOCK)
    rows = first_row + local
    inside = rows < end_row
    start = tl.program_id(1) * GATE
    gate = start + tl.arange(0, GATE)
    is_gate = gate < D
    heads = tl.arange(0, HEADS_PADDED)
    is_head = heads < HEADS

    hidden, sigma = gate_slice(
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
        GATED,
        BIAS_V,
        BIAS_U,
        BLOCK,
        GATE,
        COLUMNS,
        ALIGN,
        PRECISION,
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

    ds = tl.load(
        d_scores + rows[:, None] * HEADS + heads[None, :], inside[:, None] & is_head[None, :], 0.0
    )  # (BLOCK, HP)
    at = heads[:, None] * D + gate[None, :]
    a = tl.load(w_a + at, is_head[:, None] & is_gate[None, :], 0.0).to(tl.float32)  # (HP, GATE)
    d_head_slice = tl.zeros([HEADS_PADDED, GATE], tl.float32)
    if HEADS_PADDED == 1:
        d_hidden = ds * a
        d_head_slice += tl.sum(ds * hidden * sigma, 0)[None, :]
    else:
        d_hidden = product(ds, a, PRECISION)
        d_head_slice += product(tl.trans(ds), hidden * sigma, PRECISION)
    tl.store(
        d_head + (tile * HEADS + heads[:, None]) * D + gate[None, :], d_head_slice, is_head[:, None] & is_gate[None, :]
    )

    there = inside[:, None] & is_gate[None, :]
    target = d_gate + local[:, None] * (BRANCHES * D) + gate[None, :]
    d_v = tl.where(inside[:, None], d_hidden * sigma * slope_tanh, 0.0)
    tl.store(target, d_v.to(d_gate.dtype.element_ty), there)
    tl.store(d_bias + tile * (BRANCHES * D) + gate, tl.sum(d_v, 0), is_gate)
    if GATED:
        d_u = tl.where(inside[:, None], d_hidden * hidden * slope_sigma, 0.0)
        tl.store(target + D, d_u.to(d_gate.dtype.element_ty), there)
        tl.store(d_bias + tile * (BRANCHES * D) + D + gate, tl.sum(d_u, 0), is_gate)


def gated_attention_pool(
    x: Tensor, offsets: Tensor, parameters: GateParameters, dropout_p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, L), offsets (B+1,) -> pooled (B, H, L) in the dtype of x, scores (N, H) before softmax, stats (B, H, 2)."""
    x, seed = rows_of(x), seed if dropout_p > 0 else None
    table = GATE_FORWARD if seed is None else GATE_FORWARD_DROPOUT
    arguments = gate_arguments(x, parameters, seed)
    run = partial(_forward, x, offsets, parameters, dropout_p, arguments)
    return run(table.choose(_named("gated_attention_pool", arguments), x, *_sizes(x, parameters), run=run))


def _sizes(x: Tensor, parameters: GateParameters) -> tuple[int, int, int, int]:
    """What tiles are fitted to."""
    heads, hidden = parameters.w_a.shape
    return x.shape[1], heads, alignment(x), hidden


def _named(op: str, arguments: GateArguments) -> str:
    """The op with the switches that make other kernels of it."""
    _, flags = arguments
    return " ".join([op, *(name.lower() for name in ("GATED", "DROPOUT") if flags[name])])


def _forward(
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    arguments: GateArguments,
    tiles: GateTiles,
) -> tuple[Tensor, Tensor, Tensor]:
    bags, (rows, width), (heads, hidden) = offsets.shape[0] - 1, x.shape, parameters.w_a.shape
    tensors, flags = arguments
    programs = tile_programs(rows, bags, tiles.rows)
    scores = x.new_empty(rows, heads, dtype=torch.float32)
    parts = x.new_empty(programs, heads, width, dtype=torch.float32)
    part_stats = x.new_empty(programs, heads, 2, dtype=torch.float32)
    launch(
        gated_attention_pool_fwd_kernel,
        (programs,),
        x,
        x.stride(0),
        offsets,
        bags,
        *tensors,
        scores,
        parts,
        part_stats,
        width,
        hidden,
        keep_threshold(dropout_p),
        keep_scale(dropout_p),
        HEADS=heads,
        HEADS_PADDED=padded_heads(heads),
        BIAS_A=parameters.b_a is not None,
        BLOCK=tiles.rows,
        GATE=tiles.gate,
        COLUMNS=tiles.columns,
        ALIGN=alignment(x),
        PRECISION=precision(x.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **register_limit(x.device),
        **flags,
    )
    pooled, stats = combine(parts, part_stats, offsets, x, Tiles(tiles.rows, tiles.columns))
    return pooled, scores, stats


def gated_attention_pool_backward(
    grad_pooled: Tensor,
    grad_scores: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    seed: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_v, b_v, w_u, b_u, w_a, b_a in this order, None where `needs` says so; gates are recomputed."""
    x = rows_of(x)
    _, d_scores = pool_backward(grad_pooled, x, scores, stats, offsets, pooled, (False, True))
    assert d_scores is not None
    if grad_scores is not None:
        d_scores += grad_scores
    w_v, b_v, w_u, b_u, w_a, b_a = parameters
    d_x = x.new_empty(x.shape) if needs[0] else None
    d_weight = x.new_zeros(1 if w_u is None else 2, *w_v.shape, dtype=torch.float32) if needs[1] or needs[3] else None
    arguments = gate_arguments(x, parameters, seed if dropout_p > 0 else None)
    run = partial(_gate_gradients, x, d_scores, parameters, dropout_p, arguments)
    tiles = GATE_BACKWARD.choose(_named("gate_gradient", arguments), x, *_sizes(x, parameters), run=run)
    d_bias, d_head = run(tiles, d_x, d_weight)
    if d_x is not None:
        pool_backward(grad_pooled, x, scores, stats, offsets, pooled, (True, False), add_to=d_x)
    last = 0 if w_u is None else 1
    by_branch = [None if d_weight is None else d_weight[i] for i in (0, last)]
    found = (d_x, by_branch[0], d_bias[0], by_branch[1], d_bias[last], d_head, d_scores.sum(0))
    given = (x, w_v, b_v, w_u, b_u, w_a, b_a)
    return tuple(
        gradient.to(like.dtype, copy=gradient is not d_x)
        if need and gradient is not None and like is not None
        else None
        for need, gradient, like in zip(needs, found, given, strict=True)
    )


def _gate_gradients(
    x: Tensor,
    d_scores: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    arguments: GateArguments,
    tiles: GateTiles,
    d_x: Tensor | None = None,
    d_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the gate's part of d_x (N, L) and add to d_weight (branches, D, L).

    Returns d_bias (branches, D) and d_head (H, D).
    """
    (rows, width), (heads, hidden) = x.shape, parameters.w_a.shape
    tensors, flags = arguments
    w_v, b_v, w_u, b_u, w_a, _, seed_or_other = tensors
    branches = 2 if flags["GATED"] else 1
    both = torch.cat([w_v, w_u]) if branches == 2 else w_v  # (branches · D, L)
    most = max(1, WORKSPACE // (branches * hidden * x.element_size() * tiles.rows)) * tiles.rows
    d_gate = x.new_empty(min(most, rows), branches * hidden)
    d_bias = x.new_zeros(branches * hidden, dtype=torch.float32)
    d_head = x.new_zeros(heads, hidden, dtype=torch.float32)
    for first in range(0, rows, most):
        count = min(most, rows - first)
        programs = triton.cdiv(count, tiles.rows)
        part_head = x.new_empty(programs, heads, hidden, dtype=torch.float32)
        part_bias = x.new_empty(programs, branches * hidden, dtype=torch.float32)
        launch(
            gate_gradient_kernel,
            (programs, triton.cdiv(hidden, tiles.gate)),
            x,
            x.stride(0),
            first,
            first + count,
            d_scores,
            w_v,
            b_v,
            w_u,
            b_u,
            w_a,
            seed_or_other,
            d_gate,
            part_head,
            part_bias,
            width,
            hidden,
            keep_threshold(dropout_p),
            keep_scale(dropout_p),
            HEADS=heads,
            HEADS_PADDED=padded_heads(heads),
            BLOCK=tiles.rows,
            GATE=tiles.gate,
            COLUMNS=tiles.columns,
            ALIGN=alignment(x),
            PRECISION=precision(x.dtype),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **register_limit(x.device),
            **flags,
        )
        d_bias += part_bias.sum(0)
        d_head += part_head.sum(0)
        chunk, gates = x[first : first + count], d_gate[:count]
        if d_x is not None:
            torch.mm(gates, both, out=d_x[first : first + count])
        if d_weight is not None:
            d_weight += torch.mm(gates.T, chunk).view_as(d_weight)
    return d_bias.view(branches, hidden), d_head

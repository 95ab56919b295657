"""gated_attention_pool: scores of a gate, softmax over each bag, and the weighted sum of its rows.

s_ih = w_a[h] · (drop(tanh(W_v x_i + b_v)) ⊙ drop(σ(W_u x_i + b_u))) + b_a[h] + score_bias_ih;
out[b, h] = Σ_i softmax(s)_ih x_i. `gated_attention_scores` is the gate alone.

Forward: one product of the library gives p = x [W_v | W_u]ᵀ, one kernel the scores from p, and `attention_pool` does
the rest. On an H200 that takes 0.6 of the time of one kernel for all of it (benchmarks/NOTES.md). Where gradients
are wanted and memory allows, p is kept: (N, branches · D) in the dtype of x. Backward turns p and the gradients of the
scores into gradients at p by one kernel, and those into gradients of features and weights by products of the library.
Without p, both passes make it a bounded chunk of rows at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import cdiv, launch, multiple, rows_of, work
from momkd.kernels._gate import Gate, gate_of, keep_masks, load_gate, pack_weights
from momkd.kernels._tuning import GATE_BACKWARD, GATE_SCORES, Tiles, register_limit
from momkd.kernels.attention_pool import attention_pool
from momkd.kernels.segment_pool import pool_backward
from momkd.reference.gated_attention_pool import GateParameters

WORKSPACE = 128 << 20  # bytes of products, or of gradients at them, that are held at once where none are kept
STEPS = 8  # tiles of a program in backward: as many fewer partial sums
VARYING = ["first_row", "end_row", "threshold"]  # from batch to batch


def _score_operations(a: Any) -> float:
    return 2 * (a.end_row - a.first_row) * a.HEADS * a.D


def _score_passes(a: Any) -> dict[str, float]:
    return {"scores": (a.end_row - a.first_row) / a.scores.shape[0]}


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
    heads = tl.arange(0, HEADS_PADDED)
    is_head = heads < HEADS
    s = tl.zeros([BLOCK, HEADS_PADDED], tl.float32)
    if BIAS_A:
        s += tl.load(b_a + heads, is_head, 0.0).to(tl.float32)[None, :]
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
        gated = hidden * sigma
        gate = start + tl.arange(0, GATE)
        # Heads are few. Each is summed in float32 by itself: no tile has to be padded to the matrix unit's 16.
        for head in tl.static_range(HEADS):
            a = tl.load(w_a + head * D + gate, gate < D, 0.0).to(tl.float32)
            part = tl.sum(gated * a[None, :], 1)[:, None]
            s += part if HEADS == 1 else tl.where(heads[None, :] == head, part, 0.0)
    tl.store(scores + rows[:, None] * HEADS + heads[None, :], s, inside[:, None] & is_head[None, :])


def _gradient_operations(a: Any) -> float:
    return 2 * (a.end_row - a.first_row) * a.D * 2 * a.HEADS


def _gradient_passes(a: Any) -> dict[str, float]:
    in_place = a.products.data_ptr() == a.d_products.data_ptr()
    return {"d_scores": (a.end_row - a.first_row) / a.d_scores.shape[0], "products": 1 + in_place}


@triton.jit
def power_of_two_below(largest):
    """The power of two that brings `largest` ≥ 0 to between 1 and 2, and its inverse; 1 for zero and non-finite."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    usable = (exponent > 0) & (exponent < 254)
    factor = tl.where(usable, ((254 - exponent) << 23).to(tl.float32, bitcast=True), 1.0)
    inverse = tl.where(usable, (exponent << 23).to(tl.float32, bitcast=True), 1.0)
    return factor, inverse


@triton.jit(do_not_specialize=VARYING, launch_metadata=work("products", _gradient_operations, _gradient_passes))
def gate_gradient_kernel(
    products,  # (R, branches · D): of rows first_row to end_row
    d_products,  # the same shape; may be the same tensor
    d_scores,  # (N, H) float32
    largest,  # () float32: of |d_scores|, read with SCALED
    inverse,  # () float32: what d_products is to be multiplied with, written with SCALED
    b_v,
    b_u,
    w_a,
    seed,
    parts,  # (T, branches + H, D) float32: each program's part of the gradients of b_v, b_u and w_a
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
    DROPOUT: tl.constexpr,
    SCALED: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    GATE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BRANCHES: tl.constexpr = 2 if GATED else 1
    SUMMED: tl.constexpr = BLOCK if HEADS == 1 else HEADS_PADDED
    slices = tl.cdiv(D, GATE)
    part = (tl.program_id(0) // slices).to(tl.int64)
    start = tl.program_id(0) % slices * GATE  # slices of the same rows run side by side
    gate = start + tl.arange(0, GATE)
    is_gate = gate < D
    heads = tl.arange(0, HEADS_PADDED)
    factor = 1.0
    if SCALED:
        factor, back = power_of_two_below(tl.load(largest))
        if tl.program_id(0) == 0:
            tl.store(inverse, back)

    sum_v = tl.zeros([BLOCK, GATE], tl.float32)
    sum_u = tl.zeros([BLOCK, GATE], tl.float32)
    sum_head = tl.zeros([SUMMED, GATE], tl.float32)
    width = BRANCHES * D
    for step in range(STEPS):
        local = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        rows = first_row + local
        inside = rows < end_row
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
            d_gated += ds * tl.load(w_a + head * D + gate, is_gate, 0.0).to(tl.float32)[None, :]
            if HEADS == 1:
                sum_head += ds * gated
            else:
                sum_head += tl.where(heads[:, None] == head, tl.sum(ds * gated, 0)[None, :], 0.0)
        d_v = d_gated * sigma * slope_tanh
        sum_v += d_v
        if GATED:
            d_u = d_gated * hidden * slope_sigma
            sum_u += d_u
            columns = 2 * start + tl.arange(0, 2 * GATE)
            d = tl.reshape(tl.join(d_v, d_u), (BLOCK, 2 * GATE))
        else:
            columns = gate
            d = d_v
        target = d_products + local[:, None] * multiple(width, ALIGN) + columns[None, :]
        tl.store(target, (d * factor).to(d_products.dtype.element_ty), inside[:, None] & (columns < width)[None, :])

    into = parts + part * ((BRANCHES + HEADS) * D) + gate
    tl.store(into, tl.sum(sum_v, 0), is_gate)
    if GATED:
        tl.store(into + D, tl.sum(sum_u, 0), is_gate)
    if HEADS == 1:
        tl.store(into + BRANCHES * D, tl.sum(sum_head, 0), is_gate)
    else:
        of_head = parts + (part * (BRANCHES + HEADS) + BRANCHES + heads[:, None]) * D + gate[None, :]
        tl.store(of_head, sum_head, (heads < HEADS)[:, None] & is_gate[None, :])


def gated_attention_pool(
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    score_bias: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, L), offsets (B+1,) -> pooled (B, H, L) in the dtype of x, scores (N, H) before softmax, stats (B, H, 2).

    The fourth is the products (N, branches · D) for backward with `keep`, else (0,).
    """
    scores, kept = gated_attention_scores(x, parameters, dropout_p, seed, keep)
    if score_bias is not None:
        scores += score_bias
    pooled, stats = attention_pool(rows_of(x), scores, offsets)
    return pooled, scores, stats, kept


def gated_attention_scores(
    x: Tensor, parameters: GateParameters, dropout_p: float = 0.0, seed: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """x (N, L) -> scores (N, H) float32, and with `keep` the products (N, branches · D) for backward, else (0,)."""
    x = rows_of(x)
    packed = pack_weights(x, parameters.w_v, parameters.w_u)
    scores, products = gate_scores(x, gate_of(x, parameters, dropout_p, seed), packed, keep)
    return scores, products if keep else x.new_empty(0)


def gate_scores(x: Tensor, gate: Gate, packed: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """x (N, L) -> scores (N, H) float32 and products: of all rows with `keep`, else a workspace."""
    run = partial(_gate_scores, x, gate, packed, keep)
    return run(GATE_SCORES.choose(_named("gate_scores", gate), x, *_sizes(gate), run=run))


def _gate_scores(x: Tensor, gate: Gate, packed: Tensor, keep: bool, tiles: Tiles) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    step = rows if keep else _chunk(x, gate)
    scores = x.new_empty(rows, gate.heads, dtype=torch.float32)
    products = x.new_empty(step, gate.columns)
    cut = _cut(x, gate, tiles)
    for first in range(0, rows, step or 1):
        end = min(first + step, rows)
        chunk, part = (x, products) if step == rows else (x[first:end], products[: end - first])
        torch.mm(chunk, packed.T, out=part)
        launch(
            gate_scores_kernel,
            (cdiv(end - first, tiles.rows),),
            part,
            *gate.tensors,
            scores,
            first,
            end,
            gate.hidden,
            gate.threshold,
            gate.scale,
            **cut,
        )
    return scores, products


def gated_attention_pool_backward(
    grad_pooled: Tensor | None,
    grad_scores: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    seed: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    kept: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_v, b_v, w_u, b_u, w_a, b_a and of the scores (N, H), None where `needs` says so.

    A gradient that is None is zero.
    """
    x, d_scores = rows_of(x), None
    if grad_pooled is not None:
        _, d_scores = pool_backward(grad_pooled, x, scores, stats, offsets, (False, True))
    if d_scores is None:
        assert grad_scores is not None
        d_scores = grad_scores.to(torch.float32).contiguous()
    elif grad_scores is not None:
        d_scores += grad_scores
    d_x, *grads = gated_attention_scores_backward(d_scores, x, parameters, dropout_p, seed, kept, needs[:7])
    if d_x is not None and grad_pooled is not None:
        pool_backward(grad_pooled, x, scores, stats, offsets, (True, False), add_to=d_x)
    return (d_x, *grads, d_scores if needs[7] else None)


def gated_attention_scores_backward(
    d_scores: Tensor,
    x: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    seed: Tensor | None,
    kept: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_v, b_v, w_u, b_u, w_a, b_a in this order, None where `needs` says so."""
    x, d_scores, b_a = rows_of(x), d_scores.to(torch.float32).contiguous(), parameters.b_a
    d_b_a = d_scores.sum(0).to(b_a.dtype) if needs[6] and b_a is not None else None
    if not any(needs[:6]):
        return (*(None,) * 6, d_b_a)
    d_x = x.new_empty(x.shape) if needs[0] else None
    gate = gate_of(x, parameters, dropout_p, seed)
    packed = pack_weights(x, parameters.w_v, parameters.w_u) if kept is None or d_x is not None else None
    run = partial(_gate_backward, x, gate, packed, d_scores, kept, needs[1] or needs[3])
    tiles = GATE_BACKWARD.choose(_named("gate_gradient", gate), x, *_sizes(gate), run=run)
    d_packed, d_small = run(tiles, d_x)
    branches = gate.branches
    d_weights = [None if d_packed is None else d_packed[i::branches] for i in (0, branches - 1)]
    found = (d_weights[0], d_small[0], d_weights[1], d_small[branches - 1], d_small[branches:])
    d_parameters = [
        _copy(part, like.dtype) if need and part is not None and like is not None else None
        for need, part, like in zip(needs[1:6], found, parameters[:5], strict=True)
    ]
    return (d_x, *d_parameters, d_b_a)


def _copy(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a part of a larger tensor as a contiguous tensor of its own, by one copy whatever the dtype."""
    if part.dtype == dtype:
        return part.clone(memory_format=torch.contiguous_format)
    return part.to(dtype, memory_format=torch.contiguous_format)


def _gate_backward(
    x: Tensor,
    gate: Gate,
    packed: Tensor | None,
    d_scores: Tensor,
    kept: Tensor | None,
    need_weights: bool,
    tiles: Tiles,
    d_x: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Write the gate's part of the gradient of x into d_x (N, L).

    Returns the gradients of the packed weights (branches · D, L), and of b_v, b_u and w_a below one another
    (branches + H, D), in float32.
    """
    rows = x.shape[0]
    scaled = x.dtype == torch.float16  # gradients at products are some thousandths of 1 / N: most would be zero
    step, each = _chunk(x, gate), tiles.rows * STEPS
    parts = x.new_empty(cdiv(rows, each), gate.branches + gate.heads, gate.hidden, dtype=torch.float32)
    d_packed: Tensor | None = None
    space = x.new_empty(step, gate.columns)
    inverse = x.new_empty((), dtype=torch.float32) if scaled else d_scores
    b_v, b_u, w_a, _, seed = gate.tensors
    cut = _cut(x, gate, tiles)
    del cut["BIAS_A"]
    for first in range(0, rows, step or 1):
        end = min(first + step, rows)
        chunk, d_products = (x, space) if step == rows else (x[first:end], space[: end - first])
        if kept is not None:
            products = kept if step == rows else kept[first:end]
        else:
            assert packed is not None
            products = torch.mm(chunk, packed.T, out=d_products)
        launch(
            gate_gradient_kernel,
            (cdiv(end - first, each) * cdiv(gate.hidden, tiles.columns),),
            products,
            d_products,
            d_scores,
            torch.linalg.vector_norm(d_scores[first:end], torch.inf) if scaled else d_scores,
            inverse,
            b_v,
            b_u,
            w_a,
            seed,
            parts if first == 0 else parts[first // each :],
            first,
            end,
            gate.hidden,
            gate.threshold,
            gate.scale,
            SCALED=scaled,
            STEPS=STEPS,
            **cut,
        )
        if d_x is not None:
            assert packed is not None
            torch.mm(d_products, packed, out=d_x[first:end])
            if scaled:
                d_x[first:end] *= inverse
        if need_weights:
            part = product_in_float32(d_products.T, chunk)
            part = part.mul_(inverse) if scaled else part
            d_packed = part if d_packed is None else d_packed.add_(part)
    if need_weights and d_packed is None:  # no rows
        d_packed = x.new_zeros(gate.columns, x.shape[1], dtype=torch.float32)
    return d_packed, parts.sum(0)


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (K, N) of one dtype, summed and returned in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cpu":
        return torch.mm(a.float(), b.float())
    if torch.version.cuda is None:
        return torch.mm(a, b).float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _chunk(x: Tensor, gate: Gate) -> int:
    """Return how many rows fit the workspace, as a multiple of the rows of a program."""
    each = 1024  # of which the rows of a program in backward are a divisor, whatever the tiles
    return min(x.shape[0], max(1, WORKSPACE // (gate.columns * x.element_size() * each)) * each)


def _cut(x: Tensor, gate: Gate, tiles: Tiles) -> dict[str, Any]:
    """Return the compile-time arguments of both kernels."""
    return {
        **gate.flags,
        **register_limit(x.device),
        "BLOCK": tiles.rows,
        "GATE": tiles.columns,
        "num_warps": tiles.warps,
    }


def _sizes(gate: Gate) -> tuple[int, int, int]:
    """Return the sizes that tiles are fitted to."""
    return gate.hidden, gate.heads, gate.align


def _named(op: str, gate: Gate) -> str:
    """Return the name under which tiles are tuned: the op and the switches that change its kernel."""
    return f"{op}{' gated' * gate.flags['GATED']}{' dropout' * gate.flags['DROPOUT']}"

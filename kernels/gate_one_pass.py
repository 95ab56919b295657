"""Scores of the gate by one kernel: product, activations and heads without storing what lies between.

The features and the packed weights (`gate_products.gate_of`) are read by the copy engine through tensor descriptors
(NVIDIA, compute capability 9.0 and later), four tiles ahead of the matrix unit. 16-bit types alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import launch, work
from momkd.kernels._gate import activations, keep_masks
from momkd.kernels.gate_products import Gate, add_scores, first_scores, store_scores


def _operations(a: Any) -> float:
    return 2 * a.rows * (a.L * (1 + a.GATED) + a.HEADS) * a.D


@triton.jit(do_not_specialize=["rows", "threshold"], launch_metadata=work("products", _operations))
def gate_one_pass_kernel(
    x,  # descriptor of (N, L), blocks of (BLOCK, COLUMNS)
    packed,  # descriptor of (branches · D, L), blocks of (branches · GATE, COLUMNS)
    b_v,
    b_u,
    w_a,
    b_a,
    seed,
    scores,  # (N, H) float32
    products,  # (N, branches · D), written with KEEP
    rows,
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
    FAST: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    BRANCHES: tl.constexpr = 2 if GATED else 1
    first = tl.program_id(0) * BLOCK
    at = first.to(tl.int64) + tl.arange(0, BLOCK)
    inside = at < rows
    s = first_scores(b_a, HEADS, HEADS_PADDED, BIAS_A, BLOCK)
    for start in range(0, D, GATE):
        both = tl.zeros([BLOCK, BRANCHES * GATE], tl.float32)
        for column in range(0, L, COLUMNS):
            both = tl.dot(x.load([first, column]), packed.load([BRANCHES * start, column]).T, both)
        gate = start + tl.arange(0, GATE)
        is_gate = gate < D
        if KEEP:
            columns = BRANCHES * start + tl.arange(0, BRANCHES * GATE)
            target = products + at[:, None] * (BRANCHES * D) + columns[None, :]
            there = inside[:, None] & (columns < BRANCHES * D)[None, :]
            tl.store(target, both.to(products.dtype.element_ty), there)
        if GATED:
            v, u = tl.split(tl.reshape(both, (BLOCK, GATE, 2)))
        else:
            v = both
            u = both
        if BIAS_V:
            v += tl.load(b_v + gate, is_gate, 0.0).to(tl.float32)[None, :]
        if BIAS_U:
            u += tl.load(b_u + gate, is_gate, 0.0).to(tl.float32)[None, :]
        hidden, sigma = activations(v, u, GATED, FAST)
        if DROPOUT:
            keep_tanh, keep_sigma = keep_masks(seed, at, start, threshold, scale, BLOCK, GATE)
            hidden *= keep_tanh
            if GATED:
                sigma *= keep_sigma
        s = add_scores(s, hidden * sigma, w_a, start, D, HEADS, HEADS_PADDED, GATE)
    store_scores(scores, at, inside, s, HEADS, HEADS_PADDED)


def gate_scores(
    x: Tensor, gate: Gate, keep: bool, block: int = 128, columns: int = 64, warps: int = 8, stages: int = 4
) -> tuple[Tensor, Tensor]:
    """As `gate_products.gate_scores`; `x` has rows that begin at multiples of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, branches = x.shape[0], 2 if gate.flags["GATED"] else 1
    size = min(128, max(16, triton.next_power_of_2(gate.hidden)))
    scores = x.new_empty(rows, gate.flags["HEADS"], dtype=torch.float32)
    products = x.new_empty(rows if keep else 0, gate.packed.shape[0])
    if rows == 0:
        return scores, products
    launch(
        gate_one_pass_kernel,
        (triton.cdiv(rows, block),),
        TensorDescriptor.from_tensor(x, [block, columns]),
        TensorDescriptor.from_tensor(gate.packed, [branches * size, columns]),
        *gate.tensors,
        scores,
        products,
        rows,
        x.shape[1],
        gate.hidden,
        gate.threshold,
        gate.scale,
        KEEP=keep,
        BLOCK=block,
        GATE=size,
        COLUMNS=columns,
        HEADS_PADDED=triton.next_power_of_2(gate.flags["HEADS"]),
        num_warps=warps,
        num_stages=stages,
        **gate.flags,
    )
    return scores, products

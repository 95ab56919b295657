"""soft_angle_loss: a vector should lie nearer to its own class's slots than to any other's, by a margin.

s_c = (1/τ) · log Σ_k exp(τ · cos(z, M_ck));  Δ = s_y − max_{c ≠ y} s_c;  loss = softplus(β · (margin − Δ)).
Backward: dΔ = −β σ(β (margin − Δ)) g goes to s_y, and with the other sign to the largest other. A label of −1 gives
loss 0 and no gradient, whatever its row holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.kernels._common import INF, cdiv, launch, rows_of, work
from momkd.kernels._slots import Bank, class_similarities, comparisons, tile_rows, with_bank
from momkd.kernels.memory_similarity import similarity_backward


@triton.jit
def class_gap(s, labels, C, CLASSES: tl.constexpr):
    """Δ (BLOCK,), and the class of the largest other similarity. Unlabelled rows are treated as class 0."""
    classes = tl.arange(0, CLASSES)
    is_own = tl.maximum(labels, 0)[:, None] == classes[None, :]
    own = tl.sum(tl.where(is_own, s, 0.0), 1)
    others = tl.where(is_own | (classes >= C)[None, :], -INF, tl.where(s != s, INF, s))
    top, rival = tl.max(others, 1, return_indices=True)
    # Where one class is NaN, so is the gap.
    total = tl.sum(s, 1)
    return tl.where(total != total, total, own - top), rival


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to the last digits for large and for small results."""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    # What 1 + e lost is made good by the ratio: log(1 + e) ≈ log(u) · e / (u − 1).
    small = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    return tl.where(x > 0, x, 0.0) + small


@triton.jit(do_not_specialize=["N"], launch_metadata=work("z", comparisons(1)))
def soft_angle_loss_fwd_kernel(
    z,
    z_stride,
    bank,
    labels,  # (N,) int64
    losses,  # (N,) float32
    N,
    C,
    K,
    S: tl.constexpr,
    margin,
    tau,
    beta,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, inside = tile_rows(tl.program_id(0).to(tl.int64) * BLOCK, N, BLOCK)
    s, _ = class_similarities(
        *(z, z_stride, rows, bank, C, K, S, tau),
        *(True, CLASSES, SLOTS, BLOCK, COLUMNS, ALIGN, PRECISION),
    )
    label = tl.load(labels + rows)
    gap, _ = class_gap(s, label, C, CLASSES)
    tl.store(losses + rows, tl.where(label >= 0, softplus(beta * (margin - gap)), 0.0), inside)


@triton.jit(do_not_specialize=["N"], launch_metadata=work("z", comparisons(1)))
def soft_angle_loss_bwd_kernel(
    grad,  # (N,)
    z,
    z_stride,
    bank,
    labels,  # (N,) int64
    similarities,  # (N, C) float32
    nearest,  # (N, C) int32
    d_similarities,  # (N, C) float32
    N,
    C,
    K,
    S: tl.constexpr,
    margin,
    tau,
    beta,
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
        *(True, CLASSES, SLOTS, BLOCK, COLUMNS, ALIGN, PRECISION),
    )
    label = tl.load(labels + rows)
    gap, rival = class_gap(s, label, C, CLASSES)
    g = tl.load(grad + rows).to(tl.float32)
    d_gap = -beta * g / (1 + tl.exp(-beta * (margin - gap)))
    d_gap = tl.where(label >= 0, d_gap, 0.0)[:, None]
    classes = tl.arange(0, CLASSES)[None, :]
    d = tl.where(label[:, None] == classes, d_gap, tl.where(rival[:, None] == classes, -d_gap, 0.0))
    at = rows[:, None] * C + classes
    both = inside[:, None] & (classes < C)
    tl.store(similarities + at, s, both)
    tl.store(nearest + at, slots, both)
    tl.store(d_similarities + at, d, both)


def soft_angle_loss(z: Tensor, memory: Tensor, labels: Tensor, margin: float, tau: float, beta: float) -> Tensor:
    """z (B, S), memory (C, K, S), labels (B,) int64 -> losses (B,) float32."""
    z = rows_of(z)

    def run(bank: Bank) -> Tensor:
        losses = z.new_empty(z.shape[0], dtype=torch.float32)
        arguments = z, z.stride(0), bank.unit, labels.contiguous(), losses
        _launch(soft_angle_loss_fwd_kernel, bank, z.shape[0], arguments, (margin, tau, beta))
        return losses

    return with_bank("soft_angle_loss", memory, z, run)


def soft_angle_loss_backward(
    grad: Tensor,
    z: Tensor,
    memory: Tensor,
    labels: Tensor,
    margin: float,
    tau: float,
    beta: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and memory from the gradient (B,) of the losses; None where `needs` says so."""
    z = rows_of(z)

    def run(bank: Bank) -> tuple[Tensor | None, Tensor | None]:
        shape = (z.shape[0], memory.shape[0])
        s, d = (z.new_empty(shape, dtype=torch.float32) for _ in range(2))
        slots = z.new_empty(shape, dtype=torch.int32)
        arguments = grad.contiguous(), z, z.stride(0), bank.unit, labels.contiguous(), s, slots, d
        _launch(soft_angle_loss_bwd_kernel, bank, z.shape[0], arguments, (margin, tau, beta))
        return similarity_backward(d, z, memory, bank, tau, slots, s, needs)

    return with_bank("soft_angle_loss_backward", memory, z, run)


def _launch(
    kernel: triton.JITFunction,
    bank: Bank,
    rows: int,
    arguments: tuple[Tensor | int, ...],
    numbers: tuple[float, float, float],
) -> None:
    grid = (cdiv(rows, bank.tiles.rows),)
    launch(kernel, grid, *arguments, rows, *bank.sizes, *numbers, PRECISION=bank.precision, **bank.meta)

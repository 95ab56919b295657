"""soft_angle_loss: a vector should lie nearer to its own class's slots than to any other's, by a margin.

s_c = (1/τ) · log Σ_k exp(τ · cos(z, M_ck));  Δ = s_y − max_{c ≠ y} s_c;  loss = softplus(β · (margin − Δ)).
A label of −1 gives loss 0 and no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.reference.memory_similarity import memory_similarity, memory_similarity_backward
from momkd.reference.segments import accumulate_dtype, check_labels


def _gap(similarity: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Δ (B,), and the class of the largest other similarity (B,). Unlabelled rows are treated as class 0."""
    own = labels.clamp_min(0)[:, None]  # (B, 1)
    top, rival = similarity.scatter(1, own, -torch.inf).max(dim=1)
    return similarity.gather(1, own)[:, 0] - top, rival


def soft_angle_loss(z: Tensor, memory: Tensor, labels: Tensor, margin: float, tau: float, beta: float) -> Tensor:
    """z (B, S), memory (C, K, S), labels (B,) int64 -> losses (B,) in float32 (float64 for a float64 z)."""
    check_labels("labels", labels, memory.shape[0])
    similarity, _ = memory_similarity(z, memory, "lse", tau)
    delta, _ = _gap(similarity, labels)
    loss = torch.nn.functional.softplus(beta * (margin - delta))
    return torch.where(labels >= 0, loss, torch.zeros_like(loss))


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
    check_labels("labels", labels, memory.shape[0])
    dtype = accumulate_dtype(z.dtype)
    labelled = labels[:, None] >= 0
    rows = torch.where(labelled, z, torch.zeros_like(z))  # one that is not finite must not turn 0 · NaN into a gradient
    similarity, slots = memory_similarity(rows, memory, "lse", tau)
    delta, rival = _gap(similarity, labels)
    d_delta = -beta * torch.sigmoid(beta * (margin - delta)) * grad.to(dtype)
    d_delta = torch.where(labels >= 0, d_delta, torch.zeros_like(d_delta))
    d_similarity = torch.zeros_like(similarity)
    d_similarity.scatter_(1, labels.clamp_min(0)[:, None], d_delta[:, None])
    d_similarity.scatter_(1, rival[:, None], -d_delta[:, None])
    d_z, d_memory = memory_similarity_backward(d_similarity, rows, memory, "lse", tau, slots, needs)
    return None if d_z is None else torch.where(labelled, d_z, torch.zeros_like(d_z)), d_memory

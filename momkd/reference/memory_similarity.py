"""memory_similarity: cosine of every row with every slot of the memory, reduced over the slots of each class.

max: s_ic = max_k cos(z_i, M_ck);  lse: s_ic = (1/τ) · log Σ_k exp(τ · cos(z_i, M_ck)).
The slot of the largest cosine is returned too; of equal ones the lowest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.reference.segments import accumulate_dtype

EPS = 1e-12


def unit_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """z / max(|z|, eps) along the last dimension, and the norm (kept dimension) that it was divided by."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(EPS)
    return z / norm, norm


def unit_rows_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient of the rows before normalisation. Where the norm was clamped, the division was by a constant."""
    radial = (grad * unit).sum(-1, keepdim=True).masked_fill(norm <= EPS, 0.0)
    return (grad - unit * radial) / norm


def reduce_slots(cosines: Tensor, reduce: str, tau: float) -> tuple[Tensor, Tensor]:
    """cosines (N, C, K) -> (N, C), and the slot of the largest cosine (N, C) int32."""
    top, slots = cosines.max(dim=-1)
    value = top if reduce == "max" else torch.logsumexp(tau * cosines, dim=-1) / tau
    return value, slots.int()


def slot_shares(cosines: Tensor, slots: Tensor, reduce: str, tau: float) -> Tensor:
    """How much of the gradient of the reduced value each slot takes: (N, C, K), summing to one over K."""
    if reduce == "max":
        return torch.zeros_like(cosines).scatter_(2, slots.long()[..., None], 1.0)
    return torch.softmax(tau * cosines, dim=-1)


def memory_similarity(z: Tensor, memory: Tensor, reduce: str = "max", tau: float = 5.0) -> tuple[Tensor, Tensor]:
    """z (N, S), memory (C, K, S) -> similarities (N, C), slots (N, C) int32."""
    dtype = accumulate_dtype(z.dtype)
    unit, _ = unit_rows(z.to(dtype))
    bank, _ = unit_rows(memory.to(dtype))
    return reduce_slots(torch.einsum("ns,cks->nck", unit, bank), reduce, tau)


def memory_similarity_backward(
    grad: Tensor, z: Tensor, memory: Tensor, reduce: str, tau: float, slots: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and memory, each None where `needs` says so."""
    dtype = accumulate_dtype(z.dtype)
    unit, norm = unit_rows(z.to(dtype))
    bank, bank_norm = unit_rows(memory.to(dtype))
    cosines = torch.einsum("ns,cks->nck", unit, bank)
    d_cos = grad.to(dtype)[..., None] * slot_shares(cosines, slots, reduce, tau)
    d_z = d_memory = None
    if needs[0]:
        d_z = unit_rows_backward(torch.einsum("nck,cks->ns", d_cos, bank), unit, norm).to(z.dtype)
    if needs[1]:
        d_bank = torch.einsum("nck,ns->cks", d_cos, unit)
        d_memory = unit_rows_backward(d_bank, bank, bank_norm).to(memory.dtype)
    return d_z, d_memory

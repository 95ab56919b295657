"""ema_scatter_: the momentum update of the memory, each row into the nearest slot of its own class.

k_i = arg-max_k cos(z_i, M[c_i, k]) (of equal ones the lowest). For every slot that received mass
M ← normalise(m · M + (1 − m) · Σ w_i z_i / Σ w_i); for all slots usage ← m · usage + (1 − m) · Σ w_i.

A row with class −1 is skipped (on a GPU, where looking would wait, one with any class outside the memory), and so is
one that holds a NaN or an infinity: a single bad patch must not poison a prototype for the rest of a run. All have
assignment −1. A weight that is zero, negative or not finite brings no mass.
A slot that received no mass keeps its vector bit for bit. So does one where what is to be normalised, v, is not finite
or has cancelled: |v| ≤ 1e-5 · (m · |M| + 1 − m), the share of what unit rows and the slot would give if they all
pointed the same way. What is left then is rounding, and normalising it would give a random direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.reference.memory_similarity import unit_rows
from momkd.reference.segments import accumulate_dtype, check_labels

CANCELLED = 1e-5


def ema_accumulate(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None = None, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """memory (C, K, S), z (N, S), row_class (N,) int64, weights (N,) ->

    sums (C, K, S) of w_i z_i, mass (C, K) of w_i, assignments (N,) int32.
    """
    classes, slots, width = memory.shape
    check_labels("row_class", row_class, classes)
    dtype = accumulate_dtype(z.dtype)
    rows = z.to(dtype)
    valid = (row_class >= 0) & (row_class < classes) & rows.isfinite().all(1)
    rows = torch.where(valid[:, None], rows, torch.zeros_like(rows))
    unit, _ = unit_rows(rows)
    bank, _ = unit_rows(memory.to(dtype))
    own = torch.where(valid, row_class, torch.zeros_like(row_class))
    cosines = torch.einsum("ns,cks->nck", unit, bank)[torch.arange(len(own), device=z.device), own]  # (N, K)
    nearest = cosines.nan_to_num(nan=-torch.inf).argmax(1)  # a slot that is not a number is never the nearest

    w = torch.ones_like(rows[:, 0]) if weights is None else weights.to(dtype)
    w = torch.where(valid & w.isfinite() & (w > 0), w, torch.zeros_like(w))
    slot = own * slots + nearest
    sums = rows.new_zeros(classes * slots, width).index_add_(0, slot, w[:, None] * (unit if normalize else rows))
    mass = rows.new_zeros(classes * slots).index_add_(0, slot, w)
    assignments = torch.where(valid, nearest, torch.full_like(nearest, -1)).int()
    return sums.view(classes, slots, width), mass.view(classes, slots), assignments


def ema_apply_(memory: Tensor, usage: Tensor, sums: Tensor, mass: Tensor, momentum: float) -> None:
    """Move memory (C, K, S) and usage (C, K) in place by what `ema_accumulate` gathered."""
    dtype = accumulate_dtype(sums.dtype)
    got = mass > 0
    mean = sums.to(dtype) / torch.where(got, mass, torch.ones_like(mass)).to(dtype)[..., None]
    before = memory.to(dtype)
    moved = momentum * before + (1 - momentum) * mean
    length = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    least = CANCELLED * (momentum * torch.linalg.vector_norm(before, dim=-1, keepdim=True) + (1 - momentum))
    change = got[..., None] & (length > least) & length.isfinite()
    memory.copy_(torch.where(change, (moved / length).to(memory.dtype), memory))
    usage.copy_((momentum * usage.to(dtype) + (1 - momentum) * mass.to(dtype)).to(usage.dtype))


def ema_scatter_(
    memory: Tensor,
    usage: Tensor,
    z: Tensor,
    row_class: Tensor,
    weights: Tensor | None,
    momentum: float,
    normalize: bool = True,
) -> Tensor:
    """Both halves. Returns the assignments (N,) int32."""
    sums, mass, assignments = ema_accumulate(memory, z, row_class, weights, normalize)
    ema_apply_(memory, usage, sums, mass, momentum)
    return assignments


def reseed_(
    memory: Tensor,
    usage: Tensor,
    z: Tensor,
    row_class: Tensor,
    weights: Tensor | None,
    threshold: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Give every slot whose usage is under `threshold` the vector of a row of its class, drawn by weight.

    The slot's usage becomes the mean usage of its class, so that it is not replaced again at once. A class that has
    no finite, nonzero row with weight leaves its slots alone. Returns the replaced slots (C, K) bool. Waits for the
    device.
    """
    classes, slots, _ = memory.shape
    rows = z.to(accumulate_dtype(z.dtype))
    w = torch.ones_like(rows[:, 0]) if weights is None else weights.to(rows.dtype)
    usable = rows.isfinite().all(1) & (rows != 0).any(1) & w.isfinite() & (w > 0)  # a zero row has no direction
    w = torch.where(usable, w, torch.zeros_like(w)).cpu()
    unit, _ = unit_rows(rows)
    replaced = torch.zeros(classes, slots, dtype=torch.bool, device=memory.device)
    dead = (usage < threshold).cpu()
    labels = row_class.cpu()
    for c in range(classes):
        count = int(dead[c].sum())
        candidates = torch.where(labels == c, w, torch.zeros_like(w))
        drawable = int((candidates > 0).sum())
        if count == 0 or drawable == 0:
            continue
        take = min(count, drawable)  # the same row twice would make two slots one
        chosen = torch.multinomial(candidates, take, generator=generator).to(z.device)
        which = dead[c].nonzero()[:take, 0].to(memory.device)
        memory[c, which] = unit[chosen].to(memory.dtype)
        usage[c, which] = usage[c].mean()
        replaced[c, which] = True
    return replaced

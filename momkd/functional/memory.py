"""The memory: similarities, the soft-angle loss, the momentum update in place, and filling it for the first time."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd import ops, reference
from momkd.dispatch import choose
from momkd.functional import _validate as check


def memory_similarity(
    z: Tensor, memory: Tensor, *, reduce: str = "max", tau: float = 5.0, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine of every row with every slot, reduced over the slots of each class.

    max: s_ic = max_k cos(z_i, M_ck). lse: s_ic = (1/τ) · log Σ_k exp(τ · cos(z_i, M_ck)).

    Args:
        z: (N, S) any float dtype; normalised inside (eps 1e-12).
        memory: (C, K, S) any float dtype; normalised inside.
        reduce: "max" or "lse".
        tau: sharpness of "lse", > 0.
        backend: None for the best that can run, or a name of `momkd.dispatch.BACKENDS`.

    Returns:
        similarities (N, C) in float32 (float64 for a float64 z), and the slot of the largest cosine (N, C) int32, the
        lowest of equal ones. Gradients reach z, and the memory when it requires grad.

    Raises:
        ValueError, BackendError: as in `gated_attention_pool`.

    Example:
        >>> similarity, slots = memory_similarity(torch.randn(9, 4), torch.randn(2, 3, 4))
        >>> similarity.shape, slots.dtype
        (torch.Size([9, 2]), torch.int32)
    """
    check.shape("z", z, (None, None), "(N, S)")
    check.floating("z", z)
    check.memory(memory, z.shape[1])
    check.choice("reduce", reduce, ("max", "lse"))
    check.positive("tau", tau)
    check.same_device("z", z, memory=memory)
    result: tuple[Tensor, Tensor] = ops.memory_similarity(z, memory, reduce, float(tau), backend or "")
    return result


def soft_angle_loss(
    z: Tensor,
    memory: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.3,
    tau: float = 5.0,
    beta: float = 20.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Loss of a vector that does not lie nearer to its class's slots than to any other's, by a margin.

    s_c = (1/τ) · log Σ_k exp(τ · cos(z, M_ck)); Δ = s_y − max_{c ≠ y} s_c; loss = softplus(β · (margin − Δ)).

    Args:
        z: (B, S) any float dtype; normalised inside.
        memory: (C, K, S), C ≥ 2; normalised inside.
        labels: (B,) int64; −1 for a row without label, which has loss 0 and no gradient.
        margin: of Δ, in units of cosine.
        tau, beta: sharpness of the soft maximum and of the softplus, > 0.
        reduction: "mean" over the labelled rows (0 where there are none), "sum", or "none".
        backend: None for the best that can run, or a name of `momkd.dispatch.BACKENDS`.

    Returns:
        A scalar, or (B,) for "none", in float32 (float64 for a float64 z). Gradients reach z, and the memory when it
        requires grad.

    Raises:
        ValueError, BackendError: as in `gated_attention_pool`.

    Source: MoMKD (arXiv 2602.21395), soft-angle loss.

    Example:
        >>> loss = soft_angle_loss(torch.randn(3, 4), torch.randn(2, 5, 4), torch.tensor([0, 1, -1]))
        >>> loss.shape
        torch.Size([])
    """
    check.shape("z", z, (None, None), "(B, S)")
    check.floating("z", z)
    check.memory(memory, z.shape[1])
    if memory.shape[0] < 2:
        raise ValueError(f"memory: expected at least 2 classes (C, K, S), got {tuple(memory.shape)}")
    check.labels("labels", labels, z.shape[0], memory.shape[0])
    check.positive("tau", tau)
    check.positive("beta", beta)
    check.choice("reduction", reduction, ("mean", "sum", "none"))
    check.same_device("z", z, memory=memory, labels=labels)
    losses: Tensor = ops.soft_angle_loss(z, memory, labels, float(margin), float(tau), float(beta), backend or "")
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (labels >= 0).sum().clamp_min(1)


def _check_rows(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None, op: str = "", backend: str | None = None
) -> None:
    check.memory(memory)
    check.shape("z", z, (None, memory.shape[2]), "(N, S)")
    check.floating("z", z)
    check.labels("row_class", row_class, z.shape[0], memory.shape[0], values=False)
    if weights is not None:
        check.shape("weights", weights, (z.shape[0],), "(N,)")
        check.floating("weights", weights)
    check.same_device("memory", memory, z=z, row_class=row_class, weights=weights)
    if torch.compiler.is_compiling() or row_class.device.type != "cpu":
        return
    if not op or choose(op, backend, (memory, z, row_class, weights)) != "native":  # which looks at classes itself
        check.labels("row_class", row_class, z.shape[0], memory.shape[0])


def _check_bank(memory: Tensor, usage: Tensor, momentum: float) -> None:
    check.memory(memory)
    check.shape("usage", usage, memory.shape[:2], "(C, K)")
    check.fraction("momentum", momentum)
    for name, tensor in (("memory", memory), ("usage", usage)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous float32, got {tensor.dtype} with strides {tensor.stride()}")


def ema_scatter_(
    memory: Tensor,
    usage: Tensor,
    z: Tensor,
    row_class: Tensor,
    *,
    momentum: float,
    weights: Tensor | None = None,
    normalize: bool = True,
    reseed_below: float | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Move the memory in place: every row into the nearest slot of its own class, by an exponential moving average.

    k_i = arg-max_k cos(z_i, M[c_i, k]); for every slot that received mass
    M ← normalise(v), v = m · M + (1 − m) · Σ w_i z_i / Σ w_i; for all slots usage ← m · usage + (1 − m) · Σ w_i.

    Args:
        memory: (C, K, S) contiguous float32, changed in place. A slot that received nothing keeps its bits, and so does
            one where v has cancelled to rounding: |v| ≤ 1e-5 · (m · |M| + 1 − m).
        usage: (C, K) contiguous float32, changed in place: the moving average of the mass a slot receives a call.
        z: (N, S) any float dtype; N = 0 only lets usage fade. A row with a NaN or an infinity is skipped (assignment
            −1): `((assignments < 0) & (row_class >= 0)).sum()` says how many there were.
        row_class: (N,) int64; −1 skips the row. Another value outside the memory is an error on the CPU; on a GPU, as
            looking would wait for the device, it skips the row too.
        momentum: m in [0, 1]; 1 leaves a memory of unit vectors as it is.
        weights: (N,) any float dtype; None is 1 for every row. Zero, negative and non-finite ones bring no mass; their
            rows still get an assignment.
        normalize: scale rows to unit length first; False takes them as they are, of about unit length.
        reseed_below: after the update, give slots with less usage than this the vector of a row of their class, drawn
            by weight, as `reseed_` does (this waits for the device). None: never.
        generator: of those draws, on the CPU: with the same one, every device draws the same rows.
        backend: None for the best that can run, or a name of `momkd.dispatch.BACKENDS`.

    Returns:
        assignments (N,) int32: the slot of each row before re-seeding, −1 for a skipped row.

    Raises:
        ValueError, BackendError: as in `gated_attention_pool`; nothing has been changed then.

    Example:
        >>> memory = torch.nn.functional.normalize(torch.randn(2, 3, 4), dim=-1)
        >>> usage = torch.zeros(2, 3)
        >>> z, row_class = torch.randn(5, 4), torch.tensor([0, 1, 1, -1, 0])
        >>> z[1, 2] = torch.nan
        >>> assignments = ema_scatter_(memory, usage, z, row_class, momentum=0.9)
        >>> int(((assignments < 0) & (row_class >= 0)).sum())
        1
    """
    _check_bank(memory, usage, momentum)
    _check_rows(memory, z, row_class, weights, "ema_scatter_", backend)
    check.same_device("memory", memory, usage=usage)
    check.generator(generator)
    z = z.detach()
    assignments: Tensor = ops.ema_scatter_(
        memory, usage, z, row_class, weights, float(momentum), normalize, backend or ""
    )
    if reseed_below is not None and not memory.is_meta:
        reference.reseed_(memory, usage, z, row_class, weights, reseed_below, generator)
    return assignments


def ema_accumulate(
    memory: Tensor,
    z: Tensor,
    row_class: Tensor,
    *,
    weights: Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """First half of `ema_scatter_`: what each slot would receive. Distributed training sums both over the ranks.

    Args: as in `ema_scatter_`; the memory is only read.

    Returns:
        sums (C, K, S) of w_i z_i and mass (C, K) of w_i, in float32 (float64 for a float64 z).

    Raises:
        ValueError, BackendError: as in `gated_attention_pool`.
    """
    _check_rows(memory, z, row_class, weights, "ema_accumulate", backend)
    sums, mass, _ = ops.ema_accumulate(memory, z.detach(), row_class, weights, normalize, backend or "")
    return sums, mass


def ema_apply_(
    memory: Tensor, usage: Tensor, sums: Tensor, mass: Tensor, *, momentum: float, backend: str | None = None
) -> None:
    """Second half of `ema_scatter_`: move memory and usage in place by gathered sums and mass.

    Args:
        memory, usage, momentum: as in `ema_scatter_`.
        sums: (C, K, S) and
        mass: (C, K), as `ema_accumulate` returns them, or their sums over ranks.

    Raises:
        ValueError, BackendError: as in `gated_attention_pool`; nothing has been changed then.
    """
    _check_bank(memory, usage, momentum)
    check.shape("sums", sums, tuple(memory.shape), "(C, K, S)")
    check.shape("mass", mass, tuple(memory.shape[:2]), "(C, K)")
    check.floating("sums", sums)
    check.floating("mass", mass)
    check.same_device("memory", memory, usage=usage, sums=sums, mass=mass)
    ops.ema_apply_(memory, usage, sums, mass, float(momentum), backend or "")


def reseed_(
    memory: Tensor,
    usage: Tensor,
    z: Tensor,
    row_class: Tensor,
    *,
    threshold: float,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace slots that are hardly used by rows of their class, drawn by weight, none twice.

    Args:
        memory, usage, z, row_class, weights: as in `ema_scatter_`. Rows with a value that is not finite, zero rows and
            rows whose weight is not a positive number are never drawn.
        threshold: slots with less usage than this are replaced by a row scaled to unit length; their usage becomes the
            mean of their class, so that they are not replaced again at once.
        generator: of the draws, on the CPU: with the same one, every device draws the same rows.

    Returns:
        (C, K) bool, the slots replaced, on the memory's device. A class with fewer such rows than slots to replace
        gives its first slots what it has; one without any keeps its slots. Waits for the device.

    Raises:
        ValueError: as in `ema_scatter_`; nothing has been changed then.

    Example:
        >>> memory, usage = torch.eye(3).view(1, 3, 3).clone(), torch.tensor([[1.0, 0.0, 1.0]])
        >>> reseed_(memory, usage, torch.tensor([[0.0, 3.0, 4.0]]), torch.tensor([0]), threshold=0.1)
        tensor([[False,  True, False]])
        >>> memory[0, 1]
        tensor([0.0000, 0.6000, 0.8000])
    """
    _check_bank(memory, usage, 0.0)
    _check_rows(memory, z, row_class, weights)
    check.same_device("memory", memory, usage=usage)
    check.generator(generator)
    if memory.is_meta:
        return memory.new_empty(memory.shape[:2], dtype=torch.bool)
    return reference.reseed_(memory, usage, z.detach(), row_class, weights, threshold, generator)


def spherical_kmeans(z: Tensor, k: int, iterations: int = 20, generator: torch.Generator | None = None) -> Tensor:
    """Cluster rows by direction: Lloyd's iterations with cosine similarity, seeded far apart.

    Args:
        z: (N, S) any float dtype; rows that are zero or not finite are left out.
        k: number of centres. Where fewer directions exist than that, the rest are random directions.
        iterations: at most; it stops when nothing moves.
        generator: of the seeding, on the CPU.

    Returns:
        (k, S) unit vectors in float32 (float64 for a float64 z). Waits for the device.

    Raises:
        ValueError: z is not (N, S), or k or iterations are under 1.
    """
    check.shape("z", z, (None, None), "(N, S)")
    check.floating("z", z)
    if k < 1 or iterations < 1:
        raise ValueError(f"k, iterations: expected at least 1 each, got {k} and {iterations}")
    if z.is_meta:
        return z.new_empty((k, z.shape[1]), dtype=torch.promote_types(z.dtype, torch.float32))
    return reference.spherical_kmeans(z.detach(), k, iterations, generator)

"""Registration of ema_scatter_ and its halves. No autograd: the memory is moved, not differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.ops._backends import backend_of
from momkd.ops._register import custom_op, register_autograd, register_fake
from momkd.reference.segments import accumulate_dtype


@custom_op("ema_accumulate")
def ema_accumulate(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None, normalize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """memory (C, K, S), z (N, S), row_class (N,), weights (N,) -> sums (C, K, S), mass (C, K), assignments (N,)."""
    where = backend_of("ema_accumulate", backend, (memory, z, row_class, weights))
    result: tuple[Tensor, Tensor, Tensor] = where.ema_accumulate(memory, z, row_class, weights, normalize)
    return result


@register_fake(ema_accumulate)
def _(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None, normalize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(z.dtype)
    return (
        torch.empty_like(memory, dtype=dtype, memory_format=torch.contiguous_format),
        memory.new_empty(memory.shape[:2], dtype=dtype),
        z.new_empty((z.shape[0],), dtype=torch.int32),
    )


@custom_op("ema_apply_", mutates_args=("memory", "usage"))
def ema_apply_(memory: Tensor, usage: Tensor, sums: Tensor, mass: Tensor, momentum: float, backend: str) -> None:
    """Moves memory (C, K, S) and usage (C, K) in place by sums (C, K, S) and mass (C, K)."""
    where = backend_of("ema_apply_", backend, (memory, sums, usage, mass))
    where.ema_apply_(memory, usage, sums, mass, momentum)


@register_fake(ema_apply_)
def _(memory: Tensor, usage: Tensor, sums: Tensor, mass: Tensor, momentum: float, backend: str) -> None:
    return None


@custom_op("ema_scatter_", mutates_args=("memory", "usage"))
def ema_scatter_(
    memory: Tensor,
    usage: Tensor,
    z: Tensor,
    row_class: Tensor,
    weights: Tensor | None,
    momentum: float,
    normalize: bool,
    backend: str,
) -> Tensor:
    """Both halves in one pass. Returns the assignments (N,) int32."""
    where = backend_of("ema_scatter_", backend, (memory, z, usage, row_class, weights))
    assignments: Tensor = where.ema_scatter_(memory, usage, z, row_class, weights, momentum, normalize)
    return assignments


@register_fake(ema_scatter_)
def _(
    memory: Tensor,
    usage: Tensor,
    z: Tensor,
    row_class: Tensor,
    weights: Tensor | None,
    momentum: float,
    normalize: bool,
    backend: str,
) -> Tensor:
    return z.new_empty((z.shape[0],), dtype=torch.int32)


for _op in (ema_accumulate, ema_apply_, ema_scatter_):
    register_autograd(_op)

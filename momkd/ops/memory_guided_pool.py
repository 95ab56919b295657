"""Registration of memory_guided_pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momkd.ops import _gradients
from momkd.ops._backends import backend_of
from momkd.ops._register import call_backward, custom_op, register_autograd, register_fake
from momkd.reference.segments import accumulate_dtype


@custom_op("memory_guided_pool")
def memory_guided_pool(
    z: Tensor,
    values: Tensor,
    memory: Tensor,
    offsets: Tensor,
    temperature: Tensor,
    per_class: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """z (N, S), values (N, L), memory (C, K, S) -> pooled (B, H, L), attention (N, H), slots (N, C) int32."""
    arguments = z, values, memory, offsets, temperature, per_class
    where = backend_of("memory_guided_pool", backend, arguments[:5])
    result: tuple[Tensor, Tensor, Tensor] = where.memory_guided_pool(*arguments)
    return result


@register_fake(memory_guided_pool)
def _(
    z: Tensor,
    values: Tensor,
    memory: Tensor,
    offsets: Tensor,
    temperature: Tensor,
    per_class: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = values.shape
    bags, classes = offsets.shape[0] - 1, memory.shape[0]
    heads = classes if per_class else 1
    return (
        values.new_empty((bags, heads, width)),
        values.new_empty((rows, heads), dtype=accumulate_dtype(values.dtype)),
        values.new_empty((rows, classes), dtype=torch.int32),
    )


@custom_op("memory_guided_pool_backward")
def memory_guided_pool_backward(
    grad: Tensor,
    z: Tensor,
    values: Tensor,
    memory: Tensor,
    offsets: Tensor,
    temperature: Tensor,
    pooled: Tensor,
    attention: Tensor,
    slots: Tensor,
    per_class: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of z, values and temperature; empty where not needed."""
    needed = needs[0], needs[1], needs[2]
    arguments = grad, z, values, memory, offsets, temperature, per_class, pooled, attention, slots, needed
    where = backend_of("memory_guided_pool", backend, (z, values, memory, offsets, temperature))
    grads = where.memory_guided_pool_backward(*arguments)
    return _gradients.pack(grads, needs)


@register_fake(memory_guided_pool_backward)
def _(
    grad: Tensor,
    z: Tensor,
    values: Tensor,
    memory: Tensor,
    offsets: Tensor,
    temperature: Tensor,
    pooled: Tensor,
    attention: Tensor,
    slots: Tensor,
    per_class: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return _gradients.fake((z, values, temperature), needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.per_class, ctx.backend = inputs
    _, attention, slots = output
    ctx.mark_non_differentiable(attention, slots)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    grads = call_backward(memory_guided_pool_backward, grad, *ctx.saved_tensors, ctx.per_class, needs, ctx.backend)
    d_z, d_values, d_temperature = _gradients.unpack(grads, needs)
    return d_z, d_values, None, None, d_temperature, None, None


register_autograd(memory_guided_pool, _backward, setup_context=_setup)
register_autograd(memory_guided_pool_backward)

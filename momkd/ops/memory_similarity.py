"""Registration of memory_similarity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momkd.ops import _gradients
from momkd.ops._backends import backend_of
from momkd.ops._register import call_backward, custom_op, register_autograd, register_fake
from momkd.reference.segments import accumulate_dtype


@custom_op("memory_similarity")
def memory_similarity(z: Tensor, memory: Tensor, reduce: str, tau: float, backend: str) -> tuple[Tensor, Tensor]:
    """z (N, S), memory (C, K, S) -> similarities (N, C), slots (N, C) int32."""
    where = backend_of("memory_similarity", backend, (z, memory), reduce=reduce)
    result: tuple[Tensor, Tensor] = where.memory_similarity(z, memory, reduce, tau)
    return result


@register_fake(memory_similarity)
def _(z: Tensor, memory: Tensor, reduce: str, tau: float, backend: str) -> tuple[Tensor, Tensor]:
    shape = (z.shape[0], memory.shape[0])
    return z.new_empty(shape, dtype=accumulate_dtype(z.dtype)), z.new_empty(shape, dtype=torch.int32)


@custom_op("memory_similarity_backward")
def memory_similarity_backward(
    grad: Tensor,
    z: Tensor,
    memory: Tensor,
    slots: Tensor,
    reduce: str,
    tau: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    where = backend_of("memory_similarity", backend, (z, memory), reduce=reduce)
    needed = needs[0], needs[1]
    grads = where.memory_similarity_backward(grad, z, memory, reduce, tau, slots, needed)
    return _gradients.pack(grads, needs)


@register_fake(memory_similarity_backward)
def _(
    grad: Tensor,
    z: Tensor,
    memory: Tensor,
    slots: Tensor,
    reduce: str,
    tau: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return _gradients.fake((z, memory), needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, memory, ctx.reduce, ctx.tau, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, memory, output[1])


def _backward(ctx: Any, grad: Tensor, _grad_slots: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = call_backward(memory_similarity_backward, grad, *ctx.saved_tensors, ctx.reduce, ctx.tau, needs, ctx.backend)
    return (*_gradients.unpack(grads, needs), None, None, None)


register_autograd(memory_similarity, _backward, setup_context=_setup)
register_autograd(memory_similarity_backward)

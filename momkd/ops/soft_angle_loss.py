"""Registration of soft_angle_loss (one loss a row; the reduction is plain torch)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momkd.ops import _gradients
from momkd.ops._backends import backend_of
from momkd.ops._register import call_backward, custom_op, register_autograd, register_fake
from momkd.reference.segments import accumulate_dtype


@custom_op("soft_angle_loss")
def soft_angle_loss(
    z: Tensor, memory: Tensor, labels: Tensor, margin: float, tau: float, beta: float, backend: str
) -> Tensor:
    """z (B, S), memory (C, K, S), labels (B,) int64 -> losses (B,)."""
    where = backend_of("soft_angle_loss", backend, (z, memory, labels))
    losses: Tensor = where.soft_angle_loss(z, memory, labels, margin, tau, beta)
    return losses


@register_fake(soft_angle_loss)
def _(z: Tensor, memory: Tensor, labels: Tensor, margin: float, tau: float, beta: float, backend: str) -> Tensor:
    return z.new_empty((z.shape[0],), dtype=accumulate_dtype(z.dtype))


@custom_op("soft_angle_loss_backward")
def soft_angle_loss_backward(
    grad: Tensor,
    z: Tensor,
    memory: Tensor,
    labels: Tensor,
    margin: float,
    tau: float,
    beta: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    where = backend_of("soft_angle_loss", backend, (z, memory, labels))
    grads = where.soft_angle_loss_backward(grad, z, memory, labels, margin, tau, beta, (needs[0], needs[1]))
    return _gradients.pack(grads, needs)


@register_fake(soft_angle_loss_backward)
def _(
    grad: Tensor,
    z: Tensor,
    memory: Tensor,
    labels: Tensor,
    margin: float,
    tau: float,
    beta: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return _gradients.fake((z, memory), needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, memory, labels, ctx.margin, ctx.tau, ctx.beta, ctx.backend = inputs
    ctx.save_for_backward(z, memory, labels)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = call_backward(
        soft_angle_loss_backward, grad, *ctx.saved_tensors, ctx.margin, ctx.tau, ctx.beta, needs, ctx.backend
    )
    return (*_gradients.unpack(grads, needs), None, None, None, None, None)


register_autograd(soft_angle_loss, _backward, setup_context=_setup)
register_autograd(soft_angle_loss_backward)

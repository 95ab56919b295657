"""Registration of attention_pool."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momkd.ops import _gradients
from momkd.ops._backends import backend_of
from momkd.ops._register import call_backward, custom_op, register_autograd, register_fake
from momkd.reference.segments import accumulate_dtype


@custom_op("attention_pool")
def attention_pool(values: Tensor, scores: Tensor, offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """values (N, L), scores (N, H), offsets (B+1,) -> pooled (B, H, L), stats (B, H, 2)."""
    where = backend_of("attention_pool", backend, (values, scores, offsets))
    result: tuple[Tensor, Tensor] = where.attention_pool(values, scores, offsets)
    return result


@register_fake(attention_pool)
def _(values: Tensor, scores: Tensor, offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    bags, heads = offsets.shape[0] - 1, scores.shape[1]
    stats = values.new_empty((bags, heads, 2), dtype=accumulate_dtype(values.dtype))
    return values.new_empty((bags, heads, values.shape[1])), stats


@custom_op("attention_pool_backward")
def attention_pool_backward(
    grad: Tensor,
    values: Tensor,
    scores: Tensor,
    offsets: Tensor,
    pooled: Tensor,
    stats: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    where = backend_of("attention_pool", backend, (values, scores, offsets))
    needed = needs[0], needs[1]
    grads = where.attention_pool_backward(grad, values, scores, offsets, pooled, stats, needed)
    return _gradients.pack(grads, needs)


@register_fake(attention_pool_backward)
def _(
    grad: Tensor,
    values: Tensor,
    scores: Tensor,
    offsets: Tensor,
    pooled: Tensor,
    stats: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return _gradients.fake((values, scores), needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, scores, offsets, ctx.backend = inputs
    pooled, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(values, scores, offsets, pooled, stats)


def _backward(ctx: Any, grad: Tensor, _grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = call_backward(attention_pool_backward, grad, *ctx.saved_tensors, needs, ctx.backend)
    return (*_gradients.unpack(grads, needs), None, None)


register_autograd(attention_pool, _backward, setup_context=_setup)
register_autograd(attention_pool_backward)

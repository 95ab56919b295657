"""Registration of gated_attention_pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momkd import budget
from momkd.dispatch import choose
from momkd.ops import _gradients
from momkd.ops._backends import backend_of, module_of
from momkd.ops._register import call_backward, custom_op, register_autograd, register_fake
from momkd.reference.gated_attention_pool import GateParameters
from momkd.reference.segments import accumulate_dtype


@custom_op("gated_attention_pool")
def gated_attention_pool(
    x: Tensor,
    offsets: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    kept_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, L), offsets (B+1,) -> pooled (B, H, L), scores (N, H), stats (B, H, 2), kept (N, branches · D) or (0,).

    `kept_bytes`: what may be kept for backward; 0 nothing, −1 as much as `budget.allowed` says.
    """
    parameters = GateParameters(w_v, b_v, w_u, b_u, w_a, b_a)
    chosen = choose("gated_attention_pool", backend, (x, offsets, w_v, w_u, w_a))
    where = module_of("gated_attention_pool", chosen)
    if _kept_columns(x, w_v, w_u, kept_bytes, chosen):
        kept: tuple[Tensor, Tensor, Tensor, Tensor] = where.gated_attention_pool_kept(
            x, offsets, parameters, dropout_p, seed
        )
        return kept
    pooled, scores, stats = where.gated_attention_pool(x, offsets, parameters, dropout_p, seed)
    return pooled, scores, stats, x.new_empty(0)


def _kept_columns(x: Tensor, w_v: Tensor, w_u: Tensor | None, kept_bytes: int, chosen: str) -> int:
    """Columns of the products that this backend keeps of each row; 0 where nothing is."""
    if kept_bytes == 0 or chosen != "triton":
        return 0
    columns = w_v.shape[0] * (1 if w_u is None else 2)
    fits = x.shape[0] * columns * x.element_size() <= budget.allowed(kept_bytes, x.device)
    return columns if fits else 0


@register_fake(gated_attention_pool)
def _(
    x: Tensor,
    offsets: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    kept_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    bags, heads, dtype = offsets.shape[0] - 1, w_a.shape[0], accumulate_dtype(x.dtype)
    columns = 0
    if kept_bytes != 0:
        chosen = choose("gated_attention_pool", backend, (x, offsets, w_v, w_u, w_a))
        columns = _kept_columns(x, w_v, w_u, kept_bytes, chosen)
    return (
        x.new_empty((bags, heads, width)),
        x.new_empty((rows, heads), dtype=dtype),
        x.new_empty((bags, heads, 2), dtype=dtype),
        x.new_empty((rows, columns) if columns else (0,)),
    )


@custom_op("gated_attention_pool_backward")
def gated_attention_pool_backward(
    grad_pooled: Tensor,
    grad_scores: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    seed: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    kept: Tensor,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """The seven gradients in the order x, w_v, b_v, w_u, b_u, w_a, b_a; empty where not needed."""
    parameters = GateParameters(w_v, b_v, w_u, b_u, w_a, b_a)
    saved = x, offsets, parameters, dropout_p, seed, pooled, scores, stats, tuple(needs)
    if kept.ndim == 2:  # Triton alone keeps something, and for itself
        columns = w_v.shape[0] * (1 if w_u is None else 2)
        if kept.shape != (x.shape[0], columns) or kept.dtype != x.dtype:
            raise ValueError(
                f"kept: expected what forward gave, {x.dtype} ({x.shape[0]}, {columns}), got {kept.dtype} "
                f"{tuple(kept.shape)}; leave it (0,) to compute it again"
            )
        where = module_of("gated_attention_pool", "triton")
        grads = where.gated_attention_pool_backward(grad_pooled, grad_scores, *saved, kept)
    else:
        where = backend_of("gated_attention_pool", backend, (x, offsets, w_v, w_u, w_a))
        grads = where.gated_attention_pool_backward(grad_pooled, grad_scores, *saved)
    return _gradients.pack(grads, needs)


@register_fake(gated_attention_pool_backward)
def _(
    grad_pooled: Tensor,
    grad_scores: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    seed: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    kept: Tensor,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return _gradients.fake((x, w_v, b_v, w_u, b_u, w_a, b_a), needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, seed, _, ctx.backend = inputs
    pooled, scores, stats, kept = output
    ctx.mark_non_differentiable(stats, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seed, pooled, scores, stats, kept)


def _backward(
    ctx: Any, grad_pooled: Tensor | None, grad_scores: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_pooled is None:
        grad_pooled = torch.zeros_like(saved[-4])
    needs_x, _, *rest = ctx.needs_input_grad
    needs = [needs_x, *rest[:6]]
    grads = call_backward(
        gated_attention_pool_backward, grad_pooled, grad_scores, *saved, ctx.dropout_p, needs, ctx.backend
    )
    d_x, *d_parameters = _gradients.unpack(grads, needs)
    return (d_x, None, *d_parameters, None, None, None, None)


register_autograd(gated_attention_pool, _backward, setup_context=_setup)
register_autograd(gated_attention_pool_backward)

"""Registration of gated_attention_pool, and of gated_attention_scores, its gate without the pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momkd import budget
from momkd.dispatch import choose
from momkd.ops import _gradients
from momkd.ops._backends import module_of
from momkd.ops._register import call_backward, custom_op, register_autograd, register_fake
from momkd.reference.gated_attention_pool import GateParameters
from momkd.reference.segments import accumulate_dtype

# Both ops keep for backward what `kept_bytes` allows (0: nothing, −1: as much as `budget.allowed` says): the Triton
# kernels the products x [W_v | W_u]ᵀ (N, branches · D), the others tanh(·) and σ(·) (N, branches, D), each in the dtype
# of x; (0,) where nothing is kept.


def _kept_shape(
    x: Tensor, w_v: Tensor, w_u: Tensor | None, w_a: Tensor, kept_bytes: int, chosen: str
) -> tuple[int, ...]:
    branches, hidden = 1 if w_u is None else 2, w_v.shape[0]
    size = x.shape[0] * branches * hidden * x.element_size()
    if kept_bytes == 0 or size > budget.allowed(kept_bytes, x.device):
        return (0,)
    return (x.shape[0], branches * hidden) if chosen == "triton" else (x.shape[0], branches, hidden)


def _fake_kept(
    x: Tensor, w_v: Tensor, w_u: Tensor | None, w_a: Tensor, kept_bytes: int, backend: str, op: str, args: Any
) -> Tensor:
    shape: tuple[int, ...] = (0,)
    if kept_bytes != 0:
        shape = _kept_shape(x, w_v, w_u, w_a, kept_bytes, choose(op, backend, args))
    return x.new_empty(shape)


def _check_kept(kept: Tensor, x: Tensor, w_v: Tensor, w_u: Tensor | None) -> None:
    branches, hidden = 1 if w_u is None else 2, w_v.shape[0]
    fits = kept.shape in ((x.shape[0], branches * hidden), (x.shape[0], branches, hidden))
    if kept.ndim > 1 and (not fits or kept.dtype != x.dtype):
        raise ValueError(
            f"kept: expected what forward gave, {x.dtype} ({x.shape[0]}, {branches * hidden}) or ({x.shape[0]}, "
            f"{branches}, {hidden}), got {kept.dtype} {tuple(kept.shape)}; leave it (0,) to compute it again"
        )


def _backward_of(op: str, backend: str, kept: Tensor, args: Any) -> Any:
    """The module whose backward reads what was kept: that of Triton alone reads products."""
    if kept.ndim == 2:
        return module_of(op, "triton")
    chosen = choose(op, backend, args)
    if kept.ndim == 3 and chosen == "triton":  # asked for anew since forward
        chosen = choose(op, "torch", args)
    return module_of(op, chosen)


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
    score_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    kept_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, L), offsets (B+1,) -> pooled (B, H, L), scores (N, H), stats (B, H, 2), kept."""
    args = x, offsets, w_v, w_u, w_a
    chosen = choose("gated_attention_pool", backend, args)
    keep = len(_kept_shape(x, w_v, w_u, w_a, kept_bytes, chosen)) > 1
    parameters = GateParameters(w_v, b_v, w_u, b_u, w_a, b_a)
    where = module_of("gated_attention_pool", chosen)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = where.gated_attention_pool(
        x, offsets, parameters, dropout_p, seed, score_bias, keep
    )
    return result


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
    score_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    kept_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    bags, heads, dtype = offsets.shape[0] - 1, w_a.shape[0], accumulate_dtype(x.dtype)
    args = x, offsets, w_v, w_u, w_a
    return (
        x.new_empty((bags, heads, width)),
        x.new_empty((rows, heads), dtype=dtype),
        x.new_empty((bags, heads, 2), dtype=dtype),
        _fake_kept(x, w_v, w_u, w_a, kept_bytes, backend, "gated_attention_pool", args),
    )


@custom_op("gated_attention_pool_backward")
def gated_attention_pool_backward(
    x: Tensor,
    offsets: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    score_bias: Tensor | None,
    seed: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    kept: Tensor,
    grad_pooled: Tensor | None,
    grad_scores: Tensor | None,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """The eight gradients in the order x, w_v, b_v, w_u, b_u, w_a, b_a, score_bias; only those that are needed."""
    _check_kept(kept, x, w_v, w_u)
    where = _backward_of("gated_attention_pool", backend, kept, (x, offsets, w_v, w_u, w_a))
    parameters = GateParameters(w_v, b_v, w_u, b_u, w_a, b_a)
    grads = list(
        where.gated_attention_pool_backward(
            *(grad_pooled, grad_scores, x, offsets, parameters, dropout_p, seed),
            *(pooled, scores, stats, kept if kept.ndim > 1 else None, tuple(needs)),
        )
    )
    if needs[7] and score_bias is not None:
        grads[7] = grads[7].to(score_bias.dtype, copy=True)
    return _gradients.pack(grads, needs)


@register_fake(gated_attention_pool_backward)
def _(
    x: Tensor,
    offsets: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    score_bias: Tensor | None,
    seed: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    kept: Tensor,
    grad_pooled: Tensor | None,
    grad_scores: Tensor | None,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return _gradients.fake((x, w_v, b_v, w_u, b_u, w_a, b_a, score_bias), needs)


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, seed, _, ctx.backend = inputs
    pooled, scores, stats, kept = output
    ctx.mark_non_differentiable(stats, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seed, pooled, scores, stats, kept)


def _backward_pool(
    ctx: Any, grad_pooled: Tensor | None, grad_scores: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_pooled is None and grad_scores is None:
        return (None,) * 13
    needs_x, _, *rest = ctx.needs_input_grad
    needs = [needs_x, *rest[:7]]
    grads = call_backward(
        gated_attention_pool_backward,
        *ctx.saved_tensors,
        grad_pooled,
        grad_scores,
        ctx.dropout_p,
        needs,
        ctx.backend,
    )
    d_x, *others = _gradients.unpack(grads, needs)
    return (d_x, None, *others, None, None, None, None)


register_autograd(gated_attention_pool, _backward_pool, setup_context=_setup_pool)
register_autograd(gated_attention_pool_backward)


@custom_op("gated_attention_scores")
def gated_attention_scores(
    x: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """x (N, L) -> scores (N, H), kept."""
    chosen = choose("gated_attention_scores", backend, (x, w_v, w_u, w_a))
    keep = len(_kept_shape(x, w_v, w_u, w_a, kept_bytes, chosen)) > 1
    parameters = GateParameters(w_v, b_v, w_u, b_u, w_a, b_a)
    where = module_of("gated_attention_scores", chosen)
    result: tuple[Tensor, Tensor] = where.gated_attention_scores(x, parameters, dropout_p, seed, keep)
    return result


@register_fake(gated_attention_scores)
def _(
    x: Tensor,
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
) -> tuple[Tensor, Tensor]:
    args = x, w_v, w_u, w_a
    return (
        x.new_empty((x.shape[0], w_a.shape[0]), dtype=accumulate_dtype(x.dtype)),
        _fake_kept(x, w_v, w_u, w_a, kept_bytes, backend, "gated_attention_scores", args),
    )


@custom_op("gated_attention_scores_backward")
def gated_attention_scores_backward(
    x: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    seed: Tensor | None,
    kept: Tensor,
    grad_scores: Tensor,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """The seven gradients in the order x, w_v, b_v, w_u, b_u, w_a, b_a; only those that are needed."""
    _check_kept(kept, x, w_v, w_u)
    where = _backward_of("gated_attention_scores", backend, kept, (x, w_v, w_u, w_a))
    parameters = GateParameters(w_v, b_v, w_u, b_u, w_a, b_a)
    grads = where.gated_attention_scores_backward(
        grad_scores, x, parameters, dropout_p, seed, kept if kept.ndim > 1 else None, tuple(needs)
    )
    return _gradients.pack(grads, needs)


@register_fake(gated_attention_scores_backward)
def _(
    x: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    seed: Tensor | None,
    kept: Tensor,
    grad_scores: Tensor,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return _gradients.fake((x, w_v, b_v, w_u, b_u, w_a, b_a), needs)


def _setup_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, seed, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seed, output[1])


def _backward_scores(ctx: Any, grad_scores: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_scores is None:
        return (None,) * 11
    needs = list(ctx.needs_input_grad[:7])
    arguments = *ctx.saved_tensors, grad_scores, ctx.dropout_p, needs, ctx.backend
    grads = call_backward(gated_attention_scores_backward, *arguments)
    return (*_gradients.unpack(grads, needs), None, None, None, None)


register_autograd(gated_attention_scores, _backward_scores, setup_context=_setup_scores)
register_autograd(gated_attention_scores_backward)

"""Registration of graph_attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momkd.graph import Edges
from momkd.ops import _gradients
from momkd.ops._backends import backend_of
from momkd.ops._register import call_backward, custom_op, register_autograd, register_fake
from momkd.reference.segments import accumulate_dtype


@custom_op("graph_attention")
def graph_attention(
    x_l: Tensor,
    x_r: Tensor,
    att: Tensor,
    edges: list[Tensor],
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_l, x_r (N, H·C), att (H, C), `Edges.tensors()` -> out (N, H·C), scores (E + N, H), stats (N, H, 2)."""
    where = backend_of("graph_attention", backend, (x_l, x_r, att, edges[0]))
    result: tuple[Tensor, Tensor, Tensor] = where.graph_attention(
        x_l, x_r, att, Edges(*edges), negative_slope, dropout_p, seed
    )
    return result


@register_fake(graph_attention)
def _(
    x_l: Tensor,
    x_r: Tensor,
    att: Tensor,
    edges: list[Tensor],
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    nodes, heads, dtype = x_l.shape[0], att.shape[0], accumulate_dtype(x_l.dtype)
    return (
        x_l.new_empty(x_l.shape),
        x_l.new_empty((edges[1].shape[0] + nodes, heads), dtype=dtype),
        x_l.new_empty((nodes, heads, 2), dtype=dtype),
    )


@custom_op("graph_attention_backward")
def graph_attention_backward(
    grad: Tensor,
    x_l: Tensor,
    x_r: Tensor,
    att: Tensor,
    edges: list[Tensor],
    seed: Tensor | None,
    out: Tensor,
    scores: Tensor,
    stats: Tensor,
    negative_slope: float,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of x_l, x_r and att; empty where not needed."""
    where = backend_of("graph_attention", backend, (x_l, x_r, att, edges[0]))
    saved = x_l, x_r, att, Edges(*edges), negative_slope, dropout_p, seed, out, scores, stats
    grads = where.graph_attention_backward(grad, *saved, (needs[0], needs[1], needs[2]))
    return _gradients.pack(grads, needs)


@register_fake(graph_attention_backward)
def _(
    grad: Tensor,
    x_l: Tensor,
    x_r: Tensor,
    att: Tensor,
    edges: list[Tensor],
    seed: Tensor | None,
    out: Tensor,
    scores: Tensor,
    stats: Tensor,
    negative_slope: float,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return _gradients.fake((x_l, x_r, att), needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_l, x_r, att, edges, ctx.negative_slope, ctx.dropout_p, seed, ctx.backend = inputs
    out, scores, stats = output
    ctx.mark_non_differentiable(scores, stats)
    ctx.save_for_backward(x_l, x_r, att, seed, out, scores, stats, *edges)


def _backward(ctx: Any, grad: Tensor, *_unused: Tensor | None) -> tuple[Any, ...]:
    x_l, x_r, att, seed, out, scores, stats, *edges = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = call_backward(
        graph_attention_backward,
        grad,
        *(x_l, x_r, att, list(edges), seed, out, scores, stats),
        *(ctx.negative_slope, ctx.dropout_p, needs, ctx.backend),
    )
    return (*_gradients.unpack(grads, needs), None, None, None, None, None)


register_autograd(graph_attention, _backward, setup_context=_setup)
register_autograd(graph_attention_backward)

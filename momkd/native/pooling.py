"""Pooling by `momkd._C`: attention_pool, and gated_attention_pool with its products by torch on blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.native import bags_of, expect, extension, rows
from momkd.reference.gated_attention_pool import GateParameters
from momkd.reference.philox import keep_scale, keep_threshold

BLOCK = 1024  # rows whose gate is held at once


def _single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def attention_pool(values: Tensor, scores: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    values, about = rows("values", values)
    heads = scores.shape[1]
    expect("scores", scores, (values.shape[0], heads))
    scores, (offsets, bags) = _single(scores), bags_of(offsets)
    pooled = scores.new_empty(bags, heads, values.shape[1])
    stats = scores.new_empty(bags, heads, 2)
    extension()[0].attention_pool(
        about,
        scores.data_ptr(),
        offsets.data_ptr(),
        bags,
        heads,
        pooled.data_ptr(),
        stats.data_ptr(),
        torch.get_num_threads(),
    )
    return pooled.to(values.dtype), stats


def attention_pool_backward(
    grad: Tensor,
    values: Tensor,
    scores: Tensor,
    offsets: Tensor,
    pooled: Tensor,
    stats: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    values, about = rows("values", values)
    heads, (offsets, bags) = scores.shape[1], bags_of(offsets)
    expect("scores", scores, (values.shape[0], heads))
    expect("grad", grad, (bags, heads, values.shape[1]))
    expect("stats", stats, (bags, heads, 2))
    grad, scores_single, stats = _single(grad), _single(scores), _single(stats)
    d_values = torch.empty_like(values, memory_format=torch.contiguous_format) if needs[0] else None
    d_scores = torch.empty_like(scores_single) if needs[1] else None
    extension()[0].attention_pool_backward(
        grad.data_ptr(),
        about,
        scores_single.data_ptr(),
        offsets.data_ptr(),
        bags,
        heads,
        stats.data_ptr(),
        0 if d_scores is None else d_scores.data_ptr(),
        0 if d_values is None else d_values.data_ptr(),
        torch.get_num_threads(),
    )
    return d_values, None if d_scores is None else d_scores.to(scores.dtype)


class _Gate:
    """The parameters as the kernels read them, and the two products of a block of rows."""

    def __init__(self, x: Tensor, parameters: GateParameters, dropout_p: float, seed: Tensor | None) -> None:
        w_v, b_v, w_u, b_u, w_a, b_a = parameters
        branches = [(w_v, b_v)] if w_u is None else [(w_v, b_v), (w_u, b_u)]
        if w_a.ndim != 2 or x.ndim != 2:
            raise ValueError(
                f"x, w_a: expected (N, L) and (H, D), got {tuple(x.shape)} and {tuple(w_a.shape)}; use w_a[None]"
            )
        self.x, self.gated, (self.heads, self.hidden) = x, w_u is not None, w_a.shape
        for name, weight, bias in (("v", w_v, b_v), ("u", w_u, b_u)):
            if weight is not None:
                expect(f"w_{name}", weight, (self.hidden, x.shape[1]))
            if bias is not None:
                expect(f"b_{name}", bias, (self.hidden,))
        if b_a is not None:
            expect("b_a", b_a, (self.heads,))
        self.weight = torch.cat([weight.to(torch.float32) for weight, _ in branches])  # (D or 2 D, L)
        zero = self.weight.new_zeros(self.hidden)
        self.bias = torch.cat([zero if bias is None else bias.to(torch.float32) for _, bias in branches])
        self.w_a, self.b_a = _single(w_a), None if b_a is None else _single(b_a)
        self.dropout = (0, 1.0)
        self.seed = 0
        if dropout_p > 0 and seed is not None:
            self.dropout, self.seed = (keep_threshold(dropout_p), keep_scale(dropout_p)), int(seed)
        self.pre = self.weight.new_empty(min(BLOCK, x.shape[0]), len(self.bias))

    def blocks(self) -> range:
        return range(0, self.x.shape[0], BLOCK)

    def product(self, first: int) -> tuple[Tensor, Tensor]:
        """The rows from `first` on in float32, and what their activations see: (rows, L), (rows, D or 2 D)."""
        x = self.x[first : first + BLOCK].to(torch.float32)
        return x, torch.addmm(self.bias, x, self.weight.T, out=self.pre[: x.shape[0]])

    def about(self, pre: Tensor, first: int) -> tuple[object, ...]:
        """What the kernels are told of a block and of its dropout."""
        shape = (pre.shape[0], self.hidden, self.heads, self.gated)
        return (pre.data_ptr(), *shape, self.seed, first, *self.dropout, self.w_a.data_ptr())


def gated_attention_scores(
    x: Tensor, parameters: GateParameters, dropout_p: float = 0.0, seed: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor]:
    gate = _Gate(x, parameters, dropout_p, seed)
    scores = gate.weight.new_empty(x.shape[0], gate.heads)
    bias = 0 if gate.b_a is None else gate.b_a.data_ptr()
    for first in gate.blocks():
        _, pre = gate.product(first)
        extension()[0].gate_scores(*gate.about(pre, first), bias, scores[first:].data_ptr(), torch.get_num_threads())
    return scores, x.new_empty(0)


def gated_attention_scores_backward(
    d_scores: Tensor,
    x: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    seed: Tensor | None,
    kept: Tensor | None,
    needs: tuple[bool, ...],
    d_x: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    expect("d_scores", d_scores, (x.shape[0], parameters.w_a.shape[0]))
    d_scores = _single(d_scores)
    if needs[0] and d_x is None:
        d_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    gate = _Gate(x, parameters, dropout_p, seed)
    d_weight = torch.zeros_like(gate.weight) if needs[1] or needs[3] else None
    d_bias, d_w_a = torch.zeros_like(gate.bias), torch.zeros_like(gate.w_a)
    for first in gate.blocks():
        block, pre = gate.product(first)
        extension()[0].gate_backward(
            *gate.about(pre, first),
            d_scores[first:].data_ptr(),
            d_w_a.data_ptr(),
            d_bias.data_ptr(),
            torch.get_num_threads(),
        )
        if d_weight is not None:
            d_weight.addmm_(pre.T, block)
        if d_x is not None:
            d_x[first : first + BLOCK] += pre @ gate.weight
    grads: list[Tensor | None] = [d_x]
    for branch in range(2):
        own = slice(branch * gate.hidden, (branch + 1) * gate.hidden)
        grads += [None if d_weight is None else d_weight[own], d_bias[own]]
    grads += [d_w_a, d_scores.sum(0)]
    like = (x, *parameters)
    return tuple(
        None if t is None or g is None or not need else g if g is d_x else g.to(t.dtype, copy=True)
        for g, t, need in zip(grads, like, needs, strict=True)
    )


def gated_attention_pool(
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    score_bias: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, kept = gated_attention_scores(x, parameters, dropout_p, seed, keep)
    if score_bias is not None:
        expect("score_bias", score_bias, tuple(scores.shape))
        scores += score_bias
    pooled, stats = attention_pool(x, scores, offsets)
    return pooled, scores, stats, kept


def gated_attention_pool_backward(
    grad_pooled: Tensor | None,
    grad_scores: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float,
    seed: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    kept: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    expect("scores", scores, (x.shape[0], parameters.w_a.shape[0]))
    d_x, d_scores = None, None
    if grad_pooled is not None:
        d_x, d_scores = attention_pool_backward(grad_pooled, x, scores, offsets, pooled, stats, (needs[0], True))
    if d_scores is None:
        assert grad_scores is not None
        d_scores = _single(grad_scores)
    elif grad_scores is not None:
        d_scores += grad_scores
    grads = gated_attention_scores_backward(d_scores, x, parameters, dropout_p, seed, kept, needs[:7], d_x)
    return (*grads, d_scores if needs[7] else None)

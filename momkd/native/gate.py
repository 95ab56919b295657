"""gated_attention_pool and gated_attention_scores by `momkd._C`, on blocks of rows that stay in cache.

bfloat16 rows on a processor with AMX: one native pass multiplies a few rows with the weights, makes scores of the
products and pools. Elsewhere torch multiplies a block (16-bit rows as they are where the processor has such products,
else widened), one native pass makes scores of it, and the pieces of bags that are complete by then are pooled.

tanh(·) and σ(·) are kept for backward where that is asked for. Where they weren't, backward makes them again, block
by block, and rounds them as if they had been kept: the numbers are the same bit for bit. One native pass turns them
into gradients at the products, of which torch makes those of features and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from momkd.native import DTYPES, bags_of, bfloat16_unit, expect, extension, laid_out, recycle, rows
from momkd.native.pooling import attention_pool_backward
from momkd.reference.gated_attention_pool import GateParameters
from momkd.reference.philox import keep_scale, keep_threshold

BLOCK_BYTES = 4 << 20  # of products that are held at once, about
LEAST_ROWS = 512  # of a block
MANY_ROWS = 2048  # from which on one product of both branches saves more than copying their weights together costs


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of `dtype` by instructions of its own."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bfloat16_unit() != "")


class _Gate:
    """The features, and the parameters as products and kernels read them."""

    def __init__(self, x: Tensor, parameters: GateParameters, dropout_p: float, seed: Tensor | None) -> None:
        w_v, b_v, w_u, b_u, w_a, b_a = parameters
        if w_a.ndim != 2 or x.ndim != 2:
            raise ValueError(
                f"x, w_a: expected (N, L) and (H, D), got {tuple(x.shape)} and {tuple(w_a.shape)}; use w_a[None]"
            )
        self.gated, (self.heads, self.hidden) = w_u is not None, w_a.shape
        for name, weight, bias in (("v", w_v, b_v), ("u", w_u, b_u)):
            if weight is not None:
                expect(f"w_{name}", weight, (self.hidden, x.shape[1]))
            if bias is not None:
                expect(f"b_{name}", bias, (self.hidden,))
        if b_a is not None:
            expect("b_a", b_a, (self.heads,))
        self.x, self.rows = rows("x", x)
        self.product = x.dtype if multiplies(x.dtype) else torch.float32
        branches = [(w_v, b_v)] if w_u is None else [(w_v, b_v), (w_u, b_u)]
        self.weights = [laid_out(weight, self.product) for weight, _ in branches]  # (D, L) each
        self.columns = len(branches) * self.hidden
        self.many = self.gated and x.shape[0] >= MANY_ROWS
        zero = None if b_v is not None and (w_u is None or b_u is not None) else torch.zeros(self.hidden)
        biases = [zero if bias is None else bias for _, bias in branches]
        self.bias = torch.cat([laid_out(bias) for bias in biases if bias is not None])  # (columns,)
        self.w_a = laid_out(w_a)
        self.b_a = None if b_a is None else laid_out(b_a)
        self.dropout = (0, 1.0)
        self.seed = 0
        if dropout_p > 0 and seed is not None:
            self.dropout, self.seed = (keep_threshold(dropout_p), keep_scale(dropout_p)), int(seed)
        self.threads = torch.get_num_threads()
        self.packed = _packed(self.weights) if self.product == torch.bfloat16 else None
        self.joined = torch.cat(self.weights) if self.many and self.packed is None else None  # (columns, L)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and end of each block."""
        total = self.x.shape[0]
        each = max(LEAST_ROWS, BLOCK_BYTES // (self.columns * self.product.itemsize))
        for first in range(0, total, each):
            yield first, min(first + each, total)

    def space(self, dtype: torch.dtype) -> Tensor:
        """Room for a value a row and column of any block."""
        _, end = next(self.blocks(), (0, 0))
        return torch.empty(end, self.columns, dtype=dtype)

    def about(self, first: int, end: int) -> tuple[Any, ...]:
        """What the kernels are told of a block and of the gate."""
        return (
            (end - first, self.hidden, self.heads, self.gated),
            (self.seed, first, *self.dropout),
            (DTYPES[self.x.dtype], DTYPES[self.product]),
            (self.bias.data_ptr(), self.w_a.data_ptr(), 0 if self.b_a is None else self.b_a.data_ptr()),
        )

    def multiplied(self, first: int, end: int) -> Tensor:
        """Rows of x as they are multiplied."""
        block = self.x if end - first == self.x.shape[0] else self.x[first:end]
        return block if block.dtype == self.product else block.to(self.product)

    def branches(self, values: Tensor) -> tuple[Tensor, ...]:
        """The columns of each branch, of values (rows, columns)."""
        return (values[:, : self.hidden], values[:, self.hidden :]) if self.gated else (values,)

    def score(self, first: int, end: int, products: Tensor | None, scores: Tensor, kept: Tensor | None) -> None:
        """Write the scores of a block, and what is kept of it where there is room for that.

        `products` is room for them; it may be that of what is kept, and is None where AMX makes them.
        """
        addresses = scores.data_ptr(), 0 if kept is None else kept.data_ptr()
        if products is None:
            assert self.packed is not None
            _, values = rows("x", self.x[first:end])
            about = self.about(first, end)
            extension()[0].gate_scores_amx(values, self.packed.data_ptr(), about, 0, *addresses, None, self.threads)
        else:
            block = self.multiplied(first, end)
            if self.joined is not None:
                torch.mm(block, self.joined.T, out=products)
            else:
                for weight, into in zip(self.weights, self.branches(products), strict=True):
                    torch.mm(block, weight.T, out=into)
            extension()[0].gate_scores(products.data_ptr(), self.about(first, end), *addresses, self.threads)


def _packed(weights: list[Tensor]) -> Tensor | None:
    """The weights as AMX reads them; None where it isn't there, or doesn't take so many columns."""
    size = extension()[0].amx_packed_size(*weights[0].shape)
    if size == 0:
        return None
    packed = weights[0].new_empty(len(weights), size)
    for weight, into in zip(weights, packed, strict=True):
        extension()[0].amx_pack(weight.data_ptr(), *weight.shape, into.data_ptr())
    return packed


def _room_to_keep(gate: _Gate, keep: bool) -> Tensor | None:
    return recycle.empty((gate.x.shape[0], gate.columns), gate.x.dtype) if keep else None


def _result(kept: Tensor | None, gate: _Gate) -> Tensor:
    return gate.x.new_empty(0) if kept is None else kept.view(-1, 2 if gate.gated else 1, gate.hidden)


def _scores_by_blocks(gate: _Gate, scores: Tensor, kept: Tensor | None) -> Iterator[tuple[int, int]]:
    """Write scores and what is kept; yields the first row and the end of each block that is done."""
    in_place = kept is not None and gate.product == gate.x.dtype
    space = None if in_place or gate.packed is not None else gate.space(gate.product)
    for first, end in gate.blocks():
        own = None if kept is None else kept[first:end]
        products = None if gate.packed is not None else own if in_place else space[: end - first]  # type: ignore[index]
        gate.score(first, end, products, scores[first:end], own)
        yield first, end


def gated_attention_scores(
    x: Tensor, parameters: GateParameters, dropout_p: float = 0.0, seed: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor]:
    gate = _Gate(x, parameters, dropout_p, seed)
    scores = gate.bias.new_empty(x.shape[0], gate.heads)
    kept = _room_to_keep(gate, keep)
    for _ in _scores_by_blocks(gate, scores, kept):
        pass
    return scores, _result(kept, gate)


def gated_attention_pool(
    x: Tensor,
    offsets: Tensor,
    parameters: GateParameters,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    score_bias: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate = _Gate(x, parameters, dropout_p, seed)
    offsets, bags = bags_of(offsets)
    scores = gate.bias.new_empty(x.shape[0], gate.heads)
    if score_bias is not None:
        expect("score_bias", score_bias, tuple(scores.shape))
        score_bias = laid_out(score_bias)
    kept = _room_to_keep(gate, keep)
    pooled = scores.new_empty(bags, gate.heads, x.shape[1])
    stats = scores.new_empty(bags, gate.heads, 2)
    native = extension()[0]
    pool = native.PoolByBlocks(gate.rows, offsets.data_ptr(), bags, gate.heads, gate.threads)
    if gate.packed is not None:
        native.gate_scores_amx(
            gate.rows,
            gate.packed.data_ptr(),
            gate.about(0, x.shape[0]),
            0 if score_bias is None else score_bias.data_ptr(),
            scores.data_ptr(),
            0 if kept is None else kept.data_ptr(),
            pool,
            gate.threads,
        )
    else:
        for first, end in _scores_by_blocks(gate, scores, kept):
            if score_bias is not None:
                scores[first:end] += score_bias[first:end]
            pool.pool(scores.data_ptr(), end)
    pool.finish(pooled.data_ptr(), stats.data_ptr())
    return pooled if x.dtype == torch.float32 else pooled.to(x.dtype), scores, stats, _result(kept, gate)


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
    if grad_scores is not None:
        expect("grad_scores", grad_scores, tuple(scores.shape))
        d_scores = grad_scores.to(torch.float32) if d_scores is None else d_scores.add_(grad_scores)
    assert d_scores is not None
    grads = gated_attention_scores_backward(d_scores, x, parameters, dropout_p, seed, kept, needs[:7], d_x)
    return (*grads, d_scores if needs[7] else None)


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
    """`d_x` (N, L), where it is given, is added to."""
    expect("d_scores", d_scores, (x.shape[0], parameters.w_a.shape[0]))
    d_scores = laid_out(d_scores)
    if not any(needs[:6]):
        b_a = parameters.b_a
        return (*(None,) * 6, d_scores.sum(0).to(b_a.dtype) if needs[6] and b_a is not None else None)
    gate = _Gate(x, parameters, dropout_p, seed)
    if needs[0] and d_x is None:
        d_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    d_bias, d_w_a = torch.zeros_like(gate.bias), torch.zeros_like(gate.w_a)
    if kept is not None:
        kept = kept.reshape(x.shape[0], gate.columns)
    d_weights = _backward(gate, d_scores, kept, d_x, needs[1] or needs[3], d_bias, d_w_a)
    grads: list[Tensor | None] = [d_x]
    for branch, d_branch in enumerate(d_bias.view(-1, gate.hidden)):
        grads += [d_weights[branch] if d_weights else None, d_branch.clone()]  # a result of its own, not a part
    grads += [None] * (5 - len(grads)) + [d_w_a, d_scores.sum(0) if needs[6] else None]
    like = (x, *parameters)
    return tuple(
        None if t is None or g is None or not need else g if g.dtype == t.dtype else g.to(t.dtype)
        for g, t, need in zip(grads, like, needs, strict=True)
    )


def _backward(
    gate: _Gate,
    d_scores: Tensor,
    kept: Tensor | None,
    d_x: Tensor | None,
    need_weights: bool,
    d_bias: Tensor,
    d_w_a: Tensor,
) -> list[Tensor]:
    """Add the gradients of the gate to d_x, d_bias and d_w_a, and return those of the weights (D, L), if needed."""
    half = gate.product != torch.float32
    # oneDNN is slow where the left side of a 16-bit product is turned: the kernel writes the gradients turned.
    by_columns = gate.space(gate.product) if half and need_weights else None
    by_rows = gate.space(gate.product) if d_x is not None or (need_weights and not half) else None
    again = gate.space(gate.x.dtype) if kept is None else None
    wide = again if gate.product == gate.x.dtype else gate.space(gate.product) if kept is None else None
    unread = torch.empty_like(d_scores) if kept is None else d_scores  # scores that are made again
    joined = gate.many and half
    d_weights: list[Tensor | None] = [None] * (1 if joined else len(gate.weights))
    for first, end in gate.blocks():
        count = end - first
        if kept is not None:
            activations = kept[first:end]
        else:
            assert again is not None
            assert wide is not None
            activations = again[:count]
            products = None if gate.packed is not None else wide[:count]
            gate.score(first, end, products, unread[first:end], activations)
        extension()[0].gate_backward(
            activations.data_ptr(),
            gate.about(first, end),
            d_scores[first:].data_ptr(),
            0 if by_rows is None else by_rows.data_ptr(),
            0 if by_columns is None else by_columns.data_ptr(),
            d_w_a.data_ptr(),
            d_bias.data_ptr(),
            gate.threads,
        )
        if need_weights:
            if by_columns is not None:
                turned = by_columns.view(-1)[: gate.columns * count].view(len(d_weights), -1, count).unbind()
            else:
                assert by_rows is not None
                turned = tuple(part.T for part in gate.branches(by_rows[:count]))
            block = gate.multiplied(first, end)
            for branch, left in enumerate(turned):
                d_weights[branch] = _with_product(d_weights[branch], left, block)
        if d_x is not None and by_rows is not None:
            into = d_x[first:end]
            for d_branch, weight in zip(gate.branches(by_rows[:count]), gate.weights, strict=True):
                if d_x.dtype == gate.product:
                    into.addmm_(d_branch, weight)
                else:
                    into += d_branch @ weight
    if need_weights and gate.x.shape[0] == 0:
        return [torch.zeros_like(weight) for weight in gate.weights]
    found = [d for d in d_weights if d is not None]
    return [part.clone() for part in found[0].view(2, gate.hidden, -1)] if joined and found else found


def _with_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, in float32 where there is more than one product to add."""
    if total is None:
        return torch.mm(a, b)
    return total.addmm_(a, b) if a.dtype == torch.float32 else total.float().add_(torch.mm(a, b))

"""Every op as plain torch writes it: bag by bag, in the type of its inputs throughout.

Half precision is measured by these: the error of a kernel may be at most twice theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from momkd.graph import Edges
from momkd.reference.graph_attention import hearings
from momkd.reference.philox import edge_dropout_mask, gate_dropout_masks, keep_scale


def softmax_pool(scores: Tensor, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pooled (B, H, L) and attention (N, H)."""
    spans = list(pairwise(accumulate(lengths, initial=0)))
    attention = [torch.softmax(scores[a:b], 0) for a, b in spans]
    pooled = [w.T @ values[a:b] for w, (a, b) in zip(attention, spans, strict=True)]
    if not spans:
        return (scores.T @ values)[None][:0], scores[:0]
    return torch.stack(pooled), torch.cat(attention)


def gated_attention_scores(
    x: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    dropout_p: float,
    seed: Tensor,
) -> Tensor:
    """Scores (N, H)."""
    linear = torch.nn.functional.linear
    hidden = torch.tanh(linear(x, w_v, b_v))
    sigma = None if w_u is None else torch.sigmoid(linear(x, w_u, b_u))
    if dropout_p > 0:
        keep_tanh, keep_sigma = gate_dropout_masks(seed, x.shape[0], w_v.shape[0], dropout_p)
        hidden = hidden * keep_tanh.to(hidden.dtype) * keep_scale(dropout_p)
        sigma = None if sigma is None else sigma * keep_sigma.to(hidden.dtype) * keep_scale(dropout_p)
    return linear(hidden if sigma is None else hidden * sigma, w_a, b_a)


def gated_attention_pool(
    x: Tensor,
    lengths: Sequence[int],
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    dropout_p: float,
    seed: Tensor,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pooled (B, H, L) and scores (N, H)."""
    scores = gated_attention_scores(x, w_v, b_v, w_u, b_u, w_a, b_a, dropout_p, seed)
    scores = scores if score_bias is None else scores + score_bias
    return softmax_pool(scores, x, lengths)[0], scores


def _cosines(z: Tensor, memory: Tensor) -> Tensor:
    normalize = torch.nn.functional.normalize
    return torch.einsum("ns,cks->nck", normalize(z, dim=-1), normalize(memory, dim=-1))


def memory_similarity(z: Tensor, memory: Tensor, reduce: str, tau: float) -> Tensor:
    cosines = _cosines(z, memory)
    return cosines.amax(2) if reduce == "max" else torch.logsumexp(tau * cosines, 2) / tau


def soft_angle_loss(z: Tensor, memory: Tensor, labels: Tensor, margin: float, tau: float, beta: float) -> Tensor:
    s = memory_similarity(z, memory, "lse", tau)
    own = labels.clamp_min(0)[:, None]
    rival = s.scatter(1, own, -torch.inf).amax(1)
    loss = torch.nn.functional.softplus(beta * (margin - (s.gather(1, own)[:, 0] - rival)))
    return torch.where(labels >= 0, loss, torch.zeros_like(loss))


def memory_guided_pool(
    z: Tensor, values: Tensor, memory: Tensor, lengths: Sequence[int], temperature: Tensor, per_class: bool
) -> tuple[Tensor, Tensor]:
    """Pooled (B, H, L) and attention (N, H)."""
    s = _cosines(z, memory).amax(2)
    margin = s[:, 1:2] - s[:, 0:1]
    if per_class:
        own = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
        margin = s - s[:, None, :].masked_fill(own, -torch.inf).amax(2)
    return softmax_pool(margin / temperature.to(s.dtype), values, lengths)


def graph_attention(
    x_l: Tensor, x_r: Tensor, att: Tensor, edges: Edges, slope: float, dropout_p: float, seed: Tensor
) -> Tensor:
    source, target, _ = hearings(edges)
    heads, width = att.shape
    heard = x_l.view(-1, heads, width)[source]
    scores = (torch.nn.functional.leaky_relu(heard + x_r.view(-1, heads, width)[target], slope) * att).sum(2)
    index = target[:, None].expand_as(scores)
    top = scores.new_full((len(x_l), heads), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    weights = torch.exp(scores - top[target])
    weights = weights / weights.new_zeros(len(x_l), heads).index_add(0, target, weights)[target]
    if dropout_p > 0:
        mask = edge_dropout_mask(seed, edges.num_edges + edges.num_nodes, heads, dropout_p)
        weights = weights * mask.to(weights.dtype) * keep_scale(dropout_p)
    return heard.new_zeros(len(x_l), heads, width).index_add(0, target, weights[:, :, None] * heard).flatten(1)

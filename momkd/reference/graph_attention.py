"""graph_attention: the message passing of GATv2, each node hearing from its in-neighbours and from itself.

e_ij = a_h · LeakyReLU(x_l[j] + x_r[i]);  α_ij = softmax over j in N(i) ∪ {i};  out_i = Σ_j drop(α_ij) x_l[j], of each
head h.

A hearing is a pair (i, j) with its place p: those of node i stand at offsets[i] + i to offsets[i + 1] + i, in the order
of its list, and itself last. Scores are kept in this order, and dropout is drawn by it.

Source: Brody, Alon and Yahav, "How attentive are graph attention networks?", ICLR 2022, equation 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.graph import Edges, check_lists
from momkd.reference.philox import edge_dropout_mask, keep_scale
from momkd.reference.segments import accumulate_dtype, bag_index, segment_softmax, softmax_stats


def hearings(edges: Edges) -> tuple[Tensor, Tensor, Tensor]:
    """Of every place p: node j that is heard and node i that hears, (E + N,) int64 each; and their offsets (N + 1,)."""
    nodes, device = edges.num_nodes, edges.device
    if device.type == "cpu":
        check_lists(edges.offsets, edges.sources, edges.order)
    offsets = edges.offsets.long() + torch.arange(nodes + 1, device=device)  # E + N may pass 2³¹
    target = bag_index(offsets, edges.num_edges + nodes)
    source = target.clone()  # itself, where no edge says otherwise
    of_edge = bag_index(edges.offsets, edges.num_edges)
    source[torch.arange(edges.num_edges, device=device) + of_edge] = edges.sources.long()
    return source, target, offsets


def _dropout(edges: Edges, heads: int, p: float, seed: Tensor | None, like: Tensor) -> Tensor | None:
    """(E + N, H): 0, or the scale of what is kept; None without dropout."""
    if p == 0:
        return None
    assert seed is not None
    mask = edge_dropout_mask(seed, edges.num_edges + edges.num_nodes, heads, p)
    return mask.to(like.dtype) * keep_scale(p)


def graph_attention(
    x_l: Tensor,
    x_r: Tensor,
    att: Tensor,
    edges: Edges,
    negative_slope: float = 0.2,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_l, x_r (N, H·C), att (H, C) -> out (N, H·C) like x_l, scores (E + N, H) before softmax, stats (N, H, 2)."""
    if x_l.shape[0] != edges.num_nodes:
        raise ValueError(f"edges: expected a graph of N = {x_l.shape[0]} nodes, got {edges.num_nodes}; make it anew")
    dtype, (heads, width) = accumulate_dtype(x_l.dtype), att.shape
    source, target, offsets = hearings(edges)
    heard = x_l.to(dtype).view(-1, heads, width)[source]  # (E + N, H, C)
    met = heard + x_r.to(dtype).view(-1, heads, width)[target]
    scores = (torch.nn.functional.leaky_relu(met, negative_slope) * att.to(dtype)).sum(2)
    stats = softmax_stats(scores, offsets)
    weights = segment_softmax(scores, stats, offsets)
    kept = _dropout(edges, heads, dropout_p, seed, weights)
    if kept is not None:
        weights = weights * kept
    out = heard.new_zeros(x_l.shape[0], heads, width).index_add(0, target, weights[:, :, None] * heard)
    return out.flatten(1).to(x_l.dtype), scores, stats


def graph_attention_backward(
    grad: Tensor,
    x_l: Tensor,
    x_r: Tensor,
    att: Tensor,
    edges: Edges,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
    scores: Tensor,
    stats: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x_l, x_r and att, each None where `needs` says so.

    dα_ij = g_i · x_l[j] where kept;  de_ij = α_ij (dα_ij − g_i · out_i);  d(x_l[j] + x_r[i]) = de_ij · a ⊙ LeakyReLU'.
    """
    dtype, (heads, width) = accumulate_dtype(x_l.dtype), att.shape
    source, target, offsets = hearings(edges)
    g, heard = (t.to(dtype).view(-1, heads, width) for t in (grad, x_l))
    met = heard[source] + x_r.to(dtype).view(-1, heads, width)[target]  # (E + N, H, C)
    weights = segment_softmax(scores, stats, offsets)
    kept = _dropout(edges, heads, dropout_p, seed, weights)
    d_weights = (g[target] * heard[source]).sum(2)
    if kept is not None:
        d_weights = d_weights * kept
    inner = (g * out.to(dtype).view(-1, heads, width)).sum(2)  # (N, H)
    d_scores = weights * (d_weights - inner[target])
    slope = torch.where(met > 0, torch.ones_like(met), torch.full_like(met, negative_slope))
    d_met = d_scores[:, :, None] * att.to(dtype) * slope

    d_l = d_r = d_att = None
    if needs[0]:
        given = weights if kept is None else weights * kept
        d_l = torch.zeros_like(heard).index_add(0, source, d_met + given[:, :, None] * g[target])
        d_l = d_l.flatten(1).to(x_l.dtype)
    if needs[1]:
        d_r = torch.zeros_like(heard).index_add(0, target, d_met).flatten(1).to(x_r.dtype)
    if needs[2]:
        d_att = torch.einsum("ph,phc->hc", d_scores, torch.nn.functional.leaky_relu(met, negative_slope))
        d_att = d_att.to(att.dtype)
    return d_l, d_r, d_att

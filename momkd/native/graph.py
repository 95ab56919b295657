"""graph_attention by `momkd._C`: 16-bit rows are read and written as such, and widened in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.graph import Edges
from momkd.native import expect, extension, rows
from momkd.reference.philox import keep_scale, keep_threshold


class _Call:
    """What the kernels are told of graph, rows and dropout; holds what must live until the call is over."""

    def __init__(
        self, x_l: Tensor, x_r: Tensor, att: Tensor, edges: Edges, slope: float, dropout_p: float, seed: Tensor | None
    ) -> None:
        expect("att", att, (att.shape[0], att.numel() // max(att.shape[0], 1)))
        expect("x_l", x_l, (edges.num_nodes, att.numel()))
        expect("x_r", x_r, (edges.num_nodes, att.numel()))
        self.dtype = torch.promote_types(x_l.dtype, x_r.dtype)  # the kernels take both in one type
        self.l, about_l = rows("x_l", x_l.to(self.dtype))
        self.r, about_r = rows("x_r", x_r.to(self.dtype))
        self.att = att.float().contiguous()
        self.lists = [t.contiguous() for t in edges.tensors()]
        graph = (*(t.data_ptr() for t in self.lists), edges.num_nodes, edges.num_edges)
        about = (about_l, about_r, self.att.data_ptr(), self.att.shape[0], slope)
        dropout = (0, 0, 1.0)
        if dropout_p > 0 and seed is not None:
            dropout = (int(seed), keep_threshold(dropout_p), keep_scale(dropout_p))
        self.arguments = graph, about, dropout


def graph_attention(
    x_l: Tensor, x_r: Tensor, att: Tensor, edges: Edges, negative_slope: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(x_l, x_r, att, edges, negative_slope, dropout_p, seed)
    (nodes, width), heads = x_l.shape, att.shape[0]
    out = call.l.new_empty(nodes, width)
    scores, stats = call.att.new_empty(edges.num_edges + nodes, heads), call.att.new_empty(nodes, heads, 2)
    pointers = out.data_ptr(), scores.data_ptr(), stats.data_ptr()
    extension()[0].graph_attention(*call.arguments, *pointers, torch.get_num_threads())
    return out.to(x_l.dtype), scores, stats


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
    call = _Call(x_l, x_r, att, edges, negative_slope, dropout_p, seed)
    (nodes, width), heads = x_l.shape, att.shape[0]
    expect("grad", grad, (nodes, width))
    expect("out", out, (nodes, width))
    expect("scores", scores, (edges.num_edges + nodes, heads))
    expect("stats", stats, (nodes, heads, 2))
    grad, scores, stats = grad.to(call.dtype).contiguous(), scores.float().contiguous(), stats.float().contiguous()
    d_l, d_r = (
        t.new_empty(nodes, width) if need else None for t, need in zip((call.l, call.r), needs[:2], strict=True)
    )
    d_att = torch.empty_like(call.att) if needs[2] else None
    extension()[0].graph_attention_backward(
        grad.data_ptr(),
        *call.arguments,
        scores.data_ptr(),
        stats.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in (d_l, d_r, d_att)),
        torch.get_num_threads(),
    )
    found = zip((d_l, d_r, d_att), (x_l, x_r, att), strict=True)
    d_l, d_r, d_att = (None if t is None else t.to(like.dtype) for t, like in found)
    return d_l, d_r, d_att

"""graph_attention: the message passing of GATv2, each node hearing from its in-neighbours and from itself.

e_ij = a_h · LeakyReLU(l_j + r_i);  α_ij = softmax over j;  out_i = Σ_j drop(α_ij) l_j. A program has one node and one
head, reads a tile of neighbours at a time and keeps a running softmax, so that they are read once. Backward without
atomics: by target, where the softmax is, for d_r, d_a, drop(α) and de of each pair (E + N, H, 2); then by source for
d_l, which is Σ_i drop(α_ij) g_i + de_ij a ⊙ LeakyReLU'. Nothing of size edges × channels is stored. Places are those
of the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkd.graph import Edges
from momkd.kernels._common import INF, cdiv, launch, rows_of, work
from momkd.kernels._tuning import GRAPH, GRAPH_BACKWARD, GraphTiles, register_limit
from momkd.reference.philox import keep_scale, keep_threshold


@triton.jit
def leaky(x, slope):
    return tl.where(x > 0, x, x * slope)


@triton.jit
def kept(seed, place, head, threshold, scale):
    """0, or the scale of what is kept, of the weights at these places: low bits of word head mod 4 of its block."""
    zero = tl.zeros_like(place).to(tl.uint32)
    low, high = (place & 0xFFFFFFFF).to(tl.uint32), (place >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), low, high, zero + (head // 4).to(tl.uint32), zero + 1)
    lane = head % 4
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return tl.where((word & 0xFFFF).to(tl.int32) >= threshold, scale, 0.0)


@triton.jit
def neighbours(others, edge, end, node):
    """The nodes of a tile of a list: those of its edges, and the node itself behind them."""
    return tl.where(edge < end, tl.load(others + edge, edge < end, 0).to(tl.int64), node)


@triton.jit
def read(rows, stride, node, there, head, C, columns):
    """Rows of a tile of nodes, columns of a head: (BLOCK, COLUMNS) float32."""
    mask = there[:, None] & (columns < C)[None, :]
    return tl.load(rows + node[:, None] * stride + head * C + columns[None, :], mask, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["threshold"], launch_metadata=work("x_l", lambda a: 4 * a.scores.numel() * a.C))
def graph_attention_fwd_kernel(
    x_l,
    l_stride,
    x_r,
    r_stride,
    att,  # (H, C)
    offsets,
    sources,
    order,
    seed,
    out,  # (N, H·C)
    scores,  # (E + N, H) float32
    stats,  # (N, H, 2) float32
    C,
    slope,
    threshold,
    scale,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    node, head = tl.load(order + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(offsets + node).to(tl.int64), tl.load(offsets + node + 1).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    own = columns < C
    r = tl.load(x_r + node * r_stride + head * C + columns, own, 0.0).to(tl.float32)
    a = tl.load(att + head * C + columns, own, 0.0).to(tl.float32)

    top = -INF
    total = 0.0
    summed = tl.zeros([COLUMNS], tl.float32)
    for start in range(begin, end + 1, BLOCK):
        edge = start + tl.arange(0, BLOCK)
        there = edge <= end
        heard = read(x_l, l_stride, neighbours(sources, edge, end, node), there, head, C, columns)
        score = tl.sum(leaky(heard + r[None, :], slope) * a[None, :], 1)  # (BLOCK,)
        tl.store(scores + (edge + node) * HEADS + head, score, there)
        score = tl.where(there, score, -INF)
        larger = tl.maximum(top, tl.max(score, 0))
        base = tl.where(larger == -INF, 0.0, larger)
        shrink = tl.exp(top - base)
        weight = tl.exp(score - base)
        total = total * shrink + tl.sum(weight, 0)
        if DROPOUT:
            weight = weight * kept(seed, edge + node, head, threshold, scale)
        summed = summed * shrink + tl.sum(weight[:, None] * heard, 0)
        top = larger
    at = node * HEADS + head
    tl.store(stats + 2 * at, tl.where(top == -INF, 0.0, top))
    tl.store(stats + 2 * at + 1, total)
    tl.store(out + at * C + columns, summed / tl.where(total == 0, 1.0, total), own)


@triton.jit(
    do_not_specialize=["N", "threshold"],
    launch_metadata=work("x_l", lambda a: (6 if a.NEED_R else 4) * a.scores.numel() * a.C),
)
def graph_attention_bwd_target_kernel(
    grad,  # (N, H·C)
    x_l,
    l_stride,
    x_r,
    r_stride,
    att,
    offsets,
    sources,
    order,
    seed,
    out,
    scores,
    stats,
    pairs,  # (E + N, H, 2) float32: drop(α) and de
    d_r,  # (N, H·C)
    d_att,  # (programs, H, C) float32
    N,
    C,
    slope,
    threshold,
    scale,
    HEADS: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_R: tl.constexpr,
):
    first, head = tl.program_id(0) * NODES, tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    own = columns < C
    a = tl.load(att + head * C + columns, own, 0.0).to(tl.float32)
    toward = tl.zeros([COLUMNS], tl.float32)
    for turn in range(first, tl.minimum(first + NODES, N)):
        node = tl.load(order + turn).to(tl.int64)
        begin, end = tl.load(offsets + node).to(tl.int64), tl.load(offsets + node + 1).to(tl.int64)
        at = node * HEADS + head
        r = tl.load(x_r + node * r_stride + head * C + columns, own, 0.0).to(tl.float32)
        g = tl.load(grad + at * C + columns, own, 0.0).to(tl.float32)
        inner = tl.sum(g * tl.load(out + at * C + columns, own, 0.0).to(tl.float32), 0)
        top, total = tl.load(stats + 2 * at), tl.load(stats + 2 * at + 1)
        divide = 1.0 / tl.where(total == 0, 1.0, total)
        through = tl.zeros([COLUMNS], tl.float32)
        for start in range(begin, end + 1, BLOCK):
            edge = start + tl.arange(0, BLOCK)
            there = edge <= end
            heard = read(x_l, l_stride, neighbours(sources, edge, end, node), there, head, C, columns)
            slot = (edge + node) * HEADS + head
            weight = tl.exp(tl.load(scores + slot, there, -INF) - top) * divide
            d = tl.sum(heard * g[None, :], 1)
            given = weight
            if DROPOUT:
                keep = kept(seed, edge + node, head, threshold, scale)
                given = weight * keep
                d = d * keep
            d = tl.where(there, weight * (d - inner), 0.0)
            tl.store(pairs + 2 * slot, given, there)
            tl.store(pairs + 2 * slot + 1, d, there)
            met = heard + r[None, :]
            passed = d[:, None] * tl.where(met > 0, 1.0, slope)
            through += tl.sum(passed, 0)
            toward += tl.sum(tl.where(there[:, None], passed * met, 0.0), 0)
        if NEED_R:
            tl.store(d_r + at * C + columns, a * through, own)
    tl.store(d_att + (tl.program_id(0).to(tl.int64) * HEADS + head) * C + columns, toward, own)


@triton.jit(launch_metadata=work("x_l", lambda a: 2 * a.pairs.numel() * a.C))
def graph_attention_bwd_source_kernel(
    grad,
    x_l,
    l_stride,
    x_r,
    r_stride,
    att,
    offsets,
    out_offsets,
    targets,
    position,
    order,
    pairs,
    d_l,  # (N, H·C)
    C,
    slope,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    node, head = tl.load(order + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(out_offsets + node).to(tl.int64), tl.load(out_offsets + node + 1).to(tl.int64)
    itself = tl.load(offsets + node + 1).to(tl.int64) + node  # its place
    columns = tl.arange(0, COLUMNS)
    own = columns < C
    a = tl.load(att + head * C + columns, own, 0.0).to(tl.float32)
    heard = tl.load(x_l + node * l_stride + head * C + columns, own, 0.0).to(tl.float32)
    given = tl.zeros([COLUMNS], tl.float32)
    through = tl.zeros([COLUMNS], tl.float32)
    for start in range(begin, end + 1, BLOCK):
        edge = start + tl.arange(0, BLOCK)
        there = edge <= end
        target = neighbours(targets, edge, end, node)
        place = tl.where(edge < end, tl.load(position + edge, edge < end, 0).to(tl.int64) + target, itself)
        slot = pairs + 2 * (place * HEADS + head)
        weight, d = tl.load(slot, there, 0.0), tl.load(slot + 1, there, 0.0)
        g = read(grad, HEADS * C, target, there, head, C, columns)
        given += tl.sum(weight[:, None] * g, 0)
        met = read(x_r, r_stride, target, there, head, C, columns) + heard[None, :]
        through += tl.sum(d[:, None] * tl.where(met > 0, 1.0, slope), 0)
    tl.store(d_l + (node * HEADS + head) * C + columns, given + a * through, own)


def graph_attention(
    x_l: Tensor, x_r: Tensor, att: Tensor, edges: Edges, negative_slope: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x_l, x_r (N, H·C), att (H, C) -> out (N, H·C) like x_l, scores (E + N, H) before softmax, stats (N, H, 2)."""
    x_l, x_r, att = rows_of(x_l), rows_of(x_r), att.contiguous()
    nodes, (heads, width) = x_l.shape[0], att.shape
    out = x_l.new_empty(x_l.shape)
    scores = x_l.new_empty(edges.num_edges + nodes, heads, dtype=torch.float32)
    stats = x_l.new_empty(nodes, heads, 2, dtype=torch.float32)
    (tiles,) = GRAPH.fitted(x_l, width)
    rows = x_l, x_l.stride(0), x_r, x_r.stride(0), att
    lists = edges.offsets, edges.sources, edges.order
    launch(
        graph_attention_fwd_kernel,
        (nodes, heads),
        *(*rows, *lists, _or(seed, edges), out, scores, stats),
        *(width, negative_slope, keep_threshold(dropout_p), keep_scale(dropout_p)),
        DROPOUT=dropout_p > 0,
        HEADS=heads,
        **_meta(tiles, x_l.device),
    )
    return out, scores, stats


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
    """Gradients of x_l, x_r and att, each None where `needs` says so."""
    grad, x_l, x_r, att = grad.contiguous(), rows_of(x_l), rows_of(x_r), att.contiguous()
    nodes, (heads, width) = x_l.shape[0], att.shape
    (tiles,) = GRAPH_BACKWARD.fitted(x_l, width)
    programs = cdiv(nodes, tiles.nodes)
    pairs = x_l.new_empty(len(scores), heads, 2, dtype=torch.float32)
    d_r = x_r.new_empty(x_r.shape if needs[1] else 0)
    parts = x_l.new_empty(programs, heads, width, dtype=torch.float32)
    rows = x_l, x_l.stride(0), x_r, x_r.stride(0), att
    launch(
        graph_attention_bwd_target_kernel,
        (programs, heads),
        *(grad, *rows, edges.offsets, edges.sources, edges.order, _or(seed, edges), out, scores, stats),
        *(pairs, d_r, parts, nodes, width, negative_slope, keep_threshold(dropout_p), keep_scale(dropout_p)),
        HEADS=heads,
        NODES=tiles.nodes,
        DROPOUT=dropout_p > 0,
        NEED_R=needs[1],
        **_meta(tiles, x_l.device),
    )
    d_l = None
    if needs[0]:
        d_l = x_l.new_empty(x_l.shape)
        launch(
            graph_attention_bwd_source_kernel,
            (nodes, heads),
            *(grad, *rows, edges.offsets, edges.out_offsets, edges.targets, edges.position, edges.order),
            *(pairs, d_l, width, negative_slope),
            HEADS=heads,
            **_meta(tiles, x_l.device),
        )
    return d_l, d_r if needs[1] else None, parts.sum(0).to(att.dtype) if needs[2] else None


def _or(seed: Tensor | None, edges: Edges) -> Tensor:
    """The seed, or a tensor that stands where no dropout reads one."""
    return edges.offsets if seed is None else seed


def _meta(tiles: GraphTiles, device: torch.device) -> dict[str, int]:
    meta = {"BLOCK": tiles.rows, "COLUMNS": tiles.columns, "num_warps": tiles.warps, "num_stages": tiles.stages}
    return meta | register_limit(device) if tiles.warps > 1 else meta  # one warp spills nothing, and many fit

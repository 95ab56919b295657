"""Graphs over patches: which patch hears from which, as neighbour lists by destination and, for backward, by source.

A node always hears from itself too. That edge is in no list: every op adds it, once a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MOST = 2**31 - 1
_NAMES = ("offsets", "sources", "out_offsets", "targets", "position", "order")
_REMEDY = "make graphs by momkd.graph.from_edge_index or knn"
_CHUNK = 1 << 20  # candidates that one step of the neighbour search compares
_WIDEST = 2**53  # extent of integer coordinates: up to here float64, which the search tree holds, is exact
_WIDEST_FLOAT = 1e150  # of others: their squares stay finite
_SLACK = 1 - 2.0**-48  # squared distances of the tree are off by less


@dataclass(frozen=True, eq=False)
class Edges:
    """A graph of N nodes and E edges source → target, none of them from a node to itself: CSR by target and by source.

    Made by `from_edge_index`, `knn` or `from_lists`. Duplicate edges count each. Sizes and dtypes are checked here; the
    values where they are used, if they lie on the CPU.

    Attributes:
        offsets: (N + 1,) int32; node i hears from sources[offsets[i]] to sources[offsets[i + 1] − 1].
        sources: (E,) int32.
        out_offsets: (N + 1,) int32, of the transpose: node j is heard by targets[out_offsets[j]] to ….
        targets: (E,) int32.
        position: (E,) int32; where the edge of `targets` stands in `sources`.
        order: (N,) int32, in which nodes are best visited: near ones after one another, for the cache.
    """

    offsets: Tensor
    sources: Tensor
    out_offsets: Tensor
    targets: Tensor
    position: Tensor
    order: Tensor

    def __post_init__(self) -> None:
        nodes, edges = self.offsets.numel() - 1, self.sources.numel()
        if nodes < 0 or nodes + edges > _MOST:
            raise ValueError(f"edges: expected N + E from 0 to {_MOST}, got N = {nodes} and E = {edges}; {_REMEDY}")
        sizes = (nodes + 1, edges, nodes + 1, edges, edges, nodes)
        for name, size, tensor in zip(_NAMES, sizes, self.tensors(), strict=True):
            if tensor.shape != (size,) or tensor.dtype != torch.int32 or tensor.device != self.device:
                raise ValueError(
                    f"edges.{name}: expected int32 ({size},) on {self.device}, got "
                    f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}; {_REMEDY}"
                )

    @property
    def num_nodes(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def num_edges(self) -> int:
        return self.sources.shape[0]

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """The six tensors, in the order of the attributes."""
        return self.offsets, self.sources, self.out_offsets, self.targets, self.position, self.order

    def edge_index(self) -> Tensor:
        """(2, E) int64, sources over targets, sorted by target."""
        nodes = torch.arange(self.num_nodes, device=self.device)
        targets = torch.repeat_interleave(nodes, self.offsets.diff().long(), output_size=self.num_edges)
        return torch.stack([self.sources.long(), targets])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Edges:
        return Edges(*(t.to(device, non_blocking=non_blocking) for t in self.tensors()))

    def pin_memory(self) -> Edges:
        """Page-locked copies, so that `.to(device, non_blocking=True)` does not wait."""
        return Edges(*(t.pin_memory() for t in self.tensors()))

    def rows(self, start: int, stop: int) -> Edges:
        """The graph of nodes start to stop − 1, which no edge may leave or enter. Waits for the device."""
        first, last = (int(self.offsets[n]) for n in (start, stop))
        inside = self.sources[first:last]
        if bool(((inside < start) | (inside >= stop)).any()):
            raise ValueError(
                f"edges: expected none into nodes {start} to {stop - 1} from others, got one; join the "
                "graphs of bags by momkd.graph.batch"
            )
        mine = (self.order >= start) & (self.order < stop)
        return Edges(
            self.offsets[start : stop + 1] - first,
            self.sources[first:last] - start,
            self.out_offsets[start : stop + 1] - first,
            self.targets[first:last] - start,
            self.position[first:last] - first,
            self.order[mine] - start,
        )

    def __repr__(self) -> str:
        return f"Edges({self.num_nodes} nodes, {self.num_edges} edges, {self.device})"


def from_lists(offsets: Tensor, sources: Tensor, order: Tensor | None = None) -> Edges:
    """Return the graph of neighbour lists by target, without self-loops, and their transpose.

    Args:
        offsets: (N + 1,) int32.
        sources: (E,) int32.
        order: (N,) int32, see `Edges`; None takes that of the numbers.

    Raises:
        ValueError: lists that don't fit one another, see `check_lists`.
    """
    nodes = max(offsets.numel() - 1, 0)
    every = torch.arange(nodes, dtype=torch.int32, device=offsets.device)
    order = every if order is None else order
    check_lists(offsets, sources, order)
    targets = torch.repeat_interleave(every, offsets.diff().long(), output_size=sources.shape[0])
    position = torch.argsort(sources, stable=True)
    counts = torch.bincount(sources.long(), minlength=nodes)
    out_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return Edges(offsets, sources, out_offsets, targets[position], position.int(), order)


def check_lists(offsets: Tensor, sources: Tensor, order: Tensor) -> None:
    """Raise ValueError where these cannot be lists of `Edges`: the kernels trust them. Waits for the device."""
    nodes = offsets.numel() - 1
    for name, tensor, size in (("offsets", offsets, nodes + 1), ("sources", sources, None), ("order", order, nodes)):
        if tensor.dtype != torch.int32 or tensor.ndim != 1 or size not in (None, len(tensor)) or nodes < 0:
            words = {"offsets": "(N+1,)", "sources": "(E,)", "order": f"({nodes},)"}[name]
            raise ValueError(
                f"{name}: expected int32 {words}, got {str(tensor.dtype).removeprefix('torch.')} "
                f"{tuple(tensor.shape)}; {_REMEDY}"
            )
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != len(sources):
        raise ValueError(f"offsets: expected to run from 0 to E = {len(sources)}, got {first} to {last}; {_REMEDY}")
    down = offsets[1:] < offsets[:-1]  # the difference would wrap
    if bool(down.any()):
        raise ValueError(
            f"offsets: expected never to decrease, got less at index {int(down.nonzero()[0]) + 1}; {_REMEDY}"
        )
    for name, tensor in (("sources", sources), ("order", order)):
        if len(tensor) and (int(tensor.min()) < 0 or int(tensor.max()) >= nodes):
            bad = int(tensor.min()) if int(tensor.min()) < 0 else int(tensor.max())
            raise ValueError(f"{name}: expected nodes from 0 to N - 1 = {nodes - 1}, got {bad}; {_REMEDY}")
    if bool((torch.bincount(order, minlength=nodes) != 1).any()):
        raise ValueError(f"order: expected every node from 0 to N - 1 = {nodes - 1} once, got one again; {_REMEDY}")


def from_edge_index(edge_index: Tensor, num_nodes: int) -> Edges:
    """The graph of an edge list, as PyG writes it.

    Args:
        edge_index: (2, E) integers, sources over targets. Edges from a node to itself are left out, because every node
            hears from itself once; duplicates count each.
        num_nodes: N.

    Returns:
        The graph, on the device of `edge_index`.

    Raises:
        ValueError: another shape or type, a node under 0 or not under N, or more than 2³¹ − 1 edges and nodes.

    Example:
        >>> momkd.graph.from_edge_index(torch.tensor([[0, 1, 2, 2], [1, 0, 2, 0]]), 3)
        Edges(3 nodes, 3 edges, cpu)
    """
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"edge_index: expected int64 (2, E), sources over targets, got {edge_index.dtype} "
            f"{tuple(edge_index.shape)}; use .long(), or .T for rows of pairs"
        )
    if num_nodes < 0:
        raise ValueError(f"num_nodes: expected 0 or more, got {num_nodes}")
    if edge_index.shape[1] + num_nodes > _MOST:
        raise ValueError(f"edge_index: expected at most {_MOST} edges and nodes, got {edge_index.shape[1]} edges")
    if edge_index.numel():
        low, high = int(edge_index.min()), int(edge_index.max())
        if low < 0 or high >= num_nodes:
            bad = low if low < 0 else high
            raise ValueError(f"edge_index: expected nodes from 0 to num_nodes - 1 = {num_nodes - 1}, got {bad}")
    sources, targets = edge_index[:, edge_index[0] != edge_index[1]].long()
    targets, by_target = torch.sort(targets, stable=True)
    counts = torch.bincount(targets, minlength=num_nodes)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return from_lists(offsets, sources[by_target].int())


def knn(coords: Tensor | npt.ArrayLike, k: int = 8) -> Edges:
    """The spatial graph: every patch is heard by its k nearest patches, edges patch → neighbour.

    These are the edges of sklearn's `kneighbors_graph(coords, k).nonzero()`, row → column, wherever distances differ.
    Of patches equally far away, the lowest index is nearer; grids have many. A bag of N ≤ k patches has N − 1
    neighbours each. In-degrees vary, with mean k.

    Args:
        coords: (N, 2) numbers, such as level-0 pixels, of any type. Integers are compared exactly, others in float64.
        k: at least 1.

    Returns:
        The graph, on the CPU; its `order` follows a curve that keeps near patches together (Morton).

    Raises:
        ValueError: another shape, k under 1, or coordinates that are not finite or 2⁵³ apart.

    Example:
        >>> momkd.graph.knn(torch.tensor([[0, 0], [0, 256], [256, 0], [256, 256]]), k=2)
        Edges(4 nodes, 8 edges, cpu)
    """
    if isinstance(coords, Tensor):
        coords = coords.detach().cpu()
        coords = coords.float() if coords.dtype == torch.bfloat16 else coords  # NumPy has no such type
    points = np.asarray(coords)
    if points.ndim != 2 or points.shape[1] != 2 or points.dtype.kind not in "iuf":
        raise ValueError(f"coords: expected numbers (N, 2), got {points.dtype} {points.shape}")
    if k < 1:
        raise ValueError(f"k: expected 1 or more, got {k}")
    if not np.isfinite(points).all():
        raise ValueError("coords: expected finite numbers, got NaN or infinite ones; extract the patches again")
    nodes, k = len(points), min(k, max(len(points) - 1, 0))
    if nodes * (k + 1) > _MOST:
        raise ValueError(
            f"k: expected at most {_MOST} edges and nodes, got {nodes} patches of {k} neighbours; take a smaller k"
        )
    if k == 0:
        none = torch.zeros(nodes + 1, dtype=torch.int32, device="cpu")
        return from_lists(none, none[:0])
    points = _from_corner(points)
    neighbours = _nearest(points, k)  # (N, k): patch i is heard by these
    queries = np.repeat(np.arange(nodes, dtype=np.int32), k)
    by_target = np.argsort(neighbours.ravel(), kind="stable")
    counts = np.bincount(neighbours.ravel(), minlength=nodes)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lists = (offsets, queries[by_target], _morton(points))
    return from_lists(*(torch.from_numpy(array) for array in lists))


def batch(graphs: Sequence[Edges]) -> Edges:
    """Graphs of several bags as the one graph of their concatenated rows.

    Example:
        >>> square = momkd.graph.knn([[0, 0], [0, 1], [1, 0], [1, 1]], k=2)
        >>> momkd.graph.batch([square, momkd.graph.knn([[5, 5]])])
        Edges(5 nodes, 8 edges, cpu)
    """
    if not graphs:
        raise ValueError("graphs: expected at least one, got none")
    if len(graphs) == 1:
        return graphs[0]
    nodes = np.concatenate([[0], np.cumsum([g.num_nodes for g in graphs])]).tolist()
    edges = np.concatenate([[0], np.cumsum([g.num_edges for g in graphs])]).tolist()
    if nodes[-1] + edges[-1] > _MOST:
        raise ValueError(f"graphs: expected at most {_MOST} edges and nodes, got {nodes[-1] + edges[-1]}; fewer bags")
    shifts = {"sources": nodes, "targets": nodes, "order": nodes, "position": edges}
    joined: dict[str, Tensor] = {}
    for name in (f.name for f in fields(Edges)):
        parts = [getattr(g, name) for g in graphs]
        if name in shifts:
            parts = [part + shift for part, shift in zip(parts, shifts[name], strict=False)]
        else:  # offsets: the end of one bag is the start of the next
            starts = [part if n == 0 else part[1:] for n, part in enumerate(parts)]
            parts = [part + shift for part, shift in zip(starts, edges, strict=False)]
        joined[name] = torch.cat(parts)
    return Edges(**joined)


def _from_corner(points: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(N, 2) int64 or float64, from 0 on."""
    whole = points.dtype.kind in "iu"
    points = points if whole else points.astype(np.float64)
    low = points.min(0)
    ends = zip(low.tolist(), points.max(0).tolist(), strict=True)  # of Python, which do not overflow
    extent, widest = max(most - least for least, most in ends), _WIDEST if whole else _WIDEST_FLOAT
    if not extent < widest:
        raise ValueError(
            f"coords: expected coordinates less than {widest} apart, got {extent}; extract the patches again"
        )
    if points.dtype.itemsize < 8:
        points = points.astype(np.int64)  # the difference of small integers may not fit their type
    moved: npt.NDArray[Any] = (points - low).astype(np.int64 if whole else np.float64)
    return moved


def _squared_distance(difference: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    """dx² + dy² of (..., 2), exact for integers under 2⁵³: one number, or (low, high) with high · 2⁵⁴ + low."""
    if difference.dtype.kind == "f" or difference.size == 0 or np.abs(difference).max() < 2**31:
        return ((difference * difference).sum(-1),)
    high, low = np.divmod(np.abs(difference), 2**27)
    middle, rest = np.divmod(2 * (high * low).sum(-1), 2**27)
    carry, small = np.divmod(rest * 2**27 + (low * low).sum(-1), 2**54)
    return small, (high * high).sum(-1) + middle + carry


def _nearest(points: npt.NDArray[Any], k: int) -> npt.NDArray[np.int32]:
    """(N, k) nearest other points by (distance, index)."""
    from scipy.spatial import cKDTree

    nodes = len(points)
    tree = cKDTree(points.astype(np.float64), balanced_tree=False, compact_nodes=False)
    found = np.empty((nodes, k), np.int32)
    waiting = np.arange(nodes)
    wanted = min(nodes, 2 * k + 1)  # the point itself, k others, and room to see where a tie ends
    crowded = _crowds(points, k, found) if nodes > wanted else np.zeros(nodes, bool)
    waiting = waiting[~crowded]
    while len(waiting):
        left = []
        step = max(1, _CHUNK // wanted)
        for start in range(0, len(waiting), step):
            rows = waiting[start : start + step]
            away, candidates = tree.query(points[rows], wanted)
            others = candidates != rows[:, None]
            squared = _squared_distance(points[candidates] - points[rows, None])
            order = np.lexsort((candidates, *squared, others))[:, : k + 1]
            nearest = np.take_along_axis(candidates, order, 1)
            has_self = nearest[:, 0] == rows  # else more than `wanted` points lie where it lies
            last = np.take_along_axis(away, order, 1).max(1)
            done = (wanted == nodes) | (has_self & (last < away.max(1) * _SLACK))
            found[rows[done]] = nearest[done, 1:]
            left.append(rows[~done])
        waiting = np.concatenate(left)
        wanted = min(nodes, 4 * wanted)
    return found


def _crowds(points: npt.NDArray[Any], k: int, found: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Points with k others at the very same place: their neighbours are the first of these. True where that is so."""
    _, place, count = np.unique(points, axis=0, return_inverse=True, return_counts=True)
    crowded: npt.NDArray[np.bool_] = count[place.ravel()] > k
    members = np.flatnonzero(crowded)
    if len(members):
        own = place.ravel()[members]
        members = members[np.argsort(own, kind="stable")]  # by place, then by index
        own = place.ravel()[members]
        starts = np.flatnonzero(np.r_[True, own[1:] != own[:-1]])
        group = np.repeat(starts, np.diff(np.r_[starts, len(members)]))
        first = members[group[:, None] + np.arange(k + 1)]  # (n, k + 1)
        rank = np.minimum(np.arange(len(members)) - group, k)  # leave the point itself out, or the last
        keep = np.arange(k + 1) != rank[:, None]
        found[members] = first[keep].reshape(-1, k)
    return crowded


def _morton(points: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """The points along a curve that halves the plane in turn: their coordinates' bits, interleaved."""
    size = max(float(points.max()), 1e-300)
    cells = (points.astype(np.float64) / size * (2**16 - 1)).astype(np.uint64)
    code = np.zeros(len(points), np.uint64)
    for axis in range(2):
        bits = cells[:, axis]
        for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
            bits = (bits | (bits << np.uint64(shift))) & np.uint64(mask)
        code |= bits << np.uint64(axis)
    return np.argsort(code, kind="stable").astype(np.int32)

"""Graphs: the edges of sklearn and, where distances are equal, of a sort by hand; lists, transpose, batches."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.neighbors import kneighbors_graph
from torch import Tensor

from momkd import Bags, graph
from momkd.graph import Edges


def by_hand(points: np.ndarray, k: int) -> list[tuple[int, int]]:
    """Every point and its k nearest by (distance, index), sorted."""
    points = points.astype(object)  # Python's integers never overflow
    squared = ((points[:, None] - points[None]) ** 2).sum(2)
    pairs = []
    for i in range(len(points)):
        others = sorted((squared[i, j], j) for j in range(len(points)) if j != i)
        pairs += [(i, j) for _, j in others[:k]]
    return sorted(pairs)


def pairs(edges: Edges) -> list[tuple[int, int]]:
    return sorted(map(tuple, edges.edge_index().T.tolist()))


def points(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    if kind == "far":
        return rng.integers(-(10**9), 10**9, (n, 2))
    if kind == "2^51 apart":
        return rng.integers(-(2**51), 2**51, (n, 2))
    if kind == "pieces 2^40 apart":
        return rng.integers(0, 2, (n, 2)) * 2**40 + rng.integers(0, 9, (n, 2))
    if kind == "grid":  # in no order
        side = int(np.ceil(np.sqrt(n))) + 1
        return np.stack(np.unravel_index(rng.permutation(side * side)[:n], (side, side)), 1) * 256
    if kind == "few places":
        return rng.integers(0, 3, (n, 2)) * 1000
    if kind == "one place":
        return np.full((n, 2), 77)
    crowd = np.zeros((n, 2), np.int64)  # a line, and half of the points on one of its ends
    crowd[: n // 2, 0] = np.arange(n // 2)
    return crowd


@pytest.mark.parametrize("kind", ["far", "2^51 apart", "pieces 2^40 apart", "grid", "few places", "one place", "crowd"])
@pytest.mark.parametrize("n", [1, 2, 8, 9, 10, 150])
@pytest.mark.parametrize("k", [1, 8])
def test_knn_breaks_ties_by_the_lowest_index(kind: str, n: int, k: int) -> None:
    xy = points(kind, n)
    edges = graph.knn(xy, k)
    assert pairs(edges) == by_hand(xy, k)
    assert edges.num_edges == n * min(k, n - 1)
    check_lists(edges)


@pytest.mark.parametrize(
    "kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64", "float32", "float16"]
)
def test_knn_of_any_number_type_gives_the_edges_of_int64(kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "uint64":  # beyond int64
        xy = rng.integers(0, 2**40, (60, 2)).astype(np.uint64) + np.uint64(2**64 - 2**41)
        assert pairs(graph.knn(xy)) == pairs(graph.knn((xy - xy.min(0)).astype(np.int64)))
        return
    xy = rng.integers(0, 100, (60, 2))
    far = {"float16": 1900, "float32": 2**23, "int32": 60_000}
    xy[:12] += far[kind] if kind in far else int(np.iinfo(kind).max) - 100  # its square does not fit the type
    edges = pairs(graph.knn(xy, 8))
    assert pairs(graph.knn(xy.astype(kind), 8)) == edges
    assert pairs(graph.knn(torch.from_numpy(xy.astype(kind)), 8)) == edges


def test_far_flung_coordinates_take_no_longer_than_others() -> None:
    xy = np.random.default_rng(0).integers(0, 2**52, (20_000, 2))
    began = time.perf_counter()
    assert graph.knn(xy).num_edges == 160_000
    assert time.perf_counter() - began < 15  # 0.3 s; over two minutes where squares overflow


def check_lists(edges: Edges) -> None:
    """The transpose holds the same edges, and every node has a turn."""
    nodes = torch.arange(edges.num_nodes)
    sources = torch.repeat_interleave(nodes, edges.out_offsets.diff().long())
    position = edges.position.long()
    assert torch.equal(edges.sources[position].long(), sources)
    assert torch.equal(edges.edge_index()[1][position], edges.targets.long())
    assert torch.equal(position.sort().values, torch.arange(edges.num_edges))
    assert torch.equal(edges.order.long().sort().values, nodes)
    assert {t.dtype for t in edges.tensors()} == {torch.int32}


@pytest.mark.parametrize("k", [1, 8])
def test_knn_has_the_edges_of_sklearn_where_distances_differ(k: int) -> None:
    xy = np.random.default_rng(0).random((2000, 2)) * 1e5
    rows, columns = kneighbors_graph(xy, k).nonzero()
    assert pairs(graph.knn(torch.from_numpy(xy), k)) == sorted(zip(rows.tolist(), columns.tolist(), strict=True))


def test_order_keeps_near_points_together() -> None:
    xy = np.random.default_rng(0).random((4000, 2))
    order = graph.knn(xy).order.numpy()
    jumps = np.linalg.norm(np.diff(xy[order], axis=0), axis=1).mean()
    assert jumps < 0.1 * np.linalg.norm(np.diff(xy, axis=0), axis=1).mean()


def test_no_patches() -> None:
    edges = graph.knn(np.zeros((0, 2)))
    assert (edges.num_nodes, edges.num_edges) == (0, 0)


@pytest.mark.parametrize(
    ("coords", "k", "words"),
    [
        (np.zeros((3, 3)), 8, r"coords: expected numbers \(N, 2\), got float64 \(3, 3\)"),
        (np.array([[0.0, np.nan], [1, 1]]), 8, "expected finite"),
        (np.array([[0, 0], [2**53, 0]]), 1, "less than 9007199254740992 apart, got 9007199254740992"),
        (np.array([[0, -(2**63)], [0, 2**63 - 1]]), 1, "apart, got 18446744073709551615"),
        (np.array([[0.0, -1e200], [0, 1e200]]), 1, r"apart, got 2e\+200"),
        (np.zeros((3, 2)), 0, "k: expected 1 or more, got 0"),
    ],
)
def test_knn_says_what_is_wrong(coords: np.ndarray, k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        graph.knn(coords, k)


def test_from_edge_index_leaves_self_loops_out_and_keeps_duplicates() -> None:
    given = torch.tensor([[3, 0, 0, 2, 0, 1], [1, 1, 1, 2, 0, 3]])
    edges = graph.from_edge_index(given, 5)
    assert pairs(edges) == [(0, 1), (0, 1), (1, 3), (3, 1)]
    check_lists(edges)
    assert graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), 0).num_nodes == 0


@pytest.mark.parametrize(
    ("edge_index", "nodes", "words"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), 3, r"expected int64 \(2, E\)"),
        (torch.zeros(2, 2), 3, "expected int64"),
        (torch.tensor([[0], [3]]), 3, "expected nodes from 0 to num_nodes - 1 = 2, got 3"),
        (torch.tensor([[-1], [0]]), 3, "got -1"),
    ],
)
def test_from_edge_index_says_what_is_wrong(edge_index: Tensor, nodes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        graph.from_edge_index(edge_index, nodes)


def test_a_batch_is_one_graph_and_comes_apart_again() -> None:
    rng = np.random.default_rng(0)
    graphs = [graph.knn(rng.integers(0, 999, (n, 2))) for n in (5, 0, 1, 40, 3)]
    joined = graph.batch(graphs)
    check_lists(joined)
    bags = Bags.from_list([torch.randn(g.num_nodes, 4) for g in graphs]).with_edges(joined)
    for cut, wanted in ((bags[1:4], graphs[1:4]), (bags[::2], graphs[::2]), (bags[::-1], graphs[::-1])):
        assert cut.edges is not None
        for got, want in zip(cut.edges.tensors(), graph.batch(wanted).tensors(), strict=True):
            assert torch.equal(got, want)
    assert bags[:0].edges is None
    with pytest.raises(ValueError, match="expected at least one"):
        graph.batch([])


def test_bags_check_their_graph() -> None:
    bags = Bags.from_list([torch.randn(6, 4)])
    with pytest.raises(ValueError, match="edges: expected a graph of 6 nodes on cpu"):
        bags.with_edges(graph.knn(np.eye(2)))
    moved = bags.with_edges(graph.knn(np.arange(12).reshape(6, 2))).to("meta")
    assert moved.edges is not None
    assert moved.edges.device.type == "meta"


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("offsets", "sources", "order", "words"),
    [
        (int32(0, 1, 2), int32(1, 10**9), None, "sources: expected nodes from 0 to N - 1 = 1, got 1000000000"),
        (int32(0, 1, 2), int32(1, -1), None, "sources: expected nodes from 0 to N - 1 = 1, got -1"),
        (int32(0, 1, 3), int32(1, 0), None, "offsets: expected to run from 0 to E = 2, got 0 to 3"),
        (int32(1, 1, 2), int32(1, 0), None, "offsets: expected to run from 0 to E = 2, got 1 to 2"),
        (int32(0, 3, 2), int32(1, 0), None, "offsets: expected never to decrease, got less at index 2"),
        (int32(0, 2**31 - 1, -2, 2), int32(1, 0), None, "offsets: expected never to decrease, got less at index 2"),
        (int32(0, 1, 2), int32(1, 0), int32(0, 0), "order: expected every node from 0 to N - 1 = 1 once"),
        (int32(0, 1, 2), int32(1, 0), int32(0, 2), "order: expected nodes from 0 to N - 1 = 1, got 2"),
        (int32(0, 1, 2), int32(1, 0), int32(0), r"order: expected int32 \(2,\), got int32 \(1,\)"),
        (int32(0, 1, 2).long(), int32(1, 0), None, r"offsets: expected int32 \(N\+1,\), got int64 \(3,\)"),
        (int32(), int32(), None, r"offsets: expected int32 \(N\+1,\), got int32 \(0,\)"),
        (int32(0, 1, 2), int32(1, 0)[None], None, r"sources: expected int32 \(E,\), got int32 \(1, 2\)"),
    ],
)
def test_from_lists_says_what_is_wrong(offsets: Tensor, sources: Tensor, order: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}.*; make graphs by"):
        graph.from_lists(offsets, sources, order)


@pytest.mark.parametrize("name", ["offsets", "sources", "out_offsets", "targets", "position", "order"])
def test_edges_have_the_sizes_that_they_say(name: str) -> None:
    edges = graph.knn(np.zeros((3, 2)), 2)
    for change in (lambda t: t.long(), lambda t: t[None], lambda t: t[:0], lambda t: t.to("meta")):
        with pytest.raises(ValueError, match=r"^edges(\.\w+)?: expected"):
            replace(edges, **{name: change(getattr(edges, name))})


def test_no_more_edges_and_nodes_than_int32_counts() -> None:
    nodes, edges = 2**30, 2**30
    offsets, lists = int32(0).expand(nodes + 1), int32(0).expand(edges)
    with pytest.raises(ValueError, match="edges: expected N \\+ E from 0 to 2147483647, got N = 1073741824 and E = "):
        Edges(offsets, lists, offsets, lists, lists, lists)
    assert Edges(offsets, lists[:-1], offsets, lists[:-1], lists[:-1], lists).num_edges == edges - 1
    with pytest.raises(ValueError, match="k: expected at most 2147483647 edges and nodes, got 70000 patches of 40000"):
        graph.knn(np.broadcast_to(np.zeros(2), (70_000, 2)), 40_000)


def test_edges_between_bags_do_not_come_apart() -> None:
    edges = graph.from_edge_index(torch.tensor([[0, 3], [1, 2]]), 4)
    assert pairs(edges.rows(2, 4)) == [(1, 0)]
    across = graph.from_edge_index(torch.tensor([[0, 0], [1, 2]]), 4)
    with pytest.raises(ValueError, match="edges: expected none into nodes 2 to 3 from others"):
        across.rows(2, 4)

"""graph_attention on every backend against the reference in float64, and the reference against autograd and PyG."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from momkd import dispatch, gpu, graph, ops, reference
from momkd import functional as F
from momkd.graph import Edges
from momkd.reference.graph_attention import hearings
from momkd.reference.philox import edge_dropout_mask, keep_scale
from tests.compare import FORWARD, GRADIENT, HALVES, assert_close, assert_half, cosine

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=dispatch.OPS["graph_attention"])
def backend(request: pytest.FixtureRequest) -> str:
    able, reason = dispatch.can_run("graph_attention", request.param, (torch.zeros(1),))
    if not able:
        pytest.skip(f"{request.param}: {reason}")
    name: str = request.param
    return name


def random_edges(nodes: int, edges: int, generator: torch.Generator) -> Edges:
    return graph.from_edge_index(torch.randint(0, nodes, (2, edges), generator=generator), nodes)


def hub(nodes: int, *, out: bool = False) -> Edges:
    """Node 3 hears everyone, or everyone hears node 3, and no more."""
    others = torch.arange(nodes)
    pair = [others, torch.full_like(others, 3)]
    return graph.from_edge_index(torch.stack(pair[::-1] if out else pair), nodes)


def graphs() -> dict[str, Edges]:
    g = torch.Generator().manual_seed(0)
    nearest = [graph.knn(torch.randint(0, 4000, (n, 2), generator=g)) for n in (0, 1, 2, 0, 7, 8, 9, 20)]
    return {
        "batch": graph.batch(nearest),
        "random": random_edges(25, 300, g),
        "duplicates": random_edges(5, 200, g),
        "no edges": graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), 9),
        "one node": graph.knn(torch.zeros(1, 2)),
        "no nodes": graph.knn(torch.zeros(0, 2)),
        "hub": hub(40),
        "hub of sources": hub(40, out=True),
        "half isolated": graph.from_edge_index(torch.randint(0, 10, (2, 30), generator=g), 20),
    }


def inputs(nodes: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.randn(nodes, heads * width), torch.randn(nodes, heads * width), torch.randn(heads, width) / width**0.5
    return tuple(t.requires_grad_() for t in made)  # type: ignore[return-value]


def check(edges: Edges, given: tuple[Tensor, ...], backend: str | None, p: float = 0.0) -> None:
    """Forward and all gradients of float32 tensors, against the reference in float64."""
    exact = tuple(t.detach().double().requires_grad_() for t in given)
    seed = torch.tensor((3 << 40) + 11)
    got = F.graph_attention(*given, edges, dropout_p=p, seed=seed, backend=backend)
    want, _, _ = reference.graph_attention(*exact, edges, 0.2, p, seed)
    assert_close(got, want, FORWARD)
    grad = torch.randn_like(got)
    grads = torch.autograd.grad(got, given, grad)
    for name, a, b in zip(("x_l", "x_r", "att"), grads, torch.autograd.grad(want, exact, grad.double()), strict=True):
        assert_close(a, b, GRADIENT, f"d {name}")


@pytest.mark.parametrize("kind", graphs())
@pytest.mark.parametrize(("heads", "width"), [(2, 8), (1, 33), (3, 5)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_against_the_reference(kind: str, heads: int, width: int, p: float, backend: str) -> None:
    torch.manual_seed(0)
    edges = graphs()[kind]
    check(edges, inputs(edges.num_nodes, heads, width), backend, p)


@pytest.mark.parametrize("out", [False, True])
def test_a_hub_of_ten_thousand(out: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    nodes = 10_001
    if backend == "triton":  # interpreted, a node or a tile takes milliseconds: few nodes, duplicate edges, large tiles
        nodes, kernels = 12, gpu.kernels("graph_attention")
        for name in ("GRAPH", "GRAPH_BACKWARD"):
            table = getattr(kernels, name)
            monkeypatch.setattr(kernels, name, table._replace(single=(table.single[0]._replace(rows=512),)))
    others = torch.arange(10_000) % (nodes - 1) + 1
    pair = [others, torch.zeros_like(others)]
    more = torch.randint(0, nodes, (2, 5000))  # who hears one node alone, many times, has no gradient but rounding
    edges = graph.from_edge_index(torch.cat([torch.stack(pair[::-1] if out else pair), more], 1), nodes)
    check(edges, inputs(nodes, 1, 16), backend)


@pytest.mark.parametrize(("heads", "width"), [(2, 256), (9, 16), (1, 130)])
def test_widths_of_models(heads: int, width: int, backend: str) -> None:
    torch.manual_seed(0)
    edges = graph.knn(torch.rand(20, 2))
    check(edges, inputs(20, heads, width), backend, 0.3)


def test_rows_that_lie_apart(backend: str) -> None:
    """As the halves of one product do."""
    torch.manual_seed(0)
    edges = graph.knn(torch.rand(40, 2))
    both = torch.randn(40, 64)
    _, _, att = inputs(40, 2, 16)
    check(edges, (both[:, :32].requires_grad_(), both[:, 32:].requires_grad_(), att), backend)


def test_large_scores(backend: str) -> None:
    torch.manual_seed(0)
    edges = graph.knn(torch.rand(40, 2))
    x_l, x_r, att = inputs(40, 2, 8)
    given = tuple((t.detach() * 30).requires_grad_() for t in (x_l, x_r, att))
    got = F.graph_attention(*given, edges, backend=backend)
    want, _, _ = reference.graph_attention(*(t.double() for t in given), edges)
    assert got.isfinite().all()
    assert_close(got, want, 1e-4)  # scores are near 10^4: their float32 rounding is 10^-3 of a weight


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    if not dispatch.can_run("graph_attention", backend, (torch.zeros(1, dtype=dtype),))[0]:
        pytest.skip(f"{backend} does not take {dtype}")
    edges = graph.knn(torch.rand(80, 2))
    given = tuple(t.detach().to(dtype).requires_grad_() for t in inputs(80, 2, 32))
    exact = tuple(t.detach().double().requires_grad_() for t in given)
    plain = tuple(t.detach().requires_grad_() for t in given)
    got = F.graph_attention(*given, edges, backend=backend)
    want, _, _ = reference.graph_attention(*exact, edges)
    low = written_plainly(*plain, edges)
    assert got.dtype == dtype
    assert_half(got, want, low)
    grad = torch.randn_like(got)
    for t in (got, want, low):
        t.backward(grad.to(t.dtype))
    for a, b in zip(given, exact, strict=True):
        assert cosine(a.grad, b.grad) >= 0.999


def written_plainly(x_l: Tensor, x_r: Tensor, att: Tensor, edges: Edges) -> Tensor:
    """In the type of its inputs throughout, as PyG computes it."""
    source, target, _ = hearings(edges)
    heads, width = att.shape
    heard = x_l.view(-1, heads, width)[source]
    scores = (torch.nn.functional.leaky_relu(heard + x_r.view(-1, heads, width)[target], 0.2) * att).sum(2)
    weights = torch.exp(scores - scores.max())
    total = weights.new_zeros(len(x_l), heads).index_add(0, target, weights)
    return (
        torch.zeros_like(heard[: len(x_l)])
        .index_add(0, target, (weights / total[target])[..., None] * heard)
        .flatten(1)
    )


def test_dropout_is_that_of_philox_and_scales(backend: str) -> None:
    """Every node's value is one, so out is the sum of what was kept."""
    edges = graph.knn(torch.rand(50, 2))
    seed = torch.tensor(5)
    x = torch.ones(50, 2 * 4)
    got = F.graph_attention(x, x, torch.randn(2, 4), edges, dropout_p=0.5, seed=seed, backend=backend)
    kept = edge_dropout_mask(seed, edges.num_edges + 50, 2, 0.5)
    _, target, offsets = hearings(edges)
    share = 1 / offsets.diff()[target].float()  # all scores are equal
    want = torch.zeros(50, 2).index_add(0, target, share[:, None] * kept * keep_scale(0.5))
    assert_close(got.view(50, 2, 4), want[:, :, None].expand(-1, -1, 4), FORWARD)
    assert 0.4 < kept.float().mean() < 0.6


def test_a_nan_stays_with_those_that_hear_it(backend: str) -> None:
    torch.manual_seed(0)
    edges = graph.batch([graph.knn(torch.rand(20, 2)), graph.knn(torch.rand(30, 2))])
    x_l, x_r, att = (t.detach() for t in inputs(50, 2, 8))
    clean = F.graph_attention(x_l, x_r, att, edges, backend=backend)
    x_l[3] = torch.nan
    got = F.graph_attention(x_l, x_r, att, edges, backend=backend)
    source, target, _ = hearings(edges)
    reached = torch.zeros(50, dtype=torch.bool)
    reached[target[source == 3]] = True
    assert torch.equal(got[~reached], clean[~reached])
    assert got[reached].isnan().all()
    assert not reached[20:].any()


def test_only_the_gradients_that_are_wanted(backend: str) -> None:
    torch.manual_seed(0)
    edges = graph.knn(torch.rand(30, 2))
    given = inputs(30, 2, 8)
    every = torch.autograd.grad(F.graph_attention(*given, edges, backend=backend).sum(), given)
    for wanted in range(3):
        some = [t.detach().requires_grad_(n == wanted) for n, t in enumerate(given)]
        (got,) = torch.autograd.grad(F.graph_attention(*some, edges, backend=backend).sum(), some[wanted])
        assert_close(got, every[wanted], 1e-6)


def test_bags_are_independent_of_their_batch(backend: str) -> None:
    torch.manual_seed(0)
    each = [graph.knn(torch.rand(n, 2)) for n in (20, 1, 30)]
    x_l, x_r, att = (t.detach() for t in inputs(51, 2, 8))
    whole = F.graph_attention(x_l, x_r, att, graph.batch(each), backend=backend)
    start = 0
    for edges in each:
        rows = slice(start, start := start + edges.num_nodes)
        assert torch.equal(F.graph_attention(x_l[rows], x_r[rows], att, edges, backend=backend), whole[rows])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_backward_of_the_reference_is_that_of_autograd(p: float) -> None:
    torch.manual_seed(0)
    edges, seed = graphs()["random"], torch.tensor(9)
    given = tuple(t.detach().double().requires_grad_() for t in inputs(25, 3, 5))
    out, scores, stats = reference.graph_attention(*given, edges, 0.2, p, seed)
    grad = torch.randn_like(out)
    saved = edges, 0.2, p, seed, out, scores, stats
    got = reference.graph_attention_backward(grad, *given, *saved, (True, True, True))
    for a, b in zip(got, torch.autograd.grad(out, given, grad), strict=True):
        assert a is not None
        assert_close(a, b, 1e-12)


@pytest.mark.usefixtures("poisoned")
def test_opcheck(backend: str) -> None:
    torch.use_deterministic_algorithms(False)
    edges = list(graph.knn(torch.rand(12, 2), 3).tensors())
    given: tuple[Any, ...] = (*inputs(12, 2, 4), edges, 0.2, 0.0, None, backend)
    torch.library.opcheck(ops.graph_attention, given)


def test_it_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    edges = graph.knn(torch.rand(30, 2))
    given = inputs(30, 2, 8)
    compiled = torch.compile(lambda *t: F.graph_attention(*t, edges), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*given), F.graph_attention(*given, edges), 1e-6)


def test_wrong_arguments_are_named() -> None:
    edges, x, att = graph.knn(torch.rand(6, 2)), torch.randn(6, 8), torch.randn(2, 4)
    for given, words in (
        ((x, x, torch.randn(3, 4), edges), r"x_l: expected \(N, H\*C\) = \(any, 12\), got \(6, 8\)"),
        ((x, x[:5], att, edges), r"x_r: expected \(N, H\*C\) = \(6, 8\), got \(5, 8\)"),
        ((x[:5], x[:5], att, edges), "edges: expected a graph of N = 5 nodes, got 6"),
        ((x.long(), x, att, edges), "x_l: expected float16"),
    ):
        with pytest.raises(ValueError, match=words):
            F.graph_attention(*given)
    with pytest.raises(ValueError, match="dropout_p: expected 0 <= dropout_p < 1"):
        F.graph_attention(x, x, att, edges, dropout_p=1.0)

"""What only the native kernel of graph_attention can get wrong: every instruction set, threads, blocks, workspace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from momkd import functional as F
from momkd import graph, reference
from tests.compare import FORWARD, GRADIENT, assert_close

_C = pytest.importorskip("momkd._C", reason="momkd._C is not built: install momkd with a C++ compiler")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.build_info()["isa"]
    try:
        _C.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.use_isa(before)


def call(nodes: int, heads: int, width: int, p: float) -> tuple[torch.Tensor, ...]:
    """Result and gradients, and those of the reference in float64."""
    torch.manual_seed(nodes)
    edges = graph.knn(torch.randint(0, 5000, (nodes, 2)))
    given = [torch.randn(nodes, heads * width), torch.randn(nodes, heads * width), torch.randn(heads, width)]
    given = [t.requires_grad_() for t in given]
    out = F.graph_attention(*given, edges, dropout_p=p, seed=1 << 35, backend="native")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    made = [out, *torch.autograd.grad(out, given, grad)]
    exact = [t.detach().double().requires_grad_() for t in given]
    want, _, _ = reference.graph_attention(*exact, edges, 0.2, p, torch.tensor(1 << 35))
    wanted = [want, *torch.autograd.grad(want, exact, grad.double())]
    for got, right, tolerance in zip(made, wanted, (FORWARD, GRADIENT, GRADIENT, GRADIENT), strict=True):
        assert_close(got, right, tolerance)
    return tuple(made)


@pytest.mark.parametrize("nodes", [1, 63, 64, 65, 200])  # blocks are of 64
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (2, 3), (1, 4), (5, 16), (2, 65), (1, 79), (3, 128)])
def test_every_instruction_set(isa: str, nodes: int, heads: int, width: int) -> None:
    call(nodes, heads, width, 0.0)


@pytest.mark.parametrize("heads", [1, 4, 5, 9])
def test_dropout_on_every_instruction_set(isa: str, heads: int) -> None:
    call(90, heads, 7, 0.4)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_same_bits_for_any_number_of_threads(p: float) -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(call(1000, 2, 40, p))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_places_beyond_32_bits_draw_their_own_bits() -> None:
    """The kernel's counter carries; seen through the reference, which draws them one by one."""
    from momkd.reference.philox import _words

    seed, first = torch.tensor(77), 2**32 - 20
    whole = _words(seed, first, 40, 2, 1)
    assert torch.equal(whole[20:], _words(seed, 2**32, 20, 2, 1))
    assert not torch.equal(whole[20:], _words(seed, 0, 20, 2, 1))


def test_no_tensor_of_edges_and_channels() -> None:
    """Beside the tensors of nodes, torch's allocator sees the scores alone."""
    from benchmarks.measure import peak_bytes

    nodes, heads, width = 600, 2, 64
    edges = graph.knn(torch.rand(nodes, 2))
    given = [torch.randn(nodes, heads * width, requires_grad=True) for _ in range(2)]
    att = torch.randn(heads, width, requires_grad=True)

    def step() -> None:
        torch.autograd.grad(F.graph_attention(*given, att, edges, backend="native").sum(), [*given, att])

    of_nodes = nodes * heads * width * 4
    assert peak_bytes(step) < 5 * of_nodes  # out, its gradient, d x_l and d x_r; pairs would be 9

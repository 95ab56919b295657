"""float16 and bfloat16 rows in the native kernels: results are those of float32, rounded once, and no copy of the rows.

The gated pooling, whose products are in 16 bits too, has its tests with its op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.measure import peak_bytes
from momkd import functional as F
from momkd import graph, native
from tests.compare import FORWARD, HALVES, assert_close, assert_half, offsets_of

_C = pytest.importorskip("momkd._C", reason="momkd._C is not built: install momkd with a C++ compiler")
pytestmark = pytest.mark.usefixtures("poisoned")

LENGTHS = (17, 0, 1, 512, 110)  # the longest is a whole piece; rows are no multiple of a vector, nor are columns
N, S, L, HEADS = sum(LENGTHS), 37, 79, 2


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.build_info()["isa"]
    try:
        _C.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.use_isa(before)


class Case:
    """An op on rows of any type; `extra` are the inputs of it that stay float32."""

    def __init__(self, call: Callable[..., Tensor], widths: tuple[int, ...], *extra: Tensor) -> None:
        self.call, self.extra = call, [t.requires_grad_() for t in extra]
        self.rows = [torch.randn(N, width) for width in widths]

    def run(self, rows: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The result, and the gradients of rows and of all else, from a gradient whose values `dtype` holds."""
        leaves = [*(t.detach().requires_grad_() for t in rows), *self.extra]
        out = self.call(*leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def cases() -> dict[str, Callable[[], Case]]:
    offsets, labels = offsets_of(LENGTHS), torch.arange(N) % 3 - 1
    edges = graph.knn(torch.randint(0, 5000, (N, 2), generator=torch.Generator().manual_seed(0)))

    def bank(classes: int) -> Tensor:
        return torch.randn(classes, 9, S)

    def guided(classes: int) -> Case:
        memory = bank(classes)
        return Case(
            lambda z, v, t: F.memory_guided_pool(z, v, memory, offsets, t, backend="native")[0],
            (S, L),
            torch.tensor(0.3),
        )

    return {
        "similarity": lambda: Case(lambda z, m: F.memory_similarity(z, m, backend="native")[0], (S,), bank(2)),
        "soft similarity": lambda: Case(
            lambda z, m: F.memory_similarity(z, m, reduce="lse", backend="native")[0], (S,), bank(3)
        ),
        "soft angle": lambda: Case(
            lambda z, m: F.soft_angle_loss(z, m, labels, reduction="none", backend="native"), (S,), bank(2)
        ),
        "guided": lambda: guided(2),
        "guided by class": lambda: guided(3),
        "pool": lambda: Case(
            lambda v, s: F.attention_pool(v, s, offsets, backend="native"), (L,), 3 * torch.randn(N, HEADS)
        ),
        "graph": lambda: Case(
            lambda left, right, att: F.graph_attention(
                left, right, att, edges, dropout_p=0.2, seed=5, backend="native"
            ),
            (HEADS * L, HEADS * L),
            torch.randn(HEADS, L) / L**0.5,
        ),
    }


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", cases())
def test_results_are_those_of_float32_rounded_once(isa: str, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = cases()[name]()
    rows = [t.to(dtype) for t in case.rows]
    got, want = case.run(rows, dtype), case.run([t.float() for t in rows], dtype)
    for i, (half, single) in enumerate(zip(got, want, strict=True)):
        assert half.isfinite().all()
        if half.dtype == dtype:
            assert_half(half, single, single.to(dtype), f"{name} {i}")
        else:
            assert_close(half, single, FORWARD, f"{name} {i}")


@pytest.mark.parametrize("reduce", ["max", "lse"])
@pytest.mark.parametrize("bank", [(2, 16, 64), (1, 1, 1), (3, 5, 7), (5, 33, 130), (2, 17, 32)])
def test_similarity_is_that_of_float32(isa: str, bank: tuple[int, int, int], reduce: str) -> None:
    """Whatever multiplies: cosines as close as those of float32 rows, rows of any length, and each row by itself."""
    torch.manual_seed(0)
    z, memory = torch.randn(70, bank[2]).bfloat16(), torch.randn(bank)
    z[::5] *= torch.logspace(-36, 36, 14)[:, None]
    z[7], z[11], z[13] = 0, torch.nan, torch.inf
    got, slots = F.memory_similarity(z, memory, reduce=reduce, backend="native")
    want, want_slots = F.memory_similarity(z.double(), memory.double(), reduce=reduce, backend="torch")
    clear = z.isfinite().all(1) & (z != 0).any(1)
    assert_close(got[clear], want[clear], FORWARD)
    assert got[[11, 13]].isnan().all()
    assert (got[7] == (0 if reduce == "max" else want[7].float())).all()
    if bank[2] > 1:  # else all cosines are ±1
        assert torch.equal(slots[clear], want_slots[clear])
    for first, last in ((0, 1), (3, 20), (12, 45), (38, 70)):
        some, few = F.memory_similarity(z[first:last], memory, reduce=reduce, backend="native")
        assert torch.equal(some.nan_to_num(9), got[first:last].nan_to_num(9))
        assert torch.equal(few, slots[first:last])


def test_slots_that_are_nan_or_equal(isa: str) -> None:
    z, memory = torch.randn(40, S).bfloat16(), torch.randn(1, 1, S).repeat(2, 19, 1)
    assert (F.memory_similarity(z, memory, backend="native")[1] == 0).all()
    memory[1, 17] = torch.nan
    value, slots = F.memory_similarity(z, memory, backend="native")
    assert value[:, 0].isfinite().all()
    assert value[:, 1].isnan().all()
    assert (slots[:, 1] == 17).all()


def test_rows_may_lie_apart_and_be_of_two_types(isa: str) -> None:
    torch.manual_seed(0)
    edges = graph.knn(torch.rand(N, 2))
    wide, att = torch.randn(N, 4 * L).bfloat16(), torch.randn(HEADS, L)
    left, right = wide[:, : 2 * L], wide[:, 2 * L :]
    apart = F.graph_attention(left, right, att, edges, backend="native")
    assert torch.equal(apart, F.graph_attention(left.contiguous(), right.contiguous(), att, edges, backend="native"))
    leaves = [left.detach().requires_grad_(), right.detach().half().requires_grad_()]
    mixed = F.graph_attention(*leaves, att, edges, backend="native")
    grads = torch.autograd.grad(mixed.sum(), leaves)
    assert [t.dtype for t in (mixed, *grads)] == [torch.bfloat16, torch.bfloat16, torch.float16]
    assert_half(mixed, apart, apart.float().half(), "mixed")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", cases())
def test_rows_are_never_copied(name: str, dtype: torch.dtype) -> None:
    """Beside results and gradients torch's allocator sees less than half of the rows: float32 ones would be double."""
    torch.manual_seed(0)
    case = cases()[name]()
    rows = [t.to(dtype) for t in case.rows]
    leaves = [t.detach().requires_grad_() for t in rows]
    of_rows = sum(t.nbytes for t in rows)
    out = case.call(*leaves, *case.extra)
    small = of_rows // 2
    with torch.no_grad():
        forward = peak_bytes(lambda: case.call(*leaves, *case.extra))
    assert forward < out.nbytes + small, f"forward holds {forward} bytes"
    grad = torch.randn_like(out)
    inputs = [*leaves, *case.extra]
    backward = peak_bytes(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    expected = sum(t.nbytes for t in inputs)
    assert backward < expected + small, f"backward holds {backward} bytes, gradients are {expected}"


@pytest.mark.parametrize("reduce", ["max", "lse"])
def test_a_row_without_gradient_gives_none_were_it_nan(isa: str, reduce: str) -> None:
    torch.manual_seed(0)
    z, memory, grad = torch.randn(40, S), torch.randn(3, 9, S), torch.randn(40, 3)
    grad[[0, 17]] = 0
    slots = torch.zeros(40, 3, dtype=torch.int32)
    op = native.kernels("memory_similarity").memory_similarity_backward
    want = op(grad, z, memory, reduce, 5.0, slots, (True, True))
    z[0], z[17] = torch.nan, torch.inf
    got = op(grad, z, memory, reduce, 5.0, slots, (True, True))
    assert (got[0][[0, 17]] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from momkd import functional as F
from momkd import ops
from tests.compare import FORWARD, GRADIENT, HALVES, assert_close, assert_half, cosine

pytestmark = pytest.mark.usefixtures("poisoned")
SIZES = [(0, 4, 2, 3), (1, 2, 2, 1), (17, 16, 2, 16), (129, 33, 5, 7), (40, 64, 32, 3)]  # N, S, C, K


def naive(z: Tensor, memory: Tensor, reduce: str, tau: float = 5.0) -> Tensor:
    cos = torch.nn.functional.cosine_similarity(z[:, None, None], memory[None], dim=-1, eps=1e-12)
    return cos.amax(2) if reduce == "max" else torch.logsumexp(tau * cos, 2) / tau


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("reduce", ["max", "lse"])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_the_board(sizes: tuple[int, int, int, int], reduce: str, seed: int) -> None:
    torch.manual_seed(seed)
    n, s, c, k = sizes
    z, memory = torch.randn(n, s, requires_grad=True), torch.randn(c, k, s, requires_grad=True)
    z64, memory64 = z.detach().double().requires_grad_(), memory.detach().double().requires_grad_()
    got, slots = F.memory_similarity(z, memory, reduce=reduce, tau=7.0)
    want = naive(z64, memory64, reduce, 7.0)
    assert_close(got, want, FORWARD)
    assert slots.dtype == torch.int32
    cos = torch.nn.functional.cosine_similarity(z64[:, None, None], memory64[None], dim=-1)
    assert torch.equal(slots.long(), cos.argmax(2))
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    assert_close(z.grad, z64.grad, GRADIENT, "d z")
    assert_close(memory.grad, memory64.grad, GRADIENT, "d memory")


def test_ties_take_the_lowest_slot() -> None:
    memory = torch.randn(2, 1, 8).repeat(1, 4, 1)
    assert (F.memory_similarity(torch.randn(20, 8), memory)[1] == 0).all()


def test_a_zero_row_has_no_direction_and_a_finite_gradient() -> None:
    z = torch.zeros(2, 4, requires_grad=True)
    similarity, _ = F.memory_similarity(z, torch.randn(2, 3, 4))
    assert (similarity == 0).all()
    similarity.sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z, memory = torch.randn(50, 32).to(dtype).requires_grad_(), torch.randn(2, 8, 32).to(dtype)
    z64 = z.detach().double().requires_grad_()
    got, _ = F.memory_similarity(z, memory, reduce="lse")
    want = naive(z64, memory.double(), "lse")
    assert_half(got, want, naive(z.detach(), memory, "lse"))
    got.sum().backward()
    want.sum().backward()
    assert cosine(z.grad, z64.grad) >= 0.999


@pytest.mark.parametrize("reduce", ["max", "lse"])
def test_gradcheck_opcheck_compile(reduce: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: F.memory_similarity(a, b, reduce=reduce)[0], (z, memory))
    torch.library.opcheck(ops.memory_similarity, (z, memory, reduce, 5.0, ""))
    compiled = torch.compile(lambda a: F.memory_similarity(a, memory)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), F.memory_similarity(z, memory)[0])


def test_a_bad_row_leaves_the_others_alone() -> None:
    z, memory = torch.randn(3, 4), torch.randn(2, 3, 4)
    clean, _ = F.memory_similarity(z, memory)
    z[1, 0] = torch.nan
    got, _ = F.memory_similarity(z, memory)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.randn(3, 5)}, r"memory: expected \(C, K, S\) = \(any, any, 5\), got \(2, 3, 4\)"),
        ({"reduce": "mean"}, "reduce: expected 'max' or 'lse', got 'mean'"),
        ({"tau": 0.0}, "tau: expected a number > 0, got 0.0"),
        ({"memory": torch.randn(2, 0, 4)}, "memory: expected at least one class, slot and column"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"z": torch.randn(3, 4), "memory": torch.randn(2, 3, 4)} | change
    with pytest.raises(ValueError, match=message):
        F.memory_similarity(arguments.pop("z"), arguments.pop("memory"), **arguments)

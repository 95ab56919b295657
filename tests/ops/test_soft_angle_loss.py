from __future__ import annotations

import pytest
import torch
from torch import Tensor

from momkd import functional as F
from momkd import ops
from tests.compare import FORWARD, GRADIENT, HALVES, assert_close, assert_half, cosine

pytestmark = pytest.mark.usefixtures("poisoned")


def naive(z: Tensor, memory: Tensor, labels: Tensor, margin: float, tau: float, beta: float) -> Tensor:
    cos = torch.nn.functional.cosine_similarity(z[:, None, None], memory[None], dim=-1, eps=1e-12)
    s = torch.logsumexp(tau * cos, 2) / tau
    losses = []
    for row, label in zip(s, labels.tolist(), strict=True):
        others = torch.cat([row[:label], row[label + 1 :]]) if label >= 0 else row
        gap = row[label] - others.amax()
        losses.append(torch.nn.functional.softplus(beta * (margin - gap)) if label >= 0 else row.sum() * 0)
    return torch.stack(losses) if losses else s.sum(1)


@pytest.mark.parametrize(("rows", "classes", "slots"), [(0, 2, 3), (1, 2, 1), (17, 2, 16), (33, 5, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_the_board(rows: int, classes: int, slots: int, seed: int) -> None:
    torch.manual_seed(seed)
    z, memory = torch.randn(rows, 8, requires_grad=True), torch.randn(classes, slots, 8, requires_grad=True)
    z64, memory64 = z.detach().double().requires_grad_(), memory.detach().double().requires_grad_()
    labels = torch.randint(-1, classes, (rows,))
    got = F.soft_angle_loss(z, memory, labels, margin=0.2, tau=4.0, beta=10.0, reduction="none")
    want = naive(z64, memory64, labels, 0.2, 4.0, 10.0)
    assert_close(got, want, FORWARD)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    assert_close(z.grad, z64.grad, GRADIENT, "d z")
    assert_close(memory.grad, memory64.grad, GRADIENT, "d memory")


def test_reductions_count_labelled_rows() -> None:
    z, memory = torch.randn(4, 8), torch.randn(2, 3, 8)
    labels = torch.tensor([0, -1, 1, -1])
    each = F.soft_angle_loss(z, memory, labels, reduction="none")
    assert (each[[1, 3]] == 0).all()
    torch.testing.assert_close(F.soft_angle_loss(z, memory, labels, reduction="sum"), each.sum())
    torch.testing.assert_close(F.soft_angle_loss(z, memory, labels), each.sum() / 2)
    assert F.soft_angle_loss(z, memory, torch.full((4,), -1)) == 0


def test_an_unlabelled_row_gets_no_gradient_even_when_it_is_not_finite() -> None:
    z = torch.randn(3, 8)
    z[1] = torch.nan
    z.requires_grad_()
    memory = torch.randn(2, 3, 8, requires_grad=True)
    F.soft_angle_loss(z, memory, torch.tensor([0, -1, 1])).backward()
    assert (z.grad[1] == 0).all()
    assert z.grad.isfinite().all()
    assert memory.grad.isfinite().all()


def test_nearer_is_better() -> None:
    memory = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    angles = torch.linspace(0, torch.pi / 2, 20)
    z = torch.stack([angles.cos(), angles.sin()], 1)
    losses = F.soft_angle_loss(z, memory, torch.zeros(20, dtype=torch.int64), reduction="none")
    assert (losses.diff() > 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z, memory = torch.randn(50, 32).to(dtype).requires_grad_(), torch.randn(2, 8, 32).to(dtype)
    z64, labels = z.detach().double().requires_grad_(), torch.randint(0, 2, (50,))
    got = F.soft_angle_loss(z, memory, labels, reduction="none")
    want = naive(z64, memory.double(), labels, 0.3, 5.0, 20.0)
    assert_half(got, want, naive(z.detach(), memory, labels, 0.3, 5.0, 20.0))
    got.sum().backward()
    want.sum().backward()
    assert cosine(z.grad, z64.grad) >= 0.999


def test_gradcheck_opcheck_compile() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, -1, 1])

    def call(z: Tensor, memory: Tensor) -> Tensor:
        return F.soft_angle_loss(z, memory, labels, beta=3.0)

    assert torch.autograd.gradcheck(call, (z, memory))
    torch.library.opcheck(ops.soft_angle_loss, (z, memory, labels, 0.3, 5.0, 3.0, ""))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, memory), call(z, memory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 2])}, "labels: expected 0 to 1, or -1 for none, got 2"),
        ({"labels": torch.tensor([0, -2])}, "labels: expected 0 to 1, or -1 for none, got -2"),
        ({"labels": torch.tensor([0, 1]).int()}, "labels: expected int64, got torch.int32"),
        ({"labels": torch.tensor([0])}, r"labels: expected \(B,\) = \(2\), got \(1,\)"),
        ({"memory": torch.randn(1, 3, 8)}, "memory: expected at least 2 classes"),
        ({"beta": -1.0}, "beta: expected a number > 0, got -1.0"),
        ({"reduction": "max"}, "reduction: expected 'mean' or 'sum' or 'none', got 'max'"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "z": torch.randn(2, 8),
        "memory": torch.randn(2, 3, 8),
        "labels": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        F.soft_angle_loss(**(arguments | change))

"""What only the Triton kernel of gated_attention_pool can get wrong: slices, heads, addresses, dropout bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from momkd import dispatch, reference
from momkd import functional as F
from momkd.reference.gated_attention_pool import GateParameters
from tests.compare import FORWARD, GRADIENT, HALVES, assert_close, cosine, offsets_of, sparse

able, reason = dispatch.can_run("gated_attention_pool", "triton", (torch.zeros(1),))
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not able, reason=f"Triton: {reason}; TRITON_INTERPRET=1 runs kernels on the CPU"),
]
# Slices of the gate and of the features, none of them full; rows over the edges of tiles; one head, a few and many.
SHAPES = [((130, 0, 1, 70), 90, 150, 1), ((5, 140), 65, 129, 3), ((64, 65), 17, 16, 16), ((128,), 128, 128, 1)]


def parameters(width: int, hidden: int, heads: int, gated: bool = True) -> GateParameters:
    def made(*shape: int) -> Tensor:
        return (torch.randn(*shape) / shape[-1] ** 0.5).requires_grad_()

    gate = (made(hidden, width), made(hidden)) if gated else (None, None)
    return GateParameters(made(hidden, width), made(hidden), *gate, made(heads, hidden), made(heads))


def doubled(given: GateParameters) -> GateParameters:
    return GateParameters(*(None if p is None else p.detach().double().requires_grad_() for p in given))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("gated", [True, False])
def test_slices_and_heads(shape: tuple[tuple[int, ...], int, int, int], p: float, gated: bool) -> None:
    torch.manual_seed(0)
    lengths, width, hidden, heads = shape
    x = torch.randn(sum(lengths), width, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    given = parameters(width, hidden, heads, gated)
    given64, offsets, seed = doubled(given), offsets_of(lengths), torch.tensor((5 << 33) + 7)
    got, scores = F.gated_attention_pool(
        x, offsets, *given, dropout_p=p, seed=seed, return_scores=True, backend="triton"
    )
    want, want_scores, *_ = reference.gated_attention_pool(x64, offsets, given64, p, seed)
    assert_close(got, want, FORWARD, "pooled")
    assert_close(scores, want_scores, FORWARD, "scores")
    grads = torch.randn_like(got), torch.randn_like(scores)
    torch.autograd.backward((got, scores), grads)
    torch.autograd.backward((want, want_scores), [g.double() for g in grads])
    assert_close(x.grad, x64.grad, GRADIENT, "d x")
    for name, a, b in zip(GateParameters._fields, given, given64, strict=True):
        if a is not None:
            assert_close(a.grad, b.grad, GRADIENT, f"d {name}")


@pytest.mark.parametrize("dtype", HALVES)
def test_half_features_with_float32_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, given, offsets = torch.randn(150, 70).to(dtype), parameters(70, 40, 2), offsets_of((20, 130))
    got = F.gated_attention_pool(x, offsets, *given, backend="triton")
    given64 = doubled(given)
    want, *_ = reference.gated_attention_pool(x.double(), offsets, given64)
    assert got.dtype == dtype
    assert cosine(got.detach(), want) >= 0.9999
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    for a, b in zip(given, given64, strict=True):
        if b.grad.norm() > 0 and a is not given.b_a:  # softmax does not see b_a: its gradient is rounding alone
            assert cosine(a.grad, b.grad) >= 0.999


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_rows_that_lie_further_apart_than_32_bits_reach(heads: int, p: float) -> None:
    """Row 5 begins 2.5 · 2^31 elements behind row 0; the file behind it has holes and takes no room."""
    torch.manual_seed(0)
    gap, width = 1 << 30, 24
    far = sparse(6, gap, width)
    near = torch.randn(6, width)
    far.copy_(near)
    assert far.stride(0) == gap
    assert far.stride(0) * 5 > 2**32
    given, offsets = parameters(width, 16, heads), offsets_of((2, 4))
    results = []
    for rows in (far, near):
        leaf = rows.detach().requires_grad_()
        pooled = F.gated_attention_pool(leaf, offsets, *given, dropout_p=p, seed=torch.tensor(3), backend="triton")
        results.append([pooled, *torch.autograd.grad(pooled.square().sum(), [leaf, *given])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_nan_row_stays_in_its_bag() -> None:
    torch.manual_seed(0)
    x, given, offsets = torch.randn(200, 30), parameters(30, 16, 1), offsets_of((60, 1, 139))
    clean = F.gated_attention_pool(x, offsets, *given, backend="triton")
    x[60] = torch.nan
    got = F.gated_attention_pool(x, offsets, *given, backend="triton")
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().all()


def test_small_activations_keep_their_digits() -> None:
    """tanh of small values by 1 − 2/(e^2x + 1) would lose them all."""
    torch.manual_seed(0)
    x, given, offsets = torch.randn(40, 20) * 1e-4, parameters(20, 16, 1), offsets_of((40,))
    given = GateParameters(given.w_v, None, given.w_u, None, given.w_a, None)
    _, scores = F.gated_attention_pool(x, offsets, *given, return_scores=True, backend="triton")
    _, want, *_ = reference.gated_attention_pool(x.double(), offsets, doubled(given))
    assert_close(scores, want, FORWARD)

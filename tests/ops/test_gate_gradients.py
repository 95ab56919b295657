"""Gradients of the gate that are small or nothing: they don't underflow in float16, and a row alone gives none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import momkd
from momkd.reference.gated_attention_pool import GateParameters
from tests.compare import HALVES, assert_close, assert_half, cosine, relative
from tests.ops.test_gate_memory import CHUNK, HUGE, LENGTHS, ROWS, able, call, gate, in_chunks_of, reason, rows

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not able, reason=f"Triton: {reason}; TRITON_INTERPRET=1 runs kernels on the CPU"),
]
WEIGHTS = ("w_v", "b_v", "w_u", "b_u", "w_a")


def score_gradients(x: Tensor, given: GateParameters, lengths: tuple[int, ...], grad: Tensor) -> list[Tensor]:
    """Gradients of x and of all parameters but b_a, of scores by the Triton kernels."""
    _, scores = call(x, given, lengths)
    return list(torch.autograd.grad(scores, [x, *given[:5]], grad))


def exact_gradients(x: Tensor, given: GateParameters, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same by plain torch in this type, where scores need no bags."""
    x = x.detach().to(dtype).requires_grad_()
    w_v, b_v, w_u, b_u, w_a, b_a = (p.detach().to(dtype).requires_grad_() for p in given)
    linear = torch.nn.functional.linear
    scores = linear(torch.tanh(linear(x, w_v, b_v)) * torch.sigmoid(linear(x, w_u, b_u)), w_a, b_a)
    return list(torch.autograd.grad(scores, [x, w_v, b_v, w_u, b_u, w_a], grad.to(dtype)))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [0, HUGE])
def test_small_gradients_of_scores_reach_the_weights_in_float16(heads: int, size: int) -> None:
    """About 1e-7 each, as in a bag of a million rows: less than the least value of float16 that has all digits."""
    x, given = rows(dtype=torch.float16), gate(heads)
    grad = 2.0**-23 * torch.randn(ROWS, heads)
    with momkd.gate_memory(size):
        got = score_gradients(x, given, LENGTHS, grad)
    want = exact_gradients(x, given, grad, torch.float64)
    plain = exact_gradients(x, given, 2.0**23 * grad, torch.float16)
    for name, mine, exact, torchs in zip(WEIGHTS, got[1:], want[1:], plain[1:], strict=True):
        assert mine.dtype == torch.float32
        assert cosine(mine, exact) >= 0.9999, name
        assert_half(2.0**23 * mine, 2.0**23 * exact, torchs, name)


@pytest.mark.parametrize("sizes", [(-23, 0, -10), (-23, None, -10), (-23, None, None), (None, -23, None)])
@pytest.mark.parametrize("size", [0, HUGE])
def test_every_chunk_has_its_own_scale(
    sizes: tuple[int | None, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of one power of two in each chunk; None: all are zero there."""
    in_chunks_of(CHUNK, monkeypatch)
    lengths = (2 * CHUNK + 100,)
    x, given = rows(lengths, torch.float16), gate()
    grad = torch.randn(sum(lengths), 1)
    for chunk, power in zip(grad.split(CHUNK), sizes, strict=True):
        chunk.mul_(0.0 if power is None else 2.0**power)
    with momkd.gate_memory(size):
        d_x, *got = score_gradients(x, given, lengths, grad)
    want_x, *want = exact_gradients(x, given, grad, torch.float64)
    for name, mine, exact in zip(WEIGHTS, got, want, strict=True):
        assert cosine(mine, exact) >= 0.999, name
        assert relative(mine, exact) <= 2e-3, name
    for mine, exact, power in zip(d_x.split(CHUNK), want_x.split(CHUNK), sizes, strict=True):
        if power is None:
            assert (mine == 0).all()
        elif power > -20:  # in float16 the rest of the gradient of x is zero or nearly so
            assert relative(mine, exact) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [0, HUGE])
def test_bags_of_one_row_have_no_gradient_of_scores(dtype: torch.dtype, heads: int, size: int) -> None:
    """The weight of the row is 1 whatever its score, so that no parameter of the gate has a gradient."""
    lengths = (1,) * 9
    x, given = rows(lengths, dtype), gate(heads)
    with momkd.gate_memory(size):
        pooled, _ = call(x, given, lengths)
    grad = torch.randn_like(pooled)
    d_x, *gradients = torch.autograd.grad(pooled, [x, *given], grad)
    assert all((g == 0).all() for g in gradients)
    assert torch.equal(pooled, x.detach()[:, None].expand(-1, heads, -1))
    assert_close(d_x, grad.double().sum(1), {torch.float32: 1e-6}.get(dtype, 1e-2))

"""What CUDA asks of an op: to wait for nothing, to run on the current stream and device, and to hold little memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import momkd
from momkd import functional as F
from tests.compare import assert_close
from tests.gpu import cases
from tests.gpu.cases import Case, Inputs
from tests.gpu.check import cotangents, gradients, leaves, wrong
from tests.gpu.device import ANOTHER_ORDER, DEVICE, MIXED, about_cuda, on_gpu

pytestmark = [*on_gpu, about_cuda]

OPS: dict[str, Callable[..., Case]] = {
    "gated_attention_pool": partial(cases.gated_attention_pool, p=0.25),
    "gated_attention_scores": partial(cases.gated_attention_scores, p=0.25),
    "attention_pool": cases.attention_pool,
    "memory_similarity max": cases.memory_similarity,
    "memory_similarity lse": partial(cases.memory_similarity, reduce="lse"),
    "soft_angle_loss": cases.soft_angle_loss,
    "memory_guided_pool": cases.memory_guided_pool,
    "graph_attention": partial(cases.graph_attention, p=0.5),
}


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op: str) -> None:
    case = OPS[op](Inputs(MIXED, torch.bfloat16, DEVICE))
    mine = leaves(case)
    out = case.call(*mine)  # compiles
    grads = [g.to(o.dtype) for g, o in zip(cotangents(out, case.differentiable), out, strict=False)]
    gradients(out, mine, grads)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case.call(*mine), mine, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPS)
def test_on_a_side_stream(op: str) -> None:
    """Rows that this stream is still writing are waited for by stream order alone, forward and backward."""
    case = OPS[op](Inputs(MIXED, torch.bfloat16, DEVICE), backend="triton")
    mine = leaves(case)
    want = case.call(*mine)
    grads = cotangents(want, case.differentiable)
    d_want = gradients(want, mine, grads)
    late = [torch.full_like(t, torch.nan) for t in case.tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for empty, values in zip(late, case.tensors, strict=True):
            empty.copy_(values)
            empty.requires_grad_()
        got = case.call(*late)
        d_got = gradients(got, late, grads)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for name, a, b in zip(case.names, d_got, d_want, strict=True):
        assert_close(a, b, ANOTHER_ORDER, f"d {name}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, this machine has fewer")
@pytest.mark.parametrize("op", OPS)
def test_on_a_device_that_is_not_the_current_one(op: str) -> None:
    assert torch.cuda.current_device() == 0
    found = wrong(OPS[op](Inputs(MIXED, torch.float32, torch.device("cuda:1")), backend="triton"), torch.float32)
    assert not found, "\n".join(found)


def peak_above(call: Callable[[], object]) -> int:
    """Bytes that were held at most during a call, above those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_above_inputs_and_outputs_is_bounded() -> None:
    """Where no gradient is needed nothing of (N, D) is held; else at most the activations, and a workspace."""
    n, width, hidden = 1_000_000, 1024, 256
    x = torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16)
    bags = momkd.Bags.from_lengths(x, [n])
    shapes = [(hidden, width), (hidden,), (hidden, width), (hidden,), (1, hidden)]
    weights = [(torch.randn(*s, device=DEVICE) / s[-1] ** 0.5).bfloat16().requires_grad_() for s in shapes]
    activations = 2 * n * hidden * 2

    def pooled() -> Tensor:
        out = F.gated_attention_pool(bags, None, *weights, None, backend="triton")
        assert isinstance(out, Tensor)
        return out

    with torch.no_grad():
        extra = peak_above(pooled)
    assert extra < activations / 2, f"{extra / 1e6:.0f} MB above the input, without gradients"
    extra = peak_above(lambda: pooled().sum().backward())
    assert extra < 1.5 * activations, f"{extra / 1e6:.0f} MB above the input, with gradients"

"""Every op under torch.compile with its default backend, under autocast, in a captured CUDA graph, and tuned."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import momkd
from momkd import gpu
from tests.compare import HALVES, assert_close
from tests.gpu import cases
from tests.gpu.cases import Case, Inputs, Outputs
from tests.gpu.check import cotangents, gradients, leaves, wrong
from tests.gpu.device import ANOTHER_ORDER, DEVICE, MIXED, REHEARSING, about_cuda, fitting, name_of, on_gpu, smaller

pytestmark = on_gpu

GATE = {"width": smaller(1024, 72), "hidden": smaller(256, 40)}
OPS: dict[str, Callable[..., Case]] = {
    "gated_attention_pool": partial(cases.gated_attention_pool, **GATE, p=0.25),
    "gated_attention_pool, score_bias": partial(cases.gated_attention_pool, **GATE, p=0.25, biased=True),
    "gated_attention_scores": partial(cases.gated_attention_scores, **GATE, p=0.25),
    "attention_pool": partial(cases.attention_pool, width=smaller(1024, 72)),
    "memory_similarity max": cases.memory_similarity,
    "memory_similarity lse": partial(cases.memory_similarity, reduce="lse"),
    "soft_angle_loss": cases.soft_angle_loss,
    "memory_guided_pool": partial(cases.memory_guided_pool, width=smaller(512, 40)),
    "graph_attention": partial(cases.graph_attention, width=smaller(256, 24), p=0.5),
}


def between(form: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """With work for the compiler before and behind: inputs doubled, outputs squared."""

    def call(*given: Tensor) -> Outputs:
        return tuple(out * out for out in form(*(2 * t for t in given)))

    return call


@pytest.mark.parametrize("op", OPS)
def test_compiled_by_inductor(op: str) -> None:
    case = OPS[op](Inputs(fitting(op, MIXED), torch.float32, DEVICE))
    torch._dynamo.reset()
    compiled = torch.compile(between(case.call), fullgraph=True)
    case = case._replace(call=compiled, exact=between(case.exact), plain=between(case.plain))
    found = wrong(case, torch.float32)
    assert not found, "\n".join(found)


def test_compiled_for_any_number_of_rows() -> None:
    """Other rows and bags run, and give what they give without the compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(momkd.functional.gated_attention_pool, fullgraph=True, dynamic=True)
    for lengths in (MIXED, (3, 40, 0), (1, 2, 3, 4, 60)):
        given = Inputs(lengths, torch.bfloat16, DEVICE)
        x, *weights = cases.gated_attention_pool(given, **GATE).tensors
        x.requires_grad_()
        pooled = [form(x, given.offsets, *weights) for form in (compiled, momkd.functional.gated_attention_pool)]
        assert torch.equal(*pooled)
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in pooled))


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("op", ["gated_attention_pool", "graph_attention"])
def test_autocast(op: str, dtype: torch.dtype) -> None:
    """Inputs of float32 are computed with in half precision, and gradients come back in float32."""
    case = OPS[op](Inputs(fitting(op, MIXED), torch.float32, DEVICE), backend="triton")
    # Values that the dtype holds: what casting itself rounds away is not to be judged here.
    case = case._replace(tensors=[t.to(dtype).to(t.dtype) for t in case.tensors])
    call = case.call

    def cast(*given: Tensor) -> Outputs:
        with torch.autocast(DEVICE.type, dtype=dtype):
            return call(*given)

    found = wrong(case._replace(call=cast), dtype)
    assert not found, "\n".join(found)
    mine = leaves(case)
    out = cast(*mine)
    assert out[0].dtype == dtype
    assert {g.dtype for g in gradients(out, mine, cotangents(out, 1))} == {torch.float32}


@about_cuda
@pytest.mark.parametrize("op", OPS)
def test_captured_and_replayed(op: str) -> None:
    """Forward and backward as one CUDA graph, replayed on other values."""
    case = OPS[op](Inputs(fitting(op, MIXED), torch.bfloat16, DEVICE), backend="triton")
    mine = leaves(case)
    grads = [g.to(torch.bfloat16).double() for g in cotangents(case.call(*mine), case.differentiable)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            out = case.call(*mine)
            gradients(out, mine, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.call(*mine)
        got = gradients(out, mine, grads)
    for seed in (1, 2):
        other = OPS[op](Inputs(fitting(op, MIXED), torch.bfloat16, DEVICE, seed))
        with torch.no_grad():
            for leaf, values in zip(mine, other.tensors, strict=True):
                leaf.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        fresh = leaves(case._replace(tensors=[t.detach() for t in mine]))
        wanted = case.call(*fresh)
        for a, b in zip(out, wanted, strict=True):
            assert torch.equal(a, b)
        for name, a, b in zip(case.names, got, gradients(wanted, fresh, grads), strict=True):
            assert_close(a, b, ANOTHER_ORDER, f"d {name}")


@pytest.mark.parametrize("op", ["gated_attention_pool", "attention_pool"])
def test_tuned_on_this_device(op: str, tmp_path: Path) -> None:
    """No candidate fails, what is chosen is kept on disk and taken, and results stay right."""
    dtype = torch.bfloat16
    case = OPS[op](Inputs((3, 0, 17) if REHEARSING else MIXED, dtype, DEVICE), backend="triton")
    with warnings.catch_warnings(), momkd.tune():
        warnings.filterwarnings("error", message="momkd")
        found = wrong(case, dtype)
    assert not found, "\n".join(found)
    (file,) = tmp_path.rglob("tiles.json")
    tuned = json.loads(file.read_text())["tiles"]
    kernels = {key.split(" | ")[0].split()[0] for key in tuned}
    assert "pool_backward" in kernels
    assert len(kernels) >= 2
    before = file.stat().st_mtime_ns
    found = wrong(case, dtype)
    assert not found, "\n".join(found)
    assert file.stat().st_mtime_ns == before


@about_cuda
def test_tuning_times_kernels_and_not_the_host() -> None:
    small = torch.zeros(16, device=DEVICE)

    def slow_host() -> None:
        time.sleep(0.02)
        small.add_(1)

    large = torch.zeros(1 << 28, device=DEVICE)  # 1 GiB, read and written: 0.3 ms at 7 TB/s
    assert gpu.seconds(slow_host) < 5e-3
    assert 2.5e-4 < gpu.seconds(lambda: large.add_(1)) < 5e-2

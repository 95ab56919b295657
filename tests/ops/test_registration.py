"""What all ops owe to how they are registered: missing derivatives raise, modes see them, changes are counted."""

from __future__ import annotations

import operator
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from momkd import dispatch, ops
from momkd import functional as F
from tests.ops.cases import OFFSETS, differentiable

NAMES = tuple(differentiable())
BACKENDS = ("torch", "native", "triton")


def require(op: str, backend: str) -> None:
    able, reason = dispatch.can_run(op, backend, (torch.zeros(1, 1, 1),))
    if not able:
        pytest.skip(f"{backend}: {reason}")


def bank() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """memory, usage, z, row_class"""
    memory = torch.nn.functional.normalize(torch.randn(2, 3, 4), dim=-1)
    return memory, torch.zeros(2, 3), torch.randn(7, 4), torch.arange(7) % 2


# -- derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_raises(name: str) -> None:
    call, inputs = differentiable()[name]
    message = f"momkd::{name}: expected tensors without tangents, .* use reverse mode"
    for at, tensor in enumerate(inputs):

        def of_one(t: Tensor, at: int = at) -> Tensor:
            return call(*inputs[:at], t, *inputs[at + 1 :])

        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(of_one, (tensor,), (torch.ones_like(tensor),))
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[0].clone().requires_grad_(requires_grad), torch.ones_like(inputs[0]))
            with pytest.raises(NotImplementedError, match=message):
                call(dual, *inputs[1:])
            assert call(*inputs).isfinite().all(), "tensors without a tangent are welcome"


def test_forward_mode_of_an_update_raises_and_rows_are_constants() -> None:
    memory, usage, z, row_class = bank()
    weights = torch.ones(7)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=r"momkd::ema_scatter_: .* detach it first"):
            F.ema_scatter_(
                memory, usage, z, row_class, momentum=0.9, weights=forward_ad.make_dual(weights, torch.ones(7))
            )
        sums, _ = F.ema_accumulate(memory, forward_ad.make_dual(z, torch.ones_like(z)), row_class)
        assert forward_ad.unpack_dual(sums).tangent is None


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_raises(name: str) -> None:
    call, inputs = differentiable()[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    gradients = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
    assert all(g.requires_grad for g in gradients)
    with pytest.raises(RuntimeError, match=f"momkd::{name}_backward: expected no derivative of it to be wanted"):
        sum(g.sum() for g in gradients).backward()


@pytest.mark.parametrize("name", NAMES)
def test_functional_reverse_mode_agrees_with_autograd(name: str) -> None:
    call, inputs = differentiable(torch.float64)[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    want = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    every = tuple(range(len(inputs)))
    got = torch.func.grad(lambda *t: call(*t).square().sum(), argnums=every)(*inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    out, pull = torch.func.vjp(call, *inputs)
    for mine, theirs in zip(pull(2 * out), want, strict=True):
        torch.testing.assert_close(mine, theirs)


# -- what torch sees of a call -----------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Keeps the calls of our ops with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "momkd":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mode_sees_forward_and_backward_and_results_are_no_aliases(name: str, backend: str) -> None:
    require(name, backend)
    call, inputs = differentiable(backend=backend)[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    with Recorder() as recorder:
        call(*leaves).sum().backward()
    assert [op.name() for op, _ in recorder.calls] == [f"momkd::{name}", f"momkd::{name}_backward"]
    for op, args in recorder.calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_updates_count_as_changes(backend: str) -> None:
    require("ema_scatter_", backend)
    memory, usage, z, row_class = bank()
    updates = [
        lambda: F.ema_scatter_(memory, usage, z, row_class, momentum=0.9, backend=backend),
        lambda: F.ema_apply_(memory, usage, torch.ones(2, 3, 4), torch.ones(2, 3), momentum=0.9, backend=backend),
    ]
    for update in updates:
        weight = torch.randn(2, 3, 4, requires_grad=True)
        loss = (weight * memory).sum()
        before = memory._version, usage._version
        update()
        assert memory._version > before[0]
        assert usage._version > before[1]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():
        F.ema_scatter_(*(t.clone() for t in (memory, usage, z, row_class)), momentum=0.9, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_a_kernel(backend: str) -> None:
    require("attention_pool", backend)
    call, inputs = differentiable(backend=backend)["attention_pool"]

    def step(autocast: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call(*leaves)
            out.square().sum().backward()
        return [out, *(leaf.grad for leaf in leaves)]

    for within, without in zip(step(True), step(False), strict=True):
        assert torch.equal(within, without)


def test_the_compiler_does_not_look_into_kernels() -> None:
    """Called by code that torch.compile passes over, whose callees it compiles."""
    values, scores = torch.randn(7, 4, requires_grad=True), torch.randn(7, 2)
    traced: list[object] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        traced.extend(node.target for node in module.graph.nodes if node.op.startswith("call_"))
        return module.forward

    @torch._dynamo.disable(recursive=False)
    def passed_over() -> Tensor:
        out = ops.attention_pool(values, scores, OFFSETS, "torch")[0]
        torch.autograd.backward(out, torch.ones_like(out))
        with torch.inference_mode():
            return ops.attention_pool(values, scores, OFFSETS, "torch")[0]

    torch._dynamo.reset()
    torch.compile(lambda: passed_over() + 1, backend=backend)()
    assert values.grad is not None
    assert traced == [operator.add]


def test_a_call_does_not_import_the_compiler() -> None:
    code = """
import sys, torch, momkd
from momkd import functional as F
x = torch.randn(5, 3, requires_grad=True)
F.attention_pool(x, torch.randn(5, 1), torch.tensor([0, 5], dtype=torch.int32)).sum().backward()
assert x.grad is not None and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_ops_are_torch_ops() -> None:
    for name in ops.__all__:
        assert getattr(ops, name) is getattr(torch.ops.momkd, name).default
        assert torch.Tag.pt2_compliant_tag in getattr(ops, name).tags

# mypy: disable-error-code="no-untyped-call"
"""How every op is registered with torch: one kernel for all devices, shapes for tracing, and autograd.

This is what `torch.library.custom_op` registers, at less than half of its cost a call: `custom_op` asks the schema for
default values in every call, and looks for aliases among results, of which our ops have none (their tests look).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import increment_version

LIBRARY = torch.library.Library("momkd", "FRAGMENT")
_KERNELS: dict[str, Callable[..., Any]] = {}  # by the name of the op


def custom_op(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register `momkd::name` with the schema of the function's signature; the first argument is a tensor.

    The public functions have already cast what autocast should cast; inside, an op accumulates in float32, and
    autocast must not turn that into half precision behind its back.
    """
    mutated = tuple(mutates_args)

    def register(function: Callable[..., Any]) -> Any:
        def kernel(*args: Any) -> Any:
            device = args[0].device.type
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return function(*args)
            return function(*args)

        schema = torch.library.infer_schema(function, mutates_args=mutated)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _untraced(kernel), "CompositeExplicitAutograd")
        op = getattr(torch.ops.momkd, name).default
        if mutated:
            _count_changes(op)
        else:
            _KERNELS[op.name()] = kernel
        return op

    return register


def register_fake(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that gives the shapes of an op's results, for tracing and for meta tensors."""
    return torch.library.register_fake(op.name(), lib=LIBRARY)  # type: ignore[no-any-return]


def register_autograd(
    op: Any, backward: Callable[..., Any] | None = None, *, setup_context: Callable[..., None] | None = None
) -> None:
    """Register an op's backward, as `torch.library.register_autograd` does; None for an op that has no derivative.

    A derivative that is missing is an error when it is asked for: a second one at its backward, and one in forward
    mode, which would else be zero in silence, at once.
    """
    name = op.name()
    kernel = _KERNELS.get(name)
    returns_list = [str(r.type) for r in op._schema.returns] == ["List[Tensor]"]

    def below(keys: Any, args: Iterable[Any]) -> Any:
        with _C._AutoDispatchBelowAutograd():
            if kernel is not None and _only_dense(keys.raw_repr()):
                return kernel(*args)  # to which torch's dispatcher would come by another way round
            return op.redispatch(keys, *args)

    class Recorded(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            given = args[:-1]
            result = below(args[-1], given)
            if setup_context is not None:
                setup_context(ctx, given, result)
            return tuple(result) if returns_list else result  # of a list, autograd sees no tensor

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return differentiate(ctx, *grads)

    @_untraced
    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if backward is None:
            raise RuntimeError(
                f"{name}: expected no derivative of it to be wanted, got a backward through it; it has none (nor has "
                "an op of momkd a second derivative): leave create_graph=False, or detach its result"
            )
        return (*backward(ctx, *grads), None)

    @_untraced
    def autograd(keys: Any, *args: Any) -> Any:
        if getattr(forward_ad, "_current_level", 0) >= 0:
            _refuse_tangents(name, args, differentiable=backward is not None)
        keys = keys & _C._after_autograd_keyset
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*args)):
            return below(keys, args)
        with enable_single_level_autograd_function() if _C._are_functorch_transforms_active() else nullcontext():
            result = Recorded.apply(*args, keys)  # type: ignore[attr-defined]
        return list(result) if returns_list else result

    Recorded.__name__ = f"BackwardOf_{name.replace('::', '_')}"
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def call_backward(op: Any, *args: Any) -> Any:
    """Call the op of a backward; where no second derivative can be asked for, autograd is not asked either."""
    if torch.is_grad_enabled():
        return op(*args)
    with _C._AutoDispatchBelowAutograd():
        return op(*args)


@cache
def _only_dense(keys: int) -> bool:
    """Whether nothing is between autograd and the kernel: no mode, no tracing, no functional transform."""
    rest = _C.DispatchKeySet.from_raw_repr(keys).remove(_C.DispatchKey.ADInplaceOrView)
    return rest.highestPriorityTypeId() in (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, into which torch.compile does not look when it is called amid code that is being compiled."""
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def run(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # importing it takes seconds
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return run


def _count_changes(op: Any) -> None:
    """Tell autograd of each call which arguments it changes, so that a backward that kept them raises."""
    changed = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def count(keys: Any, *args: Any) -> Any:
        for i in changed:
            increment_version(args[i])
        with _C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keys & _C._after_ADInplaceOrView_keyset, *args)

    LIBRARY.impl(op.name(), count, "ADInplaceOrView", with_keyset=True)


def _refuse_tangents(name: str, args: Iterable[Any], *, differentiable: bool) -> None:
    for tensor in _tensors(args):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            remedy = "use reverse mode (torch.autograd.grad, torch.func.vjp)" if differentiable else "detach it first"
            raise NotImplementedError(
                f"{name}: expected tensors without tangents, because it has no derivative in forward mode "
                f"(torch.func.jvp, torch.autograd.forward_ad), got one {tuple(tensor.shape)} with a tangent; {remedy}"
            )


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, list):
            yield from _tensors(a)

"""State dicts from outside: looked at before anything of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from momkd.errors import InputError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_state_dict(state: Any, source: str = "checkpoint", *, finite: bool = True) -> dict[str, Tensor]:
    """The tensors of a state dict by name, once each is dense and holds values of its own.

    Args:
        state: what should map names to tensors.
        source: what messages call it.
        finite: refuse NaN, infinity, what is infinite in float32, and numbers that are not float16, bfloat16, float32
            or float64.

    Raises:
        InputError: no mapping, a name that is no text, or a value that is no tensor, sparse, nested, quantised, without
            storage (meta), or expanded from fewer values.
    """
    if not isinstance(state, Mapping):
        raise InputError(f"{source}: expected a state dict, got {type(state).__name__}; save model.state_dict()")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise InputError(
                f"{source}: expected names of tensors as text, got a name of type {type(name).__name__}; "
                "save model.state_dict()"
            )
        if (wrong := _unusable(tensor, finite)) is not None:
            raise InputError(f"{source}: {_shown(name)}: expected {wrong[0]}, got {wrong[1]}; {wrong[2]}")
    return dict(state)


def _unusable(tensor: Any, finite: bool) -> tuple[str, str, str] | None:
    """What a tensor should be, what it is instead, and what to do; None where nothing is wrong."""
    dense, again = "a dense tensor", "save model.state_dict() of a plain model"
    if not isinstance(tensor, Tensor):
        return "a tensor", f"a {type(tensor).__name__}", "save model.state_dict()"
    if tensor.is_nested or tensor.layout != torch.strided:
        return dense, "a sparse or nested one", again
    if tensor.is_quantized:
        return dense, "a quantised one", again
    if tensor.is_meta:
        return "a tensor with values", "one without (device meta)", again
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        came = f"{tuple(tensor.shape)} expanded from {tensor.untyped_storage().nbytes()} bytes"
        return "a tensor of its own values", came, "save tensor.contiguous()"
    if finite and tensor.dtype not in _FLOATS:
        return "a tensor of floating-point numbers", str(tensor.dtype).removeprefix("torch."), again
    if finite and not bool(tensor.isfinite().all()):
        return "finite values", "NaN or infinity", "take an earlier checkpoint, or train again"
    if finite and tensor.dtype == torch.float64 and not bool(tensor.float().isfinite().all()):
        return "values that float32 holds", "larger ones", "take an earlier checkpoint, or train again"
    return None


def _shown(name: str) -> str:
    """A name in a message: as it is, unless it is long or odd."""
    return name if name.isprintable() and len(name) <= 120 else repr(name[:120])

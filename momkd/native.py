"""The native CPU kernels (`momkd._C`): torch tensors in, raw pointers out. No mathematics here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def extension() -> tuple[Any, str]:
    """The module `momkd._C`, or None and why it is not there."""
    try:
        return importlib.import_module("momkd._C"), "built"
    except ImportError as error:
        return None, f"the extension momkd._C is not installed ({error}); reinstall with a C++ compiler"


def can_run(args: Sequence[Tensor | None]) -> tuple[bool, str]:
    """Whether the native kernels take these tensors: the first is memory (C, K, S), the second rows or sums."""
    module, reason = extension()
    if module is None:
        return False, reason
    for tensor in args:
        if tensor is not None and tensor.device.type != "cpu":
            return False, f"runs on the CPU, the tensors are on {tensor.device}"
    if args and args[0] is not None and (args[0].dtype != torch.float32 or not args[0].is_contiguous()):
        return (
            False,
            f"takes a contiguous float32 memory, got {args[0].dtype} with strides {args[0].stride()}",
        )
    if len(args) > 1 and args[1] is not None and args[1].dtype not in _DTYPES:
        return False, f"takes float32, float16 and bfloat16 rows, got {args[1].dtype}"
    return True, "CPU tensors"


def _row_arguments(z: Tensor, row_class: Tensor, weights: Tensor | None) -> tuple[tuple[int, ...], list[Tensor]]:
    """Pointers and sizes of the rows, and the tensors that must live until the call is over."""
    rows = z if z.stride(1) == 1 or z.shape[1] == 1 else z.contiguous()
    labels = row_class.contiguous()
    masses = None if weights is None else weights.to(torch.float32).contiguous()
    pointers = (
        rows.data_ptr(),
        _DTYPES[rows.dtype],
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        labels.data_ptr(),
        0 if masses is None else masses.data_ptr(),
    )
    return pointers, [rows, labels] + ([] if masses is None else [masses])


def ema_accumulate(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    classes, slots, _ = memory.shape
    sums, mass = torch.empty_like(memory), memory.new_empty(classes, slots)
    assignments = torch.empty(z.shape[0], dtype=torch.int32)
    pointers, _alive = _row_arguments(z, row_class, weights)
    extension()[0].ema_accumulate(
        *pointers,
        memory.data_ptr(),
        classes,
        slots,
        normalize,
        torch.get_num_threads(),
        sums.data_ptr(),
        mass.data_ptr(),
        assignments.data_ptr(),
    )
    return sums, mass, assignments


def ema_apply_(memory: Tensor, usage: Tensor, sums: Tensor, mass: Tensor, momentum: float) -> None:
    sums, mass = sums.to(torch.float32).contiguous(), mass.to(torch.float32).contiguous()
    extension()[0].ema_apply(
        memory.data_ptr(),
        usage.data_ptr(),
        sums.data_ptr(),
        mass.data_ptr(),
        *memory.shape,
        momentum,
        torch.get_num_threads(),
    )


def ema_scatter_(
    memory: Tensor,
    usage: Tensor,
    z: Tensor,
    row_class: Tensor,
    weights: Tensor | None,
    momentum: float,
    normalize: bool,
) -> Tensor:
    classes, slots, _ = memory.shape
    assignments = torch.empty(z.shape[0], dtype=torch.int32)
    pointers, _alive = _row_arguments(z, row_class, weights)
    extension()[0].ema_scatter(
        *pointers,
        memory.data_ptr(),
        classes,
        slots,
        normalize,
        usage.data_ptr(),
        momentum,
        assignments.data_ptr(),
        torch.get_num_threads(),
    )
    return assignments

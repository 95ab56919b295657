"""The momentum update of the memory by `momkd._C`."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.native import expect, extension, rows


def _row_arguments(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None
) -> tuple[tuple[int, ...], list[Tensor]]:
    """Pointers and sizes of the rows, and the tensors that must live until the call is over."""
    laid, about = rows("z", z)
    expect("z", z, (z.shape[0], memory.shape[2]))
    expect("row_class", row_class, (z.shape[0],), torch.int64)
    if weights is not None:
        expect("weights", weights, (z.shape[0],))
    labels = row_class.contiguous()
    masses = None if weights is None else weights.to(torch.float32).contiguous()
    pointers = (*about, labels.data_ptr(), 0 if masses is None else masses.data_ptr())
    return pointers, [laid, labels] + ([] if masses is None else [masses])


def _bank(memory: Tensor, usage: Tensor | None = None) -> tuple[int, int, int]:
    """(C, K, S) of a memory that is read or moved in place as it lies, and so is `usage`."""
    if memory.ndim != 3:
        raise ValueError(f"memory: expected (C, K, S), got {tuple(memory.shape)}; one class alone is memory[None]")
    classes, slots, width = memory.shape
    if usage is not None:
        expect("usage", usage, (classes, slots), torch.float32)
        if not usage.is_contiguous():
            raise ValueError(f"usage: expected to be contiguous, got strides {usage.stride()}; use usage.contiguous()")
    return classes, slots, width


def ema_accumulate(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    classes, slots, _ = _bank(memory)
    sums, mass = torch.empty_like(memory), memory.new_empty(classes, slots)
    assignments = row_class.new_empty(z.shape[0], dtype=torch.int32)
    pointers, _alive = _row_arguments(memory, z, row_class, weights)
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
    shape = _bank(memory, usage)
    expect("sums", sums, shape)
    expect("mass", mass, shape[:2])
    sums, mass = sums.to(torch.float32).contiguous(), mass.to(torch.float32).contiguous()
    extension()[0].ema_apply(
        memory.data_ptr(),
        usage.data_ptr(),
        sums.data_ptr(),
        mass.data_ptr(),
        *shape,
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
    classes, slots, _ = _bank(memory, usage)
    assignments = row_class.new_empty(z.shape[0], dtype=torch.int32)
    pointers, _alive = _row_arguments(memory, z, row_class, weights)
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

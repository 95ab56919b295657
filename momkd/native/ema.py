"""The momentum update of the memory by `momkd._C`."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.native import extension, rows


def _row_arguments(z: Tensor, row_class: Tensor, weights: Tensor | None) -> tuple[tuple[int, ...], list[Tensor]]:
    """Pointers and sizes of the rows, and the tensors that must live until the call is over."""
    laid, about = rows(z)
    labels = row_class.contiguous()
    masses = None if weights is None else weights.to(torch.float32).contiguous()
    pointers = (*about, labels.data_ptr(), 0 if masses is None else masses.data_ptr())
    return pointers, [laid, labels] + ([] if masses is None else [masses])


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

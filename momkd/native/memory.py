"""The ops on the memory by `momkd._C`."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.native import bags_of, expect, extension, laid_out, rows


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _like(tensor: Tensor, needed: bool) -> Tensor | None:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None


def _rows_and_bank(z: Tensor, memory: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int], Tensor]:
    """z (N, S) and what the kernels are told of it, and the memory (C, K, S) in float32."""
    z, about = rows("z", z)
    if memory.ndim != 3:
        raise ValueError(f"memory: expected (C, K, S), got {tuple(memory.shape)}; one class alone is memory[None]")
    expect("memory", memory, (*memory.shape[:2], z.shape[1]))
    return z, about, laid_out(memory)


def memory_similarity(z: Tensor, memory: Tensor, reduce: str, tau: float) -> tuple[Tensor, Tensor]:
    z, about, bank = _rows_and_bank(z, memory)
    value = bank.new_empty(z.shape[0], bank.shape[0])
    slots = torch.empty_like(value, dtype=torch.int32)
    extension()[0].memory_similarity(
        about,
        bank.data_ptr(),
        tuple(bank.shape),
        tau if reduce == "lse" else 0.0,
        value.data_ptr(),
        slots.data_ptr(),
        torch.get_num_threads(),
    )
    return value, slots


def memory_similarity_backward(
    grad: Tensor, z: Tensor, memory: Tensor, reduce: str, tau: float, slots: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    z, about, bank = _rows_and_bank(z, memory)
    expect("grad", grad, (z.shape[0], bank.shape[0]))
    expect("slots", slots, (z.shape[0], bank.shape[0]), torch.int32)
    grad, slots = laid_out(grad), slots.contiguous()
    d_z, d_bank = _like(z, needs[0]), _like(bank, needs[1])
    extension()[0].memory_similarity_backward(
        grad.data_ptr(),
        about,
        bank.data_ptr(),
        tuple(bank.shape),
        tau if reduce == "lse" else 0.0,
        slots.data_ptr(),
        _pointer(d_z),
        _pointer(d_bank),
        torch.get_num_threads(),
    )
    return d_z, None if d_bank is None else d_bank.to(memory.dtype)


def soft_angle_loss(z: Tensor, memory: Tensor, labels: Tensor, margin: float, tau: float, beta: float) -> Tensor:
    z, about, bank = _rows_and_bank(z, memory)
    expect("labels", labels, (z.shape[0],), torch.int64)
    labels, losses = labels.contiguous(), bank.new_empty(z.shape[0])
    extension()[0].soft_angle_loss(
        about,
        bank.data_ptr(),
        tuple(bank.shape),
        labels.data_ptr(),
        margin,
        tau,
        beta,
        losses.data_ptr(),
        torch.get_num_threads(),
    )
    return losses


def soft_angle_loss_backward(
    grad: Tensor,
    z: Tensor,
    memory: Tensor,
    labels: Tensor,
    margin: float,
    tau: float,
    beta: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    expect("labels", labels, (z.shape[0],), torch.int64)
    z, about, bank = _rows_and_bank(z, memory)
    expect("grad", grad, (z.shape[0],))
    grad, labels = laid_out(grad), labels.contiguous()
    d_z, d_bank = _like(z, needs[0]), _like(bank, needs[1])
    extension()[0].soft_angle_loss_backward(
        grad.data_ptr(),
        about,
        bank.data_ptr(),
        tuple(bank.shape),
        labels.data_ptr(),
        margin,
        tau,
        beta,
        _pointer(d_z),
        _pointer(d_bank),
        torch.get_num_threads(),
    )
    return d_z, None if d_bank is None else d_bank.to(memory.dtype)


def memory_guided_pool(
    z: Tensor, values: Tensor, memory: Tensor, offsets: Tensor, temperature: Tensor, per_class: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (z, about, bank), (values, pooling) = _rows_and_bank(z, memory), rows("values", values)
    expect("values", values, (z.shape[0], values.shape[1]))
    (offsets, bags), classes = bags_of(offsets), bank.shape[0]
    heads = classes if per_class else 1
    pooled, attention = bank.new_empty(bags, heads, values.shape[1]), bank.new_empty(z.shape[0], heads)
    slots = bank.new_empty(z.shape[0], classes, dtype=torch.int32)
    extension()[0].memory_guided_pool(
        about,
        pooling,
        bank.data_ptr(),
        tuple(bank.shape),
        offsets.data_ptr(),
        bags,
        per_class,
        float(temperature),
        pooled.data_ptr(),
        attention.data_ptr(),
        slots.data_ptr(),
        torch.get_num_threads(),
    )
    return pooled.to(values.dtype), attention, slots


def memory_guided_pool_backward(
    grad: Tensor,
    z: Tensor,
    values: Tensor,
    memory: Tensor,
    offsets: Tensor,
    temperature: Tensor,
    per_class: bool,
    pooled: Tensor,
    attention: Tensor,
    slots: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (z, about, bank), (values, pooling) = _rows_and_bank(z, memory), rows("values", values)
    expect("values", values, (z.shape[0], values.shape[1]))
    (offsets, bags), classes = bags_of(offsets), bank.shape[0]
    heads = classes if per_class else 1
    expect("grad", grad, (bags, heads, values.shape[1]))
    expect("attention", attention, (z.shape[0], heads))
    expect("slots", slots, (z.shape[0], classes), torch.int32)
    grad, attention, slots = laid_out(grad), laid_out(attention), slots.contiguous()
    d_z, d_values = _like(z, needs[0]), _like(values, needs[1])
    d_temperature = bank.new_empty(1) if needs[2] else None
    extension()[0].memory_guided_pool_backward(
        grad.data_ptr(),
        about,
        pooling,
        bank.data_ptr(),
        tuple(bank.shape),
        offsets.data_ptr(),
        bags,
        per_class,
        float(temperature),
        attention.data_ptr(),
        slots.data_ptr(),
        _pointer(d_z),
        _pointer(d_values),
        _pointer(d_temperature),
        torch.get_num_threads(),
    )
    if d_temperature is not None:
        d_temperature = d_temperature.reshape(temperature.shape).to(temperature.dtype)
    return d_z, d_values, d_temperature

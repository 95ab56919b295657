"""Checks that the public functions share. Each raises a ValueError that says expected, got and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CAST = FLOATS[:3]  # by autocast
_FEW = 1024  # offsets


def shape(name: str, tensor: Tensor, expected: Sequence[int | None], words: str) -> None:
    """`expected` holds a size, or None where any size will do; `words` is how the shape is written in the docs."""
    got = tensor.shape
    fits = len(got) == len(expected)
    if fits:
        for want, size in zip(expected, got):  # noqa: B905 (as long as each other)
            if want is not None and want != size:
                fits = False
    if not fits:
        sizes = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name}: expected {words} = ({sizes}), got {tuple(got)}")


def floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}; use {name}.float()"
        )


def same_device(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    device = reference.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name}: expected on {device} like {reference_name}, got {tensor.device}; "
                f"use {name}.to({reference_name}.device)"
            )


def offsets(tensor: Tensor, rows: int) -> None:
    """Dtype and shape always; the values when they lie on the host, where looking costs nothing."""
    if tensor.dtype != torch.int32 or tensor.ndim != 1 or tensor.shape[0] < 1:
        raise ValueError(
            f"offsets: expected int32 (B+1,), got {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}; "
            "use Bags.from_list or offsets.int()"
        )
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if tensor.shape[0] <= _FEW:  # a list is quicker than three calls of torch
        try:
            ends = tensor.tolist()
        except RuntimeError:  # torch 2.8, inside torch.func
            ends = []
        if ends and ends[0] == 0 and ends[-1] == rows and sorted(ends) == ends:
            return
    first, last = int(tensor[0]), int(tensor[-1])
    if first != 0 or last != rows:
        raise ValueError(f"offsets: expected to run from 0 to N = {rows}, got {first} to {last}")
    down = tensor[1:] < tensor[:-1]  # the difference would wrap
    if bool(down.any()):
        bag = int(down.nonzero()[0])
        raise ValueError(f"offsets: expected never to decrease, but offsets[{bag + 1}] < offsets[{bag}]")


def memory(tensor: Tensor, width: int | None = None) -> None:
    shape("memory", tensor, (None, None, width), "(C, K, S)")
    floating("memory", tensor)
    if 0 in tensor.shape:
        raise ValueError(f"memory: expected at least one class, slot and column, got {tuple(tensor.shape)}")


def labels(name: str, tensor: Tensor, rows: int, classes: int, *, values: bool = True) -> None:
    """int64 (rows,); with `values`, those are looked at, on the host only: −1 for none, else under `classes`."""
    shape(name, tensor, (rows,), "(N,)" if name == "row_class" else "(B,)")
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, got {tensor.dtype}; use {name}.long()")
    if not values or tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    low, high = (int(end) for end in tensor.aminmax())
    if low < -1 or high >= classes:
        bad = high if high >= classes else low
        first = int((tensor == bad).nonzero()[0])
        raise ValueError(f"{name}: expected 0 to {classes - 1}, or -1 for none, got {bad} at index {first}")


def fraction(name: str, value: float, *, below_one: bool = False) -> None:
    top = value < 1 if below_one else value <= 1
    if not (value >= 0 and top):
        raise ValueError(f"{name}: expected 0 <= {name} {'<' if below_one else '<='} 1, got {value}")


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def generator(generator: torch.Generator | None) -> None:
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator: expected one on the CPU, so that every device draws the same, got {generator.device}; "
            "use torch.Generator()"
        )


def choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def seed(value: int | Tensor | None, device: torch.device) -> Tensor:
    """An int64 scalar on the device, so that no op reads it on the host; None draws one from torch's generator."""
    if value is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise ValueError(f"seed: expected an int or an int64 scalar, got {value.dtype} {tuple(value.shape)}")
        return value.reshape(()).to(device)
    return torch.full((), value, dtype=torch.int64, device=device)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, floating tensors take its dtype, as in torch's own matrix products: all but float64.

    An op computes in the dtype of its first tensor; where that is float64, the others stay what they are too.
    """
    first = tensors[0]
    assert first is not None
    kind = first.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # of a meta device torch can't be asked
        return tensors
    if first.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t is not None and t.dtype in _CAST else t for t in tensors)

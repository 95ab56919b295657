"""The native CPU kernels (`momkd._C`): torch tensors in, raw pointers out. No mathematics here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from momkd import env
from momkd.errors import InputError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def extension() -> tuple[Any, str]:
    """Return the module `momkd._C`, or None and why it is not there.

    Raises:
        InputError: MOMKD_ISA names an instruction set that this build or this processor lacks.
    """
    try:
        module = importlib.import_module("momkd._C")
    except ImportError as error:
        return None, f"the extension momkd._C is not installed ({error}); reinstall with a C++ compiler"
    if isa := env.instruction_set():
        try:
            module.use_isa(isa)
        except ValueError as error:
            raise InputError(f"MOMKD_ISA: {str(error).removeprefix('isa: ')}; unset it or correct it") from error
    return module, "built"


_MODULES = {
    "gated_attention_pool": "gate",
    "gated_attention_scores": "gate",
    "attention_pool": "pooling",
    "graph_attention": "graph",
    "memory_similarity": "memory",
    "memory_guided_pool": "memory",
    "soft_angle_loss": "memory",
    "ema_accumulate": "ema",
    "ema_apply_": "ema",
    "ema_scatter_": "ema",
}


def bfloat16_unit() -> str:
    """Return by what this CPU multiplies bfloat16 faster than float32: "AMX", "AVX-512-BF16", "" where by nothing."""
    for name, feature in (("AMX", "_is_amx_tile_supported"), ("AVX-512-BF16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, feature, bool)():
            return name
    return ""


def kernels(op: str) -> ModuleType:
    """The module that holds the functions of `op`."""
    return importlib.import_module(f"momkd.native.{_MODULES[op]}")


def can_run(op: str, args: Sequence[Tensor | None] = ()) -> tuple[bool, str]:
    """Whether the native kernels take these tensors. Those of an EMA begin with the memory and the rows or sums."""
    module, reason = extension()
    if module is None:
        return False, reason
    tensors = [t for t in args if t is not None]
    if other := [t.device for t in tensors if t.device.type != "cpu"]:
        return False, f"runs on the CPU, the tensors are on {other[0]}"
    if op.startswith("ema_") and tensors:
        memory, *tensors = tensors[:2]
        if memory.dtype != torch.float32 or not memory.is_contiguous():
            return False, f"takes a contiguous float32 memory, got {memory.dtype} with strides {memory.stride()}"
    if bad := [t.dtype for t in tensors if t.is_floating_point() and t.dtype not in DTYPES]:
        return False, f"takes float32, float16 and bfloat16, got {str(bad[0]).removeprefix('torch.')}"
    if empty := [tuple(t.shape) for t in tensors if 0 in t.shape[1:]]:
        return False, f"takes at least one column, head and slot, got {empty[0]}"
    return True, "CPU tensors"


# One small bag: its products take less time than what is around them. Measured against the loop over bags by
# benchmarks/bench_gate_grid.py.
_SMALL = 1 << 28  # multiplications
_FEW_ROWS = 1024  # of 16 bits


def _small_gate(*, x: Tensor, w_v: Tensor, offsets: Tensor | None = None, **_: Any) -> bool:
    if offsets is not None and offsets.shape[0] != 2:
        return False
    rows, width = x.shape
    return rows * width * 2 * w_v.shape[0] <= _SMALL and (x.dtype == torch.float32 or rows <= _FEW_ROWS)


# For what calls, of those that they can run, the native kernels give way to plain torch; of all others for none.
PLAIN_IS_QUICKER: dict[str, Callable[..., bool]] = {
    "gated_attention_pool": _small_gate,
    "gated_attention_scores": _small_gate,
}


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise ValueError for another shape, dtype or device: the kernels get an address and read what they are told.

    The values that serve as indices are checked in C++.
    """
    if tensor.shape != shape or (dtype is not None and tensor.dtype != dtype) or tensor.device.type != "cpu":
        wanted, got = (str(t).removeprefix("torch.") for t in (dtype or "float", tensor.dtype))
        raise ValueError(
            f"{name}: expected {wanted} {tuple(shape)} on cpu, got {got} {tuple(tensor.shape)} on {tensor.device}; "
            "call the op through momkd.functional, whose docs say what fits"
        )


def bags_of(offsets: Tensor) -> tuple[Tensor, int]:
    """Return contiguous offsets and the number of bags; the values are checked in C++."""
    if offsets.dtype != torch.int32 or offsets.ndim != 1 or offsets.shape[0] < 1 or offsets.device.type != "cpu":
        raise ValueError(
            f"offsets: expected int32 (B+1,) on cpu, got {str(offsets.dtype).removeprefix('torch.')} "
            f"{tuple(offsets.shape)} on {offsets.device}; use Bags.from_list or offsets.int()"
        )
    return offsets.contiguous(), offsets.shape[0] - 1


def laid_out(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor, contiguous and of `dtype`; itself where it is that already."""
    if tensor.dtype == dtype:  # asked first: a call of torch that does nothing takes a microsecond or two
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    return tensor.to(dtype).contiguous()


_LARGE = 4 << 20  # bytes from which large pages are worth asking for


def fresh(tensor: Tensor) -> Tensor:
    """An empty tensor whose memory, where it is much, the system hands out in large pages."""
    if tensor.nbytes >= _LARGE:
        extension()[0].use_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def rows(name: str, tensor: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """Return a tensor (n, width) with a contiguous last dimension, and what the kernels are told of it.

    The tensor must live until the call is over.
    """
    if tensor.ndim != 2 or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected float32, float16 or bfloat16 (n, width) on cpu, got "
            f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}; use {name}.float()"
        )
    laid = tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
    return laid, (laid.data_ptr(), DTYPES[laid.dtype], laid.shape[0], laid.shape[1], laid.stride(0))

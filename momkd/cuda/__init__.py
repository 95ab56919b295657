"""The CUDA kernels (csrc/cuda): by `momkd._cuda`, or where that is not built compiled by NVRTC through CuPy.

No mathematics here, and no CUDA context before a kernel starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from momkd.cuda import nvrtc

ROW_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_MOST = (("classes", 64), ("slots a class", 1024), ("columns", 512))
_LEAST_CAPABILITY = (8, 0)
_MODULES = dict.fromkeys(("ema_accumulate", "ema_apply_", "ema_scatter_"), "ema")


@cache
def extension() -> tuple[Any, str]:
    """The module `momkd._cuda`, or None and why it is not there."""
    try:
        return importlib.import_module("momkd._cuda"), "built"
    except ImportError as error:
        return None, f"momkd._cuda is not installed ({error})"


@cache
def available() -> tuple[bool, str]:
    """Whether there is something to start kernels with, and what."""
    module, reason = extension()
    if module is not None:
        return True, "by momkd._cuda"
    compiler, why_not = nvrtc.library()
    if compiler is not None:
        return True, "by NVRTC through CuPy"
    return False, f"{reason}, and {why_not}; install momkd where nvcc is, or its extra 'cuda'"


def kernels(op: str) -> ModuleType:
    """The module that holds the functions of `op`."""
    return importlib.import_module(f"momkd.cuda.{_MODULES[op]}")


def can_run(op: str, args: Sequence[Tensor | None] = ()) -> tuple[bool, str]:
    """Whether the CUDA kernels take these tensors: the memory (C, K, S), then the rows or sums, then others."""
    tensors = [t for t in args if t is not None]
    if other := [t.device for t in tensors if t.device.type != "cuda"]:
        return False, f"runs on an NVIDIA GPU, the tensors are on {other[0]}"
    if torch.version.hip is not None:
        return False, "runs on NVIDIA GPUs, this torch is built for AMD's"
    if tensors and (reason := unfit(*tensors[:2])):
        return False, reason
    able, reason = available()
    if not able:
        return False, reason
    if not torch.cuda.is_available():
        return False, "no GPU that torch can use"
    try:
        capability = torch.cuda.get_device_capability(tensors[0].device if tensors else None)
    except RuntimeError as error:
        return False, f"no GPU can be used: {' '.join(str(error).split())}"
    if capability < _LEAST_CAPABILITY:
        return False, "needs compute capability {}.{}, this GPU has {}.{}".format(*_LEAST_CAPABILITY, *capability)
    return True, f"tensors on a GPU, {reason}"


def unfit(memory: Tensor, rows: Tensor | None = None) -> str:
    """Why the kernels don't take a memory (C, K, S) and rows or sums of some dtype; empty if they do."""
    if memory.dtype != torch.float32 or not memory.is_contiguous():
        return f"takes a contiguous float32 memory, got {memory.dtype} with strides {memory.stride()}"
    for size, (what, most) in zip(memory.shape, _MOST, strict=False):
        if size > most:
            return f"takes a memory of at most {most} {what}, got {size}"
    if rows is not None and rows.dtype not in ROW_TYPES:
        return f"takes float32, float16 and bfloat16, got {str(rows.dtype).removeprefix('torch.')}"
    return ""


def start(name: str, task: bytes, blocks: int, threads: int, shared: int, device: torch.device) -> None:
    """Starts a kernel of csrc/cuda on torch's current stream of the device. An error of CUDA is a RuntimeError."""
    if blocks == 0:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    module, _ = extension()
    with torch.cuda.device(index):
        if module is not None:
            module.launch(name, task, blocks, threads, shared, index, stream)
        else:
            nvrtc.launch(name, task, blocks, threads, shared, index, stream)

"""The CUDA kernels (csrc/cuda): by `momkd._cuda`, or where that can't run here compiled by NVRTC through CuPy.

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
    """Return the module `momkd._cuda`, or None and why it is not there."""
    try:
        return importlib.import_module("momkd._cuda"), "built"
    except ImportError as error:
        return None, f"momkd._cuda is not installed ({error})"


def available() -> tuple[bool, str]:
    """Return whether there is something to start kernels with, and what; whether it fits a GPU says `launcher`."""
    module, reason = extension()
    if module is not None:
        return True, "by momkd._cuda"
    compiler, why_not = nvrtc.library()
    if compiler is not None:
        return True, "by NVRTC through CuPy"
    return False, f"{reason}, and {why_not}; install momkd where nvcc is, or its extra 'cuda'"


def launcher(capability: tuple[int, int]) -> tuple[Any, str]:
    """Return what starts kernels on a GPU of this compute capability and its name, or None and why nothing can.

    That is `momkd._cuda` if its code runs there, else `momkd.cuda.nvrtc`; both have the function `launch`.
    """
    module, reason = extension()
    if module is not None:
        reason = _unusable(module, capability)
        if not reason:
            return module, "by momkd._cuda"
    why_not = nvrtc.unusable(capability)
    if not why_not:
        return nvrtc, "by NVRTC through CuPy"
    return None, f"{reason}, and {why_not}; install momkd where nvcc is, or its extra 'cuda'"


@cache
def _unusable(module: Any, capability: tuple[int, int]) -> str:
    """Return why the extension can't start kernels on a GPU of this compute capability; empty if it can.

    A GPU runs the machine code of its own major version up to its minor one. The highest architecture is there as PTX
    too, which a driver at least as new as the compiler turns into code for any later GPU.
    """
    info, driver = module.build_info(), module.driver_version()
    if not module.device_count():
        what = f"a driver for CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "no driver"
        return f"momkd._cuda was built with CUDA {info['cuda']} and finds {what} and no GPU that it can use"
    if module.task_bytes() != kernels("ema_scatter_").TASK_BYTES:
        return "momkd._cuda was built from other sources than this momkd; install it again"
    major, minor = capability
    arch, archs = 10 * major + minor, info["archs"]
    if any(built // 10 == major and built <= arch for built in archs):
        return ""
    compiler = [int(part) for part in info["cuda"].split(".")]
    if arch > max(archs) and driver >= 1000 * compiler[0] + 10 * compiler[1]:
        return ""
    built_for = ";".join(map(str, archs))
    return f"momkd._cuda was built with MOMKD_CUDA_ARCHS={built_for}, this GPU needs {arch}"


def kernels(op: str) -> ModuleType:
    """Return the module that holds the functions of `op`."""
    return importlib.import_module(f"momkd.cuda.{_MODULES[op]}")


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def can_run(op: str, args: Sequence[Tensor | None] = ()) -> tuple[bool, str]:
    """Return whether the CUDA kernels take these tensors: the memory (C, K, S), then the rows or sums, then others."""
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
        index = tensors[0].device.index if tensors else None
        capability = torch.cuda.get_device_capability() if index is None else _capability(index)
    except RuntimeError as error:
        return False, f"no GPU can be used: {' '.join(str(error).split())}"
    if capability < _LEAST_CAPABILITY:
        return False, "needs compute capability {}.{}, this GPU has {}.{}".format(*_LEAST_CAPABILITY, *capability)
    module, reason = launcher(capability)
    return module is not None, f"tensors on a GPU, {reason}" if module is not None else reason


def unfit(memory: Tensor, rows: Tensor | None = None) -> str:
    """Return why the kernels don't take a memory (C, K, S) and rows or sums of some dtype; empty if they do."""
    if memory.dtype != torch.float32 or not memory.is_contiguous():
        return f"takes a contiguous float32 memory, got {memory.dtype} with strides {memory.stride()}"
    for size, (what, most) in zip(memory.shape, _MOST, strict=False):
        if size > most:
            return f"takes a memory of at most {most} {what}, got {size}"
    if rows is not None and rows.dtype not in ROW_TYPES:
        return f"takes float32, float16 and bfloat16, got {str(rows.dtype).removeprefix('torch.')}"
    if rows is not None and len(rows) >= 2**31:  # more than torch sorts
        plan = kernels("ema_scatter_").plan(len(rows), *memory.shape, rows.element_size())
        if plan.by_slot:
            return f"takes fewer than 2**31 rows for a memory of {tuple(memory.shape)}, got {len(rows)}"
    return ""


def start(name: str, task: bytes, blocks: int, threads: int, shared: int, device: torch.device) -> None:
    """Start a kernel of csrc/cuda on torch's current stream of the device. An error of CUDA is a RuntimeError."""
    if blocks == 0:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    module, reason = launcher(_capability(index))
    if module is None:
        raise RuntimeError(f"{name}: {reason}")
    stream = torch.cuda.current_stream(index).cuda_stream
    with torch.cuda.device(index):
        module.launch(name, task, blocks, threads, shared, index, stream)

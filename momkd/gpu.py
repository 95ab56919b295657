"""The Triton kernels (`momkd.kernels`): whether they can run, and where they are. Triton is imported at first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from momkd import env

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_MEMORY_SIZES = (("classes", 32), ("slots a class", 256), ("columns", 512))


def _memory_sizes(memory: Tensor | None = None) -> str:
    """Why the kernels don't take a memory (C, K, S); empty if they do."""
    if memory is None or memory.ndim != 3:
        return ""
    for size, (what, most) in zip(memory.shape, _MEMORY_SIZES, strict=True):
        if size > most:
            return f"takes a memory of at most {most} {what}, got {size}"
    return ""


_GRAPH_COLUMNS = 1024


def _graph_sizes(att: Tensor | None = None) -> str:
    """Why the kernels don't take these heads (H, C); empty if they do."""
    if att is None or att.ndim != 2 or att.shape[1] <= _GRAPH_COLUMNS:
        return ""
    return f"takes at most {_GRAPH_COLUMNS} columns a head, got {att.shape[1]}"


# What an op cannot take: from its tensors, in the order in which it gives them to dispatch, to a reason or nothing.
_LIMITS: dict[str, Callable[[Sequence[Tensor | None]], str]] = {
    "graph_attention": lambda args: _graph_sizes(*args[2:3]),
    "memory_similarity": lambda args: _memory_sizes(*args[1:2]),
    "memory_guided_pool": lambda args: _memory_sizes(*args[2:3]),
    "soft_angle_loss": lambda args: _memory_sizes(*args[1:2]),
}


@cache
def triton() -> tuple[Any, str]:
    """Triton, or None and why it is not there."""
    try:
        return importlib.import_module("triton"), "installed"
    except ImportError as error:
        return None, f"Triton is not installed ({error}); pip install triton"


def kernels(name: str) -> Any:
    """The module `momkd.kernels.<name>`."""
    return importlib.import_module(f"momkd.kernels.{name}")


def can_run(op: str, args: Sequence[Tensor | None] = ()) -> tuple[bool, str]:
    """Whether the Triton kernels of `op` take these tensors; without tensors, whether they run here at all."""
    tensors = [t for t in args if t is not None]
    wanted = "cpu" if env.triton_interpreted() else "cuda"
    if other := [t.device for t in tensors if t.device.type != wanted]:
        if wanted == "cpu":
            return False, f"TRITON_INTERPRET runs kernels on the CPU, the tensors are on {other[0]}"
        return False, f"runs on a GPU, the tensors are on {other[0]}"
    if bad := [t.dtype for t in tensors if t.is_floating_point() and t.dtype not in _DTYPES]:
        return False, f"takes float16, bfloat16 and float32, got {str(bad[0]).removeprefix('torch.')}"
    if op in _LIMITS and (reason := _LIMITS[op](args)):
        return False, reason
    module, reason = triton()
    if module is None:
        return False, reason
    if wanted == "cuda" and not torch.cuda.is_available():
        return False, "no GPU that torch can use"
    return True, "interpreted on the CPU" if wanted == "cpu" else "tensors on a GPU"

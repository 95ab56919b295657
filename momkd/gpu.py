"""The Triton kernels (`momkd.kernels`): whether they can run, and where they are. Triton is imported at first use."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


# Heads go into one tile; the weights of the gate are addressed in 32 bits.
_GATE_SIZES = (("heads", 16), ("hidden features", 32_768), ("features", 65_535))
_MOST_HEADS = 32


def _gate_sizes(x: Tensor | None = None, w_v: Any = None, _: Any = None, w_a: Any = None) -> str:
    """Why the kernels don't take this gate; empty if they do."""
    if x is None or w_v is None or w_a is None:
        return ""
    sizes = w_a.shape[0], w_v.shape[0], x.shape[1]
    for size, (what, most) in zip(sizes, _GATE_SIZES):  # noqa: B905 (as many as sizes)
        if not 1 <= size <= most:
            return f"takes 1 to {most} {what}, got {size}"
    return ""


def _score_heads(_: Any = None, scores: Tensor | None = None) -> str:
    """Why the kernels don't take scores (N, H); empty if they do."""
    if scores is None or scores.ndim != 2 or 1 <= scores.shape[1] <= _MOST_HEADS:
        return ""
    return f"takes 1 to {_MOST_HEADS} heads, got {scores.shape[1]}"


_GRAPH_COLUMNS = 1024


def _graph_sizes(att: Tensor | None = None) -> str:
    """Why the kernels don't take these heads (H, C); empty if they do."""
    if att is None or att.ndim != 2 or att.shape[1] <= _GRAPH_COLUMNS:
        return ""
    return f"takes at most {_GRAPH_COLUMNS} columns a head, got {att.shape[1]}"


# What an op cannot take: from its tensors, in the order in which it gives them to dispatch, to a reason or nothing.
_LIMITS: dict[str, Callable[[Sequence[Tensor | None]], str]] = {
    "graph_attention": lambda args: _graph_sizes(*args[2:3]),
    "gated_attention_pool": lambda args: _gate_sizes(*args[:1], *args[2:5]),
    "gated_attention_scores": lambda args: _gate_sizes(*args[:4]),
    "attention_pool": lambda args: _score_heads(*args[:2]),
    "memory_similarity": lambda args: _memory_sizes(*args[1:2]),
    "memory_guided_pool": lambda args: _memory_sizes(*args[2:3]),
    "soft_angle_loss": lambda args: _memory_sizes(*args[1:2]),
}


# Of float32 logsumexps, eager torch is 1.5 times as fast on an H200 at a million rows (forward and backward), for ten
# times the cosines in memory.
_COPIES, _SHARE = 10, 8


def _prefers_similarity(*, z: Tensor, memory: Tensor, reduce: str = "max", **_: Any) -> bool:
    if reduce != "lse" or z.dtype != torch.float32 or z.device.type != "cuda":
        return True
    cosines = 4 * z.shape[0] * memory.shape[0] * memory.shape[1]
    return _COPIES * cosines > torch.cuda.get_device_properties(z.device).total_memory // _SHARE


# For what calls, of those that they can run, the Triton kernels are preferred; all others always are.
PREFERENCES: dict[str, Callable[..., bool]] = {"memory_similarity": _prefers_similarity}


@cache
def triton() -> tuple[Any, str]:
    """Triton, or None and why it is not there."""
    try:
        return importlib.import_module("triton"), "installed"
    except ImportError as error:
        return None, f"Triton is not installed ({error}); pip install triton"


_MODULES = {"gated_attention_scores": "gated_attention_pool"}


def kernels(op: str) -> Any:
    """The module of `momkd.kernels` that holds `op`, told where tuned tiles are kept and whether to tune."""
    _module("_tuning").STORE.configure(env.cache_folder(), seconds if _asked or env.tuning_asked() else None)
    return _module(_MODULES.get(op, op))


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"momkd.kernels.{name}")


_asked: list[str] = []  # one entry for each `tune` that is open


@contextmanager
def tune() -> Iterator[None]:
    """Inside, each Triton kernel that meets a new shape times a few ways to cut its work and keeps the quickest.

    A choice holds for the device, the version of Triton, the type, the widths, and the number of rows up to the next
    power of two. It is kept in ~/.cache/momkd (MOMKD_CACHE_DIR names another folder) and taken from then on, in later
    processes too; without any, the default is taken. Run one training step inside, forward and backward. Other tiles
    round in another order: results agree within tolerance, not bit for bit. MOMKD_TUNE=1 does this in a whole process.

    Example:
        >>> pool = momkd.nn.GatedAttentionPool(in_features=8, hidden_features=4)
        >>> with momkd.tune():
        ...     pool(momkd.Bags.from_list([torch.randn(5, 8)])).sum().backward()
    """
    _asked.append("tune")
    try:
        yield
    finally:
        _asked.pop()


_CYCLES_A_SECOND = 2_000_000_000  # of the fastest GPUs, about: how long a wait on the device is


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of a call, after one that compiles it.

    On a GPU that is the time of its kernels on the current stream, without that of launching them: the device is given
    a wait first, in which the host launches everything. Interpreted kernels are timed by a clock.
    """
    if env.triton_interpreted() or not torch.cuda.is_available():
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    launching = time.perf_counter() - began
    events = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(int(2 * min(launching, 0.05) * _CYCLES_A_SECOND))  # type: ignore[no-untyped-call]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in events)) / 1000


def can_run(op: str, args: Sequence[Tensor | None] = ()) -> tuple[bool, str]:
    """Whether the Triton kernels of `op` take these tensors; without tensors, whether they run here at all."""
    wanted = "cpu" if env.triton_interpreted() else "cuda"
    first = None
    for t in args:  # every call of an op asks: what is usual is found with few calls of torch
        if t is None:
            continue
        device = t.device
        if device != first:
            if device.type != wanted:
                where = "runs on a GPU" if wanted == "cuda" else "TRITON_INTERPRET runs kernels on the CPU"
                return False, f"{where}, the tensors are on {device}"
            if first is not None:
                return False, f"takes tensors of one device, got {first} and {device}"
            first = device
        if t.is_floating_point() and t.dtype not in _DTYPES:
            return False, f"takes float16, bfloat16 and float32, got {str(t.dtype).removeprefix('torch.')}"
    if op in _LIMITS and (reason := _LIMITS[op](args)):
        return False, reason
    module, reason = triton()
    if module is None:
        return False, reason
    if wanted == "cuda" and first is None and not torch.cuda.is_available():
        return False, "no GPU that torch can use"
    return True, "interpreted on the CPU" if wanted == "cpu" else "tensors on a GPU"

"""Host time of a call of each op, before a kernel has done any work: `python -m benchmarks.bench_host_cost`.

Triton: every launch is replaced by a function that does nothing, and the tensors are so small that what torch itself
computes costs nothing either. Native: the kernels run, on as few rows. Either way the time left is what a user waits
for Python, dispatch and autograd. The least of many short batches is taken, which other processes disturb least.
"""

from __future__ import annotations

import cProfile
import importlib
import os
import pkgutil
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple
from unittest import mock

import pytest
import torch
import typer
from torch import Tensor

from benchmarks.measure import on_each_device, require
from momkd import dispatch, graph
from momkd import functional as F

ROWS, WIDTH, HIDDEN, CLASSES, SLOTS = 32, 16, 8, 2, 4
BATCH, SECONDS = 4, 0.4
TARGET = 150e-6  # of gated_attention_pool forward and backward by Triton
PATHS = ("triton", "native")


class Case(NamedTuple):
    """One op as a user calls it: what its backward starts from (nothing without one), and what gets a gradient."""

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


def cases(device: str) -> dict[str, Case]:
    """Every op on a few rows; parameters want gradients, features do not."""
    torch.manual_seed(0)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    x = torch.randn(ROWS, WIDTH, device=device)
    offsets = torch.tensor([0, ROWS // 2, ROWS], dtype=torch.int32, device=device)
    gate = (parameter(HIDDEN, WIDTH), parameter(HIDDEN), parameter(HIDDEN, WIDTH), parameter(HIDDEN))
    gate = (*gate, parameter(1, HIDDEN), parameter(1))
    scores, z = parameter(ROWS, 1), parameter(ROWS, WIDTH)
    memory = torch.randn(CLASSES, SLOTS, WIDTH, device=device)
    labels = torch.arange(ROWS, device=device) % CLASSES
    edges = graph.knn(torch.rand(ROWS, 2), 4).to(device)
    x_l, x_r, att = parameter(ROWS, WIDTH), parameter(ROWS, WIDTH), parameter(2, WIDTH // 2)
    usage = torch.zeros(CLASSES, SLOTS, device=device)
    return {
        "gated_attention_pool": Case(lambda: _tensor(F.gated_attention_pool(x, offsets, *gate)), gate),
        "attention_pool": Case(lambda: F.attention_pool(x, scores, offsets), (scores,)),
        "memory_similarity": Case(lambda: F.memory_similarity(z, memory)[0], (z,)),
        "memory_guided_pool": Case(lambda: F.memory_guided_pool(z, x, memory, offsets, 0.2)[0], (z,)),
        "soft_angle_loss": Case(lambda: F.soft_angle_loss(z, memory, labels, reduction="none"), (z,)),
        "graph_attention": Case(lambda: F.graph_attention(x_l, x_r, att, edges), (x_l, x_r, att)),
        "ema_scatter_": Case(lambda: F.ema_scatter_(memory, usage, z, labels, momentum=0.9), ()),
    }


def _tensor(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)
    return result


def _nothing(kernel: object, grid: tuple[int, ...], *args: object, **meta: object) -> None:
    """Take what a launch takes and start nothing."""


@contextmanager
def stubbed(device: str) -> Iterator[None]:
    """Inside, dispatch takes the Triton kernels for tensors of this device, and none of them is started."""
    folder = importlib.import_module("momkd.kernels").__path__
    modules = [importlib.import_module(f"momkd.kernels.{each.name}") for each in pkgutil.iter_modules(folder)]
    interpreted = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, interpreted):
        patches = [mock.patch.object(m, "launch", _nothing) for m in modules if hasattr(m, "launch")]
        for patch in patches:
            patch.start()
        torch.set_flush_denormal(True)  # what no kernel has written may hold numbers that a CPU is slow with
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
            for patch in patches:
                patch.stop()


@contextmanager
def path(name: str, device: str) -> Iterator[None]:
    """Inside, ops run by this backend: Triton with nothing launched, or native."""
    if name == "triton":
        with stubbed(device):
            yield
    else:
        with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
            yield


def steps(case: Case) -> dict[str, Callable[[], object]]:
    """What is timed: a call without gradients, one that keeps what backward needs, and one with its backward."""

    def inference() -> None:
        with torch.no_grad():
            case.call()

    if not case.leaves:
        return {"inference": inference}
    out = case.call()
    grad = torch.ones_like(out)

    def both() -> None:
        for leaf in case.leaves:
            leaf.grad = None
        torch.autograd.backward(case.call(), grad)

    return {"inference": inference, "forward": case.call, "forward and backward": both}


def least(call: Callable[[], object]) -> float:
    """Seconds of a call: the least mean of batches, so short that other processes leave some of them alone."""
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(BATCH):
            call()
        best = min(best, (time.perf_counter() - began) / BATCH)
    return best


def measured(case: Case) -> dict[str, float]:
    """Seconds of each step."""
    return {name: least(call) for name, call in steps(case).items()}


def why_not(op: str, backend: str) -> str:
    """Why this op has no such path here; empty if it has."""
    able, reason = dispatch.can_run(op, backend)
    if backend == "triton" and "triton" in dispatch.OPS[op] and "no GPU" in reason:
        return ""  # nothing is launched
    return "" if able else reason


@on_each_device
@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("op", cases("cpu"))
def test_host_cost(benchmark: Any, op: str, backend: str, device: str) -> None:
    require(device)
    if device == "cuda" and backend == "native":
        pytest.skip("the native kernels run on the CPU")
    with path(backend, device):
        if reason := why_not(op, backend):
            pytest.skip(reason)
        case = cases(device)[op]
        seconds = measured(case)
        for name, each in seconds.items():
            benchmark.extra_info[f"host µs of {name}"] = round(each * 1e6, 1)
        if op == "gated_attention_pool" and backend == "triton":
            benchmark.extra_info["target met"] = seconds["forward and backward"] <= TARGET
        benchmark.pedantic(list(steps(case).values())[-1], rounds=5, iterations=20)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    profile: Annotated[str, typer.Option(help="An op: also print where its time by Triton goes.")] = "",
) -> None:
    """Print the host time of a call of each op in µs, and where that of one goes."""
    torch.set_num_threads(1)
    for backend in PATHS if device == "cpu" else PATHS[:1]:
        with path(backend, device):
            for op, case in cases(device).items():
                if not why_not(op, backend):
                    times = ", ".join(f"{name} {each * 1e6:.0f}" for name, each in measured(case).items())
                    print(f"{backend:7} {op:21} {times}", flush=True)
    if profile:
        with path("triton", device):
            call = list(steps(cases(device)[profile]).values())[-1]
            call()
            recorded = cProfile.Profile()
            recorded.runcall(lambda: [call() for _ in range(500)])
        pstats.Stats(recorded).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    typer.run(main)

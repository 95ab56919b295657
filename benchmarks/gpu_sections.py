"""What `benchmarks.gpu_figures` measures: items of every section, the most important first.

An item is a function that makes its inputs, checks the result against float64 and returns its figures. Nothing is
allocated before it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import (
    bench_attention_pool,
    bench_ema_scatter,
    bench_graph_attention,
    bench_memory_guided_pool,
    bench_memory_similarity,
    bench_soft_angle_loss,
    bench_training_step,
    gpu_gate,
)
from benchmarks import bench_gated_attention_pool as gate
from benchmarks.bags import ragged
from benchmarks.cases import Case, check
from benchmarks.gpu_machine import Call, Figures, Item, Machine, errors_of_forms, last_line, measured
from benchmarks.measure import peak_bytes, timings
from momkd import Bags, dispatch


def ceilings(m: Machine) -> Iterator[Item]:
    def copy() -> Figures:
        return {"GB/s": m.copy() / 1e9}

    def product(dtype: torch.dtype) -> Figures:
        return {"TFLOP/s": m.product(dtype) / 1e12}

    def plain(full: int) -> Figures:
        n = m.rows(full)
        x, w = (torch.randn(*s, device=m.device).bfloat16() for s in ((n, gate.WIDTH), (gate.WIDTH, 2 * gate.HIDDEN)))
        seconds = timings({"product": lambda: x @ w}, m.device, rounds=m.rounds)["product"].device
        m.plain_product = 2 * n * gate.WIDTH * 2 * gate.HIDDEN / seconds
        return {"ms": 1e3 * seconds, "TFLOP/s": m.plain_product / 1e12}

    yield Item("ceilings", "copy", copy)
    yield Item("ceilings", "product bfloat16", partial(product, torch.bfloat16))
    for rows in (100_000, 1_000_000):
        yield Item("ceilings", f"({rows}, 1024) by (1024, 512) bfloat16", partial(plain, rows))
    yield Item("ceilings", "product float32", partial(product, torch.float32))


def op(m: Machine, small: Callable[[], Case], large: Callable[[], Case]) -> Figures:
    """One op forward and backward beside its peers, checked on fewer rows."""
    error = check(small())
    case = large()
    figures = {"relative error": error, **case.facts, **measured(m, case.steps(), case.work, case.dtype)}
    errors_of_forms(case, figures)
    return figures


def layer(m: Machine, full: int) -> Figures:
    dtype = torch.float32 if m.tiny else torch.bfloat16
    calls, facts = bench_graph_attention.layer_calls(m.device, m.rows(full), dtype)
    width, channels = bench_graph_attention.WIDTH, bench_graph_attention.CHANNELS
    nodes = facts["nodes"]
    work = (4 * 2 * nodes * width * channels, 4 * nodes * width * dtype.itemsize)
    return {**facts, **measured(m, calls, work, dtype)}


def scatter(m: Machine) -> Figures:
    n = m.rows(4_000_000)
    backend = dispatch.choose("ema_scatter_", None, bench_ema_scatter.inputs(m.device, 8)[:3])
    error = bench_ema_scatter.check(bench_ema_scatter.inputs(m.device, min(n, 200_000)), None)
    given = bench_ema_scatter.inputs(m.device, n)
    calls: dict[str, Call] = {"momkd": bench_ema_scatter.scatter(given, None), **bench_ema_scatter.plain_peers(given)}
    figures: Figures = {"relative error": error, "rows": n, "backend": backend}
    try:
        calls["vector-quantize-pytorch"] = bench_ema_scatter.codebook_peer(given)
    except ImportError as missing:
        figures["without"] = last_line(missing)
    return figures | measured(m, calls, bench_ema_scatter.work(given), torch.float32)


def op_items(m: Machine) -> Iterator[Item]:
    half = torch.bfloat16
    pool, guided = bench_attention_pool.make_case, bench_memory_guided_pool.make_case
    similarity, angle = bench_memory_similarity.make_case, bench_soft_angle_loss.make_case

    def bags(median: int, width: int, dtype: torch.dtype) -> Bags:
        return ragged(m.device, 8 if m.tiny else median, width, dtype)

    n, few = m.rows(1 << 20), m.rows(2000)
    both: dict[str, tuple[Callable[[], Case], Callable[[], Case]]] = {
        "memory_guided_pool": tuple(lambda k=k: guided(bags(k, 512, torch.float32)) for k in (60, 13_000)),
        "attention_pool": tuple(lambda k=k: pool(bags(k, 512, half)) for k in (60, 8000)),
        "memory_similarity max": tuple(lambda k=k: similarity(m.device, k, "max") for k in (few, n)),
        "memory_similarity lse": tuple(lambda k=k: similarity(m.device, k, "lse") for k in (few, n)),
        "soft_angle_loss": tuple(lambda k=k: angle(m.device, k) for k in (few, n)),
    }
    yield Item("ops", "ema_scatter_", partial(scatter, m))
    yield Item("ops", "graph_attention 4096", partial(layer, m, 4096))
    for name, (small, large) in both.items():
        yield Item("ops", name, partial(op, m, small, large))
    yield Item("ops", "graph_attention 65536", partial(layer, m, 65_536))


WORDS = {True: "bfloat16 autocast", False: "float32"}


def training(m: Machine, slides: int, autocast: bool) -> Figures:
    """A whole step; rates are those until the device has finished, as the host's work is part of it."""
    small = {"width": 32, "genes": 20} if m.tiny else {}
    patches = bench_training_step.sizes_of(min(slides, 2) if m.tiny else slides, 30 if m.tiny else 4000)
    figures: Figures = {"patches": sum(patches), "forms": {}}
    make = partial(bench_training_step.step_calls, m.device, patches, autocast=autocast, **small)
    try:
        calls = make()
    except AssertionError:  # another result: no time is reported
        raise
    except Exception as error:  # the peer's fault is no reason not to time ours
        calls, figures["without the peer"] = make(with_peer=False), last_line(error)
    taken = timings(calls, m.device, rounds=m.rounds, warmup=1)
    for name, each in taken.items():
        figures["forms"][name] = {
            "ms": 1e3 * each.device,
            "wall ms": 1e3 * each.wall,
            "host us": 1e6 * each.host,
            "slides a second": len(patches) / each.wall,
            "peak MB": peak_bytes(calls[name], m.device) / 1e6,
        }
    ours, *others = taken
    figures["times as fast until the end as"] = {name: taken[name].wall / taken[ours].wall for name in others}
    return figures


def to_device(m: Machine, pinned: bool) -> Figures:
    """Copy of a gigabyte; without a GPU nothing can be pinned, and the copy stays on the CPU."""
    host = torch.ones((1 if m.tiny else 1024) << 18)
    if pinned and m.device == "cuda":
        host = host.pin_memory()
    there = torch.empty_like(host, device=m.device)
    seconds = timings({"copy": lambda: there.copy_(host, non_blocking=pinned)}, m.device, rounds=m.rounds)["copy"].wall
    return {"ms": 1e3 * seconds, "GB/s": host.nbytes / seconds / 1e9}


def items(m: Machine) -> list[Item]:
    """All items in the order in which they are run: what says most comes first."""
    steps = [(16, True), (1, True), (16, False), (1, False)]
    return [
        *ceilings(m),
        *gpu_gate.first_items(m),
        *op_items(m),
        *(Item("training step", f"{n} slides, {WORDS[bf16]}", partial(training, m, n, bf16)) for n, bf16 in steps),
        *(Item("copy to the device", name, partial(to_device, m, name == "pinned")) for name in ("pinned", "pageable")),
        *gpu_gate.other_items(m),
    ]

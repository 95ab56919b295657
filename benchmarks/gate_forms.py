"""The ways to compute the gate, side by side on this machine: `python -m benchmarks.gate_forms --out DIR`.

Each form is checked against float64 on its first rows before it is timed. DIR then holds gate_forms.json. `--once` runs
each form once and times nothing: for a profiler that reads the counters of its kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.measure import copy_rate, product_rate, timings
from momkd import Bags, reference
from momkd.kernels import attention_pool as pooling
from momkd.kernels import gate_one_pass, gate_products, gated_attention_pool, segment_pool
from momkd.reference.gated_attention_pool import GateParameters

WIDTH, HIDDEN, CHECKED = 1024, 256, 2048
MB = 1 << 20
Calls = dict[str, Callable[[], Any]]


def parameters(device: str, dtype: torch.dtype, width: int, hidden: int, heads: int) -> GateParameters:
    """Random weights and biases."""
    shapes = [(hidden, width), (hidden,), (hidden, width), (hidden,), (heads, hidden), (heads,)]
    return GateParameters(*((torch.randn(*s, device=device) / s[-1] ** 0.5).to(dtype) for s in shapes))


def scoring(x: Tensor, w: GateParameters, p: float, seed: Tensor) -> Calls:
    """Forms of the scores, each giving (scores, products or nothing)."""
    gate = gate_products.gate_of(x, w, p, seed)
    made: Calls = {}
    for size in (8, 24, 48, 1 << 14):
        name = f"{size} MB at once" if size < 1 << 14 else "all at once"
        made[f"product, then kernel, {name}"] = lambda size=size: gate_products.gate_scores(x, gate, False, size * MB)
        made[f"product, then kernel, {name}, kept"] = lambda size=size: gate_products.gate_scores(
            x, gate, True, size * MB
        )
    if x.device.type == "cuda" and x.dtype != torch.float32 and torch.cuda.get_device_capability()[0] >= 9:
        for block, warps, stages in ((128, 8, 4), (64, 4, 4), (64, 8, 3)):
            for keep in (False, True):
                made[f"one kernel, {block} rows, {warps} warps, {stages} stages{', kept' if keep else ''}"] = (
                    lambda b=block, w=warps, s=stages, keep=keep: gate_one_pass.gate_scores(x, gate, keep, b, 64, w, s)
                )
    return made


def parts(x: Tensor, w: GateParameters, offsets: Tensor, p: float, seed: Tensor) -> Calls:
    """The pieces that the forms are made of, and the whole forward and backward of the fused form."""
    gate = gate_products.gate_of(x, w, p, seed)
    scores, products = gate_products.gate_scores(x, gate, True)
    pooled, stats = pooling.attention_pool(x, scores, offsets)
    grad = torch.randn_like(pooled)
    needs, empty = (False, *[True] * 6), x.new_empty(0)
    _, d_scores = segment_pool.pool_backward(grad, x, scores, stats, offsets, pooled, (False, True))
    assert d_scores is not None

    def again(size: int, kept: Tensor) -> Callable[[], Any]:
        return lambda: gate_products.gate_backward(x, gate, d_scores, kept, None, True, size * MB)

    return {
        "plain product": lambda: torch.mm(x, gate.packed.T),
        "packing": lambda: gate_products.gate_of(x, w, p, seed),
        "pooling": lambda: pooling.attention_pool(x, scores, offsets),
        "gradient of scores": lambda: segment_pool.pool_backward(
            grad, x, scores, stats, offsets, pooled, (False, True)
        ),
        "gate backward, kept, 64 MB": again(64, products),
        "gate backward, kept, 256 MB": again(256, products),
        "gate backward, kept, all": again(1 << 14, products),
        "gate backward, again, 24 MB": again(24, empty),
        "gate backward, again, 256 MB": again(256, empty),
        "weights' gradient": lambda: gate_products.product_in_float32(products.T, x),
        "fused forward": lambda: gated_attention_pool.gated_attention_pool(x, offsets, w, p, seed),
        "fused backward": lambda: gated_attention_pool.gated_attention_pool_backward(
            grad, None, x, offsets, w, p, seed, pooled, scores, stats, needs
        ),
    }


def must_be_right(calls: Calls, x: Tensor, w: GateParameters, p: float, seed: Tensor) -> Calls:
    """Those whose scores are right on the first rows; the others are told and left out."""
    exact = GateParameters(*(None if t is None else t.double() for t in w))
    some = x[:CHECKED].double()
    ends = torch.tensor([0, len(some)], dtype=torch.int32, device=x.device)
    want = reference.gated_attention_pool(some, ends, exact, p, seed)[1]
    right: Calls = {}
    for name, call in calls.items():
        try:
            error = float((call()[0][:CHECKED] - want).norm() / want.norm())
        except Exception as failure:
            print(f"LEFT OUT {name}: {type(failure).__name__}: {str(failure)[:300]}")
            continue
        allowed = 1e-5 if x.dtype == torch.float32 else 1e-2
        if error < allowed:
            right[name] = call
        else:
            print(f"LEFT OUT {name}: wrong by {error:.1e}, allowed {allowed:.0e}")
    return right


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for gate_forms.json.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A few hundred rows.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Run each form once and time nothing.")] = False,
) -> None:
    """Time the forms of the gate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [(300, 4)] if tiny else [(100_000, 32)] if once else [(1_000_000, 32), (100_000, 32), (10_000, 1)]
    width, hidden = (64, 32) if tiny else (WIDTH, HIDDEN)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "cases": []}
    kinds = [(torch.bfloat16, 0.0, 1), (torch.bfloat16, 0.25, 1), (torch.bfloat16, 0.0, 4), (torch.float16, 0.0, 1)]
    for rows, bags in sizes:
        for dtype, p, heads in kinds if rows == sizes[-1][0] or rows == 100_000 else kinds[:1]:
            torch.manual_seed(0)
            x = torch.randn(rows, width, device=device).to(dtype)
            made = Bags.from_lengths(x, [rows // bags] * (bags - 1) + [rows - rows // bags * (bags - 1)])
            w, seed = parameters(device, dtype, width, hidden, heads), torch.tensor(7, device=device)
            calls = parts(x, w, made.offsets, p, seed) | must_be_right(scoring(x, w, p, seed), x, w, p, seed)
            if once:
                for call in calls.values():
                    call()
                continue
            case: dict[str, Any] = {"rows": rows, "bags": bags, "dtype": str(dtype), "dropout": p, "heads": heads}
            took = timings(calls, device, rounds=3 if tiny or rows > 500_000 else 7)
            case["device ms"] = {name: 1e3 * each.device for name, each in took.items()}
            case["host µs"] = {name: 1e6 * each.host for name, each in took.items()}
            found["cases"].append(case)
            print(f"{rows:,} rows, {bags} bags, {dtype}, dropout {p}, {heads} heads: device ms, host µs")
            for name, each in took.items():
                print(f"  {name:52} {1e3 * each.device:9.3f} {1e6 * each.host:9.0f}")
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                (out / "gate_forms.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    if not (tiny or once):
        print(
            f"copy {copy_rate(device) / 1e12:.2f} TB/s, product {product_rate(device, torch.bfloat16) / 1e12:.0f} TFLOP/s"
        )


if __name__ == "__main__":
    typer.run(main)

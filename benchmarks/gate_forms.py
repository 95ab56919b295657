"""The pieces of the gate and their tiles, side by side on this machine: `python -m benchmarks.gate_forms --out DIR`.

The scores are checked against float64 before anything is timed. DIR then holds gate_forms.json. `--once` runs each
piece once and times nothing: for a profiler that reads the counters of its kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.measure import must_agree, timings
from momkd import Bags, env, reference
from momkd.kernels import _tuning, attention_pool, gated_attention_pool, segment_pool
from momkd.kernels._gate import gate_of, pack_weights
from momkd.reference.gated_attention_pool import GateParameters

WIDTH, HIDDEN, CHECKED = 1024, 256, 2048
Calls = dict[str, Callable[[], Any]]
VARIANTS = [(torch.bfloat16, 0.0, 1), (torch.bfloat16, 0.25, 1), (torch.bfloat16, 0.0, 4), (torch.float32, 0.0, 1)]


def parameters(device: str, dtype: torch.dtype, width: int, hidden: int, heads: int) -> GateParameters:
    """Return random weights and biases."""
    shapes = [(hidden, width), (hidden,), (hidden, width), (hidden,), (heads, hidden), (heads,)]
    return GateParameters(*((torch.randn(*s, device=device) / s[-1] ** 0.5).to(dtype) for s in shapes))


def pieces(x: Tensor, w: GateParameters, offsets: Tensor, p: float, seed: Tensor) -> Calls:
    """Check the scores, and return the pieces of a forward and a backward of the gate."""
    gate, packed = gate_of(x, w, p, seed), pack_weights(x, w.w_v, w.w_u)
    scores, products = gated_attention_pool.gate_scores(x, gate, packed, True)
    some, ends = x[:CHECKED].double(), torch.tensor([0, min(CHECKED, len(x))], dtype=torch.int32, device=x.device)
    exact = GateParameters(*(None if t is None else t.double() for t in w))
    want = reference.gated_attention_pool(some, ends, exact, p, seed)[1]
    must_agree(scores[:CHECKED], want, 1e-5 if x.dtype == torch.float32 else 1e-2)
    pooled, stats = attention_pool.attention_pool(x, scores, offsets)
    grad = torch.randn_like(pooled)
    _, d_scores = segment_pool.pool_backward(grad, x, scores, stats, offsets, (False, True))
    assert d_scores is not None

    def backward(kept: Tensor | None) -> Callable[[], Any]:
        run = lambda tiles: gated_attention_pool._gate_backward(x, gate, packed, d_scores, kept, True, tiles)  # noqa: E731
        sizes = gated_attention_pool._sizes(gate)
        return lambda: run(_tuning.GATE_BACKWARD.choose("gate_gradient", x, *sizes, run=run))

    calls: Calls = {
        "plain product": lambda: torch.mm(x, packed.T),
        "packing": lambda: pack_weights(x, w.w_v, w.w_u),
        "scores, products kept": lambda: gated_attention_pool.gate_scores(x, gate, packed, True),
        "scores, nothing kept": lambda: gated_attention_pool.gate_scores(x, gate, packed, False),
        "pooling": lambda: attention_pool.attention_pool(x, scores, offsets),
        "gradient of scores": lambda: segment_pool.pool_backward(grad, x, scores, stats, offsets, (False, True)),
        "gate backward, products kept": backward(products),
        "gate backward, nothing kept": backward(None),
        "weights' gradient alone": lambda: gated_attention_pool.product_in_float32(products.T, x),
    }
    return calls


TABLES = {
    "GATE_SCORES": "scores, products kept",
    "POOL_ONE_HEAD": "pooling",
    "POOL": "pooling",
    "POOL_BACKWARD": "gradient of scores",
    "GATE_BACKWARD": "gate backward, products kept",
}


def candidates(calls: Calls, dtype: torch.dtype, heads: int) -> Calls:
    """Return each piece with each candidate of its tiles."""
    made: Calls = {}
    for table, piece in TABLES.items():
        if (table == "POOL" and heads == 1) or (table == "POOL_ONE_HEAD" and heads > 1):
            continue
        held = getattr(_tuning, table)
        for number, tiles in enumerate(held.single if dtype == torch.float32 else held.half):

            def run(number: int = number, piece: str = piece) -> None:
                before, _tuning.CANDIDATE = _tuning.CANDIDATE, number
                try:
                    calls[piece]()
                finally:
                    _tuning.CANDIDATE = before

            made[f"{piece}: {tuple(tiles)}"] = run
    return made


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for gate_forms.json.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A few hundred rows.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Run each piece once and time nothing.")] = False,
) -> None:
    """Time the pieces of the gate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not env.triton_interpreted():
        raise SystemExit("gate_forms: expected a GPU that torch can use, got none; set TRITON_INTERPRET=1 to rehearse")
    sizes = [(300, 4)] if tiny else [(100_000, 32)] if once else [(1_000_000, 32), (100_000, 32), (10_000, 1)]
    width, hidden = (64, 32) if tiny else (WIDTH, HIDDEN)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "cases": []}
    for rows, bags in sizes:
        for dtype, p, heads in VARIANTS if rows == 100_000 and not once else VARIANTS[:1]:
            torch.manual_seed(0)
            x = torch.randn(rows, width, device=device).to(dtype)
            made = Bags.from_lengths(x, [rows // bags] * (bags - 1) + [rows - rows // bags * (bags - 1)])
            w, seed = parameters(device, dtype, width, hidden, heads), torch.tensor(7, device=device)
            calls = pieces(x, w, made.offsets, p, seed)
            if once:
                for call in calls.values():
                    call()
                continue
            if rows != 10_000 and not tiny:
                calls |= candidates(calls, dtype, heads)
            took = timings(calls, device, rounds=1 if tiny else 5 if rows > 500_000 else 7, warmup=1)
            case: dict[str, Any] = {"rows": rows, "bags": bags, "dtype": str(dtype), "dropout": p, "heads": heads}
            case["device ms"] = {name: 1e3 * each.device for name, each in took.items()}
            case["host µs"] = {name: 1e6 * each.host for name, each in took.items()}
            found["cases"].append(case)
            print(f"{rows:,} rows, {bags} bags, {dtype}, dropout {p}, {heads} heads: device ms, host µs")
            for name, each in took.items():
                print(f"  {name:56} {1e3 * each.device:9.3f} {1e6 * each.host:9.0f}")
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                (out / "gate_forms.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

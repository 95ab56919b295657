"""Whether every op is right on this machine, in under a minute: `python -m tests.gpu.smoke --out FILE`.

Each op in float32, bfloat16 and float16 (or those that `--dtypes` names), forward and backward, on small ragged bags,
by the backend that dispatch chooses, against float64. One line each: op, dtype, pass, backend, the error nearest to its
limit, that limit, seconds. The same goes into FILE as JSON. Exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from momkd import dispatch, reference
from momkd import functional as F
from tests.compare import FORWARD, relative
from tests.gpu import cases, interpreter
from tests.gpu.cases import Case, Inputs
from tests.gpu.check import Finding, backward, cotangents, forward, gradients, leaves

LENGTHS = (0, 1, 15, 16, 17, 0, 700, 127, 128, 129, 3, 0)
TINY = (0, 1, 15, 33, 0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Report = Callable[..., None]

OPS: dict[str, Callable[[Inputs], Case]] = {
    "gated_attention_pool": cases.gated_attention_pool,
    "gated_attention_pool, dropout": partial(cases.gated_attention_pool, p=0.25),
    "gated_attention_pool, 3 heads": partial(cases.gated_attention_pool, heads=3),
    "gated_attention_pool, ungated": partial(cases.gated_attention_pool, gated=False),
    "gated_attention_pool, score_bias": partial(cases.gated_attention_pool, biased=True, heads=2),
    "gated_attention_scores": partial(cases.gated_attention_scores, p=0.25),
    "attention_pool": cases.attention_pool,
    "attention_pool, 5 heads": partial(cases.attention_pool, heads=5),
    "memory_similarity max": cases.memory_similarity,
    "memory_similarity lse": partial(cases.memory_similarity, reduce="lse"),
    "soft_angle_loss": cases.soft_angle_loss,
    "memory_guided_pool": cases.memory_guided_pool,
    "memory_guided_pool, per class": partial(cases.memory_guided_pool, sizes=(4, 16, 64), branch="per_class"),
    "graph_attention": cases.graph_attention,
    "graph_attention, dropout": partial(cases.graph_attention, p=0.5),
}
TINY_SIZES: dict[str, dict[str, Any]] = {
    "gated_attention_pool": {"width": 32, "hidden": 16},
    "gated_attention_scores": {"width": 32, "hidden": 16},
    "attention_pool": {"width": 32},
    "memory_guided_pool": {"width": 32},
    "graph_attention": {"width": 16},
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_op(name: str, given: Inputs, tiny: bool, report: Report) -> None:
    """Forward and backward of one op; what raises in forward leaves backward out."""
    sizes = TINY_SIZES.get(name.split(",")[0], {}) if tiny else {}
    case = OPS[name](given, **sizes)
    backend = dispatch.choose(case.op, None, case.asked)
    mine, exact = leaves(case), leaves(case, torch.float64)
    want = case.exact(*exact)
    began = time.perf_counter()
    got = case.call(*mine)
    synchronize()
    seconds = time.perf_counter() - began
    report("forward", backend, forward(case, got, want, given.dtype), seconds)
    for count in range(1, case.differentiable + 1):
        grads = cotangents(want, count)
        began = time.perf_counter()
        found = gradients(got, mine, grads)
        synchronize()
        seconds = time.perf_counter() - began
        step = "backward" if count == 1 else "backward of scores too"
        report(step, backend, backward(case, found, gradients(want, exact, grads), grads, given.dtype), seconds)


def check_ema(given: Inputs, report: Report) -> None:
    """The update of the memory: both halves and the whole, with weights, skipped rows and a row that is not finite."""
    memory = given.memory(2, 16, 64).float()
    z, _ = given.near(memory)
    row_class = given.labels(2)
    weights = torch.rand(given.rows, generator=given.generator).to(given.device)
    z[::97], z[5::101, 0], weights[3::50] = 0, torch.nan, -1
    exact, usage64 = memory.double(), torch.zeros(2, 16, dtype=torch.float64, device=given.device)
    sums64, mass64, slots64 = reference.ema_accumulate(exact, z.double(), row_class, weights.double())
    reference.ema_apply_(exact, usage64, sums64, mass64, 0.9)

    def timed(op: str, asked: list[Tensor], call: Callable[[], Any], figures: Callable[[Any], list[Finding]]) -> None:
        backend = dispatch.choose(op, None, asked)
        began = time.perf_counter()
        made = call()
        synchronize()
        report(op, backend, figures(made), time.perf_counter() - began)

    moved, usage = memory.clone(), torch.zeros(2, 16, device=given.device)
    sums32, mass32 = sums64.float(), mass64.float()
    timed(
        "ema_accumulate",
        [memory, z],
        lambda: F.ema_accumulate(memory, z, row_class, weights=weights),
        lambda made: [
            Finding("sums", relative(made[0], sums64), FORWARD),
            Finding("mass", relative(made[1], mass64), FORWARD),
        ],
    )
    timed(
        "ema_apply_",
        [memory, sums32],
        lambda: F.ema_apply_(moved, usage, sums32, mass32, momentum=0.9),
        lambda _: [
            Finding("memory", relative(moved, exact), FORWARD),
            Finding("usage", relative(usage, usage64), FORWARD),
        ],
    )
    whole, used = memory.clone(), torch.zeros(2, 16, device=given.device)
    timed(
        "ema_scatter_",
        [memory, z],
        lambda: F.ema_scatter_(whole, used, z, row_class, momentum=0.9, weights=weights),
        lambda slots: [
            Finding("memory", relative(whole, exact), FORWARD),
            Finding("usage", relative(used, usage64), FORWARD),
            Finding("rows in another slot", float((slots != slots64).sum()), 0.0),
        ],
    )


def dtypes_of(names: str) -> list[torch.dtype]:
    """Return the dtypes of names with commas between them."""
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in DTYPES]:
        expected = "some of " + ",".join(DTYPES)
        raise argparse.ArgumentTypeError(f"expected {expected}, got {unknown[0]!r}; write --dtypes float32,bfloat16")
    return [DTYPES[name] for name in dict.fromkeys(wanted)]


def nearest_to_its_limit(figures: Iterable[Finding]) -> Finding:
    return max(figures, key=lambda f: (not f.right, f.error / f.allowed if f.allowed else 0.0))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.smoke", description=__doc__)
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument("--device", default="cuda", help="cuda, or another of torch's")
    parser.add_argument("--tiny", action="store_true", help="few rows and narrow: for the interpreter on a CPU")
    every = ",".join(DTYPES)
    parser.add_argument("--dtypes", type=dtypes_of, default=every, help=f"names with commas between; default {every}")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []

    def write() -> None:
        if options.out is not None:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            wrong = sum(not row["right"] for row in rows)
            seconds = time.perf_counter() - began
            held = {"device": name, "torch": torch.__version__, "wrong": wrong, "seconds": seconds, "results": rows}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(held, indent=1))

    def guarded(op: str, dtype: torch.dtype, run: Callable[[Report], None]) -> None:
        kind = str(dtype).removeprefix("torch.")

        def report(step: str, backend: str, figures: Iterable[Finding], seconds: float) -> None:
            worst = nearest_to_its_limit(figures)
            row = {"op": op, "dtype": kind, "pass": step, "backend": backend, "right": worst.right}
            rows.append(
                row | {"figure": worst.name, "error": worst.error, "allowed": worst.allowed, "seconds": seconds}
            )
            verdict = "" if worst.right else "  WRONG"
            print(f"{op} {kind} {step} [{backend}]: {worst}, {seconds:.2f} s{verdict}", flush=True)

        try:
            run(report)
        except Exception as error:
            last = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
            rows.append(
                {"op": op, "dtype": kind, "pass": "raised", "right": False, "traceback": traceback.format_exc()}
            )
            print(f"{op} {kind}: RAISED {last}", flush=True)
        write()

    interpreter.round_to_nearest()
    for dtype in options.dtypes:
        for name in OPS:
            given = Inputs(TINY if options.tiny else LENGTHS, dtype, device)
            guarded(name, dtype, partial(check_op, name, given, options.tiny))
        guarded("memory update", dtype, partial(check_ema, Inputs(LENGTHS, dtype, device)))
    wrong = sum(not row["right"] for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} right, {time.perf_counter() - began:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Figures of a GPU within a budget of time: `python -m benchmarks.gpu_figures --out DIR [--tiny] [--seconds S]`.

DIR/figures.json is written after every item, the most important first, so that nothing is lost where time runs out or
an item fails: its error is written in place of its figures. Times are medians between CUDA events after warm-up, beside
the wall time and the host's own; peers run in the same process. `--tiny` rehearses every line on a CPU, where figures
say nothing. `--resume` keeps the items that DIR holds already. Where an error leaves the device unusable, the program
starts itself anew and goes on with the next item.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import momkd
from benchmarks.gpu_machine import Item, Machine, last_line
from benchmarks.gpu_sections import items
from benchmarks.measure import commit
from benchmarks.stored import PASSES, wrong_peers

FILE = "figures.json"


def write(path: Path, held: dict[str, Any]) -> None:
    """Replace the file as a whole: a reader never finds half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(held, indent=1), encoding="utf-8")
    partial.replace(path)


def conditions(m: Machine) -> dict[str, Any]:
    report = momkd.doctor(show=False).as_dict()
    name = torch.cuda.get_device_name() if m.device == "cuda" else "cpu"
    today = date.today().isoformat()
    return {"device": name, "tiny": m.tiny, "commit": commit(), "date": today, "versions": report["versions"]}


def usable(device: str) -> bool:
    """Whether the device still answers: after an illegal access it doesn't, until the process ends."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def run(item: Item) -> dict[str, Any]:
    """The item's figures, or the error in their place."""
    began = time.perf_counter()
    try:
        figures = item.run()
    except Exception as error:
        figures = {"failed": last_line(error), "traceback": traceback.format_exc()[-2000:]}
    return {**figures, "seconds": round(time.perf_counter() - began, 2)}


def release(device: str) -> None:
    """Give back what an item held, so that it neither slows nor stops the next one."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def lines(held: dict[str, Any]) -> Iterator[str]:
    """A short table: each item, its milliseconds, rates and peers."""
    yield f"{'item':68} {'ms':>9} {'host us':>8} {'TFLOP/s':>8} {'GB/s':>7} {'att. %':>6}  times as fast as"
    for section, made in held["sections"].items():
        for name, figures in made.items():
            if "failed" in figures:
                yield f"{section}: {name}: FAILED: {figures['failed']}"
                continue
            ways = {way: f for way, f in figures.items() if isinstance(f, dict) and "forms" in f} or {"": figures}
            for way, part in ways.items():
                ours = next(iter(part["forms"].values())) if "forms" in part else part
                values = (ours.get("ms"), ours.get("host us"), part.get("TFLOP/s"), part.get("GB/s"))
                shown = [
                    f"{value:{width}.{digits}f}" if value is not None else " " * width
                    for value, width, digits in zip(values, (9, 8, 8, 7), (3, 0, 1, 0), strict=True)
                ]
                attained = f"{100 * part['attained']:6.0f}" if "attained" in part else " " * 6
                peers = part.get("times as fast as") or part.get("times as fast until the end as") or {}
                wrong = wrong_peers(figures, part) if "forms" in part else []
                ratios = ", ".join(
                    f"{peer} WRONG" if peer in wrong else f"{peer} {ratio:.2f}" for peer, ratio in peers.items()
                )
                title = f"{section}: {name}{PASSES.get(way, '')}"
                yield f"{title:68} {' '.join(shown)} {attained}  {ratios}".rstrip()
    if held["left out"]:
        yield f"left out for want of time: {len(held['left out'])} items"


def main(
    out: Annotated[Path, typer.Option(help="Folder for figures.json.")],
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal on the CPU with a few hundred rows.")] = False,
    seconds: Annotated[float, typer.Option(help="No item is begun after this time.")] = 300.0,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the items that the folder holds already.")] = False,
) -> None:
    """Measure momkd and its peers on the GPU of this machine."""
    deadline = time.monotonic() + seconds
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("gpu_figures: expected a GPU that torch can use, got none; --tiny rehearses on a CPU")
    m = Machine("cuda" if torch.cuda.is_available() and not tiny else "cpu", tiny)
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILE
    held: dict[str, Any] = {"conditions": conditions(m), "sections": {}, "left out": []}
    if resume and path.exists():
        held["sections"] = json.loads(path.read_text(encoding="utf-8"))["sections"]
    held["left out"] = []
    for item in items(m):
        made = held["sections"].setdefault(item.section, {})
        if item.name in made:
            continue
        if time.monotonic() > deadline:
            held["left out"].append(f"{item.section}: {item.name}")
            continue
        made[item.name] = run(item)
        write(path, held)
        print(f"{item.section}: {item.name}: {made[item.name]['seconds']} s", flush=True)
        if not usable(m.device):
            left = str(max(0.0, deadline - time.monotonic()))
            again = [sys.executable, "-m", "benchmarks.gpu_figures", "--out", str(out), "--seconds", left, "--resume"]
            os.execv(sys.executable, again)
        release(m.device)
    write(path, held)
    print("\n".join(lines(held)))


if __name__ == "__main__":
    typer.run(main)

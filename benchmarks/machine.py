"""Say what this machine is and how fast its two ceilings are: `python -m benchmarks.machine --out FILE`.

Versions, devices and backends as `momkd doctor` finds them; the rates of a large copy and of a large product.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import momkd
from benchmarks.measure import commit, copy_rate, product_rate

LARGE = 4096  # megabytes of the copy on a GPU


def driver() -> str:
    """Return the GPU's name, memory, driver and clocks as nvidia-smi prints them, or why it failed."""
    ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip() or f"unknown: {done.stderr.strip()}"


def main(out: Annotated[Path, typer.Option(help="File for what was found, as JSON.")]) -> None:
    """Describe this machine and measure its ceilings."""
    report = momkd.doctor(show=False)
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    found: dict[str, Any] = {
        "doctor": report.as_dict(),
        "commit": commit(),
        "driver": driver(),
        "dtype of the product": str(dtype),
    }
    found["copy, bytes a second"] = copy_rate(device, LARGE if gpu else 64)
    found["product, operations a second"] = product_rate(device, dtype)
    out.write_text(json.dumps(found, indent=2), encoding="utf-8")
    for name, version in found["doctor"]["versions"].items():
        print(f"{name} {version}")
    print(f"driver: {found['driver']}")
    print(f"copy {found['copy, bytes a second'] / 1e12:.3f} TB/s, reads and writes counted")
    print(f"product {found['product, operations a second'] / 1e12:.1f} TFLOP/s in {str(dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    typer.run(main)

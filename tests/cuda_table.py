"""Compiles csrc/cuda by nvcc, warnings as errors, and reads the machine code: `python -m tests.cuda_table`.

No GPU and no driver are needed. Shared memory is what `momkd.cuda.ema` asks for at 4 million rows of 64 columns and a
memory of 2 classes of 16 slots, or 256 where the slots are not to fit in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from momkd.cuda import ema
from tests import aot
from tests.aot import CHIPS, Report

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc" / "cuda" / "ema_scatter.cu"
ARCHS = tuple(arch for arch, chip in CHIPS.items() if chip.backend == "cuda")
STRICT = ("-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage")
KERNELS = tuple(re.findall(r"MOMKD_NAMED\((ema_\w+)\)", SOURCE.read_text(encoding="utf-8")))
ROWS = 4_000_000


def unavailable() -> str:
    """Why nothing can be compiled here, or nothing."""
    return aot.unavailable() or ("" if shutil.which("nvcc") else "there is no nvcc on PATH")


def cut(kernel: str) -> ema.Plan:
    """The plan that the table tells of, for a kernel that walks rows."""
    item = 4 if "float32" in kernel else 2
    return ema.plan(ROWS, 2, 16 if "shared" in kernel else 256, 64, item)


@cache
def cubin(arch: str) -> bytes:
    """All kernels for one architecture; nvcc's messages are raised as RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kernels.cubin")
        command = [
            "nvcc",
            "-std=c++17",
            "-O3",
            *STRICT,
            f"-arch={arch}",
            f"-I{ROOT / 'csrc'}",
            "-cubin",
            "-o",
            str(out),
        ]
        done = subprocess.run([*command, str(SOURCE)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc, {arch}: {done.stderr}")
        return out.read_bytes()


def reports(archs: Sequence[str], code: bytes | None = None) -> list[Report]:
    """What each kernel became on each architecture; `code` stands in for what nvcc would make."""
    found = []
    for arch in archs:
        for kernel in KERNELS:
            threads = ema.THREADS if "rows" in kernel or "runs" in kernel else ema.WARP
            report = Report(kernel, "4M rows", arch, warps=threads // 32, stages=1)
            if "reduce" in kernel:
                report.warps, report.shared = ema.REDUCE_THREADS // 32, ema.REDUCE_SHARED
            elif "rows" in kernel:
                plan = cut(kernel)
                assert plan.in_shared == ("shared" in kernel)
                report.shared, report.stages = plan.shared, plan.stages
            aot.read_cubin(cubin(arch) if code is None else code, report, kernel)
            found.append(report)
    return found


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    arch: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90 or sm_100.")] = None,
) -> None:
    """Compile the CUDA kernels and show what they became. Exit 1 where one could not run."""
    if reason := unavailable():
        Console(stderr=True).print(reason, markup=False)
        raise typer.Exit(2)
    found = reports(arch or ARCHS)
    out = Console()
    Console(width=None if out.is_terminal else 150).print(aot.table(found))
    raise typer.Exit(1 if any(aot.problem(report) for report in found) else 0)


if __name__ == "__main__":
    app()

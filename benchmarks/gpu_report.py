"""Everything that only a GPU can tell, in one command: `python benchmarks/gpu_report.py --out DIR`.

First correctness (`pytest -m gpu`), then the benchmarks; each part has a limit of time, and what it printed is kept
whatever came of it. DIR then holds doctor.json, gpu_tests.txt, benchmarks.txt, benchmarks.json, the profile of a
training step, report.md with its plots, and summary.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ["pytest", "-q", "-ra"]


def parts(out: Path) -> dict[str, tuple[list[str], int]]:
    """What is run, as arguments of `python -m`, and its limit of seconds: under nine minutes in all."""
    results = out / "benchmarks.json"
    return {
        "gpu_tests": ([*PYTEST, "tests", "-m", "gpu", "-x"], 200),
        "benchmarks": ([*PYTEST, "benchmarks", "-k", "cuda", f"--benchmark-json={results}"], 260),
        "profile": (["benchmarks.profile_step", "--out", str(out)], 50),
        "report": (["benchmarks.report", str(results), "--out", str(out)], 20),
    }


def run_part(name: str, arguments: list[str], limit: int, out: Path) -> dict[str, Any]:
    """One part, its output in DIR/<name>.txt; it is ended at its limit of seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", *arguments]
    with (out / f"{name}.txt").open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = -1
    return {"exit code": code, "seconds": round(time.perf_counter() - began, 1), "limit": limit}


def main(out: Annotated[Path, typer.Option("--out", help="Folder for what comes out.")]) -> None:
    """Test and measure momkd on the GPU of this machine."""
    import torch

    import momkd

    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "doctor.json").write_text(json.dumps(momkd.doctor(show=False).as_dict(), indent=2))
    if not torch.cuda.is_available():
        raise SystemExit("gpu_report: expected a GPU that torch can use, got none; doctor.json says what is there")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    summary: dict[str, Any] = {"device": torch.cuda.get_device_name(), "commit": commit or None}
    for name, (arguments, limit) in parts(out).items():
        summary[name] = run_part(name, arguments, limit, out)
        print(f"{name}: {summary[name]}", flush=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=2))
        if name == "gpu_tests" and summary[name]["exit code"] != 0:
            print("the tests did not pass: what is measured next is not to be reported", flush=True)


if __name__ == "__main__":
    typer.run(main)

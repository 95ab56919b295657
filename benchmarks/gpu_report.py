"""Turn minutes on a GPU into evidence, in one command: `python benchmarks/gpu_report.py --out DIR [--part PART]`.

`--part correctness` (270 s at most) installs momkd with the machine's own nvcc, runs every op in every dtype against
float64, then `pytest -m gpu`, then compute-sanitizer over small sizes. `--part figures` (330 s at most) times the ops,
their forms and their peers, reads hardware counters, and profiles a training step. Without `--part` both run.

Each step runs in a process group of its own with a limit of seconds, and ends with all its children. After every step
DIR holds PART.tar.gz with all logs and results so far, and at the end summary.txt, the table that is also printed.
Given again, the command does not repeat steps that passed. Nothing is fetched from outside. `--rehearse` runs the same
steps on a CPU, with Triton's interpreter and tiny sizes, so that no line runs for the first time on the device.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
WORKERS = max(1, min(6, (os.cpu_count() or 2) // 2))
TOTAL = {"correctness": 270, "figures": 330}  # seconds
TABLE = 25  # lines of a step's log that the summary repeats where the step ends in a table


class Part(str, Enum):
    """What may be run."""

    correctness = "correctness"
    figures = "figures"


@dataclass(frozen=True)
class Step:
    """One command of a part, and how long it may take.

    Args:
        name: of the step and of its log.
        command: arguments, the program first.
        limit: seconds.
        environment: variables set for it.
        lines: of the end of its log that belong into the summary.
        tool: a program that the command runs under; the step is left out, with a reason, where it is missing.
    """

    name: str
    command: list[str]
    limit: int
    environment: Mapping[str, str] = field(default_factory=dict)
    lines: int = 1
    tool: str = ""


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module."""
    return [sys.executable, "-u", "-m", module, *arguments]


def correctness(work: Path, rehearse: bool) -> Iterator[Step]:
    """Yield the steps that check the kernels."""
    tiny = ["--tiny", "--device", "cpu"] if rehearse else []
    if not rehearse:
        install = ["install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
        yield Step("install", python("pip", *install), 150, {"MOMKD_CUDA_ARCHS": capability()})
    yield Step("machine", python("benchmarks.machine", "--out", str(work / "machine.json")), 60, lines=8)
    small = [*tiny, "--dtypes", "float32"] if rehearse else []
    yield Step("smoke", python("tests.gpu.smoke", "--out", str(work / "smoke.json"), *small), 90, lines=TABLE)
    few = ["-k", "test_values_and_gradients and attention_pool and float32"] if rehearse else ["--maxfail=40"]
    where = "tests/gpu" if rehearse else "tests"
    tests = [where, "-m", "gpu", "-q", "-ra", "-n", str(WORKERS), "--durations=10", "--tb=short", *few]
    yield Step("tests", python("pytest", *tests), 150, lines=TABLE)
    for tool in ("memcheck",) if rehearse else ("memcheck", "racecheck", "initcheck"):
        under = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        small = ["--out", str(work / f"{tool}.json"), "--dtypes", "bfloat16", *(tiny or ["--tiny"])]
        yield Step(
            tool,
            [*([] if rehearse else under), *python("tests.gpu.smoke", *small)],
            60,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            lines=3,
            tool="" if rehearse else "compute-sanitizer",
        )


def figures(work: Path, rehearse: bool) -> Iterator[Step]:
    """Yield the steps that measure."""
    out, tiny = ["--out", str(work)], ["--tiny"] if rehearse else []
    compiled = {"TRITON_INTERPRET": "0"}  # interpreted, whole training steps would take minutes
    yield Step("gate_forms", python("benchmarks.gate_forms", *out, *tiny), 50, lines=2 * TABLE)
    few = ["--slides", "2", "--patches", "60", "--steps", "1"] if rehearse else ["--bf16"]
    yield Step("step_profile", python("benchmarks.profile_step", *out, *few), 40, compiled, lines=3)
    timed = python("benchmarks.gpu_figures", *out, "--seconds", "170", *tiny)
    yield Step("figures", timed, 200, compiled, lines=2 * TABLE)
    epochs = ["benchmarks/bench_prefetch.py", "-q", "-k", "cpu and packed" if rehearse else "cuda"]
    stored = f"--benchmark-json={work / 'epochs.json'}"
    yield Step("epochs", python("pytest", *epochs, stored), 45, compiled, lines=5)
    metrics = "sm__throughput.avg.pct_of_peak_sustained_elapsed,dram__throughput.avg.pct_of_peak_sustained_elapsed"
    ncu = ["ncu", "--clock-control", "none", "--metrics", metrics, "--csv", "--kernel-name", "regex:gate|pool"]
    under = [] if rehearse else [*ncu, "--launch-count", "12"]
    tool = "" if rehearse else "ncu"
    yield Step("counters", [*under, *python("benchmarks.gate_forms", "--once", *tiny)], 45, lines=TABLE, tool=tool)


def capability() -> str:
    """Return the compute capability of the first GPU as nvcc writes it (90), or "" without a GPU."""
    ask = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def surroundings(rehearse: bool) -> dict[str, str]:
    """Return the environment of every step: it can import the repository and finds the CUDA toolkit."""
    names = dict(os.environ)
    toolkit = Path(names.get("CUDA_HOME", "/usr/local/cuda"))
    if (toolkit / "bin" / "nvcc").is_file():
        names |= {"CUDA_HOME": str(toolkit), "PATH": f"{names.get('PATH', '')}:{toolkit / 'bin'}"}
    names |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [names.get("PYTHONPATH")])]), "MPLBACKEND": "Agg"}
    if rehearse:
        names |= {"TRITON_INTERPRET": "1", "MOMKD_REHEARSE_GPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    return names


def run(step: Step, limit: float, work: Path, rehearse: bool) -> dict[str, Any]:
    """Run a step, its output in WORK/<name>.txt; it is ended with its children at its limit of seconds."""
    log = work / f"{step.name}.txt"
    if step.tool and shutil.which(step.tool, path=surroundings(rehearse)["PATH"]) is None:
        log.write_text(f"left out: {step.tool} is not on PATH\n")
        return {"result": "left out", "seconds": 0.0, "reason": f"{step.tool} is not on PATH"}
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=surroundings(rehearse) | dict(step.environment),
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            result = "passed" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"ended at its limit of {limit:.0f} s"
        end_group(process)
    return {"result": result, "seconds": round(time.perf_counter() - began, 1), "limit": round(limit)}


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started: asked first, then killed."""
    for word, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        try:
            os.killpg(process.pid, word)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if word is signal.SIGTERM:
            time.sleep(0.2)
    process.wait()


def tail(path: Path, lines: int) -> str:
    """Return the last non-empty lines of a log."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return "\n".join([line.rstrip()[:180] for line in text.splitlines() if line.strip()][-lines:])


def keep(part: str, work: Path, out: Path) -> None:
    """Write all that the part has so far into DIR/PART.tar.gz."""
    unfinished = out / f".{part}.tar.gz"
    with tarfile.open(unfinished, "w:gz") as archive:
        archive.add(work, arcname=part)
    os.replace(unfinished, out / f"{part}.tar.gz")


def run_part(part: Part, out: Path, work: Path, rehearse: bool, again: bool, share: float) -> dict[str, Any]:
    """Run the steps of a part that have not passed yet, and keep their results."""
    work.mkdir(parents=True, exist_ok=True)
    stored = work / "summary.json"
    summary: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() and not again else {}
    summary |= {"rehearsed": rehearse}
    results = summary.setdefault("steps", {})
    until = time.perf_counter() + TOTAL[part.value] * share
    steps = correctness if part is Part.correctness else figures
    for step in steps(work, rehearse):
        if results.get(step.name, {}).get("result") == "passed":
            print(f"{part.value}/{step.name}: passed before", flush=True)
            continue
        left = until - time.perf_counter()
        if left < 5:
            results[step.name] = {"result": "not run: no time was left", "seconds": 0.0}
        else:
            results[step.name] = run(step, min(step.limit * share, left), work, rehearse)
        results[step.name]["end"] = tail(work / f"{step.name}.txt", step.lines)
        print(f"{part.value}/{step.name}: {results[step.name]['result']}", flush=True)
        stored.write_text(json.dumps(summary, indent=2))
        keep(part.value, work, out)
    return summary


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the last lines that each step printed, then a line for each step."""
    lines = []
    for part, summary in summaries.items():
        for name, result in summary["steps"].items():
            lines += [f"--- {part}/{name}", result.get("end", "")]
    lines.append("=== summary")
    for part, summary in summaries.items():
        for name, result in summary["steps"].items():
            lines.append(f"{part + '/' + name:28} {result['seconds']:7.1f} s  {result['result']}")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder for PART.tar.gz and summary.txt.")],
    part: Annotated[Part | None, typer.Option(help="Run this part alone.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for logs and results until they are packed.")] = ROOT
    / "build"
    / "gpu",
    rehearse: Annotated[bool, typer.Option("--rehearse", help="On a CPU: interpreted, tiny sizes.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Repeat steps that passed before.")] = False,
    share: Annotated[float, typer.Option(help="Multiplies every limit of time.")] = 1.0,
) -> None:
    """Test and measure momkd on the GPU of this machine."""
    out, work = out.resolve(), work.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summaries = {
        each.value: run_part(each, out, work / each.value, rehearse, again, share)
        for each in ([part] if part else list(Part))
    }
    text = table(summaries)
    (out / "summary.txt").write_text(text, encoding="utf-8")
    print(text)
    results = [result["result"] for summary in summaries.values() for result in summary["steps"].values()]
    if any(result not in ("passed", "left out") for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)

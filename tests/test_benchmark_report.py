"""The report of stored benchmark results: every figure comes from the file, and noise is not called a difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import report

APP = typer.Typer()
APP.command()(report.main)


def entry(name: str, median: float, iqr: float = 0.0, **info: Any) -> dict[str, Any]:
    return {"name": f"test_{name}", "stats": {"median": median, "iqr": iqr}, "extra_info": info}


def stored(path: Path, *entries: dict[str, Any], dirty: bool = False) -> Path:
    machine = {
        "machine": "x86_64",
        "cpu": {"brand_raw": "A processor"},
        "threads": 2,
        "momkd": {"versions": {"momkd": "1.2", "torch": "2.9"}, "devices": []},
    }
    held = {
        "machine_info": machine,
        "commit_info": {"id": "abcdef0123456789", "dirty": dirty},
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": list(entries),
    }
    path.write_text(json.dumps(held))
    return path


FIGURES = {
    "times as fast as a loop": 3.25,
    "times as fast as padded": 0.5,
    "peak MB of momkd": 1.5,
    "peak MB of a loop": 12.0,
    "peak MB of padded": 30.0,
    "attained": 0.625,
    "patches": 12345,
    "backend": "native",
}


def test_every_figure_is_of_the_file(tmp_path: Path) -> None:
    growth = {"growth": {"1000": 1e-3, "10000": 1e-2}, "slope of time": 0.97}
    growth |= {"nanoseconds a patch": 1000.0, "bytes a patch": 4.0}
    path = stored(tmp_path / "a.json", entry("op[cpu]", 0.0123, **FIGURES), entry("growth[op]", 1.0, **growth))
    done = CliRunner().invoke(APP, [str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| op[cpu]"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["op[cpu]", "12,345", "native", "12.3 ms", "a loop 3.25, padded 0.50", "62 %", "1.5, 12.0"]
    assert "0.97th power" in text
    assert "A processor, 2 threads; momkd 1.2; torch 2.9; commit abcdef0123; 2030-01-02." in text
    plots = {p.name for p in (tmp_path / "out").glob("*.svg")}
    assert plots == {f"{n}-{t}.svg" for n in ("speedup", "growth", "memory") for t in ("light", "dark")}


@pytest.mark.parametrize(
    ("before", "now", "iqr", "verdict"),
    [
        (1.0, 1.04, 0.0, "no difference beyond noise (5 %)"),
        (1.0, 1.2, 0.0, "1.20 times slower"),
        (1.2, 1.0, 0.0, "1.20 times faster"),
        (1.0, 1.2, 0.1, "no difference beyond noise (28 %)"),
    ],
)
def test_a_verdict_only_beyond_noise(tmp_path: Path, before: float, now: float, iqr: float, verdict: str) -> None:
    old = report.read(stored(tmp_path / "old.json", entry("op", before, iqr * before), entry("gone", 1.0)))
    new = report.read(stored(tmp_path / "new.json", entry("op", now, iqr * now), entry("fresh", 1.0)))
    ((name, _, _, said),) = report.compare(new, old)
    assert name == "op"
    assert said == verdict


def test_results_of_other_devices_are_not_compared(tmp_path: Path) -> None:
    old = report.read(stored(tmp_path / "old.json", entry("op", 1.0, device="One GPU")))
    new = report.read(stored(tmp_path / "new.json", entry("op", 1.0, device="Another GPU")))
    assert not list(report.compare(new, old))
    done = CliRunner().invoke(APP, [str(new.path), "--against", str(old.path)])
    assert done.exit_code == 2
    assert "no benchmark of the same name and device" in " ".join(done.output.replace("│", " ").split())


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    done = CliRunner().invoke(APP, [str(tmp_path / "x.json")])
    assert done.exit_code == 2
    assert "expected what `pytest benchmarks/" in " ".join(done.output.replace("│", " ").split())
    done = CliRunner().invoke(APP, [str(tmp_path / "nothing here")])
    assert done.exit_code == 2


def test_a_change_not_committed_shows(tmp_path: Path) -> None:
    assert "abcdef0123 with changes" in report.read(stored(tmp_path / "x.json", dirty=True)).conditions

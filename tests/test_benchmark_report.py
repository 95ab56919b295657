"""The report of stored benchmark results: every figure comes from the file, and noise is not called a difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import report
from benchmarks.stored import LEFT_OUT, RESULTS

APP = typer.Typer()
APP.command()(report.main)
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"


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


def form(ms: float, wall: float = 0.0, peak: float = 1.0, **more: float) -> dict[str, Any]:
    return {"ms": ms, "wall ms": wall or ms, "host us": 100.4, "peak MB": peak, **more}


def part_of(forms: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """One pass as benchmarks.gpu_machine.measured gives it."""
    mine = next(iter(forms.values()))
    ratios = {name: each["ms"] / mine["ms"] for name, each in list(forms.items())[1:] if "ms" in each}
    return {"forms": forms, "attained": 0.5, "times as fast as": ratios, **more}


SHARE = {"share of the plain product's rate": 0.58}


def size_of(patches: int, ms: float, width: int = 1024, name: str = "") -> dict[str, Any]:
    passes = {
        "forward": part_of({"momkd": form(ms, 3.0)}, **SHARE),
        "forward and backward": part_of({"momkd": form(2 * ms)}, **SHARE),
    }
    item = {"patches": patches, "backend": "triton", "bags": 32, "L": width, **passes}
    return {name or f"{patches} patches, 32 bags, L={width}": item}


def gpu_stored(path: Path, sections: dict[str, Any], **conditions: Any) -> Path:
    about = {"device": "A GPU", "tiny": False, "commit": "abcdef0123456789", "versions": {"momkd": "1.2"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": about | conditions, "sections": sections, "left out": []}))
    return path


def peers_of(**errors: float) -> dict[str, Any]:
    """Peers whose stored error is this; each takes 4 ms, momkd one."""
    forms = {name: form(4.0, 8.0, 20.0, **{"relative error": error}) for name, error in errors.items()}
    return {"patches": 12345, "backend": "triton", **part_of({"momkd": form(1.0, 4.0, 7.0)} | forms)}


def lines_of(folder: Path) -> list[list[str]]:
    lines = (folder / "report.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_figures_of_a_gpu(tmp_path: Path) -> None:
    loop = {"relative error": 0.003}
    peers = part_of({"momkd": form(1.0, 4.0, 7.0), "loop": form(2.0, 20.0, 9.0, **loop), "padded": form(3.0, 12.2)})
    step = {"patches": 900, "forms": {"momkd": form(1.0, 10.0), "eager": form(50.0, 20.0)}}
    sections = {
        "ceilings": {"copy": {"GB/s": 4265.7}, "product": {"failed": "RuntimeError: none", "traceback": ""}},
        "gated_attention_pool": {
            **size_of(10_000, 0.2),
            **size_of(1_000, 0.1),
            **size_of(1_000, 0.7, width=1536),
            **size_of(10_000, 9.0, name="10000 patches, 32 bags, tuned"),
        },
        "peers": {"forward": {"patches": 12345, "backend": "triton", "relative error": 0.002, **peers}},
        "ops": {"graph": {"nodes": 64, **part_of({"momkd": form(1.0), "matrix products": form(0.26)})}},
        "training step": {"2 slides": step},
        "copy to the device": {"pinned": {"ms": 1.0, "GB/s": 55.25}},
    }
    path = gpu_stored(tmp_path / "2030-01-02" / "figures.json", sections)
    done = CliRunner().invoke(APP, [str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    head, _, *body = lines_of(tmp_path / "out")
    assert head == list(report.GPU_HEAD)
    cells = {row[0]: row[1:] for row in body}
    # without a stored error of its own, padded counts as right
    wanted = ["12,345", "triton", "1 ms", "100", "loop 2.00; padded 3.00", "loop 5.00", "50 %", "", "7.0, 1.0"]
    assert cells["gated_attention_pool, fwd"] == wanted
    size = "gated_attention_pool: 1000 patches, 32 bags, L=1024, fwd"
    assert cells[size] == ["1,000", "triton", "100 µs", "100", "", "", "50 %", "58 %", "1.0"]
    assert cells["training step: 2 slides"] == ["900", "", "1 ms", "100", "", "eager 2.00", "", "", "1.0, 1.0"]
    # products of our own are a share, no peer
    assert cells["graph"] == ["64", "", "1 ms", "100", "", "", "50 %", "26 %", "1.0"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "A GPU; momkd 1.2; commit abcdef0123; 2030-01-02." in text
    assert "Rates: copy 4,266 GB/s; copy to the device, pinned 55.2 GB/s." in text
    assert "ceilings: product failed: RuntimeError: none." in text
    plots = {p.name for p in (tmp_path / "out").glob("*.svg")}
    assert plots == {f"{n}-{t}.svg" for n in ("speedup", "growth", "memory") for t in ("light", "dark")}
    assert all(name in text for name in plots)
    grown = report.read(path).growth
    assert grown["gated_attention_pool, L=1024, 32 bags, fwd, device"] == {1000: 1e-4, 10_000: 2e-4}
    assert grown["gated_attention_pool, L=1024, 32 bags, fwd, until the end"] == {1000: 3e-3, 10_000: 3e-3}
    assert len(grown) == 4


def test_a_wrong_peer_is_not_compared(tmp_path: Path) -> None:
    errors = {"right": 0.0199, "bad": 0.021, "nan": float("nan")}
    item = {"relative error": 0.0001, **peers_of(**errors)}
    item["forms"]["broken"] = {"failed": "OutOfMemoryError: no"}
    rough = {"relative error": 0.01, **peers_of(rough=0.09, bad=0.09)}  # less than 10 times as far
    unchecked = part_of({"momkd": form(1.0), "bad": form(9.0), "fine": form(3.0)})
    sections = {"peers": {"forward": item}, "ops": {"rough": rough, "unchecked": unchecked}}
    run = report.read(gpu_stored(tmp_path / "figures.json", sections))
    first, second, third = run.results
    assert first.peers() == {"right": 4.0}
    assert first.peers_until_the_end() == {"right": 2.0}
    assert list(first.memory()) == ["momkd", "right"]
    (row, *_) = report.rows(run)
    assert row[5].splitlines() == [
        "right 4.00",
        "bad: wrong result, not compared",
        "nan: wrong result, not compared",
        "broken: failed (OutOfMemoryError: no)",
    ]
    assert second.peers() == {"rough": 4.0, "bad": 4.0}
    assert third.peers() == {"fine": 3.0}
    assert "not checked here" in third.info[LEFT_OUT]["bad"]


def test_two_files_of_figures(tmp_path: Path) -> None:
    old = report.read(gpu_stored(tmp_path / "a" / "figures.json", {"ops": {"op": part_of({"momkd": form(1.0, 5.0)})}}))
    new = report.read(gpu_stored(tmp_path / "b" / "figures.json", {"ops": {"op": part_of({"momkd": form(1.1, 2.5)})}}))
    verdicts = {name: said for name, _, _, said in report.compare(new, old)}
    assert verdicts == {"op, device": "no difference beyond noise (14 %)", "op, until the end": "2.00 times faster"}
    done = CliRunner().invoke(APP, [str(new.path), "--against", str(old.path)])
    assert done.exit_code == 0, done.output
    assert "2.00 times faster" in " ".join(done.output.replace("│", " ").split())


def test_a_benchmark_of_a_gpu_has_the_same_columns(tmp_path: Path) -> None:
    info = {"seconds of momkd": 0.001, "seconds of loop": 0.003, "times as fast as loop": 3.0, "device": "A GPU"}
    info |= {"seconds until the end of momkd": 0.002, "seconds until the end of loop": 0.003, "host µs of momkd": 900.0}
    run = report.read(stored(tmp_path / "x.json", entry("op[cuda]", 0.0021, **info), entry("op[cpu]", 1.0, **FIGURES)))
    on_device, on_cpu = report.rows(run)
    assert on_device[3:7] == ("1 ms", "900", "loop 3.00", "loop 1.50")
    assert on_cpu[3:7] == ("1 s", "", "a loop 3.25\npadded 0.50", "")
    assert len(on_device) == len(on_cpu) == len(report.head(run))


def test_folders_pass_over_other_json(tmp_path: Path) -> None:
    for machine in ("one", "other"):
        gpu_stored(tmp_path / machine / "2030-01-02" / "figures.json", {"ops": {"op": peers_of(loop=0.0)}})
    stored(tmp_path / "one" / "2030-01-02.json", entry("op", 1.0, **FIGURES))
    smoke = tmp_path / "one" / "2030-01-02" / "smoke.json"
    smoke.write_text(json.dumps({"device": "A GPU", "results": []}))
    done = CliRunner().invoke(APP, [str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    written = {str(path.parent.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("report.md")}
    assert written == {"one/2030-01-02", "one/2030-01-02/figures", "other/2030-01-02/figures"}
    done = CliRunner().invoke(APP, [str(smoke)])
    assert done.exit_code == 2
    assert "expected what `pytest benchmarks/" in " ".join(done.output.replace("│", " ").split())
    smoke.write_text('{"cut off')
    assert CliRunner().invoke(APP, [str(tmp_path)]).exit_code == 2


def test_reports_are_those_of_stored_figures() -> None:
    for written in (DOCS / "report.md", *DOCS.glob("*/report.md")):
        folder = RESULTS if written.parent == DOCS else RESULTS / written.parent.name
        runs = map(report.read, [*folder.rglob("figures.json"), *folder.rglob("20*-*.json")])
        text = written.read_text(encoding="utf-8")
        assert any(text.startswith(report.markdown(run)) for run in runs), f"{written}: run benchmarks.report again"

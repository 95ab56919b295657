"""The command that tests and measures on a GPU: its limits, what it keeps, and that every module it starts exists."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu_report import Part, Step
from benchmarks.measure import commit


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Step]:
    """Steps that a part is to run in place of its own."""
    given: list[Step] = []
    monkeypatch.setattr(gpu_report, "correctness", lambda work, rehearse: iter(given))
    return given


def run(tmp_path: Path, **options: object) -> dict[str, dict[str, object]]:
    (tmp_path / "out").mkdir(exist_ok=True)
    return gpu_report.run_part(  # type: ignore[no-any-return]
        Part.correctness,
        tmp_path / "out",
        tmp_path / "work",
        **{"rehearse": False, "again": False, "share": 1.0, **options},
    )["steps"]


def test_a_step_that_fails_does_not_hide_the_next_one(steps: list[Step], tmp_path: Path) -> None:
    steps += [Step("bad", python("print('why'); raise SystemExit(3)"), 20), Step("good", python("print('fine')"), 20)]
    results = run(tmp_path)
    assert results["bad"]["result"] == "exit code 3"
    assert results["bad"]["end"] == "why"
    assert results["good"]["result"] == "passed"
    with tarfile.open(tmp_path / "out" / "correctness.tar.gz") as archive:
        assert {"correctness/bad.txt", "correctness/good.txt", "correctness/summary.json"} <= set(archive.getnames())


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_a_step_ends_at_its_limit_with_its_children(steps: list[Step], tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    told = tmp_path / "child"
    steps.append(Step("long", python(f"{child}; open({str(told)!r}, 'w').write(str(p.pid)); p.wait()"), 4))
    began = time.perf_counter()
    assert run(tmp_path)["long"]["result"] == "ended at its limit of 4 s"
    assert time.perf_counter() - began < 30
    for _ in range(50):
        if not alive(int(told.read_text())):
            break
        time.sleep(0.1)
    assert not alive(int(told.read_text()))


def test_what_passed_is_not_repeated(steps: list[Step], tmp_path: Path) -> None:
    count = tmp_path / "count"
    steps.append(Step("once", python(f"open({str(count)!r}, 'a').write('x')"), 20))
    for _ in range(2):
        assert run(tmp_path)["once"]["result"] == "passed"
    assert count.read_text() == "x"
    run(tmp_path, again=True)
    assert count.read_text() == "xx"


def test_a_missing_tool_is_told(steps: list[Step], tmp_path: Path) -> None:
    steps.append(Step("checked", ["no-such-tool"], 20, tool="no-such-tool"))
    assert run(tmp_path)["checked"] == {
        "result": "left out",
        "seconds": 0.0,
        "reason": "no-such-tool is not on PATH",
        "end": "left out: no-such-tool is not on PATH",
    }


def test_steps_share_the_time_of_their_part(steps: list[Step], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_report.TOTAL, "correctness", 1)
    steps.append(Step("late", python(""), 20))
    assert run(tmp_path)["late"]["result"] == "not run: no time was left"


def test_the_table_ends_with_every_step(steps: list[Step], tmp_path: Path) -> None:
    steps.append(Step("good", python("print('fine')"), 20))
    text = gpu_report.table({"correctness": {"steps": run(tmp_path)}})
    assert "--- correctness/good\nfine\n" in text
    assert text.rstrip().endswith("passed")


def modules(steps: Iterator[Step]) -> set[str]:
    return {step.command[step.command.index("-m") + 1] for step in steps}  # later ones are pytest's


@pytest.mark.parametrize("rehearse", [True, False])
@pytest.mark.parametrize("part", [gpu_report.correctness, gpu_report.figures])
def test_every_module_that_is_started_exists(part: object, rehearse: bool, tmp_path: Path) -> None:
    names = modules(part(tmp_path, rehearse))  # type: ignore[operator]
    assert len(names) >= 2
    for name in names:
        assert importlib.util.find_spec(name) is not None, name


def test_limits_fit_the_lease_of_a_gpu() -> None:
    assert sum(gpu_report.TOTAL.values()) <= 600


def test_the_commit_is_told_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMKD_COMMIT", " 1234abcd ")
    assert commit() == "1234abcd"
    monkeypatch.delenv("MOMKD_COMMIT")

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert commit() == "unknown: git"


def test_stored_results_of_a_part_name_their_steps(steps: list[Step], tmp_path: Path) -> None:
    steps.append(Step("good", python(""), 20))
    run(tmp_path)
    held = json.loads((tmp_path / "work" / "summary.json").read_text())
    assert held["steps"]["good"]["result"] == "passed"
    assert not held["rehearsed"]
    assert os.listdir(tmp_path / "out") == ["correctness.tar.gz"]

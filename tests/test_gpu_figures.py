"""The figures of a GPU, rehearsed on the CPU: every item gives figures, and what fails or runs late costs no other."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_figures, gpu_gate, gpu_machine
from benchmarks.gpu_machine import Item, Machine
from benchmarks.profile_step import main as profile_step


def figures_of(folder: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / gpu_figures.FILE).read_text())
    return held


def numbers(figures: dict[str, Any]) -> list[float]:
    """All numbers of an item, however deep."""
    found = []
    for value in figures.values():
        if isinstance(value, dict):
            found += numbers(value)
        elif isinstance(value, int | float):
            found.append(float(value))
    return found


@pytest.mark.slow
def test_every_item_gives_figures_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    gpu_figures.main(tmp_path, tiny=True, seconds=600.0)
    held = figures_of(tmp_path)
    assert held["conditions"]["device"] == "cpu"
    assert held["left out"] == []
    wanted = {"ceilings", "gated_attention_pool", "peers", "ops", "training step", "copy to the device"}
    assert set(held["sections"]) == wanted
    for section, made in held["sections"].items():
        for name, figures in made.items():
            assert "failed" not in figures, f"{section}: {name}: {figures['traceback']}"
            assert all(math.isfinite(value) for value in numbers(figures)), (section, name)
    pool = next(iter(held["sections"]["gated_attention_pool"].values()))
    for way in ("forward", "forward and backward"):
        assert {"TFLOP/s", "attained", "forms"} <= set(pool[way])
        assert {"ms", "wall ms", "host us", "peak MB"} <= set(pool[way]["forms"]["momkd"])
    forms = held["sections"]["peers"]["forward and backward"]["forms"]
    assert list(forms) == ["momkd", "loop over bags", "flattened", "flattened, torch.compile", "padded batch"]
    assert not [name for name, each in forms.items() if "failed" in each]
    for op in ("memory_guided_pool", "attention_pool", "memory_similarity max", "soft_angle_loss"):
        assert all("relative error" in form for form in held["sections"]["ops"][op]["forms"].values()), op
    assert held["conditions"]["date"]
    steps = held["sections"]["training step"]
    assert all(step["forms"]["momkd"]["slides a second"] > 0 for step in steps.values())
    table = capsys.readouterr().out
    assert "gated_attention_pool: 200 patches, 32 bags, L=64, fwd+bwd" in table
    assert "FAILED" not in table


def test_the_table_has_no_ratio_to_a_wrong_peer() -> None:
    def form(ms: float, error: float) -> dict[str, float]:
        return {"ms": ms, "wall ms": ms, "host us": 1.0, "relative error": error}

    forms = {"momkd": form(1.0, 0.002), "loop": form(2.0, 0.003), "flattened": form(9.0, 10.0)}
    part = {"forms": forms, "times as fast as": {"loop": 2.0, "flattened": 9.0}}
    _, line = gpu_figures.lines({"sections": {"peers": {"forward": part}}, "left out": []})
    assert line.endswith("loop 2.00, flattened WRONG")


def test_all_sizes_are_planned_and_none_twice() -> None:
    m = Machine("cuda")
    planned = [item.name for item in (*gpu_gate.first_items(m), *gpu_gate.other_items(m))]
    assert len(set(planned)) == len(planned)
    for patches in (1_000, 10_000, 100_000, 1_000_000):
        for bags in (1, 32, 100):
            for width in (1024, 1536):
                assert f"{patches} patches, {bags} bags, L={width}" in planned


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, items: list[Item], **options: Any) -> dict[str, Any]:
    monkeypatch.setattr(gpu_figures, "items", lambda m: items)
    gpu_figures.main(folder, tiny=True, **{"seconds": 60.0, **options})
    return figures_of(folder)


def test_a_failure_is_written_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> dict[str, Any]:
        raise AssertionError("wrong by 1.0e-01: no time is reported")

    held = run(tmp_path, monkeypatch, [Item("ops", "wrong", wrong), Item("ops", "right", lambda: {"ms": 2.0})])
    assert held["sections"]["ops"]["wrong"]["failed"] == "AssertionError: wrong by 1.0e-01: no time is reported"
    assert held["sections"]["ops"]["right"]["ms"] == 2.0
    assert "ops: wrong: FAILED: AssertionError: wrong by" in capsys.readouterr().out


def test_no_item_begins_after_its_time_and_resume_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    items = [Item("ops", name, lambda name=name: ran.append(name) or {"ms": 1.0}) for name in ("a", "b")]
    held = run(tmp_path, monkeypatch, items[:1])
    assert ran == ["a"]
    held = run(tmp_path, monkeypatch, items, seconds=-1.0, resume=True)
    assert held["left out"] == ["ops: b"]
    held = run(tmp_path, monkeypatch, items, resume=True)
    assert ran == ["a", "b"]
    assert set(held["sections"]["ops"]) == {"a", "b"}
    assert held["left out"] == []
    run(tmp_path, monkeypatch, items)  # without it, all anew
    assert ran == ["a", "b", "a", "b"]


def test_a_lost_device_starts_the_program_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Restarted(Exception):
        pass

    def execv(path: str, arguments: list[str]) -> None:
        raise Restarted(arguments)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(gpu_figures, "usable", lambda device: False)
    with pytest.raises(Restarted) as started:
        run(tmp_path, monkeypatch, [Item("ops", "a", lambda: {"ms": 1.0})])
    assert "--resume" in started.value.args[0]
    assert figures_of(tmp_path)["sections"]["ops"]["a"]["ms"] == 1.0


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a GPU that torch can use, got none; --tiny rehearses"):
        gpu_figures.main(tmp_path)


def test_a_peer_that_fails_does_not_cost_our_figures() -> None:
    def out_of_memory() -> None:
        raise RuntimeError("out of memory\n")

    m, calls = Machine("cpu", tiny=True), {"momkd": lambda: torch.ones(9).sum(), "padded batch": out_of_memory}
    figures = gpu_machine.measured(m, calls, (1.0, 1.0), torch.float32)
    assert figures["forms"]["padded batch"] == {"failed": "RuntimeError: out of memory"}
    assert figures["forms"]["momkd"]["ms"] > 0
    assert figures["times as fast as"] == {}


def test_profile_of_a_step_has_files_of_its_own(tmp_path: Path) -> None:
    profile_step(tmp_path, slides=1, patches=20, steps=1, bf16=True)
    assert {path.name for path in tmp_path.iterdir()} == {"step_profile.txt", "step_profile.json", "step_trace.json"}
    figures = json.loads((tmp_path / "step_profile.json").read_text())
    assert figures["bf16 autocast"] is True
    assert figures["wall ms a step"] > 0

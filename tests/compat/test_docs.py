"""docs/drop-ins.md: its examples run, on synthetic checkpoints of the projects' layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import momkd
from momkd import compat
from tests.compat.foreign import PlainCLAM
from tests.compat.test_loading import LAYOUTS, filled

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "drop-ins.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
PROJECTS = {
    "CLAM": "CLAM_SB",
    "MIL-Lab": "MIL-Lab",
    "torchmil": "torchmil",
    "AttentionDeepMIL": "AttentionDeepMIL gated",
    "DTFD-MIL": "DTFD-MIL attention",
    "eva": "eva",
    "TRIDENT": "TRIDENT",
    "DSMIL": "DSMIL",
}


class TheirCLAM_SB(PlainCLAM):
    def __init__(self) -> None:
        super().__init__(embed_dim=8)


def saved(project: str) -> dict[str, Any]:
    if project == "torchmil":  # its page has another width
        return compat.torchmil.ABMIL((1024,), gated=True).state_dict()
    return {name: 0.05 * t for name, t in filled(LAYOUTS[PROJECTS[project]][1]).items()}


@pytest.mark.parametrize("section", SECTIONS)
def test_examples_run(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, scope = SECTIONS[section], {"torch": torch, "momkd": momkd, "TheirCLAM_SB": TheirCLAM_SB}
    for name in re.findall(r'torch\.load\("(.+?)"\)', code):
        torch.save(saved(section), tmp_path / name)
    if section == "torchmil":  # goes on from the batch above it
        scope |= {"x": torch.randn(2, 300, 1024), "mask": torch.ones(2, 300)}
    exec(compile(code, f"docs/drop-ins.md, {section}", "exec"), scope)
    told = capsys.readouterr().out
    if "accelerate" in section:
        assert told == re.findall(r"print\(report\)  # (.+)", code)[0] + "\n"
    else:
        model: Any = scope["model"]
        assert any(p.grad is not None and p.grad.norm() > 0 for p in model.parameters()), "something is trained"
        lines = [line for line in code.splitlines() if line and not line.startswith("#")]
        assert len(lines) <= 12


def test_every_project_has_a_section() -> None:
    assert set(SECTIONS) == {*PROJECTS, "A model that exists: `accelerate`"}
    modules = set(re.findall(r"`momkd\.compat\.(\w+)`", PAGE))
    assert modules == {m for m in compat.__all__ if hasattr(getattr(compat, m), "__path__") or m.islower()} - {
        "accelerate",
        "restore",
    }
    for row in re.findall(r"^\| .*? \| `momkd\.compat\.(\w+)` \| (.*?) \|", PAGE, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", row[1]):
            assert hasattr(getattr(compat, row[0]), name), name


def test_the_readme_leads_here() -> None:
    assert "(docs/drop-ins.md)" in (ROOT / "README.md").read_text(encoding="utf-8")

"""What the README says: its Python runs, its commands exist, its table is that of dispatch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from momkd import cli
from momkd.dispatch import OPS
from tests.fuzz import KINDS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
NAMES = {"native": "native C++", "triton": "Triton", "cuda": "CUDA"}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, "" for those that name none."""
    found: list[str] = []
    inside: str | None = None
    for line in README.splitlines():
        fence = re.fullmatch(r" *```(\w*)", line)
        if fence is None:
            if inside == language:
                found[-1] += line.strip() + "\n" if not language else line + "\n"
        elif inside is None:
            inside = fence[1]
            if inside == language:
                found.append("")
        else:
            inside = None
    return found


def test_python_runs_and_prints_what_its_comments_say(tmp_path: Path) -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "torch.Size([3, 1, 1024])",
        "torch.Size([3, 2]) torch.Size([4701, 1])",
    ]


def test_the_table_of_ops_is_that_of_dispatch() -> None:
    told: dict[str, str] = {}
    for ops, backends in re.findall(r"^\| (`.*?`) \|.*\| (.*?) \|$", README, re.MULTILINE):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", ops), backends)
    assert told == {op: ", ".join(NAMES.get(name, name) for name in backends) for op, backends in OPS.items()}


def test_the_number_of_inputs_tried_is_what_the_fuzz_suite_runs() -> None:
    (told,) = re.findall(r"([\d,]+) damaged and hostile inputs", README)
    assert told == f"{sum(kind.cases for kind in KINDS.values()):,}"


def test_commands_and_options_exist() -> None:
    lines = [re.sub(r"\\\n\s*", " ", block) for block in blocks("")]
    commands = re.findall(r"momkd (\w+)([^&\n]*)", "\n".join(lines))
    assert {name for name, _ in commands} >= {"demo", "splits", "train", "predict"}
    for name, rest in commands:
        done = CliRunner().invoke(cli.app, [name, "--help"])
        assert done.exit_code == 0, name
        for option in re.findall(r"--[\w-]+", rest):
            assert option in done.output, f"momkd {name} {option}"


@pytest.mark.parametrize("command", ["momkd demo", 'pytest -n auto --dist loadfile -m "not slow"'])
def test_the_two_commands(command: str) -> None:
    assert f"\npip install -e '.[test]' -c constraints.txt && {command}\n" in README


def test_cli_is_the_console_script() -> None:
    assert callable(cli.main)

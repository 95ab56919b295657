"""The edges of the command line: how commands end, what they print, what they never write over."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer
from rich.table import Table

from momkd.cli.ending import BUG, one_clear_line
from momkd.errors import BackendError, InputError, RankError
from momkd.terminal import note, printable, say, show
from tests.command import Done, ended, momkd, one_line

HOSTILE = (
    "[/b]",
    "[link=https://x.y]z[/link]",
    ":smile:",
    "=1+1",
    "a\rb",
    "\x1b[2J",
    "\u202egpj.exe",
    "-",
    "é",
    "a\udcffb",
)


# -- how a command ends --------------------------------------------------------------------------------------------


def end_with(error: BaseException) -> Done:
    def run() -> None:
        with one_clear_line():
            raise error

    return ended(run)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InputError("a.csv: expected x,\ngot [/b]"), r"a.csv: expected x,\ngot [/b]"),
        (BackendError("no triton"), "no triton"),
        (RankError("rank 1 has ended"), "rank 1 has ended"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x/[/b]"), "x/[/b]: No such file; check the path"),
        (PermissionError(errno.EACCES, "Permission denied", b"x/\xff"), r"x/\udcff: Permission denied; change"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 400), "File name too long; give a shorter name"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (OSError("Unable to open file\n(bad)"), "cannot read or write (Unable to open file (bad))"),
        (MemoryError("Unable to allocate 4 EiB"), "out of memory (Unable to allocate 4 EiB); "),
        (OverflowError("int too large to convert to float"), "got one too large (int too large"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "expected text in UTF-8, got other bytes"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (typer.BadParameter("no\nnumber"), r"Invalid value: no\nnumber"),
        (InputError("9" * 100_000), " ... 999"),
    ],
)  # fmt: skip
def test_errors_of_input_and_system_are_one_line(error: Exception, told: str) -> None:
    assert told in one_line(end_with(error))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_an_interrupt_is_130_and_one_line(error: BaseException) -> None:
    assert end_with(error) == Done(130, "", "momkd: interrupted\n")


def test_a_reader_that_has_gone_is_no_error() -> None:
    assert end_with(BrokenPipeError(errno.EPIPE, "Broken pipe")) == Done(141, "", "")


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyError("x"), ValueError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback_and_asks_for_a_report(error: Exception) -> None:
    done = end_with(error)
    assert done.code == 1
    assert done.err.startswith("Traceback")
    assert done.err.splitlines()[-1] == BUG


@pytest.mark.parametrize(
    "words",
    ["no-such", "splits", "splits --odd", "splits a --out b --folds \x1b[2J", f"splits a --out b --folds {'9' * 5000}"],
)
def test_wrong_usage_is_one_line(words: str) -> None:
    line = one_line(momkd(*words.split()))
    assert "; see momkd " in line
    assert len(line) < 2000


def test_help_and_version_end_with_0() -> None:
    assert momkd("--version").code == momkd("--help").code == 0
    assert momkd().err.startswith("Usage: momkd") or momkd().out.startswith("Usage: momkd")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("end", ["full", "pipe"])
def test_an_output_that_cannot_be_written(end: str) -> None:
    """In a process: what Python itself does at the end must not show either."""
    code = "from momkd.cli import ending\nfrom momkd.terminal import say\nwith ending.one_clear_line():\n say('x')"
    command = [sys.executable, "-c", code]
    if end == "full":
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2
        assert (
            done.stderr
            == "momkd: error: standard output: No space left on device; free some space, or write elsewhere\n"
        )
        return
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


# -- what is printed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_is_shown_as_it_is(text: str) -> None:
    def run() -> None:
        with one_clear_line():
            say(text)
            note(text)
            table = Table(text)
            table.add_row(text)
            show(table)

    done = ended(run)
    assert (done.code, done.err) == (0, "")
    shown = printable(text)
    assert done.out.splitlines()[:2] == [shown, f"note {shown}"]
    assert done.out.count(shown) >= 4
    assert "\x1b" not in done.out


def test_what_the_terminal_cannot_encode_is_escaped(tmp_path: Path) -> None:
    labels = tmp_path / "Grün-λ.csv"
    rows = [{"slide_id": f"s{n}", "case_id": f"c{n}", "label": "é" if n % 2 else "[/b]"} for n in range(12)]
    pd.DataFrame(rows).to_csv(labels, index=False)
    done = momkd("splits", labels, "--out", tmp_path / "λ[/b]", "--folds", 2, encoding="ascii")
    assert done.code == 0, done.err
    assert r"\u03bb[/b]" in done.out
    assert r"Gr\xfcn-\u03bb.csv" in one_line(
        momkd("splits", labels, "--label", "x", "--out", tmp_path, encoding="ascii")
    )

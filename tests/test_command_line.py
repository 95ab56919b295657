"""The edges of the command line: how commands end, what they print, what they never write over."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import typer
from rich.table import Table

from momkd import demo, dispatch
from momkd.cli.ending import BUG, one_clear_line
from momkd.data import raw
from momkd.data.atomic import make_folder, write_text
from momkd.device import pick_device
from momkd.errors import BackendError, InputError, RankError
from momkd.names import check_name
from momkd.simulate import SimulatedCohort
from momkd.simulate import write as momkd_simulate
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


# -- devices, numbers and names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cuda", "gpu", "mps", "cuda:9", "cuda:x", "xyz", "", "[/b]", "cpu:1", "9" * 5000, "cuda:-1"]
)
def test_a_device_that_is_not_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = r"^device: expected one of cpu, got .* \(torch finds no GPU; momkd doctor says why\); choose one or leave it"
    with pytest.raises(InputError, match=told) as caught:
        pick_device(name)
    assert len(str(caught.value)) < 300


def test_the_cpu_by_any_of_its_names() -> None:
    assert {pick_device(name) for name in ("cpu", "CPU", "cpu:0", " cpu ")} == {torch.device("cpu")}


def test_devices_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = (None, "cpu", "cuda", "cuda:1")
    assert [str(pick_device(name)) for name in given] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(InputError, match=r"^device: expected one of cpu, cuda:0, cuda:1, got 'cuda:2'; choose one"):
        pick_device("cuda:2")


@pytest.mark.parametrize("value", ["foo", "9" * 5000, "[/b]"])
def test_a_backend_in_the_environment_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMKD_BACKEND", value)
    with pytest.raises(InputError, match=r"^MOMKD_BACKEND: expected one of .*; unset it or correct it$"):
        dispatch.choose("attention_pool", None, ())


@pytest.mark.parametrize(
    "name", ["/abs/path", "../../x", "a/b", "..", "", "a\nb", "\x1b[2J", "x" * 241, "é" * 121, "a\\b"]
)
def test_names_that_lead_out(name: str) -> None:
    with pytest.raises(InputError, match=r"^table: expected tasks that can name a file, got ") as caught:
        check_name(name, "table", "tasks")
    assert "\n" not in str(caught.value)


# -- what is never written over ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """features/, labels.csv, omics.csv, splits/ and run/."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_cohort.root, folder, dirs_exist_ok=True)
    small = ("train.epochs=1", "model.hidden_features=8", "model.gate_features=4")
    settings = [word for setting in small for word in ("--set", setting)]
    given = ("--features", folder / "features", "--labels", folder / "labels.csv", "--splits", folder / "splits")
    done = momkd("train", *given, "--fold", 0, "--preset", "abmil", "--out", folder / "run", *settings)
    assert done.code == 0, done.err
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words",
    [
        "predict run --features features --out features/a.csv",
        "predict run --features features --out features/../labels.csv/../features",
        "predict run --features features --out p.csv --attention features",
        "predict run --features features --out p.csv --attention features/new",
        "predict run --features link --out p.csv --attention features",
        "predict run --features features --out p.csv --graphs features",
        "predict run --features features --out run/metrics.json",
        "predict run --features features --out new.csv --out-patients ./new.csv",
        "predict run --features features --out run/fold_0/model.safetensors",
        "predict run --features features --out p.csv --attention run/fold_0",
        "evaluate run --features features --labels run/predictions_external.csv",
        "explain run --features features --out features",
        "explain run --features features --out features/new",
        "explain run --features features --out run",
        "graph features --out features",
        "graph features --out features/graphs",
        "graph link --out features",
        "pack features --out features/all.h5",
        "pack features --out labels.csv",
        "pack features --out /dev/null",
        "convert run --out run/fold_0/model.safetensors",
        "convert run --out run/config.toml",
        "convert labels.csv --out labels.csv",
        "splits splits/splits_1.csv --out splits",
        "splits labels.csv --out labels.csv",
        "train --features features --labels labels.csv --splits splits --out features",
        "train --features features --labels labels.csv --splits splits --out features/run",
        "train --features features --labels labels.csv --splits splits --out splits",
        "train --features features --labels labels.csv --splits splits --out new --graphs features",
        "study --features features --labels labels.csv --out features/study",
        "study --features features --labels study/internal.csv --out study",
        "study --features study/features --labels labels.csv --out study",
        "study --features features --labels labels.csv --out mine",
        "study --features features --labels labels.csv --hold-out site=a --out mine",
        "demo --out mine",
        "demo --out .",
        "simulate features --overwrite",
        "simulate mine --overwrite",
        "predict run --features features --out /dev/null",
        "predict run --features features --out fifo",
        "splits labels.csv --out fifo",
        "predict run --features features --out labels.csv",
        "predict run --features features --out linked.csv",
        "predict run --features features --out mine/fast/model.pt",
        "predict run --features features --out p.csv --out-patients omics.csv",
        "predict run --features features --out /dev/stdout",
        "predict run --features features --out to-stdout",
        "predict run --features features --out p.csv --out-patients /proc/self/fd/1",
        "splits labels.csv --out mine --folds 2",
        "graph features --out study/features",
    ],
)
def test_inputs_and_files_of_others_stay(words: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (project / "fifo").exists():
        os.mkfifo(project / "fifo")
        (project / "link").symlink_to("features")
        (project / "linked.csv").symlink_to("labels.csv")
        (project / "to-stdout").symlink_to("/dev/stdout")
        for name in (
            "study/internal.csv",
            "mine/report.md",
            "mine/index.html",
            "mine/results.csv",
            "mine/fast/model.pt",
            "mine/splits_1.csv",
        ):
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(project / "labels.csv", project / name)
        shutil.copytree(project / "features", project / "study" / "features")
        (project / "features" / "new").mkdir()
    monkeypatch.chdir(project)
    before = contents(project)
    one_line(momkd(*words.split(), *(["--device", "cpu"] if words.startswith("predict") else [])))
    assert contents(project) == before
    assert Path("/dev/null").is_char_device()


def test_commands_replace_what_they_wrote(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.csv").symlink_to("p.csv")
    (tmp_path / "empty.csv").touch()
    predict = ("predict", project / "run", "--features", project / "features")
    for slides, patients in (("p.csv", "c.csv"), ("p.csv", "c.csv"), ("link.csv", "empty.csv"), ("c.csv", "p.csv")):
        done = momkd(*predict, "--out", slides, "--out-patients", patients)
        assert done.code == 0, done.err
    assert pd.read_csv("p.csv").columns[1] == "slides"
    for folds in (2, 2, 3):
        assert momkd("splits", project / "labels.csv", "--out", "splits", "--folds", folds).code == 0
    text = Path("p.csv").read_text()
    Path("p.csv").write_text(text.replace("case_id", "note,case_id", 1))
    line = one_line(momkd(*predict, "--out", "p.csv"))
    assert line.startswith("p.csv: expected no file or predictions of momkd to replace, got another file; choose")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_redirected_output_is_no_file_to_replace(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file, pytest.raises(InputError, match="expected a file to write, got a device or a pipe"):
        write_text(f"/proc/self/fd/{file.fileno()}", "x")
    assert log.read_bytes() == b""


def test_attention_replaces_attention_alone(project: Path, tmp_path: Path) -> None:
    command = (
        "predict",
        project / "run",
        "--features",
        project / "features",
        "--out",
        tmp_path / "p.csv",
        "--attention",
    )
    for _ in range(2):
        assert momkd(*command, tmp_path / "attention").code == 0
    other = tmp_path / "features of another encoder"
    shutil.copytree(project / "features", other)
    before = contents(other)
    assert "expected no file or an earlier one with 'attention' to replace, got another" in one_line(
        momkd(*command, other)
    )
    assert contents(other) == before


def test_a_demonstration_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        demo, "_demonstrate", lambda out, *_: write_text(make_folder(out / "report") / "index.html", "x")
    )
    out = tmp_path / "demo"
    for _ in range(2):
        assert momkd("demo", "--out", out).code == 0
    (out / "report" / "mine.txt").write_text("years of work")
    assert "got also 'report/mine.txt'; move it elsewhere" in one_line(momkd("demo", "--out", out))
    assert (out / "report" / "mine.txt").read_text() == "years of work"


# -- interrupts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("graph features --out NEW/graphs", {"graphs"}),
        ("pack features --out NEW/all.h5", {".all.h5.partial", ".all.h5.journal"}),  # it goes on there
        ("predict run --features features --out NEW/p.csv", set()),
        ("explain run --features features --out NEW/explained", set()),
        ("evaluate run --features features --labels labels.csv", set()),
        ("train --features features --labels labels.csv --splits splits --out NEW/run", {"run"}),
        ("study --features features --labels labels.csv --seeds 1 --arms abmil --out NEW/study", {"study"}),
        ("simulate NEW/cohort --slides 20 --patches 20 --features 8", set()),
        ("demo --fast --out NEW/demo", {"demo"}),
    ],
)
def test_an_interrupt_leaves_nothing_half_done(
    words: str, left: set[str], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def interrupted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            calls.append(given)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGINT)  # in whichever thread this is, it reaches the main one
            return plain(*given, **named)

        return call

    read, write = ("read_coords" if words.startswith("graph") else "read_features"), momkd_simulate.write_trident
    monkeypatch.setattr(raw._RawHdf5, read, interrupted(getattr(raw._RawHdf5, read)))
    monkeypatch.setattr(momkd_simulate, "write_trident", interrupted(write))
    monkeypatch.chdir(project)
    before, handler = contents(project), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = momkd(*words.replace("NEW", str(tmp_path)).split())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done.code == 130, done.err
    assert done.err == "momkd: interrupted\n"
    assert contents(project) == before
    assert {path.name for path in tmp_path.iterdir()} <= left
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name or path.name == "run.lock"]

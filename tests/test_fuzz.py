"""Untrusted input: 10,000 damaged and hostile files in worker processes, texts by hypothesis, names that lead out."""

from __future__ import annotations

import faulthandler
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from momkd import cli
from momkd.data import packed, read_labels, read_omics, read_splits
from momkd.data.pack import pack
from momkd.data.raw import check_id
from momkd.errors import InputError
from momkd.simulate import SimulatedCohort
from tests.fuzz import KINDS, main
from tests.processes import start

WORKERS = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers there")


def fuzz(kind: str, cases: int, *patch: str) -> None:
    faulthandler.enable()
    exec("\n".join(patch), {})
    raise SystemExit(main(kind, cases, 0))


def worker(kind: str, cases: int, *patch: str) -> tuple[int, str, str]:
    """Exit code, the last line, and what was wrong."""
    process = start(fuzz, kind, cases, *patch)
    code = process.wait(300)
    return code, (process.stdout.splitlines() or [""])[-1], process.stderr


def test_there_are_ten_thousand() -> None:
    assert sum(kind.cases for kind in KINDS.values()) >= 10_000


@WORKERS
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind: str) -> None:
    code, last, wrong = worker(kind, KINDS[kind].cases)
    assert code == 0, f"after case {last}: {wrong}"
    done, refused = [int(word) for word in last.split() if word.isdigit()][:2]
    assert done == KINDS[kind].cases
    assert 0 < refused < done  # some read, or nothing is tested but the first check


@WORKERS
@pytest.mark.parametrize(
    ("kind", "cases", "patch", "told"),
    [
        (
            "npy",
            400,
            "numpy.load = lambda path, **_: plain(path, allow_pickle=True)",
            "something was written or executed",
        ),
        ("hdf5", 400, "momkd.data.raw.check_written = lambda *_: None", "MemoryError"),
        ("packed", 1200, "momkd.data.packed.check_id = lambda *_: None", "AssertionError"),
        ("labels", 10, "tests.fuzz.tables.read_labels = lambda path: 1 / 0", "ZeroDivisionError"),
        (
            "npy",
            6,
            "tests.fuzz.SECONDS = 1; tests.fuzz.KINDS['npy'] = Kind(made, lambda _: time.sleep(9), 6)",
            "longer than 1 s",
        ),
    ],
)
def test_a_weaker_reader_is_found_out(kind: str, cases: int, patch: str, told: str) -> None:
    setup = (
        "import time, numpy, momkd.data.raw, momkd.data.packed, momkd.data.tables, tests.fuzz",
        "plain, made = numpy.load, tests.fuzz.KINDS['npy'].make",
        "from tests.fuzz.kinds import Kind",
    )
    code, _, wrong = worker(kind, cases, *setup, patch)
    assert code == 1
    assert told in wrong


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
CELL = st.one_of(TEXT, st.sampled_from(["", "0", "1", "1.0", "NA", "9" * 5000, '"', "../x", "1e400", "-", "\0"]))
TABLE = st.lists(st.lists(CELL, max_size=5), max_size=6)


@settings(max_examples=400, deadline=None)
@given(table=TABLE, header=st.sampled_from(["slide_id,case_id,label", "train,val,test", "case_id,A,B", ""]))
def test_texts(tmp_path_factory: pytest.TempPathFactory, table: list[list[str]], header: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "texts"
    folder.mkdir(exist_ok=True)
    path = folder / "splits_0.csv"
    path.write_bytes("\n".join([header, *(",".join(row) for row in table)]).encode())
    for read in (read_labels, lambda _: read_splits(folder), read_omics):
        try:
            read(path)
        except InputError as error:
            lines = str(error).splitlines()
        else:
            lines = [""]
        assert len(lines) == 1


@given(name=TEXT)
def test_an_id_that_passes_stays_in_its_folder(name: str) -> None:
    folder = Path("/attention")
    try:
        check_id(name, "store")
    except InputError:
        return
    assert (folder / f"{name}.h5").parent == folder
    assert Path(name).name == name


def test_nothing_is_written_outside_the_output_folder(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    """Ids of labels and of a store that lead out, through training, prediction and graphs."""
    inside = tmp_path / "a/b/inside"
    inside.mkdir(parents=True)
    shutil.copytree(tiny_cohort.root, inside / "cohort")
    cohort, store = inside / "cohort", inside / "all.h5"
    labels = pd.read_csv(cohort / "labels.csv", dtype=str)
    victim, evil = labels["slide_id"][0], "../../../evil"
    for path in (cohort / "labels.csv", *(cohort / "splits").iterdir()):
        path.write_text(path.read_text().replace(victim, evil))
    pack(cohort / "features", store)
    with h5py.File(store, "r+") as file:
        file["ids"][0] = evil.encode()
        file["seal"][0] = packed.seal({name: file[name][:] for name in packed.SEALED if name in file})
    there = {path for path in tmp_path.rglob("*") if inside not in path.parents}
    run = inside / "run"

    def momkd(*arguments: object) -> str:
        done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        if done.exception is not None and not isinstance(done.exception, InputError):
            raise done.exception
        return str(done.exception or "")

    train = ("train", "--labels", cohort / "labels.csv", "--splits", cohort / "splits", "--out", run, "--fold", 0)
    small = ("--set", "train.epochs=1", "--set", "model.hidden_features=8", "--preset", "paper")
    assert f"slide {evil!r}" in momkd(*train, "--features", cohort / "features", *small)
    assert "expected slide ids that can name a file" in momkd(*train, "--features", store, *small)
    options = ("--features", cohort / "features", "--graphs", inside / "graphs", "--skip-bad", *small)
    assert momkd(*train, *options) == ""
    predict = ("predict", run, "--out", inside / "p.csv", "--attention", inside / "attention")
    assert "expected slide ids that can name a file" in momkd(*predict, "--features", store)
    assert momkd(*predict, "--features", cohort / "features") == ""
    assert len(list((inside / "attention").iterdir())) == 36
    assert {path for path in tmp_path.rglob("*") if inside not in path.parents} == there
    assert np.isfinite(pd.read_csv(inside / "p.csv")["prob_1"]).all()

"""Runs that are killed, that fill the disk, and that want the same folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from momkd.config import Config
from momkd.data import lock
from momkd.data.atomic import atomic_write, remove_leftovers
from momkd.data.lock import LOCK, locked
from momkd.errors import InputError
from momkd.experiment import train_run
from momkd.simulate import SimulatedCohort
from tests.ranks import ROOT, environment

SETTINGS = ["train.epochs=4", "omics.genes=20", "omics.hidden_features=16", "omics.features=8"]
SETTINGS += ["model.hidden_features=16", "model.projection_features=8", "memory.slots=3", "train.slides_per_step=5"]

# Trains as `momkd train` does, and dies where it is told to: in a step, or in the writing of a file.
VICTIM = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
from tests.test_faults import train
from momkd.data import atomic
from momkd.experiment import Reporter

how, where, epoch = sys.argv[3], sys.argv[4], int(sys.argv[5])
now = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Here(Reporter):
    def progress(self, progress):
        global now
        now = progress.epoch
        if now == epoch and how == "step":
            die()
        if now == epoch and how == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(where), int(where)))
        if how == "wait":
            print("training", flush=True)
            time.sleep(120)

shown = time.perf_counter
time.perf_counter = lambda: 1000 * shown()  # report every step
replace, fsync = os.replace, os.fsync

def replaced(source, target):
    if now == epoch and how == "before" and Path(target).name == where:
        die()
    replace(source, target)
    if now == epoch and how == "after" and Path(target).name == where:
        die()

def synced(handle):
    name = os.readlink(f"/proc/self/fd/{handle}")
    if now == epoch and how == "half" and f".{where}." in name:
        os.truncate(name, os.path.getsize(name) // 2)
        die()
    fsync(handle)

os.replace, os.fsync = replaced, synced
train(Path(sys.argv[1]), Path(sys.argv[2]), reporter=Here(), resume="resume" in sys.argv[6:])
"""


def train(cohort: Path, out: Path, **options: object) -> None:
    paths = {"features": cohort / "features", "labels": cohort / "labels.csv", "splits": cohort / "splits"}
    config = Config.preset("fast").with_settings(SETTINGS)
    train_run(**paths, omics=cohort / "omics.csv", out=out, config=config, folds=[0], device="cpu", **options)


def victim(cohort: Path, out: Path, *arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", VICTIM, *map(str, (cohort, out, *arguments))]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )


@pytest.fixture(scope="module")
def unbroken(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    process = victim(tiny_cohort.root, out, "not at all", "", 0)
    assert process.wait(240) == 0, process.communicate()[1]
    return out


def contents(out: Path) -> dict[str, bytes]:
    """The files of a run, without what tells the time."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    log = pd.read_csv(out / "fold_0" / "log.csv").drop(columns="patches_per_second")
    found["fold_0/log.csv"] = log.to_csv().encode()
    return {name: data for name, data in found.items() if not name.endswith(".png")}


# -- SIGKILL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "where", "epoch"),
    [
        ("step", "", 2),
        ("after", "config.toml", 0),
        ("after", "log.csv", 2),
        ("half", "model.safetensors", 1),  # the first epoch that can be the best
        ("after", "model.safetensors", 1),  # the weights are of an epoch that the state has not seen
        ("half", "state.pt", 2),
        ("before", "predictions.csv", 3),
        ("after", "predictions.csv", 3),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    tiny_cohort: SimulatedCohort, tmp_path: Path, unbroken: Path, how: str, where: str, epoch: int
) -> None:
    out = tmp_path / "run"
    process = victim(tiny_cohort.root, out, how, where, epoch)
    assert process.wait(240) == -signal.SIGKILL, process.communicate()[1]
    assert (out / LOCK).is_file()
    process = victim(tiny_cohort.root, out, "not at all", "", 0, "resume")
    assert process.wait(240) == 0, process.communicate()[1]
    assert contents(out) == contents(unbroken)


def test_a_rank_that_is_killed(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    """torchrun ends the other; both resume to the same bits as if nothing had been."""
    script = tmp_path / "victim.py"
    script.write_text(VICTIM)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    outs = tmp_path / "whole", tmp_path / "killed"
    for out, arguments, code in (
        (outs[0], ("not at all", "", 0), 0),
        (outs[1], ("step", "", 2), 1),
        (outs[1], ("not at all", "", 0, "resume"), 0),
    ):
        given = [*line, *map(str, (tiny_cohort.root, out, *arguments))]
        done = subprocess.run(given, capture_output=True, text=True, timeout=240, env=environment(), cwd=ROOT)
        assert done.returncode == code, done.stderr
        if code:
            assert "Signal 9 (SIGKILL)" in done.stderr
            assert (out / LOCK).is_file()
    assert contents(outs[0]) == contents(outs[1])


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ["below model.safetensors", "below state.pt"])
def test_a_disk_that_fills_up_leaves_the_last_epoch_whole(
    tiny_cohort: SimulatedCohort, tmp_path: Path, unbroken: Path, room: str
) -> None:
    model = (unbroken / "fold_0" / "model.safetensors").stat().st_size
    limit = model - 1 if room == "below model.safetensors" else 2 * model
    out = tmp_path / "run"
    process = victim(tiny_cohort.root, out, "full", limit, 1)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    (said,) = [line for line in errors.splitlines() if line.startswith("momkd.errors.InputError")]
    assert "cannot write it: File too large" in said
    assert not list(out.rglob(".*"))
    assert not (out / LOCK).exists()
    assert len(pd.read_csv(out / "fold_0" / "log.csv")) >= 1
    process = victim(tiny_cohort.root, out, "not at all", "", 0, "resume")
    assert process.wait(240) == 0, process.communicate()[1]
    assert contents(out) == contents(unbroken)


# -- one folder, one run ---------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = victim(tiny_cohort.root, out, "wait", "", 0)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n", process.communicate()[1]
        before = contents_of_names(out)
        for resume in (False, True):
            with pytest.raises(InputError) as caught:
                train(tiny_cohort.root, out, resume=resume)
            who = f"process {process.pid} on {socket.gethostname()} since "
            assert str(caught.value).startswith(f"{out}: in use by {who}")
            assert str(caught.value).endswith("; wait until that ends, end it, or choose another folder")
        assert contents_of_names(out) == before
    finally:
        process.kill()
        process.wait()
    with pytest.raises(InputError, match="expected a new folder, got a run; go on with --resume"):
        train(tiny_cohort.root, out)
    assert (out / "run.json").is_file()
    assert not (out / LOCK).exists()  # nobody's any more


def contents_of_names(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*"))


CONTENDER = """
import sys, time
from pathlib import Path
from momkd.data.lock import locked
from momkd.errors import InputError
folder, began = Path(sys.argv[1]), float(sys.argv[2])
won = 0
while time.time() < began:
    pass
for _ in range(100):
    try:
        with locked(folder):
            inside = folder / "inside"
            inside.touch(exist_ok=False)  # two at once: an error
            inside.unlink()
            won += 1
    except InputError as error:
        assert "in use by" in str(error), error
print(won)
"""


def test_of_many_at_once_one_holds_the_lock(tmp_path: Path) -> None:
    began = time.time() + 6
    line = [sys.executable, "-c", CONTENDER, str(tmp_path), str(began)]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment(), cwd=ROOT) for _ in range(4)
    ]
    won = []
    for process in processes:
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        won.append(int(said))
    assert sum(won) > 0
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_its_holder_has_just_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened while it was held, locked after it was given back: then the name belongs to nobody, or to a third."""
    flocked, calls = lock._flocked, []

    def late(handle: int) -> bool | None:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        return flocked(handle)

    monkeypatch.setattr(lock, "_flocked", late)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert len(calls) == 2


def test_locks_that_were_left(tmp_path: Path) -> None:
    here, path = socket.gethostname(), tmp_path / LOCK

    def left(**holder: object) -> None:
        path.write_text(json.dumps({"pid": 1, "since": "2026-01-01 00:00", "job": None, **holder}))

    left(host=here)  # the system holds no lock for it: it has ended, whatever has its number now
    with locked(tmp_path) as who:
        assert who == f"process 1 on {here} since 2026-01-01 00:00"
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()
    with locked(tmp_path) as who:
        assert who is None

    left(host="elsewhere", job="77")
    for job in (None, "78"):
        with pytest.raises(InputError) as caught, locked(tmp_path, job):
            pass
        assert str(caught.value) == (
            f"{tmp_path}: in use by process 1 on elsewhere, SLURM job 77 since 2026-01-01 00:00, as far as can be "
            f"known from {here}; if that process has ended, remove {path}"
        )
        assert json.loads(path.read_text())["host"] == "elsewhere"
    with locked(tmp_path, "77") as who:  # the job was put into the queue again
        assert who is not None

    path.write_text("not json")
    with pytest.raises(InputError, match="if that process has ended, remove"), locked(tmp_path):
        pass


def test_a_note_tells_of_the_run_that_ended_before_its_time(
    tiny_cohort: SimulatedCohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from momkd.experiment import Reporter

    class Notes(Reporter):
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    out, notes = tmp_path / "run", Notes()
    out.mkdir()
    (out / LOCK).write_text(json.dumps({"pid": 7, "host": socket.gethostname(), "since": "then"}))
    train(tiny_cohort.root, out, reporter=notes)
    assert f"{out}: process 7 on {socket.gethostname()} since then ended before its time; going on" in notes.said[-1]


def test_leftovers_and_only_those_are_removed(tmp_path: Path) -> None:
    (tmp_path / "fold_0").mkdir()
    names = [".gitignore", "model.tmp", ".x.tmp", ".notes.txt", "fold_0/a.tmp", ".a.zzzzzzzzzzzz.tmp"]
    for name in names:
        (tmp_path / name).touch()
    made = []
    for name in ("log.csv", "fold_0/state.pt"):
        context = atomic_write(tmp_path / name, suffix=".npy" if name == "log.csv" else "")
        made.append((context, context.__enter__()))
    assert all(temporary.is_file() for _, temporary in made)
    remove_leftovers(tmp_path)
    assert not any(temporary.is_file() for _, temporary in made)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(names)

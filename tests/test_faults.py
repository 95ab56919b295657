"""Runs that are killed, that fill the disk, and that want the same folder."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from momkd import evaluate
from momkd.config import Config
from momkd.data import lock
from momkd.data.atomic import atomic_write, is_leftover, remove_leftovers, write_text
from momkd.data.lock import LOCK, locked
from momkd.errors import InputError
from momkd.experiment import Reporter, train_run
from momkd.simulate import SimulatedCohort
from momkd.train import Progress
from tests.processes import ROOT, environment, start
from tests.ranks import run_ranks

SETTINGS = ["train.epochs=4", "omics.genes=20", "omics.hidden_features=16", "omics.features=8"]
FEWER = ("train.epochs=2", "omics.select=variance")
SETTINGS += ["model.hidden_features=16", "model.projection_features=8", "memory.slots=3", "train.slides_per_step=5"]


def train(cohort: Path, out: Path, *settings: str, **options: object) -> None:
    paths = {"features": cohort / "features", "labels": cohort / "labels.csv", "splits": cohort / "splits"}
    config = Config.preset("fast").with_settings([*SETTINGS, *settings])
    train_run(**paths, omics=cohort / "omics.csv", out=out, config=config, folds=[0], device="cpu", **options)


def train_until(cohort: Path, out: Path, how: str = "", where: str = "", epoch: int = 0, resume: bool = False) -> None:
    """Trains as `momkd train` does, and dies where it is told to: in a step, or in the writing of a file."""
    now = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Here(Reporter):
        def progress(self, progress: Progress) -> None:
            nonlocal now
            now = progress.epoch
            if now == epoch and how == "step":
                die()
            if now == epoch and how == "full":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(where), int(where)))
            if how == "wait":
                print("training", flush=True)
                time.sleep(120)

    shown, replace, fsync = time.perf_counter, os.replace, os.fsync

    def replaced(source: str, target: str) -> None:
        if now == epoch and how == "before" and Path(target).name == where:
            die()
        replace(source, target)
        if now == epoch and how == "after" and Path(target).name == where:
            die()

    def synced(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if now == epoch and how == "half" and f".{where}." in name:
            os.truncate(name, os.path.getsize(name) // 2)
            die()
        fsync(handle)

    time.perf_counter = lambda: 1000 * shown()  # report every step
    os.replace, os.fsync = replaced, synced
    train(cohort, out, reporter=Here(), resume=resume)


@pytest.fixture(scope="module")
def unbroken(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    process = start(train_until, tiny_cohort.root, out)
    assert process.wait() == 0, process.stderr
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
        ("half", "model.safetensors", 1),  # the first epoch that can be the best
        ("half", "state.pt", 2),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    tiny_cohort: SimulatedCohort, tmp_path: Path, unbroken: Path, how: str, where: str, epoch: int
) -> None:
    out = tmp_path / "run"
    process = start(train_until, tiny_cohort.root, out, how, where, epoch)
    assert process.wait() == -signal.SIGKILL, process.stderr
    assert (out / LOCK).is_file()
    process = start(train_until, tiny_cohort.root, out, resume=True)
    assert process.wait() == 0, process.stderr
    assert contents(out) == contents(unbroken)


def plain_plot(*given: object, **_: object) -> None:
    """A file where a plot belongs; drawing takes longer than all the rest of such a run."""
    write_text(next(path for path in given if isinstance(path, Path)), "")


def train_until_the_next_write(cohort: Path, out: Path, seen: Path) -> None:
    """Trains on, and dies before every second file gets its name; `seen` lists files and epochs that had their turn."""
    now, replace = -1, os.replace

    class Here(Reporter):
        def progress(self, progress: Progress) -> None:
            nonlocal now
            now = progress.epoch

    def replaced(source: str, target: str) -> None:
        write, lines = f"{Path(target).relative_to(out.resolve())} {now}", seen.read_text().splitlines()
        if write not in lines:
            seen.write_text("\n".join([*lines, write]))
            if len(lines) % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replaced
    evaluate.plot_roc = evaluate.plot_training = plain_plot
    train(cohort, out, *FEWER, reporter=Here(), resume=True)


def test_a_run_that_is_killed_at_every_second_write(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    """Each process goes on where the last one died, two writes further."""
    out, seen = tmp_path / "run", tmp_path / "seen"
    seen.touch()
    for _ in range(40):
        process = start(train_until_the_next_write, tiny_cohort.root, out, seen)
        if process.wait() == 0:
            break
        assert process.wait() == -signal.SIGKILL, process.stderr
    assert start(train, tiny_cohort.root, tmp_path / "whole", *FEWER).wait() == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert {line.split()[0] for line in seen.read_text().splitlines()} >= set(contents(out))


SCRIPT = """
import sys
from pathlib import Path
from tests.test_faults import train_until

cohort, out, how, epoch = sys.argv[1:]
train_until(Path(cohort), Path(out), how, epoch=int(epoch))
"""


def test_a_rank_that_is_killed(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    """torchrun ends the other; both resume to the same bits as if nothing had been."""
    whole, killed, script = tmp_path / "whole", tmp_path / "killed", tmp_path / "script.py"
    script.write_text(SCRIPT)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    line += [str(tiny_cohort.root), str(killed), "step", "2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, env=environment(), cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert (killed / LOCK).is_file()
    for out in (whole, killed):
        meeting = tmp_path / f"meeting of {out.name}"
        meeting.mkdir()
        for end in run_ranks(meeting, 2, train_until, cohort=tiny_cohort.root, out=out, resume=out == killed):
            assert end.code == 0, end.stderr
    assert contents(whole) == contents(killed)


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ["below model.safetensors", "below state.pt"])
def test_a_disk_that_fills_up_leaves_the_last_epoch_whole(
    tiny_cohort: SimulatedCohort, tmp_path: Path, unbroken: Path, room: str
) -> None:
    model = (unbroken / "fold_0" / "model.safetensors").stat().st_size
    limit = model - 1 if room == "below model.safetensors" else 2 * model
    out = tmp_path / "run"
    process = start(train_until, tiny_cohort.root, out, "full", str(limit), 1)
    assert process.wait() == 1, process.stderr
    (said,) = [line for line in process.stderr.splitlines() if line.startswith("momkd.errors.InputError")]
    assert "cannot write it: File too large" in said
    assert not list(out.rglob(".*"))
    assert not (out / LOCK).exists()
    assert len(pd.read_csv(out / "fold_0" / "log.csv")) >= 1
    process = start(train_until, tiny_cohort.root, out, resume=True)
    assert process.wait() == 0, process.stderr
    assert contents(out) == contents(unbroken)


def test_a_disk_that_is_full_at_every_write(
    tiny_cohort: SimulatedCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write fails once, in one line; what was there stays as it was, and --resume goes on from it."""
    out, seen, fsync, now = tmp_path / "run", set[str](), os.fsync, -1
    there: dict[str, bytes] = {}

    class Here(Reporter):
        def progress(self, progress: Progress) -> None:
            nonlocal now
            now = progress.epoch

    def full(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        write = f"{path.parent.name} {path.name[1:-17]} {now}"  # without the random part of its name
        if is_leftover(path.name) and write not in seen:
            seen.add(write)
            there.update(files(out))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    said = ""
    monkeypatch.setattr(os, "fsync", full)
    for name in ("plot_roc", "plot_training"):
        monkeypatch.setattr(evaluate, name, plain_plot)
    for _ in range(40):
        there.clear()
        said = refusal(tiny_cohort.root, out, Here())
        if not said:
            break
        assert said.endswith("cannot write it: No space left on device; free some space or choose another folder")
        left = files(out) if out.exists() else {}
        assert left == {name: data for name, data in there.items() if not name.endswith((".tmp", LOCK))}
    assert {write.split()[1] for write in seen} >= {Path(name).name for name in contents(out)}
    monkeypatch.undo()
    train(tiny_cohort.root, tmp_path / "whole", *FEWER)
    assert contents(out) == contents(tmp_path / "whole")


def refusal(cohort: Path, out: Path, reporter: Reporter) -> str:
    """The line that training, gone on with, ends in, or nothing."""
    try:
        train(cohort, out, *FEWER, reporter=reporter, resume=True)
    except InputError as error:
        return str(error)
    return ""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- one folder, one run ---------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(train_until, tiny_cohort.root, out, "wait")
    try:
        process.wait_for_line("training")
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
    with pytest.raises(InputError, match="expected a new folder, got a run; go on with --resume"):
        train(tiny_cohort.root, out)
    assert (out / "run.json").is_file()
    assert not (out / LOCK).exists()  # nobody's any more


def contents_of_names(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*"))


def contend(folder: Path, began: float) -> None:
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
            if "in use by" not in str(error):
                raise
    print(won)


def test_of_many_at_once_one_holds_the_lock(tmp_path: Path) -> None:
    start(str).wait()  # from here on, a start takes no time
    began = time.time() + 1
    processes = [start(contend, tmp_path, began) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4, [process.stderr for process in processes]
    assert time.time() > began
    assert sum(int(process.stdout) for process in processes) > 0
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

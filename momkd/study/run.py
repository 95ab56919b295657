"""`momkd study`: arms × tasks × seeds of cross-validation, several at once, going on where it was interrupted.

OUT/
    study.json                  what is studied; the same study goes on in the same folder
    cohort/                     simulated slides, where none were given
    splits/TASK/seed_S/         made by case, stratified by the task, anew for each seed (where none were given)
    internal.csv, external.csv  the labels, where some rows were held out
    runs/TASK/ARM/seed_S/       a run of `momkd train` each, and attention.csv where patches have a truth
    results.csv, report.md, index.html, *.png
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from momkd.data.atomic import make_folder, write_csv, write_json
from momkd.data.own import read_json, short
from momkd.data.splits import make_splits, write_splits
from momkd.data.tables import Labels
from momkd.device import pick_device
from momkd.errors import InputError
from momkd.evaluate import evaluate_external
from momkd.experiment import train_run
from momkd.names import check_name
from momkd.runs import EXTERNAL, Run
from momkd.study.arms import Arm
from momkd.study.attention import attention_table
from momkd.study.cohort import MARK, StudyCohort, check_folder
from momkd.study.labels import read_task
from momkd.study.workers import in_processes

ATTENTION = "attention.csv"
_REMEDY = "remove it to go on with the options of now, or choose another --out"


class ArmFacts(TypedDict):
    """What an arm's name means, in study.json."""

    preset: str
    settings: list[str]


_Fact = str | int | float | bool | None | list[str] | dict[str, ArmFacts]


@dataclass(frozen=True)
class Cell:
    """One run of a study, with its seed and where it lies."""

    task: str
    arm: Arm
    seed: int
    splits: Path
    folder: Path


@dataclass(frozen=True)
class Study:
    """A cohort, arms, seeds and the settings that all arms share.

    Args:
        out: the folder of all.
        cohort: what is studied.
        arms: from `momkd.study.arms.choose_arms`; those that need expression are left out where there is none.
        seeds: repetitions, each with weights, order and (where they are made) splits of its own.
        folds: of the splits that are made.
        settings: `section.key=value` for every arm.
    """

    out: Path
    cohort: StudyCohort
    arms: tuple[Arm, ...]
    seeds: int = 1
    folds: int = 5
    settings: tuple[str, ...] = field(default=())

    def cells(self) -> list[Cell]:
        """Every run, seed by seed, so that an unfinished study compares all arms as early as it can."""
        return [
            Cell(task, arm, seed, self.splits(task, seed), self.out / "runs" / task / arm.name / f"seed_{seed}")
            for seed in range(self.seeds)
            for task in self.cohort.tasks
            for arm in self.arms
            if self.cohort.omics is not None or not arm.needs_omics
        ]

    def splits(self, task: str, seed: int) -> Path:
        return self.cohort.splits or self.out / "splits" / task / f"seed_{seed}"

    def finished(self, cell: Cell) -> bool:
        """Whether a cell has its predictions, of other hospitals too where there are some."""
        wanted = ["metrics.json"]
        if cell.arm.slides:
            wanted += [EXTERNAL] if self.cohort.external_features is not None else []
            wanted += [ATTENTION] if self.cohort.instances is not None else []
        return all((cell.folder / name).is_file() for name in wanted)


# -- running -----------------------------------------------------------------------------------------------------


def run_study(
    study: Study,
    *,
    jobs: int = 1,
    device: str | None = None,
    report: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> None:
    """Trains and evaluates every cell that has not been; what was interrupted goes on where it stopped.

    Args:
        study: what to do.
        jobs: processes at once; each takes its share of the cores.
        device: as for `train_run`.
        report: called after each cell with its name, the cells done and all of them.
        note: called with what a user should know of the input, a line each.

    Raises:
        InputError: anything wrong with the input, of the first cell that finds it; finished cells are kept.
    """
    pick_device(device)
    for task in study.cohort.tasks:
        check_name(task, str(study.cohort.labels), "names of labels")
    for arm in study.arms:
        check_name(arm.name, "arms", "names")
    check_folder(study.out, [study.cohort.labels, study.cohort.external_labels])
    make_folder(study.out)
    _check_same(study)
    tasks = [read_task(study.cohort, task, note) for task in study.cohort.tasks]
    for labels in tasks:
        _check_classes(study, labels, labels.name)
        for seed in range(study.seeds):
            _make_splits(study, labels, labels.name, seed)
    cells = study.cells()
    left = [cell for cell in cells if not study.finished(cell)]
    done = len(cells) - len(left)
    if any(cell.arm.omics for cell in left):
        for line in study.cohort.omics_notes(tasks):
            if note is not None:
                note(line)
    with contextlib.closing(_finished(study, left, jobs, device)) as ended:
        for cell in ended:
            done += 1
            if report is not None:
                report(f"{cell.task} {cell.arm.name} seed {cell.seed}", done, len(cells))


def _check_same(study: Study) -> None:
    """Write down what is studied; in a folder of another study, say what differs.

    Tasks, arms, seeds and the truth about patches may be added; what an arm's name means may not change.
    """
    added = ("tasks", "instances", "label_options")
    facts = {
        **{n: value and str(value) for n, value in vars(study.cohort).items() if n not in added},
        "folds": study.folds,
        "settings": list(study.settings),
    }
    arms = {arm.name: ArmFacts(preset=arm.preset, settings=list(arm.settings)) for arm in study.arms}
    path = study.out / MARK
    if path.exists():
        before = read_json(path, dict[str, _Fact], what="the description of a study", remedy=_REMEDY)
        earlier = before.get("arms")
        if not isinstance(earlier, dict):
            raise InputError(f"{path}: expected 'arms' in it, got {short(earlier)}; {_REMEDY}")
        known = {name: earlier[name] for name in arms if name in earlier}
        for name, old, new in [(n, before.get(n), facts[n]) for n in facts] + [
            (f"arm {n}", known[n], arms[n]) for n in known
        ]:
            if old != new:
                raise InputError(
                    f"{study.out}: expected a study with {name}={old!r:.160} as it began, got {new!r:.160}; go on "
                    "with the same or choose another --out"
                )
        arms = {**earlier, **arms}
    write_json(path, {**facts, "arms": arms})


def _check_classes(study: Study, labels: Labels, task: str) -> None:
    """Cells that are there already have the classes of now, in the same order."""
    for cell in study.cells():
        if cell.task == task and (cell.folder / "run.json").is_file():
            before = Run(cell.folder).info.classes
            if before != list(labels.classes):
                raise InputError(
                    f"{cell.folder}: expected the classes {before} as when it began, got {list(labels.classes)}; give "
                    "the same --positive, --classes and --missing, or choose another --out"
                )


def _make_splits(study: Study, labels: Labels, task: str, seed: int) -> None:
    folder = study.splits(task, seed)
    if study.cohort.splits is not None:
        return
    if not all((folder / f"splits_{fold}.csv").is_file() for fold in range(study.folds)):
        write_splits(folder, make_splits(labels, study.folds, seed))


def _finished(study: Study, cells: Sequence[Cell], jobs: int, device: str | None) -> Generator[Cell, None, None]:
    if jobs == 1 or len(cells) <= 1:
        for cell in cells:
            _run_cell(study, cell, device=device)
            yield cell
        return
    work = functools.partial(_run_cell, study, device=device)
    yield from in_processes(work, cells, jobs, lambda cell: str(cell.folder))


def _run_cell(study: Study, cell: Cell, *, device: str | None) -> None:
    cohort, arm = study.cohort, cell.arm
    run = train_run(
        cohort.features if arm.slides else None,
        cohort.labels,
        cell.splits,
        cell.folder,
        config=arm.config(study.settings, cell.seed),
        label=cell.task,
        omics=cohort.omics if arm.omics else None,
        omics_columns=cohort.omics_columns,
        label_options=cohort.options(cell.task),
        resume=True,
        device=device,
    )
    if cohort.external_features is not None and cohort.external_labels is not None and arm.slides:
        evaluate_external(
            Run(run.folder),
            cohort.external_features,
            cohort.external_labels,
            label=cell.task,
            device=device,
            label_options=cohort.external_options(cell.task),
        )
    if cohort.instances is not None and arm.slides:
        write_csv(cell.folder / ATTENTION, attention_table(run, cohort.features, *cohort.instances, device=device))

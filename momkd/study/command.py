"""What the options of `momkd study` mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from momkd.data.classes import LabelOptions
from momkd.data.outputs import check_outputs
from momkd.data.tables import read_labels
from momkd.errors import InputError
from momkd.names import check_name
from momkd.simulate import SimulationConfig
from momkd.study.arms import Arm
from momkd.study.cohort import StudyCohort, check_folder, hold_out, semisynthetic_cohort, simulated_cohort
from momkd.study.labels import task_options
from momkd.study.run import Study


def study_of(
    out: Path,
    arms: Sequence[Arm],
    *,
    features: Path | None,
    labels: Path | None,
    tasks: Sequence[str],
    omics: Path | None,
    omics_columns: str | None,
    splits: Path | None,
    external: tuple[Path | None, Path | None],
    held_out: str | None,
    instances: Path | None,
    instance_type: str | None,
    site: str | None,
    dials: Sequence[str],
    seeds: int,
    folds: int,
    settings: Sequence[str],
    classes: Sequence[str] = (),
    positive: Sequence[str] = (),
    missing: Sequence[str] = (),
    case_from: str | None = None,
) -> Study:
    """A study of the slides that are given, or of simulated ones, which are made here. Raises InputError."""
    if features is None and (labels is None) != (omics is None):
        raise InputError("study: expected --labels and --omics to simulate slides from expression, got one; give both")
    if features is not None and labels is None:
        raise InputError("study: expected --labels with --features, got none; give the CSV of slide_id and labels")
    if features is not None and dials:
        raise InputError("study: expected --dial where slides are simulated, got it with --features; leave one out")
    if (external[0] is None) != (external[1] is None):
        raise InputError("study: expected --external-features and --external-labels together, got one; give both")
    if held_out is not None and (external[0] is not None or splits is not None):
        raise InputError("study: expected --hold-out alone, got also --external-features or --splits; choose one")
    if (instances is None) != (instance_type is None) or (instances is not None and features is None):
        raise InputError("study: expected --instances and --instance-type with --features, got some; give all or none")
    places = {"--features": features, "--labels": labels, "--omics": omics, "--splits": splits}
    places |= {"--external-features": external[0], "--external-labels": external[1], "--instances": instances}
    check_outputs({"--out": out}, places, whole=("--out",))
    check_folder(out)
    for task in tasks:
        check_name(task, "--label", "names of labels")
    tasks = tuple(dict.fromkeys(tasks))
    turned = _dials(dials)
    if features is not None and labels is not None:
        named = tuple(tasks) or (read_labels(labels, options=LabelOptions(missing=tuple(missing))).name,)
        truth = None if instances is None or instance_type is None else (instances, instance_type)
        cohort = StudyCohort(features, labels, named, omics, splits, *external, truth, omics_columns)
    elif omics is not None and labels is not None:
        if not tasks:
            raise InputError("study: expected --label, the columns that are tasks, got none; name one or more")
        cohort = semisynthetic_cohort(
            out / "cohort", omics, labels, tasks, turned, site=site, omics_columns=omics_columns
        )
    else:
        cohort = simulated_cohort(out / "cohort", turned)
    options = task_options(cohort.tasks, classes=classes, positive=positive, missing=missing, case_from=case_from)
    cohort = replace(cohort, label_options=options)
    if held_out is not None:
        column, equals, value = held_out.partition("=")
        if not equals:
            raise InputError(f"hold-out: expected COLUMN=VALUE such as site=A2, got {held_out!r}")
        cohort = hold_out(cohort, out, column, value)
    return Study(out, cohort, tuple(arms), seeds, folds, tuple(settings))


def _dials(texts: Sequence[str]) -> dict[str, Any]:
    """name=value of the simulation, as the type of its default."""
    kinds = {name: type(default) for name, default, _, _ in SimulationConfig.dials()}
    dials: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise InputError(f"dial: expected name=value with one of {', '.join(kinds)}, got {text!r}")
        try:
            dials[name] = kinds[name](value)
        except ValueError as error:
            raise InputError(f"dial: expected {name} as {kinds[name].__name__}, got {value!r}") from error
    return dials

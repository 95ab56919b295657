"""What a study found: every arm's metrics, and the reference's advantage over each, with intervals over patients.

Folds of all seeds count as folds of one cross-validation; a patient is drawn once for all of them, so an interval says
what other patients would have done, and the mean over seeds takes out what chance in training did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from momkd.errors import InputError
from momkd.metrics import calibration, evaluate_predictions, paired_difference
from momkd.patients import by_patient
from momkd.predictions import check_predictions, read_predictions
from momkd.runs import EXTERNAL, Run
from momkd.study.arms import REFERENCE
from momkd.study.attention import read_attention
from momkd.study.run import ATTENTION, Cell, Study

PARTS = ("test", "external")
RANKING = ("auc", "auprc")


def study_results(
    study: Study, *, reference: str = REFERENCE, bootstrap: int = 1000, patients: str = "mean"
) -> pd.DataFrame:
    """One row a task, arm and part, from the predictions of all cells that are finished. Metrics are by patient.

    Args:
        study: as it was run.
        reference: the arm whose advantage over every other is given, where it is among them; else the first arm.
        bootstrap: resamples of patients.
        patients: how a patient's slides are joined, see `momkd.patients.by_patient`.

    Returns:
        Columns task, positive (of two classes the positive one), arm, title, part ("test" or "external"), seeds, folds,
        patients; auc and auprc, each with _low and _high; where patients have several slides, rule (how they are
        joined) and auc_by_slide, with _low and _high; ece, brier; attention_auc, the mean over test slides of the last
        class, then over folds and seeds, where the truth about patches is known; difference, difference_low,
        difference_high: AUC of the reference minus that of the arm, on the slides that both predicted.

    Raises:
        InputError: no cell is finished.
    """
    rows = []
    for task in study.cohort.tasks:
        cells = [cell for cell in study.cells() if cell.task == task and study.finished(cell)]
        by_arm: dict[str, list[Cell]] = {}
        for cell in cells:
            by_arm.setdefault(cell.arm.name, []).append(cell)
        tables = {name: _predictions(own) for name, own in by_arm.items()}
        compared = reference if reference in tables else next(iter(tables), "")
        for name, (table, classes) in tables.items():
            found = evaluate_predictions(table, classes, bootstrap=bootstrap, patients=patients, source=name)
            several = not found["by_patient"]["one_slide_each"]
            metrics = found["by_patient"] if several else found
            every = by_patient(check_predictions(table, classes, name), classes, patients)
            for part in PARTS:
                if part not in metrics:
                    continue
                own = every[(every["part"] == part) & (every["label"] >= 0)]
                row: dict[str, Any] = {"task": task, "positive": classes[1] if len(classes) == 2 else None}
                row |= {"arm": name, "title": by_arm[name][0].arm.title, "part": part}
                row |= {
                    "seeds": len(by_arm[name]),
                    "folds": own["fold"].nunique(),
                    "patients": own["case_id"].nunique(),
                }
                for metric in RANKING:
                    row |= _with_interval(metric, metrics[part][metric])
                if several:
                    row |= {"rule": patients, **_with_interval("auc_by_slide", found[part]["auc"])}
                row |= calibration(own, classes)
                if part == "test" and (attended := _attention(by_arm[name])) is not None:
                    row["attention_auc"] = attended
                if name != compared:
                    row |= _advantage(tables[compared][0], table, classes, part, bootstrap, patients, (compared, name))
                rows.append(row)
    if not rows:
        raise InputError(f"{study.out}: expected a finished run, got none; let the study go on")
    results: pd.DataFrame = pd.DataFrame(rows)
    return results


def _with_interval(name: str, value: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value["estimate"], f"{name}_low": value["low"], f"{name}_high": value["high"]}


def _predictions(cells: Sequence[Cell]) -> tuple[pd.DataFrame, list[str]]:
    """The predictions of all seeds of an arm as folds of one table, and the classes."""
    parts, classes = [], Run(cells[0].folder).info.classes
    for cell in cells:
        run = Run(cell.folder)
        tables = [run.predictions()]
        if (cell.folder / EXTERNAL).is_file():
            tables.append(read_predictions(cell.folder / EXTERNAL))
        parts += [table.assign(fold=table["fold"] + cell.seed * run.info.num_splits) for table in tables]
    return pd.concat(parts, ignore_index=True), classes


def _attention(cells: Sequence[Cell]) -> float | None:
    means = []
    for path in (cell.folder / ATTENTION for cell in cells):
        rows = read_attention(path) if path.is_file() else []
        folds = {row.fold for row in rows}
        means += [np.mean([row.attention_auc for row in rows if row.fold == fold]) for fold in sorted(folds)]
    return float(np.mean(means)) if means else None


def _advantage(
    reference: pd.DataFrame,
    other: pd.DataFrame,
    classes: Sequence[str],
    part: str,
    bootstrap: int,
    patients: str,
    names: tuple[str, str],
) -> Mapping[str, float | None]:
    """AUC by patient of the reference minus that of another arm, on the slides that both predicted."""
    keys = ["fold", "part", "slide_id"]
    both = reference[keys].merge(other[keys])
    if not (both["part"] == part).any():
        return {}
    a, b = reference.merge(both), other.merge(both)
    found = paired_difference(a, b, classes, part=part, bootstrap=bootstrap, patients=patients, names=names)
    return {
        "difference": found["difference"],
        "difference_low": found["low"],
        "difference_high": found["high"],
    }

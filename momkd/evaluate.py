"""Scores of a run, from its predictions, and of its models on an external cohort: `momkd evaluate`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from momkd import distributed
from momkd.data.atomic import write_csv, write_json
from momkd.data.batches import BagLoader
from momkd.data.classes import LabelOptions
from momkd.data.cohort import open_cohort
from momkd.data.ids import shared_note
from momkd.data.outputs import check_outputs, run_files
from momkd.data.splits import match_splits, read_splits
from momkd.data.tables import Labels, read_labels
from momkd.errors import InputError
from momkd.inference import budget_of, device_cache, none_left, pick_device, probabilities
from momkd.metrics import evaluate_predictions
from momkd.plots import plot_roc, plot_training
from momkd.predict import threshold_of
from momkd.predictions import prediction_table, read_predictions
from momkd.runs import EXTERNAL, PREDICTIONS, Run
from momkd.state import read_log

_OTHER_LABEL = "external label"  # in run.json, where the external cohort names it otherwise


def evaluate_run(run: Run, *, bootstrap: int = 1000, patients: str | None = None) -> dict[str, Any]:
    """Metrics of all predictions in the run's folder; writes metrics.json, roc.png and training.png.

    Args:
        run: a finished run.
        bootstrap: resamples of patients for the intervals, up to 100,000.
        patients: how a patient's slides are joined: "mean", "max" or "noisy-or"; None takes that of the run.

    Returns:
        What `momkd.metrics.evaluate_predictions` returns.

    Raises:
        InputError: the run has no predictions, because training has not ended.
    """
    path = run.folder / PREDICTIONS
    if not path.is_file():
        raise InputError(f"{run.folder}: expected predictions.csv, got none; training has not ended: train --resume")
    table = run.predictions()
    if (run.folder / EXTERNAL).is_file():
        table = pd.concat([table, read_predictions(run.folder / EXTERNAL)], ignore_index=True)
    rule = patients or run.config.train.patients
    metrics = evaluate_predictions(table, run.info.classes, bootstrap=bootstrap, patients=rule, source=str(path))
    if "external" in metrics and (other := run.info.data.get(_OTHER_LABEL)):
        metrics["notes"].insert(0, _other_label(run, other))
    write_json(run.folder / "metrics.json", metrics)
    name = run.folder.resolve().name
    if any(fold["auc"] is not None for fold in metrics.get("folds", [])):
        plot_roc({name: table}, run.info.classes, run.folder / "roc.png", bootstrap=bootstrap)
    logs = [read_log(log).assign(fold=fold) for fold in run.info.folds if (log := run.fold(fold) / "log.csv").is_file()]
    if logs:
        plot_training(pd.concat(logs, ignore_index=True), run.folder / "training.png", title=f"Training, {name}")
    return metrics


def labels_for(
    run: Run, path: Path | str, label: str | None, options: LabelOptions | None, *, cases: bool = True
) -> Labels:
    """Read labels of another cohort for a run: the column that is named, or the one that the run was trained on."""
    known: dict[str, Any] = {"classes": run.info.classes, "options": options, "cases": cases}
    remedy = f"the run predicts {run.info.label!r}: name the column that holds it with --label"
    return read_labels(path, label=label or run.info.label, remedy=remedy, **known)


def _other_label(run: Run, column: str) -> str:
    return f"external: scored on the column {column!r}, while the run was trained on {run.info.label!r}"


def evaluate_external(
    run: Run,
    features: Path | str,
    labels: Path | str,
    *,
    label: str | None = None,
    skip_bad: bool = False,
    device: str | None = None,
    graphs: Path | str | None = None,
    label_options: LabelOptions | None = None,
    patch_budget: int | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Predicts another cohort with the model of every fold and writes predictions_external.csv into the run.

    Several ranks share the slides, see `momkd.distributed.started`; rank 0 writes.

    Args:
        run: a finished run.
        features, labels: as for training; only slides with a row in the table of labels are predicted.
        label: column of the labels; None takes that of the run, by its name.
        skip_bad: leave out slides that cannot be used.
        device, graphs: as for training.
        label_options: what is missing and which cases there are; the classes are the run's.
        patch_budget: patches computed at a time, as in `predict_run`.
        report: called with each line that a user should know, on rank 0.

    Returns:
        The slides that were skipped, and why.
    """
    with distributed.together():
        where = pick_device(device)
        places = {path.name: path for path in run_files(run.folder)}
        check_outputs({**places, "--graphs": graphs}, {"--features": features, "--labels": labels})
        table = labels_for(run, labels, label, label_options)
        cohort = open_cohort(
            features,
            table.table.index,
            width=run.info.in_features,
            skip_bad=skip_bad,
            source=table.source,
            neighbours=run.config.model.graph_neighbours,
            graphs=graphs,
        )
    if report is not None and distributed.first():
        shared = shared_note(table.source, table.cases(), *_known(run, label_options))
        other = [_other_label(run, table.name)] if table.name != run.info.label else []
        for text in (table.summary(), *other, *table.notes, *cohort.notes, *shared):
            report(text)
    slides, options = list(cohort.paths), run.config.train
    loader = BagLoader(
        slides,
        table.table.loc[slides, "label"].to_numpy(np.int64),
        cohort.sizes,
        cohort.read,
        slides_per_step=options.slides_per_step,
        patch_budget=budget_of(run, patch_budget),
        cache_bytes=int(options.cache_gb * 1e9),
        pin=where.type == "cuda",
        graph=cohort.graphs,
        skipped=cohort.skipped if skip_bad else None,
        device_cache=device_cache(options, where),
        read_blocks=cohort.blocks,
    )
    parts = []
    for fold in run.info.folds:
        read, probs, _ = probabilities(run.load_model(fold, where), loader, where, amp=run.amp(where))
        with distributed.together():
            if not read:
                raise none_left(f"{features}: fold {fold}", slides, cohort.skipped)
        at: dict[str, Any] = {"fold": fold, "part": "external", "threshold": threshold_of(run, [fold])}
        parts.append(prediction_table(table.table, read, probs, run.info.classes, **at))
    for found in distributed.gather(cohort.skipped):
        cohort.skipped.update(found)
    with distributed.together():
        if distributed.first():
            predicted = pd.concat(parts, ignore_index=True)
            every = predicted.groupby("slide_id")["fold"].transform("size") == len(parts)
            if not every.any():
                raise none_left(str(features), slides, cohort.skipped)
            write_csv(run.folder / EXTERNAL, predicted[every])
            data = {name: value for name, value in run.info.data.items() if name != _OTHER_LABEL}
            if table.name != run.info.label:
                data[_OTHER_LABEL] = table.name
            if data != run.info.data:
                run.info = Run.create(run.folder, run.config, replace(run.info, data=data)).info
    return cohort.skipped


def _known(run: Run, options: LabelOptions | None) -> tuple[set[str], set[str]]:
    """Slides and cases of the run's own cohort: from its predictions, and from its labels and splits if still there."""
    table = read_predictions(run.folder / PREDICTIONS) if (run.folder / PREDICTIONS).is_file() else None
    slides, cases = (set(), set()) if table is None else (set(table["slide_id"]), set(table["case_id"]))
    labels, splits = run.info.data.get("labels"), run.info.data.get("splits")
    if labels is not None and splits is not None:
        cases_too = LabelOptions(case_from=None if options is None else options.case_from)
        with contextlib.suppress(InputError):  # they may have moved, or say less than the predictions
            own = read_labels(labels, label=run.info.label, options=cases_too)
            folds, _ = match_splits(read_splits(splits, own.table.index), own)
            used = {slide for split in folds for part in split.parts().values() for slide in part}
            slides |= used
            cases |= set(own.table["case_id"].reindex(sorted(used)).dropna())
    return slides, cases

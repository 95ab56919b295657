"""`momkd demo`: the whole way on a simulated cohort, in a minute or two, with whatever comes out.

Simulate a cohort with expression for most patients; train MoMKD and, as the baseline, ABMIL on slides alone; predict a
cohort of other hospitals from slides alone; compare with intervals; write a report.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from rich.console import Console

import momkd
from momkd.config import Config
from momkd.data.atomic import make_folder, write_json
from momkd.data.folders import LIST, foreign_file, list_files
from momkd.errors import InputError
from momkd.evaluate import evaluate_external, evaluate_run
from momkd.experiment import train_run
from momkd.metrics import mean_attention_auc, paired_difference
from momkd.plots import plot_attention, plot_roc
from momkd.predict import predict_run
from momkd.predictions import read_predictions
from momkd.progress import ConsoleReporter
from momkd.report import ReportFigure, comparison_table, write_report
from momkd.runs import EXTERNAL, PREDICTIONS, Run
from momkd.simulate import SimulatedCohort, SimulationConfig, simulate
from momkd.terminal import progress_bar, say, show, stdout

ARMS = {"ABMIL": "abmil", "MoMKD": "fast"}
BASELINE = "ABMIL"
MARK = "demo.json"  # a folder without it is never replaced
NOTE = (
    "Everything here is simulated: no patient, no slide. It shows that the software works and how results look; it is "
    "no evidence for or against a method."
)
_FULL = {"slides": 200, "external_slides": 100, "folds": 3, "val_fraction": 0.2}
_FAST = {"slides": 100, "external_slides": 40, "folds": 2, "val_fraction": 0.25, "patches": 150}
_SMALL = ["model.hidden_features=256", "model.gate_features=128", "omics.features=256", "omics.hidden_features=256"]
_MAPS = 3


def run_demo(out: Path, *, fast: bool = False, seed: int = 0, console: Console | None = None) -> Path:
    """Runs the demonstration; returns the report's index.html.

    Args:
        out: folder for cohort, runs, predictions and report; an earlier demonstration there is replaced.
        fast: a smaller cohort and fewer folds.
        seed: of simulation and training.
        console: where to print.

    Raises:
        InputError: `out` holds something else.
    """
    _make_room(out)
    write_json(make_folder(out) / MARK, {"momkd": momkd.__version__, "note": NOTE, "fast": fast, "seed": seed})
    try:
        return _demonstrate(out, fast, seed, console or stdout())
    finally:
        list_files(out)  # also after an interrupt, so that the next demonstration may replace this one


def _demonstrate(out: Path, fast: bool, seed: int, console: Console) -> Path:
    began = time.perf_counter()
    dials: dict[str, Any] = _FAST if fast else _FULL
    say(f"1. Simulate ({NOTE.split(':')[0].lower()}: no patients)", style="bold", console=console)
    with progress_bar(console) as bar:
        task = bar.add_task("slides", total=None)
        cohort = simulate(
            out / "cohort",
            SimulationConfig(seed=seed, **dials),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    assert cohort.external is not None
    assert cohort.splits is not None
    counts = [sum(1 for _ in folder.glob("*.h5")) for folder in (cohort.features, cohort.external.features)]
    say(f"   {counts[0]} slides, and {counts[1]} of other hospitals: {cohort.root}", console=console)

    say("2. Train and predict the other hospitals from the slide alone", style="bold", console=console)
    runs: dict[str, Run] = {}
    for name, preset in ARMS.items():
        config = Config.preset(preset).with_settings(
            [*_SMALL, f"train.seed={seed}", f"train.epochs={30 if fast else 60}"]
        )
        omics = cohort.omics if config.model.kind == "momkd" else None
        with contextlib.closing(ConsoleReporter(console, f"   {name}")) as reporter:
            runs[name] = train_run(
                cohort.features,
                cohort.labels,
                cohort.splits,
                out / preset,
                config=config,
                omics=omics,
                reporter=reporter,
            )
        evaluate_external(runs[name], cohort.external.features, cohort.external.labels)
    metrics = {name: evaluate_run(run) for name, run in runs.items()}

    attended = out / "attention"
    predict_run(runs["MoMKD"], cohort.external.features, out / "predictions.csv", attention=attended)
    tables = {name: _all_predictions(run) for name, run in runs.items()}
    differences = {
        name: paired_difference(table, tables[BASELINE], runs[name].info.classes, names=(name, BASELINE))
        for name, table in tables.items()
        if name != BASELINE
    }
    say("3. Compare", style="bold", console=console)
    show(comparison_table(metrics, differences, baseline=BASELINE), console=console)
    found = mean_attention_auc(_attention_and_truth(cohort.external, attended))["mean"]
    told = (
        "The genomics were used while training alone: the external cohort was predicted from slides. Its attention "
        f"tells tumour patches from the others with a mean AUC of {found:.3f}."
    )
    say(f"   {told}", console=console)
    report = write_report(
        out / "report",
        title="momkd demonstration on a simulated cohort",
        note=NOTE,
        comparison=metrics,
        differences=differences,
        baseline=BASELINE,
        paragraphs=[told],
        figures=_figures(out, tables, runs["MoMKD"], cohort.external, attended),
    )
    say(f"Report: {report}   ({time.perf_counter() - began:.0f} s)", console=console)
    return report


def _make_room(out: Path) -> None:
    """Remove an earlier demonstration, once every file in it is momkd's."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / MARK).is_file() or not (out / LIST).is_file():
        raise InputError(
            f"{out}: expected a new folder or that of an earlier demo, got other files; choose another --out"
        )
    if (other := foreign_file(out)) is not None:
        raise InputError(f"{out}: expected nothing but a demo to replace, got also {other!r}; move it elsewhere")
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _all_predictions(run: Run) -> pd.DataFrame:
    return pd.concat([read_predictions(run.folder / name) for name in (PREDICTIONS, EXTERNAL)], ignore_index=True)


def _attention_and_truth(cohort: SimulatedCohort, attended: Path) -> dict[str, tuple[np.ndarray[Any, Any], Any]]:
    """Attention of each patch and whether it is tumour, by slide."""
    truth = pd.read_csv(cohort.instances, dtype={"slide_id": str})
    pairs = {}
    for slide, rows in truth.groupby("slide_id"):
        with h5py.File(attended / f"{slide}.h5") as file:
            attention = file["attention"][:, 0]
        pairs[str(slide)] = (attention[rows["row"].to_numpy()], (rows["type"] == "tumour").to_numpy(np.int64))
    return pairs


def _figures(
    out: Path, tables: dict[str, pd.DataFrame], run: Run, cohort: SimulatedCohort, attended: Path
) -> list[ReportFigure]:
    classes, folder = run.info.classes, out / "report"
    folder.mkdir(exist_ok=True)
    figures = []
    for part, words in (("test", "cross-validation"), ("external", "other hospitals")):
        path = plot_roc(tables, classes, folder / f"roc_{part}.png", part=part, title=f"ROC, simulated, {words}")
        text = f"ROC curves on simulated slides, {words}: mean over folds, single folds thin."
        figures.append(ReportFigure(path, text, text))
    external = tables["MoMKD"][tables["MoMKD"]["part"] == "external"]
    slides = external.groupby("slide_id")
    mean = slides[[f"prob_{classes[1]}"]].mean().assign(label=slides["label"].first())
    for slide in mean.sort_values(f"prob_{classes[1]}", ascending=False).index[:_MAPS]:
        with h5py.File(attended / f"{slide}.h5") as file:
            coords, attention = file["coords"][:], file["attention"][:, 0]
            size = float(file["coords"].attrs["patch_size_level0"])
        path = plot_attention(
            coords, attention, folder / f"attention_{slide}.png", patch_size=size, title=f"{slide}, simulated"
        )
        p, label = mean.loc[slide, f"prob_{classes[1]}"], mean.loc[slide, "label"]
        text = f"Attention of MoMKD on {slide}: probability of {classes[1]} {p:.2f}, label {label}."
        figures.append(ReportFigure(path, text, text))
    return figures

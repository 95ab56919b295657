"""Commands that train models, and look at what they do."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from momkd.cli.common import (
    FOLDS,
    SEED,
    Bootstrap,
    CaseFrom,
    Classes,
    Device,
    Features,
    Graphs,
    Label,
    Missing,
    Omics,
    OmicsColumns,
    PatchBudget,
    Patients,
    Positive,
    SkipBad,
    SomeFeatures,
    app,
    label_options,
    say_skipped,
)
from momkd.errors import InputError
from momkd.terminal import note, printable, progress_bar, say, show, stdout


@app.command()
def train(
    labels: Annotated[Path, typer.Option("--labels", help="CSV of slide_id, case_id and the label.")],
    splits: Annotated[Path, typer.Option("--splits", help="Folder of splits_0.csv, ...; see momkd splits.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    features: SomeFeatures = None,
    label: Label = None,
    omics: Omics = None,
    omics_columns: OmicsColumns = None,
    fold: Annotated[
        list[int] | None, typer.Option("--fold", min=0, max=FOLDS, help="Train this split; may be repeated.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            help="paper: MoMKD, patches see neighbours; fast: MoMKD; abmil: slide alone; omics: genes alone.",
        ),
    ] = "fast",
    config: Annotated[Path | None, typer.Option("--config", help="TOML with options over the preset.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value over it; may be repeated.")] = None,
    patients: Patients = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out was interrupted.")] = False,
    skip_bad: SkipBad = False,
    allow_leaks: Annotated[bool, typer.Option("--allow-leaks", help="Allow a case in two parts of a split.")] = False,
    device: Device = None,
    graphs: Graphs = None,
    classes: Classes = None,
    positive: Positive = None,
    missing: Missing = None,
    case_from: CaseFrom = None,
) -> None:
    """Train a model on every fold, predict its test slides, and evaluate."""
    from momkd import distributed
    from momkd.config import Config, read_config
    from momkd.experiment import train_run
    from momkd.progress import ConsoleReporter

    chosen = Config.preset(preset)
    if config is not None:
        chosen = read_config(config, base=chosen)
    chosen = chosen.with_settings([*(set_ or []), *([] if patients is None else [f"train.patients={patients}"])])
    reporter = ConsoleReporter(stdout())
    with distributed.started(), contextlib.closing(reporter):
        run = train_run(
            features,
            labels,
            splits,
            out,
            config=chosen,
            label=label,
            omics=omics,
            omics_columns=omics_columns,
            folds=fold,
            resume=resume,
            skip_bad=skip_bad,
            leaks=allow_leaks,
            device=device,
            graphs=graphs,
            label_options=label_options(classes, positive, missing, case_from),
            reporter=reporter,
        )
        if distributed.first():
            _show_metrics(run.folder)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    features: SomeFeatures = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="CSV of an external cohort's labels.")] = None,
    label: Label = None,
    bootstrap: Bootstrap = 1000,
    patients: Patients = None,
    skip_bad: SkipBad = False,
    device: Device = None,
    graphs: Graphs = None,
    patch_budget: PatchBudget = None,
    missing: Missing = None,
    case_from: CaseFrom = None,
) -> None:
    """Metrics of a run with intervals; with --features and --labels also on an external cohort."""
    from momkd import distributed
    from momkd.evaluate import evaluate_external, evaluate_run
    from momkd.patients import check_rule
    from momkd.runs import Run

    opened = Run(run)
    rule = check_rule(patients or opened.config.train.patients)
    if (features is None) != (labels is None):
        raise InputError("evaluate: expected --features and --labels together, got one of them; give both or none")
    with distributed.started():
        skipped: dict[str, str] = {}
        if features is not None and labels is not None:
            options: dict[str, Any] = {"label": label, "skip_bad": skip_bad, "device": device, "graphs": graphs}
            options |= {"patch_budget": patch_budget}
            options |= {"label_options": label_options(missing=missing, case_from=case_from), "report": note}
            skipped = evaluate_external(opened, features, labels, **options)
        if distributed.first():
            say_skipped(skipped)
            evaluate_run(opened, bootstrap=bootstrap, patients=rule)
            _show_metrics(run)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    features: Features,
    out: Annotated[Path, typer.Option("--out", help="CSV to write.")],
    attention: Annotated[
        Path | None, typer.Option("--attention", help="Folder for attention and prototypes of each patch, HDF5.")
    ] = None,
    fold: Annotated[
        list[int] | None, typer.Option("--fold", min=0, max=FOLDS, help="Use this fold's model; may be repeated.")
    ] = None,
    cases: Annotated[
        Path | None, typer.Option("--cases", help="CSV of slide_id and case_id; else each slide is a case.")
    ] = None,
    case_from: CaseFrom = None,
    out_patients: Annotated[Path | None, typer.Option("--out-patients", help="CSV to write, a row a patient.")] = None,
    patients: Patients = None,
    skip_bad: SkipBad = False,
    device: Device = None,
    graphs: Graphs = None,
    patch_budget: PatchBudget = None,
) -> None:
    """Predict slides from their features alone, by the mean of the folds' models."""
    from momkd.predict import predict_run
    from momkd.runs import Run

    notes: list[str] = []
    with progress_bar() as bar:
        task = bar.add_task("predict", total=None)
        table, skipped = predict_run(
            Run(run),
            features,
            out,
            attention=attention,
            cases=cases,
            case_from=case_from,
            out_patients=out_patients,
            patients=patients,
            folds=fold,
            skip_bad=skip_bad,
            device=device,
            graphs=graphs,
            patch_budget=patch_budget,
            report=lambda done, total: bar.update(task, completed=done, total=total),
            note=notes.append,
        )
    say_skipped(skipped, notes)
    counts = ", ".join(f"{count} {name}" for name, count in table["predicted"].value_counts().items())
    say(f"{len(table)} slides predicted ({counts}): {out}")
    if out_patients is not None:
        say(f"{table['case_id'].nunique()} patients: {out_patients}")
    if attention is not None:
        say(f"attention of each patch: {attention}")


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    features: Features,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; an earlier explanation is replaced.")],
    fold: Annotated[
        int | None, typer.Option("--fold", min=0, max=FOLDS, help="Whose model; the first if left out.")
    ] = None,
    slides: Annotated[
        Path | None, typer.Option("--slides", help="Folder of whole-slide images, for thumbnails: momkd[slides].")
    ] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="CSV of labels, to show beside predictions.")] = None,
    label: Label = None,
    limit: Annotated[
        int, typer.Option("--limit", help="Slides with a map: of each predicted class the most certain.")
    ] = 12,
    top: Annotated[float, typer.Option("--top", help="Share of patches in a slide's GeoJSON, 1 for all.")] = 0.1,
    nearest: Annotated[int, typer.Option("--nearest", help="Patches shown of a prototype.")] = 8,
    per_slide: Annotated[int, typer.Option("--per-slide", help="Of those, at most so many of one slide.")] = 2,
    patch_size: Annotated[
        float | None, typer.Option("--patch-size", help="Level-0 pixels of a patch, where features don't say.")
    ] = None,
    skip_bad: SkipBad = False,
    device: Device = None,
    graphs: Graphs = None,
    patch_budget: PatchBudget = None,
    missing: Missing = None,
) -> None:
    """Show what a model looks at: maps of attention, also for QuPath, and the patches behind its prototypes."""
    from momkd.explain import Options, explain_run
    from momkd.runs import Run

    with progress_bar() as bar:
        task = bar.add_task("explain", total=None)
        made = explain_run(
            Run(run),
            features,
            out,
            fold=fold,
            options=Options(limit, top, nearest, per_slide, patch_size),
            images=slides,
            labels=labels,
            label=label,
            label_options=label_options(missing=missing),
            skip_bad=skip_bad,
            device=device,
            graphs=graphs,
            patch_budget=patch_budget,
            report=lambda done, total: bar.update(task, completed=done, total=total),
        )
    say_skipped(made.skipped)
    for told in made.notes:
        note(told)
    say(f"{made.slides} slides seen, {made.maps} mapped: {made.index}")


@app.command()
def study(
    out: Annotated[Path, typer.Option("--out", help="Folder of the study; the same goes on there.")] = Path("study"),
    features: SomeFeatures = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="CSV of slide_id, case_id and labels; without slides of case_id.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="Column that is a task; may be repeated.")] = None,
    omics: Omics = None,
    omics_columns: OmicsColumns = None,
    splits: Annotated[Path | None, typer.Option("--splits", help="Folder of splits; else made for each seed.")] = None,
    external_features: Annotated[Path | None, typer.Option("--external-features", help="Slides of others.")] = None,
    external_labels: Annotated[Path | None, typer.Option("--external-labels", help="Their labels.")] = None,
    hold_out: Annotated[
        str | None, typer.Option("--hold-out", help="COLUMN=VALUE of the labels: those rows are the external cohort.")
    ] = None,
    instances: Annotated[
        Path | None, typer.Option("--instances", help="CSV of slide_id, row and type: what attention should find.")
    ] = None,
    instance_type: Annotated[
        str | None, typer.Option("--instance-type", help="The type among them that matters.")
    ] = None,
    site: Annotated[str | None, typer.Option("--site", help="Column of hospitals, to simulate slides.")] = None,
    dial: Annotated[
        list[str] | None, typer.Option("--dial", help="name=value of momkd simulate, where slides are simulated.")
    ] = None,
    arms: Annotated[str | None, typer.Option("--arms", help="Comma-separated; else all; see --list.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", help="NAME=section.key=value,...: one more variant of MoMKD.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=FOLDS, help="Repetitions.")] = 3,
    folds: Annotated[int, typer.Option("--folds", min=2, max=FOLDS, help="Of the splits that are made.")] = 5,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value for every arm.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=FOLDS, help="Runs at once.")] = 1,
    bootstrap: Bootstrap = 1000,
    patients: Patients = None,
    device: Device = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--classes", help="The classes in order, with commas; with several labels LABEL=A,B."),
    ] = None,
    positive: Annotated[
        list[str] | None, typer.Option("--positive", help="The positive of two classes; with several labels LABEL=B.")
    ] = None,
    missing: Missing = None,
    case_from: CaseFrom = None,
    list_: Annotated[bool, typer.Option("--list", help="Say what the arms are, and do nothing.")] = False,
) -> None:
    """Compare ways to learn from slides and genomics, by cross-validation over seeds, and write a report.

    Without --features the slides are simulated: from the expression in --omics where it is given, else all of it is.
    """
    from momkd.patients import check_rule
    from momkd.study import ARMS, choose_arms, run_study, study_results, study_table, write_study_report
    from momkd.study.command import study_of

    if list_:
        for known in ARMS.values():
            say(f"{known.name:18} {known.title}")
        return
    rule = check_rule(patients or "mean")
    planned = study_of(
        out,
        choose_arms(None if arms is None else arms.split(","), arm or ()),
        features=features,
        labels=labels,
        tasks=label or (),
        omics=omics,
        omics_columns=omics_columns,
        splits=splits,
        external=(external_features, external_labels),
        held_out=hold_out,
        instances=instances,
        instance_type=instance_type,
        site=site,
        dials=dial or (),
        seeds=seeds,
        folds=folds,
        settings=set_ or (),
        classes=classes or (),
        positive=positive or (),
        missing=missing or (),
        case_from=case_from,
    )
    say(planned.cohort.note, style="bold")
    with progress_bar() as bar:
        task = bar.add_task("study", total=len(planned.cells()))

        def told(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            say(f"{done}/{total} {name}")

        run_study(planned, jobs=jobs, device=device, report=told, note=note)
    results = study_results(planned, bootstrap=bootstrap, patients=rule)
    report = write_study_report(planned, results)
    for name in planned.cohort.tasks:
        show(study_table(results, name))
    say(f"Report: {report}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for cohort, runs and report.")] = Path("demo"),
    fast: Annotated[bool, typer.Option("--fast", help="Smaller, for a quick look.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEED)] = 0,
) -> None:
    """Simulate a cohort, train MoMKD and ABMIL, predict without genomics, compare, and write a report."""
    from momkd.demo import run_demo

    run_demo(out, fast=fast, seed=seed, console=stdout())


def _show_metrics(folder: Path) -> None:
    import json

    from momkd.report import metrics_table

    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    show(metrics_table(metrics, printable(f"Run {folder}")))

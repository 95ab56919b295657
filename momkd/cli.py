"""The command line. Exit codes: 0 done, 2 bad input with one clear line, 1 a bug of momkd."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

import momkd
from momkd import env
from momkd.errors import BackendError, InputError, RankError, SharedError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Multiple-instance learning on whole-slide images: train with genomics, predict from the slide alone.",
)
_WITH_RANKS = ("train", "evaluate")
out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False)

_FEATURES = "Folder of feature files, one a slide (.h5, .pt, .npy), or a file of momkd pack."
Features = Annotated[Path, typer.Option("--features", help=_FEATURES)]
SomeFeatures = Annotated[Path | None, typer.Option("--features", help=_FEATURES)]
Label = Annotated[str | None, typer.Option("--label", help="Column of the labels.")]
Device = Annotated[str | None, typer.Option("--device", help="Such as cpu or cuda:1; a GPU where there is one.")]
Graphs = Annotated[
    Path | None, typer.Option("--graphs", help="Folder that keeps graphs of patches, for the encoder gatv2.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out slides that cannot be used, and list them.")]


@app.command()
def train(
    labels: Annotated[Path, typer.Option("--labels", help="CSV of slide_id, case_id and the label.")],
    splits: Annotated[Path, typer.Option("--splits", help="Folder of splits_0.csv, ...; see momkd splits.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    features: SomeFeatures = None,
    label: Label = None,
    omics: Annotated[Path | None, typer.Option("--omics", help="Table of cases x genes: CSV, Parquet, .npy.")] = None,
    fold: Annotated[list[int] | None, typer.Option("--fold", help="Train this split; may be repeated.")] = None,
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            help="paper: MoMKD, patches see neighbours; fast: MoMKD; abmil: slide alone; omics: genes alone.",
        ),
    ] = "fast",
    config: Annotated[Path | None, typer.Option("--config", help="TOML with options over the preset.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value over it; may be repeated.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out was interrupted.")] = False,
    skip_bad: SkipBad = False,
    allow_leaks: Annotated[bool, typer.Option("--allow-leaks", help="Allow a case in two parts of a split.")] = False,
    device: Device = None,
    graphs: Graphs = None,
) -> None:
    """Train a model on every fold, predict its test slides, and evaluate."""
    from momkd import distributed
    from momkd.config import Config, read_config
    from momkd.experiment import train_run
    from momkd.progress import ConsoleReporter

    chosen = Config.preset(preset)
    if config is not None:
        chosen = read_config(config, base=chosen)
    chosen = chosen.with_settings(set_ or [])
    reporter = ConsoleReporter(out_console)
    with distributed.started(), contextlib.closing(reporter):
        run = train_run(
            features,
            labels,
            splits,
            out,
            config=chosen,
            label=label,
            omics=omics,
            folds=fold,
            resume=resume,
            skip_bad=skip_bad,
            leaks=allow_leaks,
            device=device,
            graphs=graphs,
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
    bootstrap: Annotated[int, typer.Option("--bootstrap", min=0, help="Resamples of patients.")] = 1000,
    skip_bad: SkipBad = False,
    device: Device = None,
    graphs: Graphs = None,
) -> None:
    """Metrics of a run with intervals; with --features and --labels also on an external cohort."""
    from momkd import distributed
    from momkd.evaluate import evaluate_external, evaluate_run
    from momkd.runs import Run

    opened = Run(run)
    if (features is None) != (labels is None):
        raise InputError("evaluate: expected --features and --labels together, got one of them; give both or none")
    with distributed.started():
        skipped: dict[str, str] = {}
        if features is not None and labels is not None:
            options: dict[str, Any] = {"label": label, "skip_bad": skip_bad, "device": device, "graphs": graphs}
            skipped = evaluate_external(opened, features, labels, **options)
        if distributed.first():
            _say_skipped(skipped)
            evaluate_run(opened, bootstrap=bootstrap)
            _show_metrics(run)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    features: Features,
    out: Annotated[Path, typer.Option("--out", help="CSV to write.")],
    attention: Annotated[
        Path | None, typer.Option("--attention", help="Folder for attention and prototypes of each patch, HDF5.")
    ] = None,
    fold: Annotated[list[int] | None, typer.Option("--fold", help="Use this fold's model; may be repeated.")] = None,
    skip_bad: SkipBad = False,
    device: Device = None,
    graphs: Graphs = None,
) -> None:
    """Predict slides from their features alone, by the mean of the folds' models."""
    from momkd.predict import predict_run
    from momkd.progress import progress_bar
    from momkd.runs import Run

    with progress_bar(out_console) as bar:
        task = bar.add_task("predict", total=None)
        table, skipped = predict_run(
            Run(run),
            features,
            out,
            attention=attention,
            folds=fold,
            skip_bad=skip_bad,
            device=device,
            graphs=graphs,
            report=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _say_skipped(skipped)
    counts = ", ".join(f"{count} {name}" for name, count in table["predicted"].value_counts().items())
    out_console.print(f"{len(table)} slides predicted ({counts}): {out}", soft_wrap=True)
    if attention is not None:
        out_console.print(f"attention of each patch: {attention}", soft_wrap=True)


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    features: Features,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; an earlier explanation is replaced.")],
    fold: Annotated[int | None, typer.Option("--fold", help="Whose model; the first if left out.")] = None,
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
) -> None:
    """Show what a model looks at: maps of attention, also for QuPath, and the patches behind its prototypes."""
    from momkd.explain import Options, explain_run
    from momkd.progress import progress_bar
    from momkd.runs import Run

    with progress_bar(out_console) as bar:
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
            skip_bad=skip_bad,
            device=device,
            graphs=graphs,
            report=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _say_skipped(made.skipped)
    for note in made.notes:
        out_console.print(f"[yellow]note[/yellow] {escape(note)}", soft_wrap=True)
    out_console.print(f"{made.slides} slides seen, {made.maps} mapped: {made.index}", soft_wrap=True)


@app.command()
def splits(
    labels: Annotated[Path, typer.Argument(help="CSV of slide_id, case_id and the label.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for splits_0.csv, ....")],
    label: Label = None,
    folds: Annotated[int, typer.Option("--folds", min=1, help="Folds; 1 is a single split.")] = 5,
    val: Annotated[
        float, typer.Option("--val", min=0, max=0.99, help="Share that validates, of what is not test.")
    ] = 0.15,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Make splits by patient, stratified by class, in CLAM's files."""
    from momkd.data.splits import make_splits, write_splits
    from momkd.data.tables import read_labels

    made = make_splits(read_labels(labels, label=label), folds, seed, val)
    write_splits(out, made)
    sizes = ", ".join(f"{len(slides)} {part}" for part, slides in made[0].parts().items())
    out_console.print(f"{len(made)} splits (the first: {sizes} slides): {out}", soft_wrap=True)


@app.command()
def graph(
    features: Annotated[Path, typer.Argument(help="Folder of feature files with coordinates, one a slide.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the graphs; give it to --graphs.")],
    neighbours: Annotated[int, typer.Option("--neighbours", min=1, help="Nearest patches of each patch.")] = 8,
    skip_bad: SkipBad = False,
) -> None:
    """Make the graphs of patches that the encoder gatv2 sees, once for all runs."""
    from momkd.data.cohort import open_cohort
    from momkd.progress import progress_bar

    cohort = open_cohort(features, skip_bad=skip_bad, source=str(features), neighbours=neighbours, graphs=out)
    assert cohort.graphs is not None
    edges = 0
    with progress_bar(out_console) as bar:
        for slide in bar.track(cohort.paths, description="graph"):
            try:
                edges += cohort.graphs(slide).num_edges
            except InputError as error:
                if not skip_bad:
                    raise
                cohort.skipped[slide] = str(error)
    _say_skipped(cohort.skipped)
    made = len(cohort) - sum(slide in cohort.skipped for slide in cohort.paths)
    out_console.print(f"{made} graphs of {edges} edges: {out}", soft_wrap=True)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Folder of feature files; with --verify, a packed store.")],
    out: Annotated[Path | None, typer.Option("--out", help="The store to write, such as cohort.h5.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float16, where it holds the values, or float32.")] = "float16",
    neighbours: Annotated[
        int, typer.Option("--graph", min=0, help="Store graphs of this many nearest patches; 0: none.")
    ] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Compare a store with its checksums.")] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Pack feature files into one store that reads faster, for --features. Interrupted packing goes on."""
    from momkd.data.pack import pack
    from momkd.data.pack import verify as find_damage
    from momkd.progress import progress_bar

    if verify == (out is not None):
        raise InputError("pack: expected a folder and --out, or a store and --verify; give one of the two")
    with progress_bar(out_console, TextColumn("{task.fields[told]}")) as bar:
        task = bar.add_task("verify" if verify else "pack", total=None, told="")
        if out is None:
            checked = 0

            def count(done: int, total: int) -> None:
                nonlocal checked
                checked = total
                bar.update(task, completed=done, total=total)

            damaged = find_damage(source, count)
        else:
            began = time.monotonic()

            def show(done: int, total: int, nbytes: int) -> None:
                rate = nbytes / 1e6 / max(time.monotonic() - began, 1e-3)
                bar.update(task, completed=done, total=total, told=f"{rate:,.0f} MB/s")

            made = pack(source, out, dtype=dtype, neighbours=neighbours or None, skip_bad=skip_bad, report=show)
    if out is None:
        for wrong in damaged.values():
            out_console.print(f"[red]damaged[/red] {escape(wrong)}", soft_wrap=True)
        if damaged:
            raise InputError(
                f"{source}: {len(damaged)} of {checked} slides are damaged: {', '.join(list(damaged)[:8])}"
            )
        out_console.print(f"{checked} slides are as they were packed: {source}", soft_wrap=True)
        return
    _say_skipped(made.skipped)
    size = f"{made.patches} patches, {made.nbytes / 1e6:,.1f} MB"
    out_console.print(f"{made.slides} slides packed ({size}): {out}", soft_wrap=True)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of the released MoMKD, or the folder of a run.")],
    out: Annotated[Path, typer.Option("--out", help="The run to make, or the checkpoint to write (.pt).")],
    fold: Annotated[int, typer.Option("--fold", min=0, help="Of the run, which model.")] = 0,
    classes: Annotated[str, typer.Option("--classes", help="Names of the two classes of the checkpoint.")] = "0,1",
) -> None:
    """Turn the released MoMKD's checkpoint into a run that `momkd predict` takes, or a run into such a checkpoint."""
    from momkd.convert import checkpoint_to_run, run_to_checkpoint

    if source.is_dir():
        run_to_checkpoint(source, out, fold=fold)
    else:
        checkpoint_to_run(source, out, classes=classes.split(","))
    out_console.print(f"{source} converted: {out}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for cohort, runs and report.")] = Path("demo"),
    fast: Annotated[bool, typer.Option("--fast", help="Smaller, for a quick look.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Simulate a cohort, train MoMKD and ABMIL, predict without genomics, compare, and write a report."""
    from momkd.demo import run_demo

    run_demo(out, fast=fast, seed=seed, console=out_console)


@app.command()
def study(
    out: Annotated[Path, typer.Option("--out", help="Folder of the study; the same goes on there.")] = Path("study"),
    features: SomeFeatures = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="CSV of slide_id, case_id and labels; without slides of case_id.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="Column that is a task; may be repeated.")] = None,
    omics: Annotated[Path | None, typer.Option("--omics", help="Table of cases x genes: CSV, Parquet, .npy.")] = None,
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
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Repetitions.")] = 3,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Of the splits that are made.")] = 5,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value for every arm.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once.")] = 1,
    bootstrap: Annotated[int, typer.Option("--bootstrap", min=0, help="Resamples of patients.")] = 1000,
    device: Device = None,
    list_: Annotated[bool, typer.Option("--list", help="Say what the arms are, and do nothing.")] = False,
) -> None:
    """Compare ways to learn from slides and genomics, by cross-validation over seeds, and write a report.

    Without --features the slides are simulated: from the expression in --omics where it is given, else all of it is.
    """
    from momkd.progress import progress_bar
    from momkd.study import ARMS, choose_arms, run_study, study_results, study_table, write_study_report
    from momkd.study.command import study_of

    if list_:
        for known in ARMS.values():
            out_console.print(f"{known.name:18} {known.title}", soft_wrap=True)
        return
    planned = study_of(
        out,
        choose_arms(None if arms is None else arms.split(","), arm or ()),
        features=features,
        labels=labels,
        tasks=label or (),
        omics=omics,
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
    )
    out_console.print(f"[bold]{escape(planned.cohort.note)}[/bold]", soft_wrap=True)
    with progress_bar(out_console) as bar:
        task = bar.add_task("study", total=len(planned.cells()))

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            bar.console.print(f"{done}/{total} {escape(name)}", soft_wrap=True)

        run_study(planned, jobs=jobs, device=device, report=show)
    results = study_results(planned, bootstrap=bootstrap)
    report = write_study_report(planned, results)
    for name in planned.cohort.tasks:
        out_console.print(study_table(results, name))
    out_console.print(f"Report: {report}", soft_wrap=True)


@app.command()
def doctor(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say which backend runs each op here, and why the others can't."""
    import json

    from momkd.doctor import doctor as examine

    report = examine(show=not json_)
    if json_:
        print(json.dumps(report.as_dict(), indent=2))


@functools.cache
def _register_simulate() -> None:
    """`momkd simulate`: an option a dial of the simulation, so that the dials are written down in one place."""
    from momkd.simulate.config import SimulationConfig

    def simulate(out: Path, overwrite: bool, **dials: Any) -> None:
        """Write a simulated cohort in TRIDENT layout, and one from other hospitals."""
        from momkd.progress import progress_bar
        from momkd.simulate import simulate

        with progress_bar(out_console) as bar:
            task = bar.add_task("simulate", total=None)
            made = simulate(
                out,
                SimulationConfig(**dials),
                overwrite=overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        out_console.print(f"a simulated cohort (not patients): {made.root}", soft_wrap=True)

    named = inspect.Parameter.KEYWORD_ONLY
    replace = typer.Option("--overwrite", help="Replace a simulated cohort that is there.")
    parameters = [
        inspect.Parameter("out", named, annotation=Annotated[Path, typer.Argument(help="Folder to write.")]),
        inspect.Parameter("overwrite", named, default=False, annotation=Annotated[bool, replace]),
    ]
    kinds = {"int": int, "float": float, "str": str}
    for dial, (name, default, unit, meaning) in zip(fields(SimulationConfig), SimulationConfig.dials(), strict=True):
        option = typer.Option(f"--{name.replace('_', '-')}", help=f"{meaning} ({unit})")
        kind = kinds[str(dial.type)]
        parameters.append(inspect.Parameter(name, named, default=default, annotation=Annotated[kind, option]))
    simulate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    simulate.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command()(simulate)


def _say_skipped(skipped: dict[str, str]) -> None:
    for slide, reason in skipped.items():
        out_console.print(f"[yellow]note[/yellow] skipped {escape(slide)}: {escape(reason)}", soft_wrap=True)


def _show_metrics(folder: Path) -> None:
    import json

    from momkd.report import metrics_table

    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    out_console.print(metrics_table(metrics, f"Run {folder}"))


@contextlib.contextmanager
def _one_clear_line() -> Iterator[None]:
    """Errors that a user can mend leave with exit code 2 and one line; an interrupt with 130."""
    try:
        yield
    except (InputError, BackendError, RankError) as error:
        if not (isinstance(error, SharedError) and error.silent):
            err_console.print(f"[red]momkd: error:[/red] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        err_console.print("momkd: interrupted")
        raise SystemExit(130) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        out_console.print(f"momkd {momkd.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    command = context.invoked_subcommand
    if env.world_size() > 1 and command not in _WITH_RANKS:
        told = f"{command}: expected one process, got {env.world_size()}; only {' and '.join(_WITH_RANKS)} use torchrun"
        raise SharedError(told, silent=env.rank() > 0)


def main() -> None:
    """The `momkd` command."""
    _register_simulate()
    with _one_clear_line():
        app(prog_name="momkd")


if __name__ == "__main__":
    main()

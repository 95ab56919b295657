"""Commands that make and check data, and look at this machine."""

from __future__ import annotations

import functools
import inspect
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from momkd.cli.common import (
    FOLDS,
    NEIGHBOURS,
    SEED,
    CaseFrom,
    Classes,
    Label,
    Missing,
    Positive,
    SkipBad,
    app,
    label_options,
    say_labels,
    say_skipped,
)
from momkd.errors import InputError
from momkd.terminal import note, progress_bar, say


@app.command()
def splits(
    labels: Annotated[Path, typer.Argument(help="CSV of slide_id, case_id and the label.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for splits_0.csv, ....")],
    label: Label = None,
    folds: Annotated[int, typer.Option("--folds", min=1, max=FOLDS, help="Folds; 1 is a single split.")] = 5,
    val: Annotated[
        float, typer.Option("--val", min=0, max=0.99, help="Share that validates, of what is not test.")
    ] = 0.15,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEED)] = 0,
    classes: Classes = None,
    positive: Positive = None,
    missing: Missing = None,
    case_from: CaseFrom = None,
) -> None:
    """Make splits by patient, stratified by class, in CLAM's files."""
    from momkd.data.outputs import check_outputs
    from momkd.data.splits import check_splits_replaced, make_splits, write_splits
    from momkd.data.tables import read_labels

    check_outputs({f"splits_{n}.csv": out / f"splits_{n}.csv" for n in range(folds)}, {"the labels": labels})
    check_splits_replaced(out, folds)
    table = read_labels(labels, label=label, options=label_options(classes, positive, missing, case_from))
    say_labels(table)
    made = make_splits(table, folds, seed, val)
    write_splits(out, made)
    sizes = ", ".join(f"{len(slides)} {part}" for part, slides in made[0].parts().items())
    say(f"{len(made)} splits (the first: {sizes} slides): {out}")


@app.command()
def graph(
    features: Annotated[Path, typer.Argument(help="Folder of feature files with coordinates, one a slide.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the graphs; give it to --graphs.")],
    neighbours: Annotated[
        int, typer.Option("--neighbours", min=1, max=NEIGHBOURS, help="Nearest patches of each patch.")
    ] = 8,
    skip_bad: SkipBad = False,
) -> None:
    """Make the graphs of patches that the encoder gatv2 sees, once for all runs."""
    from momkd.data.cohort import open_cohort
    from momkd.data.outputs import check_outputs

    check_outputs({"--out": out}, {"the features": features})
    cohort = open_cohort(features, skip_bad=skip_bad, source=str(features), neighbours=neighbours, graphs=out)
    assert cohort.graphs is not None
    edges = 0
    with progress_bar() as bar:
        for slide in bar.track(cohort.paths, description="graph"):
            try:
                edges += cohort.graphs(slide).num_edges
            except InputError as error:
                if not skip_bad:
                    raise
                cohort.skipped[slide] = str(error)
    say_skipped(cohort.skipped, cohort.notes)
    made = len(cohort) - sum(slide in cohort.skipped for slide in cohort.paths)
    say(f"{made} graphs of {edges} edges: {out}")


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Folder of feature files; with --verify, a packed store.")],
    out: Annotated[Path | None, typer.Option("--out", help="The store to write, such as cohort.h5.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float16, where it holds the values, or float32.")] = "float16",
    neighbours: Annotated[
        int, typer.Option("--graph", min=0, max=NEIGHBOURS, help="Store graphs of this many nearest patches; 0: none.")
    ] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Compare a store with its checksums.")] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Pack feature files into one store that reads faster, for --features. Interrupted packing goes on."""
    from momkd.data.pack import pack
    from momkd.data.pack import verify as find_damage

    if verify == (out is not None):
        raise InputError("pack: expected a folder and --out, or a store and --verify; give one of the two")
    with progress_bar(told=True) as bar:
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
            note(wrong, label="damaged", style="red")
        if damaged:
            raise InputError(
                f"{source}: {len(damaged)} of {checked} slides are damaged: {', '.join(list(damaged)[:8])}"
            )
        say(f"{checked} slides are as they were packed: {source}")
        return
    say_skipped(made.skipped, made.notes)
    size = f"{made.patches} patches, {made.nbytes / 1e6:,.1f} MB"
    say(f"{made.slides} slides packed ({size}): {out}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of the released MoMKD, or the folder of a run.")],
    out: Annotated[Path, typer.Option("--out", help="The run to make, or the checkpoint to write (.pt).")],
    fold: Annotated[int, typer.Option("--fold", min=0, max=FOLDS, help="Of the run, which model.")] = 0,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Names of the two classes; else as in the checkpoint, or 0,1.")
    ] = None,
) -> None:
    """Turn the released MoMKD's checkpoint into a run that `momkd predict` takes, or a run into such a checkpoint."""
    from momkd.convert import checkpoint_to_run, run_to_checkpoint

    if source.is_dir():
        run_to_checkpoint(source, out, fold=fold)
    else:
        checkpoint_to_run(source, out, classes=None if classes is None else classes.split(","))
    say(f"{source} converted: {out}")


@app.command()
def doctor(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say which backend runs each op here, and why the others can't."""
    import json

    from momkd.doctor import doctor as examine

    report = examine(show=not json_)
    if json_:
        print(json.dumps(report.as_dict(), indent=2))


@functools.cache
def register_simulate() -> None:
    """`momkd simulate`: an option a dial of the simulation, so that the dials are written down in one place."""
    from momkd.simulate.config import SimulationConfig

    def simulate(out: Path, overwrite: bool, **dials: Any) -> None:
        """Write a simulated cohort in TRIDENT layout, and one from other hospitals."""
        from momkd.simulate import simulate

        with progress_bar() as bar:
            task = bar.add_task("simulate", total=None)
            made = simulate(
                out,
                SimulationConfig(**dials),
                overwrite=overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        say(f"a simulated cohort (not patients): {made.root}")

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

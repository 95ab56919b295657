"""What the commands share: the application, and the options that several take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import momkd
from momkd import env
from momkd.errors import SharedError
from momkd.terminal import note, say

if TYPE_CHECKING:
    from momkd.data import LabelOptions, Labels

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Multiple-instance learning on whole-slide images: train with genomics, predict from the slide alone.",
)
# The largest numbers that options take; what is larger is a slip, and libraries beneath don't all refuse it clearly.
FOLDS, NEIGHBOURS, SEED = 1000, 1000, 2**32 - 1
_WITH_RANKS = ("train", "evaluate")

_FEATURES = "Folder of feature files, one a slide (.h5, .pt, .npy), or a file of momkd pack."
Features = Annotated[Path, typer.Option("--features", help=_FEATURES)]
SomeFeatures = Annotated[Path | None, typer.Option("--features", help=_FEATURES)]
Label = Annotated[str | None, typer.Option("--label", help="Column of the labels.")]
Classes = Annotated[
    str | None, typer.Option("--classes", help="The classes in order, with commas; of two the second is positive.")
]
Positive = Annotated[str | None, typer.Option("--positive", help="Of two classes the positive one.")]
Missing = Annotated[
    list[str] | None,
    typer.Option("--missing", help="One more text that means no label, besides NA, null and others; may be repeated."),
]
CaseFrom = Annotated[
    str | None, typer.Option("--case-from", help="Column of cases, or tcga: the first 12 characters of TCGA barcodes.")
]
Device = Annotated[str | None, typer.Option("--device", help="Such as cpu or cuda:1; a GPU where there is one.")]
Graphs = Annotated[
    Path | None, typer.Option("--graphs", help="Folder that keeps graphs of patches, for the encoder gatv2.")
]
PatchBudget = Annotated[
    int | None,
    typer.Option("--patch-budget", min=1, max=2**31 - 1, help="Patches computed at a time; fewer take less memory."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out slides that cannot be used, and list them.")]
OmicsColumns = Annotated[
    str | None,
    typer.Option(
        "--omics-columns",
        help="Columns of --omics that are genes though they look like metadata or the label: names with commas between "
        "them, a file with one a line, or all.",
    ),
]
Patients = Annotated[
    str | None,
    typer.Option("--patients", help="How a patient's slides are joined: mean, max or noisy-or; else as in training."),
]
Bootstrap = Annotated[
    int, typer.Option("--bootstrap", min=0, max=100_000, help="Resamples of patients for the intervals.")
]
Omics = Annotated[Path | None, typer.Option("--omics", help="Table of cases x genes: CSV, Parquet, .npy.")]


def say_skipped(skipped: dict[str, str], notes: Sequence[str] = ()) -> None:
    """Print what was found while slides were read, and which were left out."""
    for told in notes:
        note(told)
    for slide, reason in skipped.items():
        note(f"skipped {slide}: {reason}")


def label_options(
    classes: str | None = None,
    positive: str | None = None,
    missing: list[str] | None = None,
    case_from: str | None = None,
) -> LabelOptions:
    """What the options say of labels."""
    from momkd.data import LabelOptions

    names = None if classes is None else tuple(name.strip() for name in classes.split(","))
    return LabelOptions(names, positive, tuple(missing or ()), case_from)


def say_labels(labels: Labels) -> None:
    """Print the classes with their counts, and what there is to know of the table."""
    say(labels.summary())
    for text in labels.notes:
        note(text)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"momkd {momkd.__version__}")
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

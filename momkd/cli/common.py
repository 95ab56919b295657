"""What the commands share: the application, its consoles, the options that several take, and how errors end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

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
_UNTIL_RANK_0_HAS_SPOKEN = 30  # seconds; it may have started later
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
Omics = Annotated[Path | None, typer.Option("--omics", help="Table of cases x genes: CSV, Parquet, .npy.")]


def say_skipped(skipped: dict[str, str]) -> None:
    for slide, reason in skipped.items():
        out_console.print(f"[yellow]note[/yellow] skipped {escape(slide)}: {escape(reason)}", soft_wrap=True)


@contextlib.contextmanager
def one_clear_line() -> Iterator[None]:
    """Errors that a user can mend leave with exit code 2 and one line; an interrupt with 130."""
    try:
        yield
    except (InputError, BackendError, RankError) as error:
        if isinstance(error, SharedError) and error.silent:
            time.sleep(_UNTIL_RANK_0_HAS_SPOKEN)  # torchrun ends all ranks with the first that ends, this one meanwhile
        else:
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

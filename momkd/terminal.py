"""How momkd prints: text that is not its own appears as it is, on one line, and is never read as markup.

Paths, ids, names of classes and messages of libraries may hold anything: `[/b]`, `[link=…]`, `:x:`, control characters,
bytes that are no text. Everything is printed by `say`, `note` and `show`, on consoles of `terminal`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.progress import Progress


def printable(text: object, keep: str = "") -> str:
    """Return a text on one line: what moves the cursor, hides or reverses is shown escaped, such as \\n and \\x1b.

    Args:
        text: anything; its str.
        keep: characters that stay, such as line feeds in the cell of a table.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


@cache
def _kind() -> type[Console]:
    """Return the class of the consoles. It is made at first use: rich takes longer to import than the command line."""
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    class Terminal(Console):
        """A console without markup, emoji and highlighting, which shows control characters escaped."""

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text, keep="\n"), **options)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                safe = segment.control or segment.text.isprintable()
                yield segment if safe else Segment(printable(segment.text, keep="\n"), segment.style)

        def print(self, *objects: Any, **options: Any) -> None:
            try:
                super().print(*objects, **options)
            except BrokenPipeError:
                raise
            except OSError as error:  # a full disk, which does not say of which file it speaks
                raise OSError(
                    error.errno, error.strerror, "standard error" if self.stderr else "standard output"
                ) from error

        def on_broken_pipe(self) -> None:
            raise  # the error that rich is handling: the command line ends silently

    return Terminal


def terminal(**options: Any) -> Console:
    """Return a console of rich for text of others; `options` are those of `rich.console.Console`."""
    return _kind()(markup=False, emoji=False, highlight=False, **options)


@cache
def stdout() -> Console:
    """Return the console of the standard output."""
    return terminal()


@cache
def stderr() -> Console:
    """Return the console of the standard error."""
    return terminal(stderr=True)


def say(text: object, *, style: str = "", console: Console | None = None) -> None:
    """Print a line, however long it is, on `stdout()` if nothing else is given."""
    from rich.text import Text

    (console or stdout()).print(Text(printable(text), style), soft_wrap=True)


def note(text: object, *, label: str = "note", style: str = "yellow", console: Console | None = None) -> None:
    """Print a line behind a coloured word."""
    from rich.text import Text

    (console or stdout()).print(Text.assemble((label, style), " ", printable(text)), soft_wrap=True)


def show(renderable: RenderableType, *, console: Console | None = None) -> None:
    """Print a table."""
    (console or stdout()).print(renderable)


def progress_bar(console: Console | None = None, *, told: bool = False) -> Progress:
    """Return a bar with a description, a count, the time that passed and the time left; gone when done.

    Args:
        console: to show it on, `stdout()` if nothing else is given.
        told: each task has a field `told`, shown behind its count.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    where = console or stdout()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}", markup=False),
        *([TextColumn("{task.fields[told]}", markup=False)] if told else []),
        TimeElapsedColumn(),
        TextColumn("left", markup=False),
        TimeRemainingColumn(),
        console=where,
        transient=True,
        disable=not where.is_terminal,  # a log file gets the lines alone
    )

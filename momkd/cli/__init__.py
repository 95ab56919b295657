"""The command line. See `momkd.cli.ending` for its exit codes."""

import io
import sys
from collections.abc import Sequence

from momkd.cli import learning, preparing  # the commands add themselves
from momkd.cli.common import app
from momkd.cli.ending import one_clear_line

__all__ = ["app", "learning", "main", "preparing"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The `momkd` command, with the arguments of the process by default."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # with PYTHONIOENCODING=ascii most names can't be encoded
            stream.reconfigure(errors="backslashreplace")
    with one_clear_line():
        preparing.register_simulate()
        code = app(None if arguments is None else list(arguments), prog_name="momkd", standalone_mode=False)
    if code:  # of typer.Exit
        raise SystemExit(code)

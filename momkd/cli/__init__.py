"""The command line. See `momkd.cli.ending` for its exit codes."""

import functools
import io
import sys
from collections.abc import Sequence
from typing import Any

import typer

from momkd.cli import learning, preparing  # the commands add themselves
from momkd.cli.common import app
from momkd.cli.ending import one_clear_line

__all__ = ["app", "learning", "main", "preparing"]


@functools.cache
def command() -> Any:
    """Return all commands as a command of click, made once in a process."""
    preparing.register_simulate()
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `momkd` command, with the arguments of the process by default."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # with PYTHONIOENCODING=ascii most names can't be encoded
            stream.reconfigure(errors="backslashreplace")
    with one_clear_line():
        code = command().main(arguments, prog_name="momkd", standalone_mode=False)
        if code == 130:  # typer makes an interrupt of it, without a word
            raise KeyboardInterrupt
    if code:  # of typer.Exit
        raise SystemExit(code)

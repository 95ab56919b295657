"""The momkd command in this process: what a shell would see."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import NamedTuple

from momkd import cli


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def momkd(*arguments: object, encoding: str = "utf-8") -> Done:
    """Run `momkd ARGUMENTS`, its output encoded as `encoding` as a shell with that locale would."""
    return ended(lambda: cli.main([str(word) for word in arguments]), encoding)


def ended(run: Callable[[], None], encoding: str = "utf-8") -> Done:
    """Call what ends as a command does."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    code = 0
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            run()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    return Done(code, out, err)


def one_line(done: Done) -> str:
    """The line of a command that refused its input."""
    assert done.code == 2, done
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("momkd: error: ")
    return lines[0].removeprefix("momkd: error: ")

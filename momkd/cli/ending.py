"""How a command ends: 0 done, 1 a bug of momkd, 2 one clear line, 130 interrupted, 141 nobody reads what it prints."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import typer

from momkd.errors import BackendError, InputError, RankError, SharedError
from momkd.terminal import note, say, stderr

_UNTIL_RANK_0_HAS_SPOKEN = 30  # seconds; it may have started later
_LONGEST = 1500  # characters of a line: a path has its place, 5,000 digits do not
# Of click, or of the copy of it inside typer.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = typer.BadParameter.__mro__[2]
_REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP), "check the path"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its mode or owner, or choose another"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or write elsewhere"),
    errno.EROFS: "write elsewhere",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EISDIR: "give a file, not a folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "close other programs, or take less at once",
}
BUG = "This is a bug of momkd. Please report it with the lines above, the command and what `momkd doctor` says."


@contextlib.contextmanager
def one_clear_line() -> Iterator[None]:
    """Every end of a command but success becomes an exit code and a line; only a bug of momkd shows a traceback."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = 2  # also where the line itself cannot be written
        with contextlib.suppress(OSError):
            code = _end(error)
        raise SystemExit(code) from None


def _end(error: BaseException) -> int:
    """Print what ended a command; returns the exit code."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        say("momkd: interrupted", console=stderr())
        return 130
    if isinstance(error, BrokenPipeError) and error.filename is None:
        _forget_stdout()
        return 141
    if isinstance(error, SharedError) and error.silent:
        time.sleep(_UNTIL_RANK_0_HAS_SPOKEN)  # torchrun ends all ranks with the first that ends, this one meanwhile
        return 2
    if isinstance(error, _ClickException):
        return _end_of_usage(error)
    line = _line(error)
    if line is None:
        traceback.print_exception(error, file=sys.stderr)
        say(BUG, console=stderr())
        return 1
    _say_error(line)
    if isinstance(error, OSError) and error.filename in (None, "standard output"):
        _forget_stdout()
    return 2


def _line(error: BaseException) -> str | None:
    """The line of an error that a user can mend, or None for a bug."""
    if isinstance(error, (InputError, BackendError, RankError)):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory{_told(error)}; close other programs, or take less at once (smaller files, fewer patches)"
    if isinstance(error, OSError):
        if error.errno is None:
            return f"cannot read or write{_told(error)}; check the files that you gave"
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
        remedy = _REMEDIES.get(error.errno, "check the files that you gave")
        return f"{where}{error.strerror or os.strerror(error.errno)}; {remedy}"
    if isinstance(error, UnicodeError):
        return f"expected text in UTF-8, got other bytes{_told(error)}; save the file as UTF-8, or rename it"
    if isinstance(error, OverflowError):
        return f"expected numbers of usual size, got one too large{_told(error)}; correct it in the options or files"
    if isinstance(error, RecursionError):
        return "expected a file of few levels, got values nested too deeply; check the files that you gave"
    return None


def _end_of_usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    context = getattr(error, "ctx", None)
    hint = "" if context is None else f"; see {context.command_path} --help"
    _say_error(f"{error.format_message().rstrip('.')}{hint}")
    return int(error.exit_code)


def _say_error(line: str) -> None:
    short = line if len(line) <= _LONGEST else f"{line[:1000]} ... {line[-400:]}"
    note(short, label="momkd: error:", style="red", console=stderr())


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f" ({text[:300]})" if text else ""


def _forget_stdout() -> None:
    """What is left in its buffer cannot be written; Python would try again at the end, and fail with a traceback."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)

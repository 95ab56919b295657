"""Names from outside that become names of files and folders: ids of slides, tasks, arms."""

from __future__ import annotations

import os
from pathlib import Path

from momkd.errors import InputError

_LONGEST = 240  # bytes, of the 255 that file systems allow: endings are added


def check_name(name: str, source: str, what: str) -> str:
    """Return the name, once it can be the name of a file: no folder, no control character, not too long.

    Args:
        name: to be checked.
        source: where it came from, and `what` it is in the plural, for the message.

    Raises:
        InputError: it could lead out of the folder that it is written into.
    """
    odd = not name.isprintable() or any(sign in name for sign in "/\\")
    if odd or name.strip(" .") == "" or len(name.encode(errors="replace")) > _LONGEST:
        raise InputError(
            f"{source}: expected {what} that can name a file, got {name[:80]!r}; rename it, without folders and "
            f"special characters, in {_LONGEST} bytes at most"
        )
    return name


def check_utf8(name: Path | str, source: Path | str, what: str) -> None:
    """Check that a name which the file system gave is text: bytes that are not UTF-8 go into no table.

    Args:
        name: to be checked.
        source: the path that holds it, and `what` it is in the singular, for the message.

    Raises:
        InputError: naming the source, with such bytes escaped.
    """
    try:
        os.fspath(name).encode()
    except UnicodeEncodeError:
        shown = os.fspath(source).encode(errors="backslashreplace").decode()
        raise InputError(f"{shown}: expected {what} named in UTF-8, got other bytes; rename it") from None


def check_id(slide_id: str, source: str) -> str:
    """Return the id of a slide, once it can be the name of a file. Raises InputError."""
    return check_name(slide_id, source, "slide ids")

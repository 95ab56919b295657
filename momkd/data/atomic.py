"""Files that are either whole or absent: write beside the target, flush to disk, rename.

A reader never sees half a file, and a run that is killed or a disk that fills up leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from momkd.data.files import leads_through_devices
from momkd.errors import InputError

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EFBIG: "raise the file size limit (ulimit -f) or choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "choose a folder, not a file",
    errno.EISDIR: "give the name of a file, not of a folder",
    errno.ENAMETOOLONG: "give a shorter name",
}

_FORMULA = re.compile(r"'*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20].")  # what spreadsheets run, full-width forms too
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)


@contextlib.contextmanager
def atomic_write(path: Path | str, *, suffix: str = "") -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; at the end it becomes `path`, or on any exception disappears.

    Args:
        path: the file to write or replace, whose mode stays. A symbolic link is followed: its target is replaced.
        suffix: ending of the temporary name, for writers that insist on one (".npy").

    Raises:
        InputError: the folder is missing, read-only or full, or `path` is a device or a pipe; the line says what to do.

    Example:
        >>> with atomic_write("scores.npy", suffix=".npy") as temporary:  # doctest: +SKIP
        ...     numpy.save(temporary, scores)
    """
    shown, target = Path(path), Path(os.path.realpath(path))
    # Short and hidden, so that no listing of slides takes it for one and a long target name stays within the limit.
    temporary = target.parent / f".{target.name[:40]}.{secrets.token_hex(6)}.tmp{suffix}"
    try:
        before = _mode_to_keep(shown, target)
        # Unlike mkstemp (mode 0600), so that the umask decides who may read a new file.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if before is None else before)
        mode = stat.S_IMODE(os.fstat(handle).st_mode) if before is None else before
        os.close(handle)
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # a library may have put a file of its own there
        os.replace(temporary, target)
        sync_folder(target.parent)
    except Exception as error:
        number = _disk_errno(error, temporary, target)
        if number is None:
            raise
        raise cannot_write(shown, OSError(number, os.strerror(number))) from error
    finally:
        with contextlib.suppress(OSError):  # it is gone after the rename
            temporary.unlink()


def _mode_to_keep(shown: Path, target: Path) -> int | None:
    """The permissions of the file that will be replaced, or None where there is none yet."""
    if leads_through_devices(shown):
        raise InputError(f"{shown}: expected a file to write, got a device or a pipe; choose another name")
    try:
        there = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(there):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(there):  # root could replace /dev/null
        raise InputError(f"{shown}: expected a file to write, got a device or a pipe; choose another name")
    return there & 0o777


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that a killed process left in a folder and under it; nobody else may be writing."""
    for path in folder.rglob(".*"):
        if is_leftover(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def is_leftover(name: str) -> bool:
    """Whether `atomic_write` names its temporary files so."""
    return re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp(\.\w+)?", name) is not None


def cannot_write(path: Path | str, error: OSError, facts: str = "") -> InputError:
    """The error of a file that cannot be written, with a remedy; `facts` go into parentheses."""
    number = error.errno or errno.EIO
    remedy = _REMEDIES.get(number, "choose another folder")
    told = f" ({facts})" if facts and number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
    return InputError(f"{path}: cannot write it: {os.strerror(number)}{told}; {remedy}")


def make_folder(path: Path | str) -> Path:
    """The folder, made where it is not there. Raises InputError where it cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot make the folder: {error.strerror}; choose another") from error
    return path


def write_text(path: Path | str, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path | str, table: pd.DataFrame, *, index: bool = False) -> None:
    """Writes a table as CSV, whole or not at all; missing cells are empty.

    Texts that a spreadsheet would run as a formula stand behind an apostrophe; see `spreadsheet_cell`.
    """
    safe = table.rename(columns=_safe, index=_safe if index else None)
    for at, kind in enumerate(table.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):  # texts and objects; bool counts as a number
            safe.isetitem(at, table.iloc[:, at].map(_safe))
    with atomic_write(path) as temporary:
        safe.to_csv(temporary, index=index, lineterminator="\n")


def spreadsheet_cell(text: str) -> str:
    """Return a text that no spreadsheet runs: behind an apostrophe if it begins like a formula. A number stays.

    `plain_cell` undoes it, for every text.

    Example:
        >>> spreadsheet_cell("=1+1"), spreadsheet_cell("-1")
        ("'=1+1", '-1')
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def plain_cell(text: str) -> str:
    """Return the text of a cell that `spreadsheet_cell` made."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _safe(value: Any) -> Any:
    return spreadsheet_cell(value) if isinstance(value, str) else value


def _disk_errno(error: Exception, temporary: Path, target: Path) -> int | None:
    """The number of a failure to write here, or None where the error came from elsewhere in the caller's block."""
    if isinstance(error, OSError):
        if error.filename is not None and Path(os.fsdecode(error.filename)) not in (temporary, target, target.parent):
            return None
        if error.errno is not None:
            return error.errno
    # HDF5 and safetensors report a full disk in the text of errors of their own.
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(number) in str(error):
            return number
    return errno.EIO if isinstance(error, OSError) else None


def sync_folder(folder: Path) -> None:
    """Makes the rename itself last through a power cut."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

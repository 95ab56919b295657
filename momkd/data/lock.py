"""One writer for a folder: a lock file that says who holds it.

The system's own lock on the file (flock) ends with the process that holds it, however that ends, so a lock whose
process was killed on this machine is taken over. Where the file names another machine, that can't be known from here:
it is taken over only within one SLURM job, which never runs twice at a time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from momkd.data.files import open_own
from momkd.data.own import short
from momkd.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"


@contextlib.contextmanager
def locked(folder: Path, job: str | None = None) -> Iterator[str | None]:
    """Holds the lock of a folder that exists; the file is removed at the end.

    Args:
        folder: to be written by this process alone.
        job: the SLURM job of this process.

    Yields:
        Who held it and ended without giving it back, in words, or None.

    Raises:
        InputError: another process holds it, or may; or it cannot be written.
    """
    path = folder / LOCK
    handle, sure = _opened(path)
    try:
        holder = _read(handle)
        if sure is False:
            raise InputError(
                f"{folder}: in use by {_words(holder)}; wait until that ends, end it, or choose another folder"
            )
        same_machine = holder.get("host") == socket.gethostname()
        same_job = job is not None and holder.get("job") == job
        if holder and not (sure and (same_machine or same_job)):
            raise InputError(
                f"{folder}: in use by {_words(holder)}, as far as can be known from {socket.gethostname()}; "
                f"if that process has ended, remove {path}"
            )
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "job": job, "since": time.strftime("%Y-%m-%d %H:%M")}
        try:
            _write(handle, mine, path)
            yield _words(holder) if holder else None
        finally:
            with contextlib.suppress(OSError):  # removed by hand
                path.unlink()
    finally:
        os.close(handle)


def _opened(path: Path) -> tuple[int, bool | None]:
    """The open file, and whether this process alone holds it; None where the system can't say."""
    while True:
        try:
            handle = open_own(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise _unwritable(path, error) from error
        sure = _flocked(handle)
        with contextlib.suppress(FileNotFoundError):
            if sure is False or os.path.samestat(os.fstat(handle), path.stat()):
                return handle, sure
        os.close(handle)  # its holder has just removed it


def _flocked(handle: int) -> bool | None:
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _read(handle: int) -> dict[str, Any]:
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, 4096)
    if not text:
        return {}
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text), dict):
            return found
    return {"pid": "?", "host": "?"}


def _write(handle: int, holder: dict[str, Any], path: Path) -> None:
    try:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps(holder).encode())
        os.fsync(handle)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot write it: {error.strerror}; choose another folder")


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    job = f", SLURM job {holder['job']}" if holder.get("job") else ""
    holder = {name: short(value).strip("'") for name, value in holder.items()}
    return f"process {holder.get('pid')} on {holder.get('host')}{job} since {holder.get('since', '?')}"

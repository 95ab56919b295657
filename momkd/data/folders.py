"""Folders that are either whole or absent: filled under a hidden name beside the target, then renamed.

So a process that is killed or a disk that fills up leaves no folder that looks whole and is not. The folder holds a
list of its files; one to which somebody else has added a file is never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from momkd.errors import InputError

LIST = ".momkd-files.json"
_OF_THE_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EFBIG: "raise the file size limit (ulimit -f) or choose another folder",
    errno.EBUSY: "choose a new folder inside it",
    errno.EXDEV: "choose a new folder inside it",
    errno.ENAMETOOLONG: "give a shorter name",
}


@contextlib.contextmanager
def whole_folder(out: Path | str, *, name: str, mark: str, overwrite: bool | None = None) -> Iterator[Path]:
    """Yields a hidden folder to fill, which at the end becomes `out`, or on any exception disappears.

    Args:
        out: the folder to make; an empty one is taken too.
        name: what it will be, for messages: "a simulation".
        mark: a file that only such a folder has; one without it is never replaced.
        overwrite: replace an earlier folder of this kind, unless it holds files that momkd did not write; None where
            the user cannot ask for it.

    Raises:
        InputError: the folder holds something else, cannot be written or is full.
    """
    shown, target = Path(out), Path(os.path.realpath(out))
    _check_target(shown, target, name, mark, overwrite)
    temporary = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        list_files(temporary)
        _check_target(shown, target, name, mark, overwrite)  # it took a while
        _put_in_place(temporary, target)
    except InputError as error:
        raise InputError(str(error).replace(str(temporary), str(shown))) from error
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "choose a folder that you may write to")
        raise InputError(f"{shown}: cannot write it: {error.strerror or error}; {remedy}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it is gone after the rename


def _check_target(shown: Path, target: Path, name: str, mark: str, overwrite: bool | None) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"{shown}: expected a new or an empty folder, got a file; choose another name")
    if not target.is_dir():
        return
    here = Path.cwd()
    if target == here or target in here.parents:
        raise InputError(f"{shown}: expected a new folder, got one that you are in; name one inside it")
    found = sorted(path.name for path in target.iterdir())
    if not found:
        return
    if mark not in found:
        raise InputError(f"{shown}: expected a new or an empty folder, got {found[0]!r} in it; choose another folder")
    if not overwrite:
        remedy = "choose another folder" + ("" if overwrite is None else " or set overwrite")
        raise InputError(f"{shown}: expected a new or an empty folder, got {name}; {remedy}")
    if (other := foreign_file(target)) is not None:
        raise InputError(f"{shown}: expected nothing but {name} to overwrite, got also {other!r}; move it elsewhere")


def list_files(folder: Path) -> None:
    """Write down which files a folder holds, so that it may be replaced later."""
    (folder / LIST).write_text(json.dumps({"momkd": _files(folder)}), encoding="utf-8")


def listed(folder: Path, files: Iterable[Path]) -> str:
    """The text of a folder's list with the digests of `files` in it, which will lie there by their names."""
    known = _known(folder)
    return json.dumps({**known, "digests": {path.name: _digest(path) for path in files}})


def is_listed(path: Path) -> bool:
    """Whether the list of a file's folder holds its digest: momkd wrote it, and nobody has changed it since."""
    digests = _known(path.parent).get("digests")
    return path.is_file() and isinstance(digests, dict) and digests.get(path.name) == _digest(path)


def _known(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def foreign_file(folder: Path) -> str | None:
    """Return the first file of a folder that is not in its list, or has changed since; None where all are momkd's."""
    known = _known(folder).get("momkd")
    for path, size in _files(folder).items():
        if not (isinstance(known, dict) and known.get(path) == size):
            return path
    return None


def _files(folder: Path) -> dict[str, int]:
    """The size of every file by its path in the folder; links are not followed."""
    sizes: dict[str, int] = {}
    for top, folders, files in os.walk(folder):
        for name in files + [name for name in folders if os.path.islink(os.path.join(top, name))]:
            if name not in _OF_THE_SYSTEM and (top, name) != (str(folder), LIST):
                path = Path(top, name)
                sizes[path.relative_to(folder).as_posix()] = path.lstat().st_size
    return dict(sorted(sizes.items()))


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name[:40]}.{secrets.token_hex(6)}.tmp"


def _put_in_place(temporary: Path, target: Path) -> None:
    """`temporary` becomes `target`; what was there comes back if that fails, and is deleted if it does not."""
    if not target.exists():
        os.rename(temporary, target)
        return
    shutil.copymode(target, temporary)
    old = _beside(target)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)  # the new one is there, whatever becomes of this

"""What a path leads to, asked before it is opened: a pipe or a device never ends, and a name may be too long."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from momkd.errors import InputError

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(path: Path | str) -> str:
    """Return what a path leads to, links followed, as words for messages; nothing is opened and nothing is raised.

    "a file", "a folder", "a named pipe", "a socket", "a device", "nothing there", or what the system says of it, such
    as "Permission denied" or "File name too long".
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing there"
    except OSError as error:
        return error.strerror or type(error).__name__
    except ValueError as error:  # a zero byte, or characters that no file name holds
        return str(error)
    return _KINDS.get(stat.S_IFMT(mode), "no file")


def leads_through_devices(path: Path | str) -> bool:
    """Return whether a path, or a link behind it, lies under /dev or /proc: /dev/stdout may lead to a regular file.

    /dev/shm is a folder as any other. At most 40 links are followed, as by the system.
    """
    place = Path(os.path.abspath(path))
    for _ in range(40):
        folder = Path(os.path.realpath(place.parent))
        if folder.parts[1:2] in (("dev",), ("proc",)) and folder.parts[:3] != ("/", "dev", "shm"):
            return True
        if not (place := folder / place.name).is_symlink():
            return False
        place = folder / os.readlink(place)
    return True


def regular_file(path: Path | str, expected: str, remedy: str = "check the path") -> Path:
    """Return the path, once a regular file is there.

    Args:
        path: what the user gave.
        expected: what it should be, for the message: "a CSV table".
        remedy: what to do otherwise.

    Raises:
        InputError: a folder, a pipe, a device or nothing is there, or the system refuses to look.
    """
    return _checked(path, "a file", expected, remedy)


def existing_folder(path: Path | str, expected: str, remedy: str = "check the path") -> Path:
    """Return the path, once a folder is there; see `regular_file`."""
    return _checked(path, "a folder", expected, remedy)


def open_own(path: Path, flags: int) -> int:
    """Return the handle of a file whose name anybody can guess, such as a lock: never what somebody put in its place.

    A link is not followed, and a pipe, a device or a second name of another file is refused.

    Args:
        path: the file.
        flags: of `os.open`, such as os.O_RDWR | os.O_CREAT.

    Raises:
        InputError: something else is there.
        OSError: it cannot be opened.
    """
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    came = "a link"
    try:
        handle = os.open(path, flags | safe, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise
        came = "a link" if error.errno != errno.ENXIO else kind_of(path)
    else:
        state = os.fstat(handle)
        if stat.S_ISREG(state.st_mode) and state.st_nlink <= 1:
            return handle
        os.close(handle)
        if stat.S_ISREG(state.st_mode) and state.st_nlink > 1:
            came = "a second name of another file"
        else:
            came = kind_of(path)
    raise InputError(f"{path}: expected a file that momkd made, got {came}; remove it")


def _checked(path: Path | str, kind: str, expected: str, remedy: str) -> Path:
    came = kind_of(path)
    if came != kind:
        raise InputError(f"{path}: expected {expected}, got {came}; {remedy}")
    return Path(path)

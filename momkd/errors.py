"""Errors that a user can mend: one clear line each, never a traceback on the command line."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a table, a configuration, a checkpoint.

    The message is one line that names the file or argument, what was expected, what came and what to do.
    The command line prints it and exits with code 2.
    """


class BackendError(RuntimeError):
    """A backend named by the caller cannot run this call; the message carries the reason."""


class SharedError(InputError):
    """An InputError that ends every process of a distributed training, to be printed by one: not where `silent`."""

    def __init__(self, message: str, *, silent: bool) -> None:
        super().__init__(message)
        self.silent = silent


class RankError(RuntimeError):
    """Another process of a distributed training has ended, hangs, or holds something else than this one."""

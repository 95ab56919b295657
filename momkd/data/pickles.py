"""What a pickle holds, found from its operations before anything is loaded.

torch.load(weights_only=True) executes nothing, but it computes the hash of a dict's keys, and that of a tuple of tuples
of tuples, each named twice, takes for ever.
"""

from __future__ import annotations

import contextlib
import mmap
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

_LARGEST = 1_000_000  # values in a tuple, those of its tuples counted each time that they come
_DEEPEST = 500  # tuples in tuples
_PICKLES = 5  # that the old format of torch.save writes: magic number, version, system, object, keys
_BYTES = 1 << 28  # of a pickle in the new format


class ForeignObjects(ValueError):
    """A file of torch.save holds something else than tensors and plain values."""

    def __init__(self, name: str) -> None:
        super().__init__(f"NumPy arrays ({name})" if name.startswith("numpy.") else f"objects ({name})")


def short_reason(error: pickle.UnpicklingError) -> ValueError:
    """What torch.load has to say, without its advice of how to load anything all the same."""
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return ForeignObjects(match[1][:80])
    match = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
    return ValueError(match[1] if match else "not what torch.save writes")


def check_nesting(path: Path, zipped: bool) -> set[str]:
    """Raise ValueError where the tuples in a file of torch.save are too deep or too large once they are written out.

    Returns:
        The names that its pickles look up, such as "torch._utils _rebuild_tensor_v2".
    """
    names: set[str] = set()
    if zipped:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("data.pkl"):
                    if entry.file_size > _BYTES:
                        raise ValueError(f"a pickle of {entry.file_size} bytes")
                    _check(archive.read(entry), 1, names)
    elif path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            _check(mapped, _PICKLES, names)
    return names


def _check(stream: Any, pickles: int, names: set[str]) -> None:
    data = _Stream(stream)
    with contextlib.suppress(_Damaged):  # the unpickler says so in better words
        for _ in range(pickles):
            _check_one(data, names)


class _Damaged(Exception):
    pass


class _Stream:
    """A file over bytes that are mapped or in memory, for pickletools."""

    def __init__(self, data: Any) -> None:
        self._data, self._at = data, 0

    def read(self, size: int) -> bytes:
        made = bytes(self._data[self._at : self._at + size])
        self._at += len(made)
        return made

    def readline(self) -> bytes:
        end = self._data.find(b"\n", self._at, self._at + 100_000)
        return self.read((end + 1 if end >= 0 else len(self._data)) - self._at)

    def tell(self) -> int:
        return self._at


def _check_one(data: _Stream, names: set[str]) -> None:
    """Follows the stack of one pickle, and adds to `names`; a value is (size, depth) of its tuples."""
    stack: list[tuple[int, int] | None] = []  # None is a mark
    memo: dict[Any, tuple[int, int]] = {}
    plain = (1, 0)
    operations = pickletools.genops(data)  # type: ignore[arg-type]  # read, readline and tell are all it uses
    while True:
        try:
            operation, argument, _ = next(operations)
        except StopIteration:
            return
        except Exception as error:  # of nearly any kind
            raise _Damaged from error
        name = operation.name
        if name == "GLOBAL":
            names.add(str(argument))
        taken: list[tuple[int, int]] = []
        try:
            if pickletools.stackslice in operation.stack_before or name == "POP_MARK":
                while (value := stack.pop()) is not None:
                    taken.append(value)
            if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1] or plain
                continue
            if name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
                continue
            if name == "DUP":
                stack.append(stack[-1])
                continue
            if name == "POP" and stack and stack[-1] is None:
                stack.pop()
                continue
            for kind in operation.stack_before:
                if kind not in (pickletools.markobject, pickletools.stackslice):
                    taken.append(stack.pop() or plain)
        except (IndexError, KeyError) as error:
            raise _Damaged from error
        if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"):
            made = 1 + sum(size for size, _ in taken), 1 + max((depth for _, depth in taken), default=0)
            if made[0] > _LARGEST or made[1] > _DEEPEST:
                raise ValueError("tuples within tuples without end")
            stack.append(made)
            continue
        for kind in operation.stack_after:
            stack.append(None if kind is pickletools.markobject else plain)

"""Where slides come from: a folder of feature files, or a packed store, behind one interface."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from momkd.data.packed import PackedStore
from momkd.data.raw import Array
from momkd.data.slides import (
    files_below,
    find_slides,
    read_blocks,
    read_places,
    read_slide,
    slide_attributes,
    slide_header,
)
from momkd.errors import InputError
from momkd.graph import Edges
from momkd.names import check_utf8


class SlideSource(Protocol):
    """Slides by id; every method raises InputError where a slide cannot be used."""

    @property
    def paths(self) -> Mapping[str, Path]:
        """The file that holds each slide, sorted by id."""

    def name(self, slide_id: str) -> str:
        """What messages call a slide."""

    def header(self, slide_id: str) -> tuple[int, int, str]:
        """(N, L, "float16" or "float32"), without reading values."""

    def has_coords(self, slide_id: str) -> bool: ...

    def read(self, slide_id: str, width: int | None = None) -> Array:
        """Features (N, L), float16 or float32."""

    def blocks(self, slide_id: str, rows: int, width: int | None = None) -> Iterator[Array]:
        """The same, `rows` patches at a time."""

    def coords(self, slide_id: str) -> tuple[npt.NDArray[np.int64] | None, dict[str, Any]]:
        """Coordinates (N, 2) or None, and the attributes of the slide."""

    def graph(self, slide_id: str, neighbours: int) -> Edges | None:
        """The graph of k neighbours that is stored with the slide, or None."""

    def checksum(self, slide_id: str) -> str | None:
        """That of the slide's features where it is stored with them, or None."""

    def alias(self, names: Mapping[str, str]) -> None:
        """Let slides be asked for by other ids too: other id -> id."""


@dataclass(frozen=True)
class SlideFiles:
    """Slides as `find_slides` finds them, one file each. A file that changes after its header was read is refused."""

    paths: dict[str, Path]
    noted: dict[str, list[str]] = field(default_factory=dict)  # what was found or converted -> slides
    overlooked: str = ""  # what is said of feature files in the folders of a folder that holds some itself
    _seen: dict[str, tuple[tuple[int, int] | None, bool]] = field(default_factory=dict, repr=False)  # stamp, has_coords
    _noted: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def name(self, slide_id: str) -> str:
        return str(self.paths[slide_id])

    def header(self, slide_id: str) -> tuple[int, int, str]:
        check_utf8(self.paths[slide_id].stem, self.paths[slide_id], "a feature file")
        stamp = _stamp(self.paths[slide_id])
        header = slide_header(self.paths[slide_id])
        self._seen[slide_id] = stamp, header.has_coords
        self.note(slide_id, header.notes)
        return header[:3]

    def note(self, slide_id: str, notes: Iterable[str]) -> None:
        """Keep what was found or converted in a slide, once."""
        for note in notes:
            if (note, slide_id) not in self._noted:
                self._noted.add((note, slide_id))
                self.noted.setdefault(note, []).append(slide_id)

    def has_coords(self, slide_id: str) -> bool:
        if slide_id not in self._seen:
            self.header(slide_id)
        return self._seen[slide_id][1]

    def read(self, slide_id: str, width: int | None = None) -> Array:
        with self._unchanged(slide_id) as path:
            return read_slide(path, width=width, with_coords=False).features

    def blocks(self, slide_id: str, rows: int, width: int | None = None) -> Iterator[Array]:
        with self._unchanged(slide_id) as path:
            yield from read_blocks(path, rows, width=width)

    def coords(self, slide_id: str) -> tuple[npt.NDArray[np.int64] | None, dict[str, Any]]:
        with self._unchanged(slide_id) as path:
            coords, attrs, notes = read_places(path)
            self.note(slide_id, notes)
            return coords, attrs

    def attributes(self, slide_id: str) -> dict[str, Any]:
        return slide_attributes(self.paths[slide_id])

    def graph(self, slide_id: str, neighbours: int) -> Edges | None:
        return None

    def checksum(self, slide_id: str) -> str | None:
        return None

    def alias(self, names: Mapping[str, str]) -> None:
        self.paths.update({name: self.paths[slide] for name, slide in names.items()})

    @contextlib.contextmanager
    def _unchanged(self, slide_id: str) -> Iterator[Path]:
        """The file whose header was read; what a change of it leads to inside, be it an error, is not told."""
        path = self.paths[slide_id]

        def check() -> None:
            if slide_id in self._seen and _stamp(path) != self._seen[slide_id][0]:
                raise InputError(
                    f"{path}: expected the file that was there when the slides were looked through, got one that was "
                    "changed since; start again once nothing writes to it"
                )

        check()
        try:
            yield path
        finally:
            check()


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of modification of a file, or None where nothing is there."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return None
    return state.st_size, state.st_mtime_ns


def open_source(features: Path | str) -> SlideSource:
    """The slides of a folder of feature files, or of a packed store.

    Raises:
        InputError: neither is there.
    """
    path = Path(features)
    if path.is_file():
        return PackedStore(path)
    found = find_slides(path)
    return SlideFiles(found, overlooked=_overlooked(path, found))


def _overlooked(folder: Path, found: Mapping[str, Path]) -> str:
    """What is said of feature files below a folder that holds some itself, such as one that strayed there."""
    if next(iter(found.values())).parent != folder:  # they were found below it
        return ""
    number, whole = files_below(folder, found)
    if not number:
        return ""
    told = f"{number}{'' if whole else ' or more'} feature files lie in its folders and are not looked at"
    stray = next(iter(found.values())).name + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    return f"{told}: give one of them, or move {stray} out"

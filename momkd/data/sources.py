"""Where slides come from: a folder of feature files, or a packed store, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from momkd.data.packed import PackedStore
from momkd.data.raw import Array, open_raw
from momkd.data.slides import find_slides, has_coords, read_coords, read_slide, slide_header
from momkd.graph import Edges


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

    def coords(self, slide_id: str) -> tuple[npt.NDArray[np.int64] | None, dict[str, Any]]:
        """Coordinates (N, 2) or None, and the attributes of the slide."""

    def graph(self, slide_id: str, neighbours: int) -> Edges | None:
        """The graph of k neighbours that is stored with the slide, or None."""


@dataclass(frozen=True)
class SlideFiles:
    """Slides as `find_slides` finds them, one file each."""

    paths: Mapping[str, Path]

    def name(self, slide_id: str) -> str:
        return str(self.paths[slide_id])

    def header(self, slide_id: str) -> tuple[int, int, str]:
        return slide_header(self.paths[slide_id])

    def has_coords(self, slide_id: str) -> bool:
        return has_coords(self.paths[slide_id])

    def read(self, slide_id: str, width: int | None = None) -> Array:
        return read_slide(self.paths[slide_id], width=width, with_coords=False).features

    def coords(self, slide_id: str) -> tuple[npt.NDArray[np.int64] | None, dict[str, Any]]:
        return read_coords(self.paths[slide_id])

    def attributes(self, slide_id: str) -> dict[str, Any]:
        with open_raw(self.paths[slide_id]) as raw:
            return raw.attrs

    def graph(self, slide_id: str, neighbours: int) -> Edges | None:
        return None


def open_source(features: Path | str) -> SlideSource:
    """The slides of a folder of feature files, or of a packed store.

    Raises:
        InputError: neither is there.
    """
    path = Path(features)
    return PackedStore(path) if path.is_file() else SlideFiles(find_slides(path))

"""Spatial graphs of slides: built from the coordinates of their feature files, and kept in a folder where one is given.

A kept graph is an HDF5 file `<slide>.h5`: `offsets` (N + 1,), `sources` (E,) and `order` (N,) int32 as in
`momkd.graph.Edges`, with the attributes `neighbours` (k) and `coords`, a digest of the coordinates that it was made of.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from momkd.data.atomic import make_folder
from momkd.data.raw import check_id, check_written, locked_elsewhere, one_line, own, plain_attributes
from momkd.data.slides import write_hdf5
from momkd.data.sources import SlideSource
from momkd.errors import InputError
from momkd.graph import Edges, from_lists, knn

_LISTS = ("offsets", "sources", "order")


@dataclass(frozen=True)
class SlideGraphs:
    """The k-nearest-neighbour graph of a slide, when asked for.

    Args:
        source: where the slides are, with their coordinates; a packed store may hold their graphs too.
        neighbours: k.
        folder: where graphs are kept: read where they are there, written where not; None keeps nothing.
    """

    source: SlideSource
    neighbours: int = 8
    folder: Path | None = None

    def __call__(self, slide_id: str, rows: npt.NDArray[np.int64] | None = None) -> Edges:
        """The graph of a slide, or of some of its patches, which is another one and never kept.

        Raises:
            InputError: no coordinates, or a kept graph that is broken or was made of something else.
        """
        if rows is None and (stored := self.source.graph(slide_id, self.neighbours)) is not None:
            return stored
        coords, _ = self.source.coords(slide_id)
        if coords is None:
            raise InputError(no_coords(self.source.name(slide_id)))
        if rows is not None or self.folder is None:
            return self._knn(slide_id, coords if rows is None else coords[rows])
        kept = self.folder / f"{check_id(slide_id, self.source.name(slide_id))}.h5"
        digest = hashlib.blake2b(np.ascontiguousarray(coords).tobytes(), digest_size=16).hexdigest()
        if kept.is_file():
            return _read(kept, self.neighbours, digest)
        edges = self._knn(slide_id, coords)
        make_folder(self.folder)
        with write_hdf5(kept) as file:
            for name in _LISTS:
                file.create_dataset(name, data=getattr(edges, name).numpy())
            file.attrs.update({"neighbours": self.neighbours, "coords": np.bytes_(digest)})
        return edges

    def _knn(self, slide_id: str, coords: npt.NDArray[np.int64]) -> Edges:
        try:
            return knn(coords, self.neighbours)
        except ValueError as error:
            raise InputError(f"{self.source.name(slide_id)}: {error}") from error


def no_coords(name: str) -> str:
    """What is said of a slide without coordinates, where a graph is wanted."""
    return (
        f"{name}: expected coordinates (N, 2) for the graph of patches, got none; extract features with coordinates, "
        "or choose an encoder without graph (model.encoder=mlp)"
    )


def _read(path: Path, neighbours: int, digest: str) -> Edges:
    made: dict[str, Any] = {}
    try:
        with h5py.File(path) as file:
            made = plain_attributes(file)
            lists = [_list(path, file, name) for name in _LISTS if "neighbours" in made]
        edges = from_lists(*lists) if lists else None
    except BlockingIOError as error:
        raise InputError(locked_elsewhere(path)) from error
    except Exception as error:  # HDF5's errors on a damaged file have several roots
        if "neighbours" not in made:
            raise _other_file(path) from error
        raise InputError(
            f"{path}: expected a graph of momkd, got one that does not read ({one_line(error)}); remove it"
        ) from error
    if edges is None:
        raise _other_file(path)
    if made.get("neighbours") != neighbours or made.get("coords") != digest:
        what = "the coordinates" if made.get("neighbours") == neighbours else f"{neighbours} neighbours"
        raise InputError(
            f"{path}: expected a graph of {what} of this slide, got another one; remove it to make it anew"
        )
    return edges


def _list(path: Path, file: h5py.File, name: str) -> torch.Tensor:
    if (data := own(file, name)) is None:
        raise ValueError(f"no dataset {name!r} in it")
    check_written(path, name, data, path.stat().st_size)
    return torch.from_numpy(data[:].astype(np.int32))


def _other_file(path: Path) -> InputError:
    return InputError(
        f"{path}: expected a graph of momkd, got another file or a damaged one; choose another folder for the graphs"
    )

"""Spatial graphs of slides: built from the coordinates of their feature files, and kept in a folder where one is given.

A kept graph is an HDF5 file `<slide>.h5`: `offsets` (N + 1,), `sources` (E,) and `order` (N,) int32 as in
`momkd.graph.Edges`, with the attributes `neighbours` (k) and `coords`, a digest of the coordinates that it was made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from momkd.data.atomic import make_folder
from momkd.data.raw import one_line
from momkd.data.slides import read_coords, write_hdf5
from momkd.errors import InputError
from momkd.graph import Edges, from_lists, knn

_LISTS = ("offsets", "sources", "order")


@dataclass(frozen=True)
class SlideGraphs:
    """The k-nearest-neighbour graph of a slide, when asked for.

    Args:
        paths: feature file by slide id.
        neighbours: k.
        folder: where graphs are kept: read where they are there, written where not; None keeps nothing.
    """

    paths: Mapping[str, Path]
    neighbours: int = 8
    folder: Path | None = None

    def __call__(self, slide_id: str, rows: npt.NDArray[np.int64] | None = None) -> Edges:
        """The graph of a slide, or of some of its patches, which is another one and never kept.

        Raises:
            InputError: no coordinates, or a kept graph that is broken or was made of something else.
        """
        path = self.paths[slide_id]
        coords, _ = read_coords(path)
        if coords is None:
            raise InputError(no_coords(path))
        if rows is not None or self.folder is None:
            return knn(coords if rows is None else coords[rows], self.neighbours)
        kept = self.folder / f"{slide_id}.h5"
        digest = hashlib.blake2b(np.ascontiguousarray(coords).tobytes(), digest_size=16).hexdigest()
        if kept.is_file():
            return _read(kept, self.neighbours, digest)
        edges = knn(coords, self.neighbours)
        make_folder(self.folder)
        with write_hdf5(kept) as file:
            for name in _LISTS:
                file.create_dataset(name, data=getattr(edges, name).numpy())
            file.attrs.update({"neighbours": self.neighbours, "coords": digest})
        return edges


def no_coords(path: Path) -> str:
    """What is said of a feature file without coordinates, where a graph is wanted."""
    return (
        f"{path}: expected coordinates (N, 2) for the graph of patches, got none; extract features with coordinates, "
        "or choose an encoder without graph (model.encoder=mlp)"
    )


def _read(path: Path, neighbours: int, digest: str) -> Edges:
    made: dict[str, Any] = {}
    try:
        with h5py.File(path) as file:
            lists = [torch.from_numpy(file[name][:].astype(np.int32)) for name in _LISTS]
            made = dict(file.attrs)
        offsets, sources, order = lists
        sizes_fit = len(order) == len(offsets) - 1 and int(offsets[-1]) == len(sources)
        inside = all(len(t) == 0 or (int(t.min()) >= 0 and int(t.max()) < len(order)) for t in (sources, order))
        if not sizes_fit or not inside or int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
            raise ValueError("lists that don't fit one another")
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(
            f"{path}: expected a graph of momkd, got one that does not read ({one_line(error)}); remove it"
        ) from error
    if made.get("neighbours") != neighbours or made.get("coords") != digest:
        what = "the coordinates" if made.get("neighbours") == neighbours else f"{neighbours} neighbours"
        raise InputError(
            f"{path}: expected a graph of {what} of this slide, got another one; remove it to make it anew"
        )
    return from_lists(offsets, sources, order)

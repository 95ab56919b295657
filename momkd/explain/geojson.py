"""Patches of a slide as GeoJSON that QuPath opens: tiles with measurements, coloured by their rank of attention.

QuPath counts pixels of the full resolution from the upper left corner, as the coordinates of features do. It reads
`objectType`, a `classification` of name and color (both are needed), and `measurements`, which are numbers alone.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from momkd.data.atomic import atomic_write
from momkd.explain.look import Integers, SlideView
from momkd.plots import percentile_rank

_BINS = ((1, "top 1 %"), (5, "top 5 %"), (10, "top 10 %"), (25, "top 25 %"), (50, "top 50 %"), (100, "lower half"))


def write_geojson(
    path: Path,
    view: SlideView,
    coords: Integers,
    *,
    patch_size: float,
    share: float,
    namespace: uuid.UUID,
    names: Sequence[str] = (),
    slots: int = 1,
) -> int:
    """Writes one Feature a patch, highest attention first, one a line.

    Args:
        path: the file, whole or not at all.
        view: the slide.
        coords: (N, 2) upper left corners in level-0 pixels.
        patch_size: side of a patch in level-0 pixels.
        share: of the patches that are written: those of the highest attention, rounded up.
        namespace: ids of patches are made from it, the slide and the row, so they are the same each time.
        names: of the P prototypes, where `view.near` is there.
        slots: K, prototypes a class.

    Returns:
        How many patches were written.
    """
    count = math.ceil(share * len(view.attention))
    rows = np.argsort(-view.attention, kind="stable")[:count]
    rank = 100 * percentile_rank(view.attention)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for number, feature in enumerate(_features(view, rows, rank, coords, patch_size, namespace, names, slots)):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(feature, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
        file.write("\n]}\n")
    return count


def _features(
    view: SlideView,
    rows: Integers,
    rank: Any,
    coords: Integers,
    patch_size: float,
    namespace: uuid.UUID,
    names: Sequence[str],
    slots: int,
) -> Iterator[dict[str, Any]]:
    classes = [{"name": f"Attention {name}", "color": _colour(most)} for most, name in _BINS]
    side = int(patch_size) if float(patch_size).is_integer() else float(patch_size)
    for row in rows.tolist():
        x, y = coords[row].tolist()
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        measurements = {"Attention": _short(view.attention[row]), "Attention percentile": _short(rank[row])}
        properties: dict[str, Any] = {"objectType": "tile"}
        if view.near is not None:
            nearest = int(view.near.prototype[row])
            properties["name"] = names[nearest]
            measurements["Nearest prototype: class"] = nearest // slots
            measurements["Nearest prototype: slot"] = nearest % slots
            measurements["Nearest prototype: cosine"] = _short(view.near.cosine[row])
        bin_ = next(i for i, (most, _) in enumerate(_BINS) if rank[row] >= 100 - most)
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(namespace, f"{view.slide_id}/{row}")),
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {**properties, "classification": classes[bin_], "measurements": measurements},
        }


def _colour(most: int) -> list[int]:
    """As the map colours the middle of a bin: red, green, blue of 0 to 255."""
    lower = max((m for m, _ in _BINS if m < most), default=0)
    return [round(255 * part) for part in colormaps["viridis"](1 - (most + lower) / 200)[:3]]


def _short(value: float) -> float:
    return float(f"{value:.6g}")

"""Which slides are shown, and their maps."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from momkd.data.raw import check_id
from momkd.explain.geojson import write_geojson
from momkd.explain.index import SlideCard
from momkd.explain.look import SlideView, attention_shares
from momkd.explain.view import View
from momkd.plots import plot_attention

_NAMED, _LEAST = 3, 0.01  # prototypes that a slide's card names, and the least share of attention that is named


def map_slides(view: View, table: pd.DataFrame, folder: Path, step: Callable[[], None]) -> list[SlideCard]:
    """Looks again at the slides that are shown, each a batch, and writes their maps into `folder`/maps.

    Args:
        table: a row a slide: slide_id, patches, prob_*, predicted, label, part.
        step: called after each slide.
    """
    (folder / "maps").mkdir()
    ids = uuid.uuid5(uuid.NAMESPACE_OID, _digest(view.run.fold(view.fold) / "model.safetensors"))
    number = {slide: row for row, slide in enumerate(view.loader.slide_ids)}
    rows = table.loc[choose(table, view.classes, view.options.limit)].to_dict("records")
    cards = []
    for row, slide in zip(rows, view.look([[number[row["slide_id"]]] for row in rows]), strict=True):
        told: dict[str, Any] = {name: row[name] for name in ("slide_id", "patches", "predicted", "label", "part")}
        if slide.near is not None:
            shares = attention_shares(slide, len(view.names))
            best = [int(p) for p in np.argsort(-shares, kind="stable")[:_NAMED] if shares[p] >= _LEAST]
            told["nearest"] = [(view.names[p], float(shares[p])) for p in best]
        cards.append(SlideCard(probs=slide.probs, **told, **_map(view, slide, folder, ids)))
        step()
    return cards


def choose(table: pd.DataFrame, classes: Sequence[str], limit: int) -> list[int]:
    """Rows of the slides to show: the most certain of every predicted class in turn."""
    probs = table[[f"prob_{name}" for name in classes]].to_numpy()
    certain = pd.Series(probs[np.arange(len(table)), table["predicted"]], index=table.index)
    turn = certain.groupby(table["predicted"]).rank(method="first", ascending=False)
    order = pd.DataFrame({"turn": turn, "predicted": table["predicted"]}).sort_values(["turn", "predicted"])
    return [int(row) for row in order.index[:limit]]


def _map(view: View, slide: SlideView, folder: Path, ids: uuid.UUID) -> dict[str, Any]:
    """The map of a slide and its GeoJSON, or why there are none."""
    name, source = slide.slide_id, view.cohort.source
    coords, size, pixels = view.located(name)
    if coords is None:
        return {"missing": "No map: its features hold no coordinates."}
    if size is None:
        return {"missing": "No map: its features hold no patch_size_level0; give --patch-size."}
    path = folder / "maps" / check_id(name, source.name(name))
    picture, geojson = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.geojson")
    plot_attention(coords, slide.attention, picture, patch_size=size)
    if not pixels:  # QuPath would show it elsewhere
        return {"map": picture}
    written = write_geojson(
        geojson,
        slide,
        coords,
        patch_size=size,
        share=view.options.top,
        namespace=ids,
        names=view.names,
        slots=view.slots,
    )
    return {"map": picture, "geojson": f"maps/{geojson.name}", "written": written}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

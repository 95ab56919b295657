"""The prototypes of a memory: how much each is used, and the patches that lie nearest to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from momkd.bootstrap import Floats
from momkd.data.atomic import write_csv
from momkd.explain.index import Memory
from momkd.explain.look import NearestPatches, Shares
from momkd.explain.thumbnails import SlideImages
from momkd.explain.view import View
from momkd.plots import plot_prototypes, plot_slots


def show_memory(
    view: View,
    table: pd.DataFrame,
    nearest: NearestPatches,
    shares: Shares,
    pooled: Floats,
    images: SlideImages | None,
    folder: Path,
) -> Memory:
    """Writes slots.csv, prototypes.csv, their figures, and thumbnails where there are images.

    Args:
        table: a row a slide, in the order in which `nearest` and `shares` saw them.
        pooled: (n, S) projections of the slides.
    """
    assert view.prototypes is not None
    assert view.model.memory is not None
    usage = view.model.memory.usage.detach().double().cpu().numpy()  # (C, K)
    patches, attention = (each / shares.slides for each in (shares.patches, shares.attention))  # (P,)
    slots = pd.DataFrame(
        {
            "class": np.repeat(view.classes, view.slots),
            "slot": np.tile(np.arange(view.slots), len(view.classes)),
            "usage": usage.ravel(),
            "patch_share": patches,
            "attention_share": attention,
        }
    )
    write_csv(folder / "slots.csv", slots)
    near = _nearest_table(view, table, nearest)
    _locate(view, near, images, folder)
    write_csv(folder / "prototypes.csv", near)
    each = (patches.reshape(usage.shape), attention.reshape(usage.shape))
    bars = plot_slots(usage, *each, view.classes, folder / "slots.png")
    colour = table["label"].where(table["label"] >= 0, table["predicted"])
    drawn = plot_prototypes(view.prototypes.numpy(), usage, pooled, colour, view.classes, folder / "prototypes.png")
    return Memory(bars, drawn, slots, near)


def _nearest_table(view: View, table: pd.DataFrame, found: NearestPatches) -> pd.DataFrame:
    """A row a patch: class, slot, rank, slide_id, row, x, y, cosine, thumbnail; places are not known yet."""
    prototype, rank = np.nonzero(np.isfinite(found.cosines))
    unknown = pd.array([pd.NA] * len(rank), "Int64")
    located: pd.DataFrame = pd.DataFrame(
        {
            "class": np.array(view.classes)[prototype // view.slots],
            "slot": prototype % view.slots,
            "rank": rank + 1,
            "slide_id": table["slide_id"].to_numpy()[found.slides[prototype, rank]],
            "row": found.rows[prototype, rank],
            "x": unknown,
            "y": unknown.copy(),
            "cosine": found.cosines[prototype, rank],
            "thumbnail": "",
        }
    )
    return located


def _locate(view: View, near: pd.DataFrame, images: SlideImages | None, folder: Path) -> None:
    """Fills in coordinates and thumbnails, slide by slide, so that each is opened once."""
    if images is not None:
        (folder / "thumbnails").mkdir()
    without = []
    for name, rows in near.groupby("slide_id", sort=False):
        slide_id = str(name)
        coords, size, pixels = view.located(slide_id)
        if coords is not None:
            near.loc[rows.index, ["x", "y"]] = coords[rows["row"]]
        if images is None:
            continue
        cut: dict[int, str] = {}
        if coords is not None and size is not None and pixels:
            places = {int(str(number)): coords[row] for number, row in rows["row"].items()}
            cut = _cut(images, slide_id, places, size, folder)
        for number, path in cut.items():
            near.loc[number, "thumbnail"] = path
        without += [] if cut else [slide_id]
    if without:
        listed = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        view.notes.append(f"No image in --slides shows the patches of {len(without)} slides ({listed}).")


def _cut(
    images: SlideImages, slide_id: str, places: dict[int, np.ndarray], size: float, folder: Path
) -> dict[int, str]:
    """Thumbnails of patches of one slide: paths beside the page, by the number of the patch."""
    made = {}
    with images.open(slide_id) as image:
        for number, (x, y) in places.items() if image is not None else ():
            path = f"thumbnails/{number}.jpg"
            if images.cut(image, int(x), int(y), size, folder / path):
                made[number] = path
    return made

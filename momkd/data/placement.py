"""Where patches lie, in level-0 pixels: what the attributes of a feature file say of its coordinates.

| written by | coordinates | size of a patch |
|---|---|---|
| TRIDENT | level-0 pixels | `patch_size_level0` |
| CLAM | level-0 pixels | `patch_size` pixels of level `patch_level`, each `downsample` level-0 pixels wide |
| STAMP | µm (`unit`) | `tile_size_um` µm |

Coordinates in µm become pixels where the file also holds the µm of a level-0 pixel (`mpp_level0`, or `mpp` where it
is not that of the tiles) or `patch_size_level0`. Where it holds neither they stay a grid of the same form, in
hundredths of a µm, and the attribute `coords_unit` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from momkd.errors import InputError

HUNDREDTHS = "0.01 um"  # attribute `coords_unit` of coordinates that could not become pixels
TEXTS = ("unit",)  # attributes that are texts and matter here
_PIXELS = ("", "px", "pixel", "pixels", "level0", "level 0", "level-0 pixels")
_MICROMETRES = {
    **dict.fromkeys(("um", "µm", "\u03bcm", "micron", "microns", "micrometer", "micrometers", "micrometre"), 1.0),
    **{"micrometres": 1.0, "nm": 1e-3, "mm": 1e3},
}
_MPP_LEVEL0 = ("mpp_level0", "level0_mpp", "slide_mpp", "base_mpp")
_LEVELS = (2, 4, 8, 16, 32, 64)  # the levels of a slide are this much coarser
_MANY = 16  # patches from which a grid shows
_SAME = 0.02  # two sizes that differ by less are one, rounded
_APART = 1.96  # of patches and the space between them, in patches, from which a grid is told of
_WIDE = "patches lie apart, or the patch size is of another level"


@dataclass(frozen=True)
class Placement:
    """How the coordinates of a file are read.

    Attributes:
        attrs: attributes of the file, with `patch_size_level0` where it follows from others.
        scale: level-0 pixels, or hundredths of a µm, of one unit of the file; None for pixels.
        note: what was converted, or could not be, in words; "" for nothing.
        certain: the file says that the size of a patch is in level-0 pixels, and nothing in it says otherwise.
    """

    attrs: dict[str, Any]
    scale: float | None = None
    note: str = ""
    certain: bool = False


def placement(name: str, attrs: Mapping[str, Any]) -> Placement:
    """Return how coordinates with these attributes are read.

    Raises:
        InputError: a unit that is not known.
    """
    size, tile = _number(attrs, "patch_size_level0"), _number(attrs, "tile_size_um")
    unit = attrs.get("unit", "")
    if unit is None and tile is not None:
        unit = ""  # a text that does not read, and does not matter
    told = unit.strip().lower() if isinstance(unit, str) else None
    if told is None or (told not in _PIXELS and told not in _MICROMETRES):
        came = "a text that does not read" if unit is None else repr(str(unit)[:40])
        raise InputError(f"{name}: unit: expected px or um, got {came}; write coordinates in level-0 pixels")
    if tile is None and told in _MICROMETRES:
        tile = _number(attrs, "tile_size")
    kept = {key: value for key, value in attrs.items() if key != "unit"}
    if told in _MICROMETRES or (told == "" and tile is not None and size is None):
        return _of_micrometres(kept, _MICROMETRES.get(told, 1.0), tile, size)
    if size is not None or "patch_size_level0" in attrs:
        return Placement(kept, certain=size is not None and _agree(kept, size))
    return _of_a_level(kept)


def check_spacing(name: str, coords: npt.NDArray[np.int64], placed: Placement) -> str:
    """Raise InputError where the grid of patches contradicts the size that the attributes give them.

    Patches may overlap, lie apart or be few. A dense grid whose spacing is 2, 4, 8, ... patches wide is refused where
    the size may be of another level of the slide: it follows from other attributes than those of level 0, or they
    contradict one another. So is one that is not as `overlap` says by such a factor; a negative overlap is the space
    between patches. An attribute `stride_level0` says that a wide grid is meant.

    Args:
        name: of the slide, for the message.
        coords: (N, 2) level-0 pixels.
        placed: what the attributes say.

    Returns:
        A note, of a wide grid that is not refused and that nothing explains; "" for none.
    """
    attrs = placed.attrs
    size, stride = _number(attrs, "patch_size_level0"), _number(attrs, "stride_level0")
    if size is None or stride is not None or len(coords) < _MANY:
        return ""
    side, overlap = _number(attrs, "patch_size"), attrs.get("overlap")
    says = isinstance(overlap, int | float) and side is not None and -1e12 <= overlap < side
    wanted = size * (1 - overlap / side) if says and side is not None and overlap is not None else size
    spacing = _spacing(coords)
    if spacing is None:
        return ""
    ratio = spacing / wanted
    wide, fine = (any(_close(each, factor) for factor in _LEVELS) for each in (ratio, 1 / ratio))
    if (wide and (says or not placed.certain)) or (fine and says):
        raise InputError(
            f"{name}: coords: expected a grid of {wanted:g} level-0 pixels (patch_size_level0 = {size:g}), got one of "
            f"{spacing}: one of them is of another level; write both in level-0 pixels, or the attribute "
            "stride_level0 if the patches lie so on purpose"
        )
    if ratio < _APART:
        return ""
    return f"the grid is {spacing / size:.3g} times as wide as a patch: {_WIDE}"


def _of_micrometres(attrs: dict[str, Any], micrometres: float, tile: float | None, size: float | None) -> Placement:
    """Coordinates of which each unit is so many µm."""
    mpp = next((mpp for key in _MPP_LEVEL0 if (mpp := _number(attrs, key)) is not None), None)
    if mpp is None and (given := _number(attrs, "mpp")) is not None:
        pixels = _number(attrs, "tile_size_px")
        # Where it is that of the tiles, it may be that of level 0, or not.
        mpp = None if tile and pixels and _close(given, tile / pixels) else given
    if mpp is None and tile and size:
        mpp = tile / size
    if mpp is not None:
        found = {} if size is not None or tile is None else {"patch_size_level0": tile / mpp}
        return Placement(attrs | found, micrometres / mpp, f"coordinates in µm became level-0 pixels of {mpp:.4g} µm")
    unknown: dict[str, Any] = {"coords_unit": HUNDREDTHS} | ({} if tile is None else {"patch_size_level0": tile * 100})
    return Placement(
        attrs | unknown,
        micrometres * 100,
        "coordinates are in µm and nothing says how many µm a level-0 pixel has (attribute mpp_level0), so they are "
        "kept in hundredths of a µm: graphs are the same, maps don't fit an image of the slide",
    )


def _of_a_level(attrs: dict[str, Any]) -> Placement:
    """The size of a patch, where it is given in pixels of another level."""
    side, down = _number(attrs, "patch_size"), 1.0 if attrs.get("patch_level") == 0 else _downsample(attrs)
    if side is None or down is None or "patch_level" not in attrs:
        return Placement(attrs)
    size = side * down
    size = int(size) if size.is_integer() else size
    note = f"patches of {side:g} pixels of level {attrs['patch_level']} are {size:g} level-0 pixels wide"
    certain = down == 1 and _agree(attrs, size)
    return Placement(attrs | {"patch_size_level0": size}, note="" if down == 1 else note, certain=certain)


def _agree(attrs: Mapping[str, Any], size: float) -> bool:
    """Whether nothing else among the attributes gives patches another size than this one, in level-0 pixels."""
    side, level, down = _number(attrs, "patch_size"), attrs.get("patch_level"), _downsample(attrs)
    if level == 0:
        if down is not None and not _close(down, 1):
            return False
        down = 1.0
    if side is None:
        return True
    if level is not None and down is None:
        return not _close(side, size)  # of another level it is another number
    highest, wanted = _number(attrs, "level0_magnification"), _number(attrs, "target_magnification")
    times = [down] if down is not None else []
    times += [highest / wanted] if highest is not None and wanted is not None else []
    return all(_close(side * each, size) for each in times)


def _downsample(attrs: Mapping[str, Any]) -> float | None:
    """How many level-0 pixels a pixel of the level is wide."""
    down = attrs.get("downsample")
    return _number({"downsample": down[0] if isinstance(down, list | tuple) and down else down}, "downsample")


def _number(attrs: Mapping[str, Any], key: str) -> float | None:
    """An attribute that is a number such as sizes have."""
    value = attrs.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e12:
        return None
    return float(value)


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * other


def _spacing(coords: npt.NDArray[np.int64]) -> int | None:
    """The distance of neighbours in a row or column that most patches have, if it is the smallest there is."""
    steps = []
    for along in (0, 1):
        order = np.lexsort((coords[:, along], coords[:, 1 - along]))
        line, place = coords[order, 1 - along], coords[order, along]
        apart = np.diff(place)[line[1:] == line[:-1]]
        steps.append(apart[apart > 0])
    every = np.concatenate(steps)
    if not len(every):
        return None
    least = int(every.min())
    return least if (every <= least * (1 + _SAME) + 1).sum() >= len(coords) / 2 else None

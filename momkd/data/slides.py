"""Feature files of slides: TRIDENT and CLAM HDF5, tensors (.pt) and arrays (.npy).

Whatever the format, a slide reads as features (N, L) float16 or float32 and coordinates (N, 2) int64, or as an
`InputError` that names the file, what was expected and what came. Nothing that is wrong is repaired or replaced.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from momkd.data.atomic import atomic_write
from momkd.data.files import existing_folder
from momkd.data.placement import Placement, check_spacing, placement
from momkd.data.raw import SUFFIXES, Array, Raw, all_finite, open_raw
from momkd.errors import InputError

_FOLDERS = 100_000  # of a tree of feature files
_LOOKED_AT = 1000  # folders beside feature files, to count what lies in them
_FURTHEST = 2**52  # of coordinates: their differences are exact in float64
_BLOCK = 1 << 22  # values that one step of the finite check looks at, to bound its memory


@dataclass(frozen=True, eq=False)
class Slide:
    """One bag: the patches of a slide.

    Args:
        slide_id: the file name without its last ending.
        features: (N, L) float16 or float32, finite; N may be 0.
        coords: (N, 2) int64, x and y of the top-left corner in level-0 pixels (may be negative), or None. Where the
            attribute `coords_unit` is there, in that unit instead; see `momkd.data.placement`.
        attrs: attributes of the file, its features and its coordinates (`patch_size_level0`, ...): numbers, and texts
            of fixed length. `patch_size_level0` is there where it follows from others.
        notes: what was found or converted, a line each.
    """

    slide_id: str
    path: Path
    features: Array  # (N, L)
    coords: npt.NDArray[np.int64] | None = None  # (N, 2)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Header(NamedTuple):
    """What a feature file says before values are read: (N, L), the type once read, and notes as of `Slide`."""

    patches: int
    width: int
    dtype: str  # "float16" or "float32"
    has_coords: bool
    notes: tuple[str, ...]


def find_slides(directory: Path | str, *, recursive: bool | None = None) -> dict[str, Path]:
    """The feature files of a folder by slide id, sorted; hidden files and folders and other endings are left out.

    Args:
        directory: the folder.
        recursive: also look into its folders, such as one a patient, at any depth; links are followed, each folder is
            visited once. None does so where the folder itself holds no feature file.

    Raises:
        InputError: no such folder, no feature file in it, two files of one slide, or a folder that cannot be read.
    """
    folder = existing_folder(directory, "a folder of feature files", "check --features")
    files = _files_of(folder, nested=False) if not recursive else []
    if not files and recursive is not False:
        files = _files_of(folder, nested=True)
    found: dict[str, Path] = {}
    for path in files:
        if path.stem in found:
            pair = [str(each.relative_to(folder)) for each in (found[path.stem], path)]
            remedy = "remove one of them" if path.parent == folder else "give the folder of one of them, or rename one"
            raise InputError(f"{folder}: expected one file a slide, got {pair[0]} and {pair[1]}; {remedy}")
        found[path.stem] = path
    if not found:
        where = "" if recursive is False else ", nor in its folders"
        raise InputError(f"{folder}: expected feature files ({', '.join(SUFFIXES)}), got none{where}; check --features")
    return dict(sorted(found.items()))


def files_below(folder: Path, found: Mapping[str, Path]) -> tuple[int, bool]:
    """How many feature files of slides that are not among those found lie in the folders of a folder.

    Returns:
        Their number, and whether that is all: not more than some folders are looked at.
    """
    files, whole = _walk(folder, nested=True, most=_LOOKED_AT, strict=False)
    return len({path.stem for path in files} - found.keys()), whole


def _files_of(folder: Path, *, nested: bool) -> list[Path]:
    """Feature files, sorted, of a folder or of all folders in it."""
    return _walk(folder, nested=nested, most=_FOLDERS, strict=True)[0]


def _walk(folder: Path, *, nested: bool, most: int, strict: bool) -> tuple[list[Path], bool]:
    """Feature files, sorted, and whether these are all.

    Where it is not strict, folders that cannot be read, and those after so many, are left out; else they are errors.
    """
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()  # folders, so that links which lead back end
    above = Path(os.path.realpath(folder)).parents
    waiting, links, whole = [folder], list[Path](), True
    while waiting or links:
        place = waiting.pop() if waiting else links.pop()  # a folder goes by its own name, if it has one here
        if len(seen) >= most:
            if not strict:
                return sorted(files), False
            raise InputError(f"{folder}: expected feature files in at most {most} folders, got more; check --features")
        try:
            state = place.stat()
            entries = [] if (state.st_dev, state.st_ino) in seen else sorted(os.scandir(place), key=lambda e: e.name)
        except OSError as error:
            if not strict:
                whole = False
                continue
            raise InputError(f"{place}: expected a folder that can be read, got {error.strerror}; check it") from error
        seen.add((state.st_dev, state.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            with contextlib.suppress(OSError):  # a link to itself
                if Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file():
                    files.append(place / entry.name)
                elif nested and entry.is_symlink():
                    if entry.is_dir() and Path(os.path.realpath(entry.path)) not in above:
                        links.append(place / entry.name)
                elif nested and entry.is_dir():
                    waiting.append(place / entry.name)
    return sorted(files), whole


def read_slide(path: Path | str, *, width: int | None = None, with_coords: bool = True) -> Slide:
    """Reads and checks one feature file.

    Args:
        path: .h5 or .hdf5 (datasets `features` and `coords`), .pt (a tensor, or a dict with these keys) or .npy.
            Where there is no `features`, `feats`, `embeddings` or `x` does as well, or the only floats of two
            dimensions. Features are (N, L) or (1, N, L); an empty slide may be (0,). float64 and bfloat16 become
            float32.
        width: the L that is expected; None takes any.
        with_coords: also read coordinates, where the file has them.

    Returns:
        The slide; its features own their memory. A slide of no patches has shape (0, width), which is not an error.

    Raises:
        InputError: missing, broken or foreign file, missing dataset, wrong shape, type or width, a value that is not
            finite, coordinates that don't fit the features, or whose grid contradicts the size of patches.
    """
    path = Path(path)
    with open_raw(path) as raw:
        n, length = _checked_shape(path, raw, width)
        features = raw.read_features().reshape(n, length)
        features = _as_float(features)  # (N, L)
        _check_finite(path, features)
        coords, attrs, notes = None, raw.attrs, tuple[str, ...]()
        if with_coords and raw.has_coords:
            coords, attrs, notes = _checked_coords(path, raw, n)
        return Slide(path.stem, path, features, coords, attrs, tuple(filter(None, (raw.note, *notes))))


def read_blocks(path: Path | str, rows: int, *, width: int | None = None) -> Iterator[Array]:
    """Reads the features of a slide `rows` at a time, (n, L) each; checked as by `read_slide`, which holds them all.

    Raises:
        InputError: as `read_slide`, apart from coordinates; of values when their block is reached.
    """
    path = Path(path)
    with open_raw(path) as raw:
        n, length = _checked_shape(path, raw, width)
        for first in range(0, n, rows):
            block = _as_float(raw.read_features(first, min(first + rows, n)).reshape(-1, length))
            _check_finite(path, block, first)
            yield block


def slide_shape(path: Path | str) -> tuple[int, int]:
    """(N, L) of a feature file, from its header: type and shape are checked, values are not read.

    L is 0 where an empty slide does not say its width.

    Raises:
        InputError: as `read_slide`, apart from width, values and coordinates; their number is checked.
    """
    header = slide_header(path)
    return header.patches, header.width


def slide_header(path: Path | str) -> Header:
    """As `slide_shape`, with the type that the features will have, whether there are coordinates, and notes."""
    path = Path(path)
    with open_raw(path) as raw:
        n, length = _checked_shape(path, raw, None)
        dtype = "float16" if raw.dtype.lstrip("<>=") in ("float16", "f2") else "float32"
        note = ""
        if raw.has_coords:
            with contextlib.suppress(InputError):  # it is raised where coordinates are wanted
                note = placement(str(path), raw.attrs).note
        return Header(n, length, dtype, raw.has_coords, tuple(filter(None, (raw.note, note))))


def read_coords(path: Path | str) -> tuple[npt.NDArray[np.int64] | None, dict[str, Any]]:
    """Coordinates (N, 2) of a feature file, or None where it has none, and its attributes; features are not read.

    Raises:
        InputError: as `read_slide`, apart from the values of the features.
    """
    return read_places(path)[:2]


def read_places(
    path: Path | str,
) -> tuple[npt.NDArray[np.int64] | None, dict[str, Any], tuple[str, ...]]:
    """As `read_coords`, and notes of what was found or converted in them.

    Raises:
        InputError: as `read_coords`.
    """
    path = Path(path)
    with open_raw(path) as raw:
        n, _ = _checked_shape(path, raw, None)
        return _checked_coords(path, raw, n) if raw.has_coords else (None, raw.attrs, ())


def slide_attributes(path: Path | str) -> dict[str, Any]:
    """The attributes of a feature file as `read_coords` gives them, without reading values."""
    path = Path(path)
    with open_raw(path) as raw:
        if raw.has_coords:
            with contextlib.suppress(InputError):  # it is raised where coordinates are wanted
                return placement(str(path), raw.attrs).attrs
        return raw.attrs


def write_trident(
    path: Path | str,
    features: Array,
    coords: npt.ArrayLike,
    *,
    patch_size_level0: int,
    encoder: str,
    row_chunks: bool = False,
    **attrs: Any,
) -> None:
    """Writes a slide in TRIDENT's HDF5 layout, whole or not at all.

    Args:
        features: (N, L) of any float type.
        coords: (N, 2) integers, level-0 pixels.
        patch_size_level0: side of a patch in level-0 pixels.
        encoder: name of the feature extractor.
        row_chunks: chunks of one row, as TRIDENT itself writes; the default is contiguous and reads faster.
        attrs: further attributes of `coords`, such as target_magnification.

    Raises:
        ValueError: shapes don't fit.
        InputError: the file cannot be written.
    """
    path, points = Path(path), np.asarray(coords, dtype=np.int64)
    if features.ndim != 2 or points.shape != (len(features), 2):
        raise ValueError(f"features, coords: expected (N, L) and (N, 2), got {features.shape} and {points.shape}")

    def layout(width: int) -> dict[str, Any]:
        return {"chunks": (1, width), "maxshape": (None, width)} if row_chunks else {}

    with write_hdf5(path) as file:
        rows = file.create_dataset("features", data=features, **layout(features.shape[1]))
        rows.attrs.update({"encoder": encoder, "name": path.stem})
        places = file.create_dataset("coords", data=points, **layout(2))
        places.attrs.update({"patch_size_level0": patch_size_level0, "name": path.stem, **attrs})


@contextlib.contextmanager
def write_hdf5(path: Path | str) -> Iterator[h5py.File]:
    """Yields an HDF5 file to fill, which becomes `path`, whole or not at all. It lies in memory until then.

    HDF5 crashes when the process ends, if a disk that filled up kept it from closing a file of its own.
    """
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        yield file
    with atomic_write(path) as temporary:
        temporary.write_bytes(image.getbuffer())


# -- checks ------------------------------------------------------------------------------------------------------


def _checked_shape(path: Path, raw: Raw, width: int | None) -> tuple[int, int]:
    """(N, L) of the features; (0,) and the like are (0, width)."""
    shape = raw.shape[1:] if len(raw.shape) == 3 and raw.shape[0] == 1 else raw.shape
    if raw.kind != "f":
        raise InputError(
            f"{path}: features: expected floating point, got {raw.dtype}; write the encoder's output, not codes or ids"
        )
    if shape in ((0,), (0, 0)):
        _check_rows(path, raw, 0)
        return 0, width or 0
    if len(shape) != 2:
        raise InputError(
            f"{path}: features: expected (N, L) or (1, N, L), got {raw.shape}; one row a patch, one file a slide"
        )
    n, length = shape
    if length == 0:
        raise InputError(f"{path}: features: expected (N, L) with L > 0, got {raw.shape}; extract the features again")
    if width is not None and length != width:
        raise InputError(
            f"{path}: features: expected width {width}, got {length}; all slides need features of one encoder"
        )
    _check_rows(path, raw, n)
    return n, length


def _check_rows(path: Path, raw: Raw, n: int) -> None:
    """Coordinates of another number of patches belong to other features, whether they are used or not."""
    shape = raw.coords_shape
    if shape is None:
        return
    rows = (shape[1:] if len(shape) == 3 and shape[0] == 1 else shape)[:1]
    if rows != (n,):
        raise InputError(
            f"{path}: coords: expected ({n}, 2), one row a patch, got {shape}; extract the features of this slide again"
        )


def _as_float(features: Array) -> Array:
    """float16 and float32 as they are, all else as float32; native byte order, rows one after the other."""
    keep = features.dtype.itemsize in (2, 4)
    wanted = features.dtype.newbyteorder("=") if keep else np.dtype(np.float32)
    with np.errstate(over="ignore"):  # what overflows is found by the finite check
        return np.ascontiguousarray(features, dtype=wanted)


def _check_finite(path: Path, features: Array, above: int = 0) -> None:
    """Raises for values that are not finite; `above` rows of the slide came before."""
    if features.size == 0:
        return
    step = max(1, _BLOCK // features.shape[1])
    count, first = 0, -1
    for start in range(0, len(features), step):
        block = features[start : start + step]
        if all_finite(block):
            continue
        bad = ~np.isfinite(block)
        count += int(bad.sum())
        first = above + start + int(bad.any(1).argmax()) if first < 0 else first
    if count:
        raise InputError(
            f"{path}: features: expected finite values, got {count} NaN or infinite, the first in row {first}; "
            "extract the features of this slide again, in float32 if float16 overflowed"
        )


def _checked_coords(path: Path, raw: Raw, n: int) -> tuple[npt.NDArray[np.int64], dict[str, Any], tuple[str, ...]]:
    """Coordinates (N, 2), the attributes, and what was found or converted."""
    coords = raw.read_coords()
    given = coords.shape
    if coords.ndim == 3 and len(coords) == 1:
        coords = coords[0]
    if n == 0 and coords.size == 0:
        return np.zeros((0, 2), np.int64), raw.attrs, ()
    if coords.shape != (n, 2):
        raise InputError(
            f"{path}: coords: expected ({n}, 2), one row a patch, got {given}; extract the features of this slide again"
        )
    placed = placement(str(path), raw.attrs)
    points = _whole(path, coords, placed)
    notes = placed.note, check_spacing(str(path), points, placed)
    return points, placed.attrs, tuple(filter(None, notes))


def _whole(path: Path, coords: Array, placed: Placement) -> npt.NDArray[np.int64]:
    """Coordinates as integers, once they are numbers of a slide."""
    if coords.dtype.kind not in "fiu":
        raise InputError(f"{path}: coords: expected whole level-0 pixels, got {coords.dtype}; write integers")
    if placed.scale is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            coords = np.rint(coords.astype(np.float64) * placed.scale)
    if coords.dtype.kind == "f" and not (coords == np.rint(coords)).all():
        raise InputError(
            f"{path}: coords: expected whole level-0 pixels, got fractions in {coords.dtype}; write integers, or the "
            "attribute unit = um"
        )
    # Both ends: the absolute value of the least int64 is negative.
    if not ((coords < _FURTHEST) & (coords > (0 if coords.dtype.kind == "u" else -_FURTHEST) - 1)).all():
        far = max((coords.min(), coords.max()), key=lambda end: abs(float(end)))
        raise InputError(f"{path}: coords: expected level-0 pixels, got values up to {far}; extract the patches again")
    return coords.astype(np.int64)

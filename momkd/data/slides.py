"""Feature files of slides: TRIDENT and CLAM HDF5, tensors (.pt) and arrays (.npy).

Whatever the format, a slide reads as features (N, L) float16 or float32 and coordinates (N, 2) int64, or as an
`InputError` that names the file, what was expected and what came. Nothing that is wrong is repaired or replaced.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from momkd.data.atomic import atomic_write
from momkd.data.raw import SUFFIXES, Array, Raw, all_finite, open_raw
from momkd.errors import InputError

_BLOCK = 1 << 22  # values that one step of the finite check looks at, to bound its memory


@dataclass(frozen=True, eq=False)
class Slide:
    """One bag: the patches of a slide.

    Args:
        slide_id: the file name without its last ending.
        features: (N, L) float16 or float32, finite; N may be 0.
        coords: (N, 2) int64, x and y of the top-left corner in level-0 pixels (may be negative), or None.
        attrs: attributes of the file, its features and its coordinates (`patch_size_level0`, ...): numbers, and texts
            of fixed length.
    """

    slide_id: str
    path: Path
    features: Array  # (N, L)
    coords: npt.NDArray[np.int64] | None = None  # (N, 2)
    attrs: Mapping[str, Any] = field(default_factory=dict)


def find_slides(directory: Path | str) -> dict[str, Path]:
    """The feature files of a folder by slide id, sorted; hidden files and other endings are left out.

    Raises:
        InputError: no such folder, no feature file in it, or two files of one slide.
    """
    folder = Path(directory)
    if not folder.is_dir():
        came = "a file" if folder.exists() else "nothing there"
        raise InputError(f"{folder}: expected a folder of feature files, got {came}; check --features")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in found:
            raise InputError(
                f"{folder}: expected one file a slide, got {found[path.stem].name} and {path.name}; remove one of them"
            )
        found[path.stem] = path
    if not found:
        raise InputError(f"{folder}: expected feature files ({', '.join(SUFFIXES)}), got none; {_elsewhere(folder)}")
    return dict(sorted(found.items()))


def read_slide(path: Path | str, *, width: int | None = None, with_coords: bool = True) -> Slide:
    """Reads and checks one feature file.

    Args:
        path: .h5 or .hdf5 (datasets `features` and `coords`), .pt (a tensor, or a dict with these keys) or .npy.
            Features are (N, L) or (1, N, L); an empty slide may be (0,). float64 and bfloat16 become float32.
        width: the L that is expected; None takes any.
        with_coords: also read coordinates, where the file has them.

    Returns:
        The slide; its features own their memory. A slide of no patches has shape (0, width), which is not an error.

    Raises:
        InputError: missing, broken or foreign file, missing dataset, wrong shape, type or width, a value that is not
            finite, coordinates that don't fit.
    """
    path = Path(path)
    with open_raw(path) as raw:
        n, length = _checked_shape(path, raw, width)
        features = raw.read_features().reshape(n, length)
        features = _as_float(features)  # (N, L)
        _check_finite(path, features)
        coords = _checked_coords(path, raw, n) if with_coords and raw.has_coords else None
        return Slide(path.stem, path, features, coords, raw.attrs)


def slide_shape(path: Path | str) -> tuple[int, int]:
    """(N, L) of a feature file, from its header: type and shape are checked, values are not read.

    L is 0 where an empty slide does not say its width.

    Raises:
        InputError: as `read_slide`, apart from width, values and coordinates.
    """
    return slide_header(path)[:2]


def slide_header(path: Path | str) -> tuple[int, int, str]:
    """As `slide_shape`, and the type that the features will have once read, "float16" or "float32"."""
    path = Path(path)
    with open_raw(path) as raw:
        n, length = _checked_shape(path, raw, None)
        return n, length, "float16" if raw.dtype.lstrip("<>=") in ("float16", "f2") else "float32"


def has_coords(path: Path | str) -> bool:
    """Whether a feature file says where its patches lie; nothing is read or checked."""
    with open_raw(Path(path)) as raw:
        return raw.has_coords


def read_coords(path: Path | str) -> tuple[npt.NDArray[np.int64] | None, dict[str, Any]]:
    """Coordinates (N, 2) of a feature file, or None where it has none, and its attributes; features are not read.

    Raises:
        InputError: as `read_slide`, apart from the values of the features.
    """
    path = Path(path)
    with open_raw(path) as raw:
        n, _ = _checked_shape(path, raw, None)
        return (_checked_coords(path, raw, n) if raw.has_coords else None), raw.attrs


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
    return n, length


def _as_float(features: Array) -> Array:
    """float16 and float32 as they are, all else as float32; native byte order, rows one after the other."""
    keep = features.dtype.itemsize in (2, 4)
    wanted = features.dtype.newbyteorder("=") if keep else np.dtype(np.float32)
    with np.errstate(over="ignore"):  # what overflows is found by the finite check
        return np.ascontiguousarray(features, dtype=wanted)


def _check_finite(path: Path, features: Array) -> None:
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
        first = start + int(bad.any(1).argmax()) if first < 0 else first
    if count:
        raise InputError(
            f"{path}: features: expected finite values, got {count} NaN or infinite, the first in row {first}; "
            "extract the features of this slide again, in float32 if float16 overflowed"
        )


def _checked_coords(path: Path, raw: Raw, n: int) -> npt.NDArray[np.int64]:
    coords = raw.read_coords()
    given = coords.shape
    if coords.ndim == 3 and len(coords) == 1:
        coords = coords[0]
    if n == 0 and coords.size == 0:
        return np.zeros((0, 2), np.int64)
    if coords.shape != (n, 2):
        raise InputError(
            f"{path}: coords: expected ({n}, 2), one row a patch, got {given}; extract the features of this slide again"
        )
    fractions = coords.dtype.kind == "f" and not (coords == np.rint(coords)).all()
    if fractions or coords.dtype.kind not in "fiu":
        came = f"fractions in {coords.dtype}" if fractions else str(coords.dtype)
        raise InputError(f"{path}: coords: expected whole level-0 pixels, got {came}; write integers")
    if coords.dtype.kind != "i" and not (np.abs(coords) < 2**62).all():
        raise InputError(f"{path}: coords: expected level-0 pixels, got values up to {coords.max()}; write int64")
    return coords.astype(np.int64)


def _elsewhere(folder: Path) -> str:
    """Where the files may be instead: CLAM and TRIDENT nest their folders."""
    for inner in sorted(p for p in folder.iterdir() if p.is_dir()):
        if any(p.suffix.lower() in SUFFIXES for p in inner.iterdir()):
            return f"its folder {inner.name} holds some: give {inner}"
    return "check --features"

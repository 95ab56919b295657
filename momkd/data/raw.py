"""What a feature file holds, before any check: one small reader a format, all with one interface.

HDF5 and .npy answer for their shape from the header; a .pt file is mapped, not read, where its format allows.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from momkd.errors import InputError

Array = npt.NDArray[Any]

HDF5 = (".h5", ".hdf5")
SUFFIXES = (*HDF5, ".pt", ".npy")


class Raw(ABC):
    """Features and coordinates of an open file, as they lie there."""

    shape: tuple[int, ...]
    dtype: str
    kind: str  # "f" for floating point, as in numpy
    has_coords: bool
    attrs: dict[str, Any]

    @abstractmethod
    def read_features(self) -> Array: ...

    @abstractmethod
    def read_coords(self) -> Array: ...


class _RawHdf5(Raw):
    def __init__(self, path: Path, file: h5py.File) -> None:
        self._features = self._dataset(path, file, "features")
        self._coords = self._dataset(path, file, "coords") if "coords" in file else None
        self.shape, self.kind = tuple(self._features.shape), self._features.dtype.kind
        self.dtype, self.has_coords = str(self._features.dtype), self._coords is not None
        self.attrs = {}
        for holder in (file, self._features, self._coords):
            if holder is not None:
                self.attrs.update({name: _plain(value) for name, value in holder.attrs.items()})

    @staticmethod
    def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
        item = file.get(name)
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            return item
        there: list[str] = []
        file.visititems(lambda key, value: there.append(key) if getattr(value, "shape", None) is not None else None)
        listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
        raise InputError(
            f"{path}: expected a dataset {name!r}, got {listed or 'no dataset at all'}; rename it or extract again"
        )

    def read_features(self) -> Array:
        return np.asarray(self._features[...])

    def read_coords(self) -> Array:
        assert self._coords is not None
        return np.asarray(self._coords[...])


class _RawTensor(Raw):
    def __init__(self, path: Path, value: object) -> None:
        self.attrs = {}
        coords: object = None
        if isinstance(value, dict):
            if "features" not in value:
                keys = ", ".join(map(str, list(value)[:8]))
                raise InputError(
                    f"{path}: expected a tensor or a dict with 'features', got keys {keys or '(none)'}; rename the key"
                )
            coords = value.get("coords")
            value = value["features"]
        self._features = self._dense(path, "features", value)
        self._coords = self._dense(path, "coords", coords) if coords is not None else None
        self.shape, self.dtype = tuple(self._features.shape), str(self._features.dtype).removeprefix("torch.")
        self.kind = "f" if self._features.is_floating_point() else "i"
        self.has_coords = self._coords is not None

    @staticmethod
    def _dense(path: Path, name: str, value: object) -> Tensor:
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise InputError(f"{path}: {name}: expected a dense tensor, got {_kind(value)}; save it as one tensor")
        return value.detach()

    def read_features(self) -> Array:
        keep = self._features.dtype in (torch.float16, torch.float32, torch.float64)
        # A copy, since a mapped file would be read again, or be gone, whenever the values are used.
        return self._features.to(self._features.dtype if keep else torch.float32, copy=True).numpy()

    def read_coords(self) -> Array:
        assert self._coords is not None
        return self._coords.clone().numpy()


class _RawArray(Raw):
    def __init__(self, path: Path, value: object) -> None:
        if not isinstance(value, np.ndarray):
            raise InputError(f"{path}: expected one array, got {_kind(value)}; save it with numpy.save")
        self._features = value
        self.shape, self.dtype, self.kind = value.shape, str(value.dtype), value.dtype.kind
        self.has_coords, self.attrs = False, {}

    def read_features(self) -> Array:
        return np.array(self._features)

    def read_coords(self) -> Array:
        raise NotImplementedError(".npy files hold no coordinates")


@contextlib.contextmanager
def open_raw(path: Path) -> Iterator[Raw]:
    """Opens a feature file; whatever goes wrong in the libraries until it is closed becomes one clear line."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a feature file ({', '.join(SUFFIXES)}), got {suffix or 'no ending'}")
    if not path.is_file():
        came = "a folder" if path.is_dir() else "nothing there"
        raise InputError(f"{path}: expected a feature file, got {came}; check the path")
    with contextlib.ExitStack() as stack:
        try:
            if suffix in HDF5:
                yield _RawHdf5(path, stack.enter_context(h5py.File(path, "r")))
            elif suffix == ".pt":
                yield _RawTensor(path, _load_tensor(path))
            else:
                yield _RawArray(path, np.load(path, mmap_mode="r", allow_pickle=False))
        except (InputError, MemoryError, AssertionError, NotImplementedError):
            raise
        except Exception as error:  # decoders of a foreign or damaged file raise nearly anything
            _unreadable(path, error)


def _load_tensor(path: Path) -> object:
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # the zip format; older files cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _unreadable(path: Path, error: Exception) -> NoReturn:
    suffix = path.suffix.lower()
    kind = "HDF5 file" if suffix in HDF5 else "file of tensors" if suffix == ".pt" else "NumPy array"
    if isinstance(error, PermissionError):
        raise InputError(f"{path}: expected a readable {kind}, got no permission; change its mode or owner") from error
    cause = f"{path.stat().st_size} bytes that do not read ({one_line(error)})" if path.exists() else "nothing there"
    raise InputError(f"{path}: expected a whole {kind}, got {cause}; copy or extract it again") from error


def one_line(error: BaseException, limit: int = 160) -> str:
    """The text of a library's error on one line, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return "a sparse or quantised tensor"
    return f"a {type(value).__name__}"


def _plain(value: Any) -> Any:
    """Attributes as Python values, so that they print and go into JSON."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value

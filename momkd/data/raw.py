"""What a feature file holds, before any check: one small reader a format, all with one interface.

HDF5 and .npy answer for their shape from the header; a .pt file is mapped, not read, where its format allows.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
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
PACKED = "momkd packed store"  # attribute `format` of the files of `momkd pack`
_DEFLATE = 1100  # bytes that one compressed byte can become, at most


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
        if plain_attributes(file).get("format") == PACKED:
            raise InputError(f"{path}: expected one slide, got a packed store; give --features the store itself")
        self._features = self._dataset(path, file, "features")
        self._coords = self._dataset(path, file, "coords") if "coords" in file else None
        size = path.stat().st_size
        for name, data in (("features", self._features), ("coords", self._coords)):
            if data is not None:
                check_written(path, name, data, size)
        self.shape, self.kind = tuple(self._features.shape), self._features.dtype.kind
        self.dtype, self.has_coords = str(self._features.dtype), self._coords is not None
        self.attrs = {}
        for holder in (file, self._features, self._coords):
            if holder is not None:
                self.attrs.update(plain_attributes(holder))

    @staticmethod
    def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
        item = own(file, name)
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


def own(file: h5py.File, name: str) -> Any:
    """A group or dataset of this very file, or None; links, which may lead anywhere, are not followed.

    Raises:
        ValueError: it takes its values from other files.
    """
    place: Any = file
    for part in name.split("/"):
        link = place.get(part, getlink=True) if isinstance(place, h5py.Group) and part in place else None
        if not isinstance(link, h5py.HardLink):
            return None
        place = place[part]
    if isinstance(place, h5py.Dataset):
        plan = place.id.get_create_plist()
        if plan.get_layout() == h5py.h5d.VIRTUAL or plan.get_external_count():
            raise ValueError(f"the values of {name} lie in other files; copy them into this one")
    return place


def plain_attributes(holder: Any) -> dict[str, Any]:
    """Attributes of a file, group or dataset: numbers, and texts of fixed length, as Python values.

    Texts of variable length are left out. They lie in a heap of the file, and where that is damaged HDF5 may search it
    without end.
    """
    plain: dict[str, Any] = {}
    for name in holder.attrs:
        kind = holder.attrs.get_id(name).get_type()
        fixed = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        if fixed or isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID | h5py.h5t.TypeEnumID):
            plain[name] = _plain(holder.attrs[name])
    return plain


def check_written(path: Path, name: str, data: h5py.Dataset, size: int) -> None:
    """HDF5 makes up values that were never written, as many as the header says: they are refused, not read."""
    wanted, there, plan = data.nbytes, data.id.get_storage_size(), data.id.get_create_plist()
    if plan.get_nfilters():
        most = _DEFLATE * size
        # A chunk is unpacked whole, however little of it is wanted.
        chunk = math.prod(data.chunks) * data.dtype.itemsize
        whole = data.id.get_num_chunks() == math.prod(-(-n // c) for n, c in zip(data.shape, data.chunks, strict=True))
    else:
        most, chunk, whole = size, there, there >= wanted
    if not whole or there > size or max(wanted, chunk) > most:
        raise InputError(
            f"{path}: {name}: expected {wanted} bytes of values, got {there} in a file of {size}: it was not written "
            "to its end; extract the features of this slide again"
        )


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
        value = value.detach()
        there = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > there:
            raise InputError(
                f"{path}: {name}: expected a tensor of its own values, got {tuple(value.shape)} expanded from {there} "
                "bytes; save tensor.contiguous()"
            )
        return value

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
                yield _RawTensor(path, load_torch(path))
            else:
                yield _RawArray(path, np.load(path, mmap_mode="r", allow_pickle=False))
        except (InputError, MemoryError, AssertionError, NotImplementedError):
            raise
        except Exception as error:  # decoders of a foreign or damaged file raise nearly anything
            _unreadable(path, error)


def load_torch(path: Path) -> Any:
    """What torch.save wrote, mapped where the format allows; nothing in it is executed.

    Raises:
        Exception: of nearly any kind, from the unpickler of a damaged file.
    """
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # the zip format; older files cannot be mapped
    try:
        if mapped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.file_size != entry.compress_size for entry in archive.infolist()):
                    raise ValueError("compressed, which torch.save never does")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (AssertionError, NotImplementedError, MemoryError) as error:
        raise ValueError(one_line(error)) from error


def _unreadable(path: Path, error: Exception) -> NoReturn:
    suffix = path.suffix.lower()
    kind = "HDF5 file" if suffix in HDF5 else "file of tensors" if suffix == ".pt" else "NumPy array"
    if isinstance(error, PermissionError):
        raise InputError(f"{path}: expected a readable {kind}, got no permission; change its mode or owner") from error
    cause = f"{path.stat().st_size} bytes that do not read ({one_line(error)})" if path.exists() else "nothing there"
    raise InputError(f"{path}: expected a whole {kind}, got {cause}; copy or extract it again") from error


def all_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite; of float16 the bits are compared, which is several times faster."""
    if values.dtype == np.float16:
        return values.size == 0 or int((values.view(np.uint16) & 0x7FFF).max()) < 0x7C00
    return bool(np.isfinite(values).all())


def check_id(slide_id: str, source: str) -> str:
    """The id, once it can be the name of a file: no folder, no control character, not too long.

    Raises:
        InputError: it could lead out of the folder that it is written into.
    """
    odd = not slide_id.isprintable() or any(sign in slide_id for sign in "/\\")
    if odd or slide_id.strip(" .") == "" or len(slide_id.encode(errors="replace")) > 240:
        raise InputError(
            f"{source}: expected slide ids that can name a file, got {slide_id[:80]!r}; rename the slide, without "
            "folders and special characters"
        )
    return slide_id


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

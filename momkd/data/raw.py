"""What a feature file holds, before any check: one small reader a format, all with one interface.

HDF5 and .npy answer for their shape from the header; a .pt file is mapped, not read, where its format allows.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from momkd.data.files import regular_file
from momkd.data.hdf5_text import text_attributes
from momkd.data.pickles import ForeignObjects, check_nesting, short_reason
from momkd.data.placement import TEXTS
from momkd.errors import InputError
from momkd.names import check_id as check_id
from momkd.names import check_utf8

Array = npt.NDArray[Any]

HDF5 = (".h5", ".hdf5")
SUFFIXES = (*HDF5, ".pt", ".npy")
OTHER_NAMES = ("feats", "embeddings", "x")  # of features, in the files of other projects
PACKED = "momkd packed store"  # attribute `format` of the files of `momkd pack`
_MANY = 256  # datasets of a file that are looked at
_DEFLATE = 1100  # bytes that one compressed byte can become, at most


class Raw(ABC):
    """Features and coordinates of an open file, as they lie there."""

    shape: tuple[int, ...]
    dtype: str
    kind: str  # "f" for floating point, as in numpy
    coords_shape: tuple[int, ...] | None = None
    attrs: dict[str, Any]
    note = ""  # what a reader should know of how the file was read

    @property
    def has_coords(self) -> bool:
        return self.coords_shape is not None

    @abstractmethod
    def read_features(self, first: int = 0, last: int | None = None) -> Array:
        """The features, or rows `first` to `last` of them; of (1, N, L) the rows are the second dimension."""

    def _rows(self, first: int, last: int | None) -> tuple[slice, ...]:
        rows = slice(first, last)
        return (slice(None), rows) if len(self.shape) == 3 else (rows,) if self.shape else ()

    @abstractmethod
    def read_coords(self) -> Array: ...


class _RawHdf5(Raw):
    def __init__(self, path: Path, file: h5py.File) -> None:
        if plain_attributes(file).get("format") == PACKED:
            raise InputError(f"{path}: expected one slide, got a packed store; give --features the store itself")
        name, self._features = _features_of(path, file)
        self.note = "" if name == "features" else _note(f"dataset {name!r}")
        coords = own(file, "coords")
        self._coords = coords if isinstance(coords, h5py.Dataset) and coords.shape is not None else None
        if self._coords is None and "coords" in file:
            raise InputError(f"{path}: coords: expected a dataset, got something else; extract again")
        size = path.stat().st_size
        check_written(path, name, self._features, size)
        if self._coords is not None:
            check_written(path, "coords", self._coords, size)
        self.shape, self.kind = tuple(self._features.shape), self._features.dtype.kind
        self.dtype = str(self._features.dtype)
        self.coords_shape = None if self._coords is None else tuple(self._coords.shape)
        self.attrs = {}
        for holder in (file, self._features, self._coords):
            if holder is not None:
                self.attrs.update(plain_attributes(holder, TEXTS))

    def read_features(self, first: int = 0, last: int | None = None) -> Array:
        return np.asarray(self._features[self._rows(first, last)])

    def read_coords(self) -> Array:
        assert self._coords is not None
        return np.asarray(self._coords[...])


def _features_of(path: Path, file: h5py.File) -> tuple[str, h5py.Dataset]:
    """Name and dataset of the features: `features`, else the one under another usual name, else the only candidate."""
    item = own(file, "features")
    if isinstance(item, h5py.Dataset) and item.shape is not None:
        return "features", item
    there: dict[str, tuple[int, ...]] = {}

    def look(key: str, value: Any) -> bool | None:
        if isinstance(value, h5py.Dataset) and value.shape is not None:
            there[key] = tuple(value.shape) if value.dtype.kind == "f" else ()
        return True if len(there) >= _MANY else None

    file.visititems(look)
    name = only_features(there) if item is None else None
    if name is not None and isinstance(item := own(file, name), h5py.Dataset):
        return name, item
    if list(there) == ["coords"]:
        raise InputError(
            f"{path}: expected features, got coordinates of patches alone; give the folder of the features"
        )
    listed = ", ".join(key[:40] for key in list(there)[:8]) + (", ..." if len(there) > 8 else "")
    raise InputError(
        f"{path}: expected a dataset 'features', got {listed or 'no dataset at all'}; rename it or extract again"
    )


def only_features(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which of several arrays is the features: the one of a usual name, else the only one of two dimensions.

    Args:
        shapes: of floating-point arrays by name; () for others.
    """
    flat = [name for name, shape in shapes.items() if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)]
    named = [name for name in flat if name in OTHER_NAMES]
    flat = [name for name in flat if name.rpartition("/")[2].lower() not in ("coords", "coordinates", "locations")]
    chosen = named or flat
    return chosen[0] if len(chosen) == 1 else None


def _note(place: str) -> str:
    return f"features were read from {place}, there is no 'features'"


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


def plain_attributes(holder: Any, texts: Sequence[str] = ()) -> dict[str, Any]:
    """Attributes of a file, group or dataset: numbers, and texts of fixed length, as Python values.

    Texts of variable length are left out, apart from those named in `texts`. They lie in a heap of the file, and where
    that is damaged HDF5 may search it without end: these are read by `text_attributes`, or are None.
    """
    plain: dict[str, Any] = {}
    for name in holder.attrs:
        kind = holder.attrs.get_id(name).get_type()
        fixed = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        if fixed or isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID | h5py.h5t.TypeEnumID):
            plain[name] = _plain(holder.attrs[name])
        elif name in texts:
            plain[name] = None
    wanted = [name for name, value in plain.items() if value is None]
    return plain | text_attributes(holder, wanted) if wanted else plain


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
            coords, name = value.get("coords"), "features" if "features" in value else _only_tensor(value)
            if name is None:
                keys = ", ".join(key[:40] if isinstance(key, str) else type(key).__name__ for key in list(value)[:8])
                raise InputError(
                    f"{path}: expected a tensor or a dict with 'features', got keys {keys or '(none)'}; rename the key"
                )
            self.note = "" if name == "features" else _note(f"key {name!r}")
            value = value[name]
        self._features = self._dense(path, "features", value)
        self._coords = self._dense(path, "coords", coords) if coords is not None else None
        self.shape, self.dtype = tuple(self._features.shape), str(self._features.dtype).removeprefix("torch.")
        self.kind = "f" if self._features.is_floating_point() else "i"
        self.coords_shape = None if self._coords is None else tuple(self._coords.shape)

    @staticmethod
    def _dense(path: Path, name: str, value: object) -> Tensor:
        if not isinstance(value, Tensor) or _special(value):
            raise InputError(
                f"{path}: {name}: expected a dense tensor, got {_kind(value)}; save it as one dense tensor of the CPU, "
                "a row a patch"
            )
        value = value.detach()
        there = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > there:
            raise InputError(
                f"{path}: {name}: expected a tensor of its own values, got {tuple(value.shape)} expanded from {there} "
                "bytes; save tensor.contiguous()"
            )
        return value

    def read_features(self, first: int = 0, last: int | None = None) -> Array:
        keep = self._features.dtype in (torch.float16, torch.float32, torch.float64)
        # A copy, since a mapped file would be read again, or be gone, whenever the values are used.
        rows = self._features[self._rows(first, last)]
        return rows.to(rows.dtype if keep else torch.float32, copy=True).numpy()

    def read_coords(self) -> Array:
        assert self._coords is not None
        return self._coords.clone().numpy()


class _RawArray(Raw):
    def __init__(self, path: Path, value: object) -> None:
        if not isinstance(value, np.ndarray):
            raise InputError(f"{path}: expected one array, got {_kind(value)}; save it with numpy.save")
        self._features = value
        self.shape, self.dtype, self.kind = value.shape, str(value.dtype), value.dtype.kind
        self.attrs = {}

    def read_features(self, first: int = 0, last: int | None = None) -> Array:
        return np.array(self._features[self._rows(first, last)])

    def read_coords(self) -> Array:
        raise NotImplementedError(".npy files hold no coordinates")


@contextlib.contextmanager
def open_raw(path: Path) -> Iterator[Raw]:
    """Opens a feature file; whatever goes wrong in the libraries until it is closed becomes one clear line."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a feature file ({', '.join(SUFFIXES)}), got {suffix or 'no ending'}")
    regular_file(path, "a feature file")
    with contextlib.ExitStack() as stack:
        try:
            if suffix in HDF5:
                yield _RawHdf5(path, stack.enter_context(h5py.File(path, "r")))
            elif suffix == ".pt":
                yield _RawTensor(path, load_torch(path))
            else:
                yield _RawArray(path, _load_array(path))
        except (InputError, MemoryError, AssertionError, NotImplementedError):
            raise
        except Exception as error:  # decoders of a foreign or damaged file raise nearly anything
            _unreadable(path, error)


def _load_array(path: Path) -> object:
    """What numpy.save wrote, mapped; nothing is unpickled. What is refused is named."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        with path.open("rb") as file:
            if file.read(6) != np.lib.format.MAGIC_PREFIX:
                raise ValueError("not what numpy.save writes") from None
            file.seek(0)
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        if not dtype.hasobject:
            raise
    raise InputError(
        f"{path}: expected an array of numbers, got one of shape {shape} of Python objects, which are never loaded; "
        "save the numbers alone, such as numpy.save(path, numpy.stack(list(array)).astype('float32'))"
    )


def load_torch(path: Path) -> Any:
    """What torch.save wrote, mapped where the format allows; nothing in it is executed.

    Raises:
        InputError: its path is not UTF-8.
        ForeignObjects: it holds something else than tensors and plain values.
        Exception: of nearly any other kind, from the unpickler of a damaged file.
    """
    check_utf8(path, path, "a file of tensors")  # torch maps no other
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # the zip format; older files cannot be mapped
    try:
        if mapped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.file_size != entry.compress_size for entry in archive.infolist()):
                    raise ValueError("compressed, which torch.save never does")
        names = check_nesting(path, zipped=mapped)
        with contextlib.ExitStack() as stack:
            if "torch._utils _rebuild_qtensor" in names:  # which warns of what torch itself does
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (AssertionError, NotImplementedError, MemoryError, RecursionError) as error:
        raise ValueError(one_line(error)) from error
    except pickle.UnpicklingError as error:
        raise short_reason(error) from error


def _unreadable(path: Path, error: Exception) -> NoReturn:
    suffix = path.suffix.lower()
    kind = "HDF5 file" if suffix in HDF5 else "file of tensors" if suffix == ".pt" else "NumPy array"
    if isinstance(error, ForeignObjects):
        raise InputError(
            f"{path}: expected tensors alone, got {error}; save one tensor (N, L), such as torch.from_numpy(array), or "
            "an array by numpy.save as .npy"
        ) from error
    if isinstance(error, PermissionError):
        raise InputError(f"{path}: expected a readable {kind}, got no permission; change its mode or owner") from error
    if isinstance(error, BlockingIOError):  # errno 11, "unable to lock file"
        raise InputError(locked_elsewhere(path)) from error
    cause = f"{path.stat().st_size} bytes that do not read ({one_line(error)})" if path.exists() else "nothing there"
    raise InputError(f"{path}: expected a whole {kind}, got {cause}; copy or extract it again") from error


def locked_elsewhere(path: Path | str) -> str:
    """What is said of an HDF5 file that another program is writing, or of a disk that knows no locks."""
    return (
        f"{path}: expected a file that can be read, got one that another program has open for writing; close it there, "
        "or set HDF5_USE_FILE_LOCKING=FALSE if none has"
    )


def all_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite; of float16 the bits are compared, which is several times faster."""
    if values.dtype == np.float16:
        return values.size == 0 or int((values.view(np.uint16) & 0x7FFF).max()) < 0x7C00
    return bool(np.isfinite(values).all())


def one_line(error: BaseException, limit: int = 160) -> str:
    """The text of a library's error on one line, without codes for a terminal, cut to `limit` characters."""
    plain = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~])?", "", str(error))
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in plain).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _kind(value: object) -> str:
    if isinstance(value, list | tuple) and value:
        first = (
            f"tensors, the first {_special(value[0]) or tuple(value[0].shape)}"
            if isinstance(value[0], Tensor)
            else type(value[0]).__name__
        )
        return f"a {type(value).__name__} of {len(value)} {first}"
    if isinstance(value, Tensor):
        return _special(value) or "a dense tensor"
    return f"a {type(value).__name__}"


def _special(tensor: Tensor) -> str:
    """What a tensor is that has no plain values (N, L), in words; nothing for one that has them."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    return "a tensor without values (device meta)" if tensor.is_meta else ""


def _only_tensor(values: dict[Any, Any]) -> str | None:
    """The key of the features among others; see `only_features`."""
    tensors = {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}
    tensors = {key: value for key, value in tensors.items() if not value.is_nested}  # which has no shape
    return only_features({k: tuple(t.shape) if t.is_floating_point() else () for k, t in tensors.items()})


def _plain(value: Any) -> Any:
    """Attributes as Python values, so that they print and go into JSON."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value

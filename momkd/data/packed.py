"""The packed store: all slides of a cohort in one HDF5 file, their rows one after the other.

Every dataset is contiguous, so a slide is one range of bytes, which is mapped, not read. The datasets, S slides with N
patches in all of width L:

    ids        (S,)        UTF-8 of fixed length, sorted
    attrs      (S,)        JSON of the attributes of each slide
    offsets    (S + 1,)    int64; slide s owns rows offsets[s] to offsets[s + 1]
    state      (S,)        uint8: 1 stored, 3 with coordinates, 0 left out because its file could not be read
    checksums  (S, 3)      uint32, CRC-32 of the bytes of each slide's features, coords and graph
    seal       (1,)        uint32, CRC-32 of all of the above and of graph/starts
    coords     (N, 2)      int64, level-0 pixels
    features   (N, L)      float16 or float32
    graph/     optional, attribute `neighbours`: starts (S + 1,) int64, offsets (N + S,), sources (E,), order (N,) int32
                           as in `momkd.graph.Edges`; slide s owns sources starts[s] to starts[s + 1]

`momkd pack` writes it (`momkd.data.pack`); this module reads it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import torch

from momkd.data.files import regular_file
from momkd.data.raw import PACKED, Array, all_finite, check_id, locked_elsewhere, one_line, own, plain_attributes
from momkd.errors import InputError
from momkd.graph import Edges, from_lists

VERSION = 1
STORED, WITH_COORDS = 1, 3
PARTS = ("features", "coords", "graph")  # columns of the checksums
SEALED = ("ids", "attrs", "offsets", "state", "checksums", "graph/starts")  # and covered by the seal, in this order
GRAPH = ("graph/offsets", "graph/sources", "graph/order")
_AGAIN = "copy the file again, or remove it and pack again"


def layout(
    slides: int, rows: int, width: int, dtype: str, id_bytes: int, attrs_bytes: int, edges: int | None
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of every dataset; `edges` is None for no graph."""
    made: dict[str, tuple[tuple[int, ...], Any]] = {
        "ids": ((slides,), f"S{id_bytes}"),
        "attrs": ((slides,), f"S{attrs_bytes}"),
        "offsets": ((slides + 1,), "<i8"),
        "state": ((slides,), "u1"),
        "checksums": ((slides, len(PARTS)), "<u4"),
        "seal": ((1,), "<u4"),
        "coords": ((rows, 2), "<i8"),
    }
    if edges is not None:
        made["graph/starts"] = (slides + 1,), "<i8"
        made |= {name: ((n,), "<i4") for name, n in zip(GRAPH, (rows + slides, edges, rows), strict=True)}
    made["features"] = (rows, width), {"float16": "<f2", "float32": "<f4"}[dtype]
    return {name: (shape, np.dtype(kind)) for name, (shape, kind) in made.items()}


def seal(arrays: Mapping[str, Array]) -> int:
    """CRC-32 over the small datasets."""
    value = 0
    for name in SEALED:
        if name in arrays:
            value = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, value)
    return value


class _Region(NamedTuple):
    """Where a dataset lies in the file."""

    at: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class PackedStore:
    """A packed store, opened for reading. Threads may share it; a process that forked opens its own.

    What `read`, `coords` and `graph` return lies in memory that is mapped privately from the file: it costs no copy, is
    read when it is used, and goes when the array goes; writing to it does not change the file. The first time that a
    part of a slide is asked for, its bytes are compared with their checksum.

    Args:
        path: the file.
        check: compare checksums.

    Raises:
        InputError: no packed store, one of another version, or one whose header is damaged.

    Example:
        >>> store = PackedStore("cohort.h5")  # doctest: +SKIP
        >>> store.read("TCGA-A1-A0SB").shape  # doctest: +SKIP
        (15234, 1536)
    """

    def __init__(self, path: Path | str, *, check: bool = True) -> None:
        self.path, self.check = Path(path), check
        regular_file(path, "a packed store", "check --features")
        try:
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise InputError(f"{path}: cannot read it: {error.strerror}") from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self._checked: set[tuple[int, int]] = set()  # slide and part
        self._stamp = _stamp(self._file)

    def _open(self) -> None:
        self._regions, self.neighbours = _regions(self.path, os.fstat(self._file).st_size)
        small = {name: self._map(name, 0, None) for name in (*SEALED, "seal") if name in self._regions}
        if seal(small) != int(small["seal"][0]):
            raise self._damaged("its header does not fit its checksum")
        self._seal = seal(small)
        self._offsets, self._state, self._sums = (np.array(small[name]) for name in ("offsets", "state", "checksums"))
        self._starts = np.array(small["graph/starts"]) if "graph/starts" in small else None
        self._attrs = np.array(small["attrs"])
        ends = [(self._offsets, self._regions["features"].shape[0])]
        if self._starts is not None:
            ends.append((self._starts, self._regions["graph/sources"].shape[0]))
        for starts, end in ends:
            if starts[0] != 0 or starts[-1] != end or (np.diff(starts) < 0).any():
                raise self._damaged("offsets that do not fit")
        try:
            ids = [value.decode() for value in small["ids"].tolist()]
        except UnicodeDecodeError:
            raise self._damaged("ids that are not UTF-8") from None
        for slide in ids:
            check_id(slide, str(self.path))
        if ids != sorted(set(ids)):
            raise self._damaged("ids that are not sorted or not unique")
        self._number = {slide: s for s, slide in enumerate(ids) if self._state[s]}
        if not self._number:
            raise self._damaged("no slide")
        self.paths: dict[str, Path] = dict.fromkeys(self._number, self.path)

    def __len__(self) -> int:
        return len(self._number)

    @property
    def width(self) -> int:
        """L of every slide."""
        return self._regions["features"].shape[1]

    def close(self) -> None:
        """Closes the file; arrays that were read stay valid."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()

    def __enter__(self) -> PackedStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- a slide -------------------------------------------------------------------------------------------------------

    def name(self, slide_id: str) -> str:
        return f"{self.path}: slide {slide_id!r}"

    def header(self, slide_id: str) -> tuple[int, int, str]:
        first, last = self._rows(slide_id)
        return last - first, self.width, self._regions["features"].dtype.newbyteorder("=").name

    def has_coords(self, slide_id: str) -> bool:
        return int(self._state[self._slide(slide_id)]) == WITH_COORDS

    def read(self, slide_id: str, width: int | None = None) -> Array:
        """Features (N, L), mapped.

        Raises:
            InputError: no such slide, another width, or bytes that are not those that were packed.
        """
        self._check_unchanged()
        if width is not None and width != self.width:
            raise InputError(f"{self.path}: features: expected width {width}, got {self.width}; use another store")
        features = self._map("features", *self._rows(slide_id))
        if self._verify(slide_id, "features", features) and not all_finite(features):
            raise InputError(f"{self.name(slide_id)}: features: expected finite values, got others; pack it again")
        return features

    def blocks(self, slide_id: str, rows: int, width: int | None = None) -> Iterator[Array]:
        """The same, `rows` patches at a time."""
        features = self.read(slide_id, width)
        for first in range(0, len(features), rows):
            yield features[first : first + rows]

    def coords(self, slide_id: str) -> tuple[npt.NDArray[np.int64] | None, dict[str, Any]]:
        self._check_unchanged()
        attrs = self._attrs_of(slide_id)
        if not self.has_coords(slide_id):
            return None, attrs
        coords = self._map("coords", *self._rows(slide_id))
        self._verify(slide_id, "coords", coords)
        return coords, attrs

    def graph(self, slide_id: str, neighbours: int) -> Edges | None:
        if self._starts is None or self.neighbours != neighbours or not self.has_coords(slide_id):
            return None
        self._check_unchanged()
        s, (first, last) = self._slide(slide_id), self._rows(slide_id)
        ranges = (first + s, last + s + 1), (int(self._starts[s]), int(self._starts[s + 1])), (first, last)
        lists = [self._map(name, *rows) for name, rows in zip(GRAPH, ranges, strict=True)]
        self._verify(slide_id, "graph", *lists)
        offsets, sources, order = (torch.from_numpy(each) for each in lists)
        try:
            return from_lists(offsets, sources, order)
        except ValueError as error:
            raise InputError(
                f"{self.name(slide_id)}: graph: expected lists of neighbours, got {error}; {_AGAIN}"
            ) from error

    def checksum(self, slide_id: str) -> str:
        """CRC-32 of the slide's features, as it was packed."""
        return f"{int(self._sums[self._slide(slide_id), PARTS.index('features')]):08x}"

    def alias(self, names: Mapping[str, str]) -> None:
        """Let slides be asked for by other ids too: other id -> id."""
        self._number.update({name: self._number[slide] for name, slide in names.items()})
        self.paths.update(dict.fromkeys(names, self.path))

    def damage(self, slide_id: str) -> str | None:
        """What is wrong with the bytes of a slide, in one line, or None."""
        try:
            self.read(slide_id)
            self.coords(slide_id)
            if self.neighbours is not None:
                self.graph(slide_id, self.neighbours)
        except InputError as error:
            return str(error)
        return None

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _slide(self, slide_id: str) -> int:
        try:
            return self._number[slide_id]
        except KeyError:
            raise InputError(f"{self.path}: expected slide {slide_id!r}, got no such slide; check the ids") from None

    def _rows(self, slide_id: str) -> tuple[int, int]:
        s = self._slide(slide_id)
        return int(self._offsets[s]), int(self._offsets[s + 1])

    def _attrs_of(self, slide_id: str) -> dict[str, Any]:
        try:
            attrs = json.loads(self._attrs[self._slide(slide_id)].decode())
            if not isinstance(attrs, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"attributes of slide {slide_id!r} that do not read ({one_line(error)})") from error
        return attrs

    def _map(self, name: str, first: int, last: int | None) -> Array:
        """Rows of a dataset."""
        region = self._regions[name]
        last = region.shape[0] if last is None else last
        shape = (last - first, *region.shape[1:])
        row = region.dtype.itemsize * int(np.prod(region.shape[1:], dtype=np.int64))
        at, size = region.at + first * row, (last - first) * row
        if size == 0:
            return np.zeros(shape, region.dtype)
        before = at % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(self._file, before + size, access=mmap.ACCESS_COPY, offset=at - before)
            if hasattr(mmap, "MADV_WILLNEED"):
                mapped.madvise(mmap.MADV_WILLNEED)
            return np.frombuffer(mapped, region.dtype, size // region.dtype.itemsize, before).reshape(shape)
        except ValueError:
            raise self._damaged("fewer bytes than its header says") from None
        except OSError:  # too many maps or open files: a copy does as well
            return self._copy(at, size).view(region.dtype).reshape(shape)

    def _copied(self, name: str) -> Array:
        """A dataset, read and not mapped: what is mapped ends the process where the file has become shorter."""
        at, shape, dtype = self._regions[name]
        return self._copy(at, dtype.itemsize * int(np.prod(shape, dtype=np.int64))).view(dtype).reshape(shape)

    def _copy(self, at: int, size: int) -> Array:
        made = np.empty(size, np.uint8)
        done = 0
        while done < size:
            try:
                got = os.pread(self._file, min(size - done, 1 << 30), at + done)
            except OSError as error:
                raise InputError(f"{self.path}: cannot read it: {error.strerror}") from error
            if not got:
                raise self._damaged("fewer bytes than its header says")
            made[done : done + len(got)] = np.frombuffer(got, np.uint8)
            done += len(got)
        return made

    def _check_unchanged(self) -> None:
        """Compares checksums anew where the file was written to since; a file that took its name does not matter."""
        if (stamp := _stamp(self._file)) == self._stamp:
            return
        with contextlib.suppress(InputError):
            small = {name: self._copied(name) for name in SEALED if name in self._regions}
            if seal(small) == self._seal:
                self._stamp, self._checked = stamp, set()
                return
        raise InputError(
            f"{self.path}: expected the packed store that was opened, got one that was overwritten since; start again "
            "once nothing writes to it"
        )

    def _verify(self, slide_id: str, part: str, *arrays: Array) -> bool:
        """Raises where the bytes are not those that were packed; False where nothing was left to check."""
        key = self._slide(slide_id), PARTS.index(part)
        if not self.check or key in self._checked:
            return False
        if checksum(*arrays) != int(self._sums[key]):
            raise InputError(
                f"{self.name(slide_id)}: {part}: expected the bytes that were packed, got others (the checksum "
                f"differs); {_AGAIN}"
            )
        self._checked.add(key)
        return True

    def _damaged(self, came: str) -> InputError:
        return InputError(f"{self.path}: expected a whole packed store, got {came}; {_AGAIN}")


def _stamp(file: int) -> tuple[int, int]:
    """Size and time of modification of an open file."""
    state = os.fstat(file)
    return state.st_size, state.st_mtime_ns


def checksum(*arrays: Array) -> int:
    """CRC-32 of the bytes of arrays, one after the other."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, value)
    return value


def is_packed(file: h5py.File) -> bool:
    """Whether an open HDF5 file says that it is a packed store."""
    return bool(plain_attributes(file).get("format") == PACKED)


def _regions(path: Path, size: int) -> tuple[dict[str, _Region], int | None]:
    """Where the datasets of a store lie, once each has the right shape and type and is inside the file; and its k.

    HDF5 is asked for nothing but these places: what the file says about links, filters or other files is not followed.
    """
    try:
        with h5py.File(path, "r") as file:
            if not is_packed(file):
                raise InputError(
                    f"{path}: expected a packed store, got another HDF5 file; give the folder of feature files, or "
                    "make a store with momkd pack"
                )
            if (version := int(plain_attributes(file)["version"])) != VERSION:
                raise InputError(f"{path}: expected version {VERSION} of the store, got {version}; update momkd")
            group, features, ids = own(file, "graph"), own(file, "features"), own(file, "ids")
            neighbours = None if group is None else int(plain_attributes(group)["neighbours"])
            wanted = layout(
                ids.shape[0],
                features.shape[0],
                features.shape[1],
                features.dtype.newbyteorder("=").name,
                ids.dtype.itemsize,
                own(file, "attrs").dtype.itemsize,
                None if group is None else own(file, "graph/sources").shape[0],
            )
            return {name: _region(file, name, *each, size) for name, each in wanted.items()}, neighbours
    except InputError:
        raise
    except BlockingIOError as error:
        raise InputError(locked_elsewhere(path)) from error
    except Exception as error:  # HDF5's errors on a foreign or damaged file have several roots
        raise InputError(
            f"{path}: expected a packed store, got a file that does not read ({one_line(error)}); {_AGAIN}"
        ) from error


def _region(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> _Region:
    data = own(file, name)
    if data.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
        raise ValueError(f"{name} lies in pieces")
    if data.shape != shape or (data.dtype.kind, data.dtype.itemsize) != (dtype.kind, dtype.itemsize):
        raise ValueError(f"{name} is {data.dtype} {data.shape}, not {dtype} {shape}")
    if data.dtype.byteorder == ">":
        raise ValueError(f"{name} is big-endian")
    at, nbytes = data.id.get_offset(), dtype.itemsize * int(np.prod([int(n) for n in shape], dtype=object))
    if nbytes and (at is None or at < 0 or at + nbytes > size):
        raise ValueError(f"{name} reaches beyond the end of the file")
    return _Region(at or 0, shape, dtype)

"""Packing: the slides of a folder into one store (`momkd.data.packed`), streamed, resumable, whole or not at all.

The store grows under a hidden name beside its target, and its space is reserved before the first slide is read. HDF5
lays the file out in memory and never holds it open: every byte reaches the disk by plain writes, so a full disk is an
ordinary error. A journal beside it says which slides are on the disk; after a kill, packing goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import h5py
import numpy as np
import torch

from momkd.data.atomic import cannot_write, sync_folder
from momkd.data.cohort import Cohort, open_cohort
from momkd.data.files import kind_of, open_own
from momkd.data.packed import (
    GRAPH,
    PARTS,
    STORED,
    VERSION,
    WITH_COORDS,
    PackedStore,
    checksum,
    is_packed,
    layout,
    seal,
)
from momkd.data.raw import PACKED, Array, check_id, locked_elsewhere
from momkd.data.slides import Slide, read_slide
from momkd.data.sources import SlideFiles, open_source
from momkd.errors import InputError
from momkd.graph import knn

_SYNC_BYTES, _SYNC_SECONDS = (
    1 << 28,
    5.0,
)  # a slide counts as done once it is on the disk, which is asked for this often
_LONGEST_TEXT = 256  # of an attribute that is kept
_LARGEST = float(np.finfo(np.float16).max)
_FINEST = 2.0**-14  # root mean square from which rounding to float16 costs a relative error of 7e-4 at most


@dataclass(frozen=True)
class Packed:
    """What was written: the file, slides, patches, bytes; the slides that were left out, with the reason; and notes."""

    path: Path
    slides: int
    patches: int
    nbytes: int
    skipped: dict[str, str]
    notes: list[str] = field(default_factory=list)


def pack(
    features: Path | str,
    out: Path | str,
    *,
    dtype: str = "float16",
    neighbours: int | None = None,
    skip_bad: bool = False,
    report: Callable[[int, int, int], None] | None = None,
) -> Packed:
    """Writes the slides of a folder into one store. Where packing was interrupted, it goes on.

    Args:
        features: folder of feature files, one a slide, all of one width.
        out: the file; a packed store that is there is replaced at the end. Until then it is `.NAME.partial`.
        dtype: "float16", once it is sure that it holds the values, or "float32".
        neighbours: k, to store the graph of k nearest patches of each slide; None stores none.
        skip_bad: leave out slides that cannot be used, instead of ending.
        report: called with (slides done, slides, bytes of features written).

    Returns:
        What was written.

    Raises:
        InputError: a slide that cannot be used or does not fit float16, a file that cannot be written, or an
            interrupted packing of other slides.
    """
    if dtype not in ("float16", "float32"):
        raise InputError(f"dtype: expected float16 or float32, got {dtype!r}")
    source = open_source(features)
    if isinstance(source, PackedStore):
        raise InputError(f"{features}: expected a folder of feature files, got a packed store; it is packed already")
    nested = any(path.parent != Path(features) for path in source.paths.values())
    target = _target(Path(out), Path(features), nested)
    cohort = open_cohort(features, skip_bad=skip_bad, source=str(features), neighbours=neighbours)
    plan = _Plan.of(cohort, dtype, neighbours)
    try:
        with _Writer(target, plan) as writer:
            _fill(writer, cohort, skip_bad, report)
            writer.finish()
    except OSError as error:
        raise cannot_write(out, error, _needed(target, plan)) from error
    rows = sum(cohort.sizes[slide] for slide in writer.done)
    return Packed(Path(out), len(writer.done), rows, plan.size, cohort.skipped, cohort.notes)


def verify(path: Path | str, report: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """Compares every byte of a store with its checksums.

    Args:
        report: called with (slides done, slides).

    Returns:
        The slides that are damaged, and what is wrong; empty where all is well.

    Raises:
        InputError: no packed store, or its header is damaged.
    """
    damaged: dict[str, str] = {}
    with PackedStore(path) as store:
        for number, slide in enumerate(store.paths, start=1):
            if (wrong := store.damage(slide)) is not None:
                damaged[slide] = wrong
            if report is not None:
                report(number, len(store))
    return damaged


# -- plan --------------------------------------------------------------------------------------------------------------


class _Image(io.RawIOBase):
    """The file that HDF5 lays out, in memory: space that is only reserved takes none."""

    PAGE = 4096

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.size = self.at = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def truncate(self, size: int | None = None) -> int:
        self.size = self.at if size is None else size
        return self.size

    def _pieces(self, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(page, first byte in it, first byte of the call, bytes)."""
        done = 0
        while done < length:
            page, first = divmod(self.at + done, self.PAGE)
            step = min(length - done, self.PAGE - first)
            yield page, first, done, step
            done += step
        self.at += length

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for page, first, done, step in self._pieces(len(view)):
            held = self.pages.setdefault(page, bytearray(self.PAGE))
            held[first : first + step] = view[done : done + step]
        self.size = max(self.size, self.at)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self.size - self.at))
        for page, first, done, step in self._pieces(length):
            held = self.pages.get(page, b"\0" * self.PAGE)
            view[done : done + step] = held[first : first + step]
        return length


@dataclass(frozen=True)
class _Plan:
    """The file before the first slide is read: its header, and where everything will lie."""

    slides: tuple[str, ...]
    starts: Array  # (S + 1,) of rows
    edges: Array | None  # (S + 1,) of sources
    dtype: str
    neighbours: int | None
    small: dict[str, Array]
    places: dict[str, int]  # of each dataset in the file; an empty one lies nowhere
    pages: dict[int, bytearray]
    size: int

    @classmethod
    def of(cls, cohort: Cohort, dtype: str, neighbours: int | None) -> _Plan:
        slides = tuple(sorted(cohort.paths))
        for slide in slides:
            check_id(slide, str(cohort.paths[slide]))
        sizes = np.array([cohort.sizes[slide] for slide in slides], np.int64)
        starts, edges = _ends(sizes), None
        if neighbours is not None:
            edges = _ends(sizes * np.minimum(neighbours, sizes - 1))
        small: dict[str, Array] = {
            "ids": np.array([slide.encode() for slide in slides]),
            "attrs": np.array([_attributes(cohort, slide) for slide in slides]),
            "offsets": starts,
            "state": np.zeros(len(slides), np.uint8),
            "checksums": np.zeros((len(slides), len(PARTS)), np.uint32),
        }
        if edges is not None:
            small["graph/starts"] = edges
        shapes = layout(
            len(slides),
            int(starts[-1]),
            cohort.width,
            dtype,
            small["ids"].itemsize,
            small["attrs"].itemsize,
            None if edges is None else int(edges[-1]),
        )
        image, places = _Image(), {}
        # Metadata in one block at the front.
        with h5py.File(image, "w", meta_block_size=1 << 16) as file:
            file.attrs.update({"format": np.bytes_(PACKED), "version": VERSION})
            if neighbours is not None:
                file.create_group("graph").attrs["neighbours"] = neighbours
            for name, (shape, kind) in shapes.items():
                data = file.create_dataset(name, dcpl=_reserved(), shape=shape, dtype=_text(kind))
                places[name] = data.id.get_offset() or 0
        return cls(slides, starts, edges, dtype, neighbours, small, places, image.pages, image.size)

    @property
    def fingerprint(self) -> str:
        """Of everything that the file is before slides are written."""
        digest = hashlib.blake2b(digest_size=16)
        for page, held in sorted(self.pages.items()):
            digest.update(page.to_bytes(8, "little") + held)
        for array in self.small.values():
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _ends(sizes: Array) -> Array:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _reserved() -> Any:
    """Space for the values is set aside at once, and nothing is written into it."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)
    return plan


def _text(kind: np.dtype[Any]) -> Any:
    return h5py.string_dtype("utf-8", kind.itemsize) if kind.kind == "S" else kind


def _attributes(cohort: Cohort, slide: str) -> bytes:
    """The numbers and short texts among the attributes of a slide, as JSON."""
    assert isinstance(cohort.source, SlideFiles)
    kept = {
        name: value
        for name, value in sorted(cohort.source.attributes(slide).items())
        if (isinstance(value, str) and len(value) <= _LONGEST_TEXT)
        or (isinstance(value, int | float) and math.isfinite(value))
    }
    return json.dumps(kept).encode()


# -- slides ------------------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """The arrays of a slide as they lie in the store: features, coordinates or None, lists of the graph."""

    features: Array
    coords: Array | None
    graph: list[Array]


def _fill(writer: _Writer, cohort: Cohort, skip_bad: bool, report: Callable[[int, int, int], None] | None) -> None:
    """Reads the slides that are not there yet, and writes one while the next is read."""
    writer.keep_unchanged(lambda slide: _stamp(cohort.paths[slide]))
    plan, done, nbytes, source = writer.plan, len(writer.done), 0, cohort.source
    assert isinstance(source, SlideFiles)
    if report is not None:
        report(done, len(plan.slides), nbytes)
    with ThreadPoolExecutor(1, "momkd-pack") as pool:
        writing: Future[int] | None = None
        for number, slide in enumerate(plan.slides):
            if slide in writer.done:
                continue
            path = cohort.paths[slide]
            stamp = _stamp(path)
            try:
                read: Slide | None = read_slide(path, width=cohort.width)
                assert read is not None
                source.note(slide, read.notes)
                if len(read.features) != cohort.sizes[slide]:
                    raise InputError(f"{path}: expected {cohort.sizes[slide]} patches as before, got "
                                     f"{len(read.features)}; the file changed while packing: pack again")  # fmt: skip
            except InputError as error:
                if not skip_bad:
                    if writing is not None:
                        writing.result()
                    raise
                cohort.skipped[slide] = str(error)
                read = None
            if writing is not None:
                nbytes += writing.result()
                writing = None
            if read is not None:
                writing = pool.submit(_write, writer, number, read, stamp)
            done += 1
            if report is not None:
                report(done, len(plan.slides), nbytes)
        if writing is not None:
            writing.result()
    if not writer.done:
        raise InputError(next(iter(cohort.skipped.values())))


def _write(writer: _Writer, number: int, slide: Slide, stamp: list[int]) -> int:
    plan, graph = writer.plan, []
    features = _as_half(slide) if plan.dtype == "float16" else slide.features.astype(np.float32, copy=False)
    if plan.neighbours is not None:
        assert slide.coords is not None
        edges = knn(slide.coords, plan.neighbours)
        graph = [each.numpy() for each in (edges.offsets, edges.sources, edges.order)]
    writer.write(number, _Parts(features, slide.coords, graph), stamp)
    return features.nbytes


def _as_half(slide: Slide) -> Array:
    """The features in float16, once they fit.

    Raises:
        InputError: a value is too large, or all are so small that float16 holds few of their digits.
    """
    if slide.features.dtype == np.float16 or slide.features.size == 0:
        return slide.features
    values = torch.from_numpy(slide.features)
    half = values.half()
    what = ""
    if half.isinf().any():
        what = f"values up to {float(values.abs().max()):.3g}, and float16 ends at {_LARGEST:.0f}"
    else:
        size = float(values.norm()) / values.numel() ** 0.5
        if 0 < size < _FINEST:
            what = f"values of about {size:.2g}, of which float16 holds few digits"
    if what:
        raise InputError(f"{slide.path}: features: expected values for float16, got {what}; pack with --dtype float32")
    return half.numpy()


def _stamp(path: Path) -> list[int]:
    """Tells a file that changed: size and time of modification."""
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"{path}: expected a feature file, got nothing there ({error.strerror})") from error
    return [state.st_size, state.st_mtime_ns]


# -- file --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Writer:
    """The growing store and its journal: a line of the plan, then a line for each slide that is on the disk."""

    target: Path
    plan: _Plan
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # slide -> its line in the journal
    _waiting: list[str] = field(default_factory=list)  # lines of slides that may not be on the disk yet
    _bytes: int = 0
    _synced: float = field(default_factory=time.monotonic)
    _file: int = -1
    _journal: TextIO | None = None

    @property
    def partial(self) -> Path:
        return self.target.parent / f".{self.target.name}.partial"

    @property
    def journal(self) -> Path:
        return self.target.parent / f".{self.target.name}.journal"

    def __enter__(self) -> _Writer:
        self._open()
        try:
            if self._resumed():
                self._journal = self._open_journal(os.O_APPEND)
                self._journal.write("\n")  # ends a line that a kill may have cut
            else:
                self._begin()
        except BaseException:
            self._close()
            raise
        return self

    def _open(self) -> None:
        """Opens and locks the partial file; one that another process has just finished is that no longer."""
        while True:
            self._file = open_own(self.partial, os.O_RDWR | os.O_CREAT)
            try:
                _lock(self._file, self.partial)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._file), self.partial.lstat()):
                        return
            except BaseException:
                self._close()
                raise
            self._close()

    def _open_journal(self, flags: int) -> TextIO:
        return os.fdopen(open_own(self.journal, os.O_WRONLY | flags), "a", encoding="utf-8")

    def _begin(self) -> None:
        try:
            self.journal.unlink(missing_ok=True)
            os.ftruncate(self._file, 0)
            _reserve(self._file, self.plan.size)
            for page, held in self.plan.pages.items():
                at = page * _Image.PAGE
                self._put(held[: self.plan.size - at], at)
            for name, array in self.plan.small.items():
                self._put(array, self.plan.places[name])
            os.fsync(self._file)
            self._journal = self._open_journal(os.O_CREAT | os.O_EXCL)
            self._journal.write(json.dumps({"plan": self.plan.fingerprint}) + "\n")
            self._flush()
            sync_folder(self.target.parent)
        except OSError:
            for path in (self.partial, self.journal):  # nothing of worth is lost
                path.unlink(missing_ok=True)
            raise

    def _resumed(self) -> bool:
        """Whether the journal tells of this plan; `done` is then what it says is done."""
        lines = list(_lines(self.journal)) if kind_of(self.journal) == "a file" else []
        if not lines or not isinstance(lines[0], dict) or "plan" not in lines[0]:
            return False
        if lines[0]["plan"] != self.plan.fingerprint:
            raise InputError(
                f"{self.partial}: expected to go on packing the same slides with the same options, got others; remove "
                "it to begin anew, or choose another --out"
            )
        if os.fstat(self._file).st_size != self.plan.size:
            return False
        for line in lines[1:]:
            if _is_entry(line) and line["slide"] in self.plan.slides:
                self.done[line["slide"]] = line
        return True

    def keep_unchanged(self, stamp: Callable[[str], list[int]]) -> None:
        """Forgets slides whose file is not the one that was packed."""
        self.done = {slide: line for slide, line in self.done.items() if line["stamp"] == stamp(slide)}

    def write(self, number: int, parts: _Parts, stamp: list[int]) -> None:
        """One slide, into its place."""
        plan, slide = self.plan, self.plan.slides[number]
        first, edge = int(plan.starts[number]), 0 if plan.edges is None else int(plan.edges[number])
        self._put_rows("features", first, parts.features)
        if parts.coords is not None:
            self._put_rows("coords", first, parts.coords)
        for name, at, array in zip(GRAPH, (first + number, edge, first), parts.graph, strict=False):
            self._put_rows(name, at, array)
        coords = [] if parts.coords is None else [parts.coords]
        sums = [checksum(parts.features), checksum(*coords), checksum(*parts.graph)]
        state = STORED if parts.coords is None else WITH_COORDS
        line = {"slide": slide, "state": state, "checksums": sums, "stamp": stamp}
        self.done[slide] = line
        self._waiting.append(json.dumps(line))
        self._bytes += parts.features.nbytes
        if self._bytes >= _SYNC_BYTES or time.monotonic() - self._synced >= _SYNC_SECONDS:
            self._sync()

    def finish(self) -> None:
        """The checksums, and the name."""
        self._sync()
        small = dict(self.plan.small)
        for number, slide in enumerate(self.plan.slides):
            if slide in self.done:
                small["state"][number] = self.done[slide]["state"]
                small["checksums"][number] = self.done[slide]["checksums"]
        for name in ("state", "checksums"):
            self._put(small[name], self.plan.places[name])
        self._put(np.array([seal(small)], np.uint32), self.plan.places["seal"])
        os.fsync(self._file)
        os.replace(self.partial, self.target)
        self.journal.unlink()
        sync_folder(self.target.parent)

    def _put_rows(self, name: str, first: int, array: Array) -> None:
        if len(array):
            self._put(array, self.plan.places[name] + first * array[0].nbytes)

    def _put(self, data: Any, at: int) -> None:
        view = memoryview(np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data).cast("B")
        while len(view):
            written = os.pwrite(self._file, view[: 1 << 30], at)
            view, at = view[written:], at + written

    def _sync(self) -> None:
        if self._waiting and self._journal is not None:
            os.fsync(self._file)
            self._journal.write("\n".join(self._waiting) + "\n")
            self._flush()
        self._waiting, self._bytes, self._synced = [], 0, time.monotonic()

    def _flush(self) -> None:
        assert self._journal is not None
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(OSError):  # another error is on its way, or all is written
                self._sync()
        finally:
            self._close()

    def _close(self) -> None:
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _lines(path: Path) -> Iterator[Any]:
    """What a journal holds, without lines that a kill cut."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line)


def _is_entry(line: Any) -> bool:
    """Whether a line of a journal is one that `_Writer.write` makes."""
    if not isinstance(line, dict) or set(line) != {"slide", "state", "checksums", "stamp"}:
        return False
    numbers = (line["state"], *(line["checksums"] if isinstance(line["checksums"], list) else ()))
    return (
        isinstance(line["slide"], str)
        and len(numbers) == 1 + len(PARTS)
        and all(type(number) is int and 0 <= number < 2**32 for number in numbers)
        and line["state"] in (STORED, WITH_COORDS)
    )


def _reserve(file: int, size: int) -> None:
    """Sets the space aside, so that a disk that is too small is known at once."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(file, size)


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return  # a file system without locks
        raise InputError(
            f"{path}: expected to be the only one packing into it, got another process; wait for it"
        ) from error


def _target(out: Path, features: Path, nested: bool) -> Path:
    """Where to write, links followed; never over something that is no store, nor among the slides."""
    target = Path(os.path.realpath(out))
    if target.is_dir():
        raise InputError(f"{out}: expected the name of a file, got a folder; name a file in it, such as cohort.h5")
    if not target.parent.is_dir():
        raise InputError(f"{out}: cannot write it: No such file or directory; create the folder first")
    inside = (target.parent, *target.parent.parents) if nested else (target.parent,)
    if Path(os.path.realpath(features)) in inside:
        raise InputError(f"{out}: expected a file outside {features}, where it would pass for a slide; choose another")
    if (came := kind_of(target)) != "nothing there":
        if came != "a file":
            raise InputError(f"{out}: expected a new file or a packed store to replace, got {came}; choose another")
        try:
            with h5py.File(target, "r") as file:
                ours = is_packed(file)
        except BlockingIOError as error:
            raise InputError(locked_elsewhere(out)) from error
        except OSError:
            ours = False
        if not ours:
            raise InputError(
                f"{out}: expected a new file or a packed store to replace, got another file; choose another"
            )
    return target


def _needed(target: Path, plan: _Plan) -> str:
    """How much space a store takes, for the error that says it is not there."""
    free = ""
    with contextlib.suppress(OSError):
        state = os.statvfs(target.parent)
        free = f", {state.f_bavail * state.f_frsize / 1e6:,.0f} MB are free"
    return f"the store takes {plan.size / 1e6:,.1f} MB{free}"

"""Sizes of tiles: a few candidates an op, chosen by chip, widths and type, never by exact lengths.

The first candidate that fits is the default; compiled ahead of time, none of them spills. Where the user asks for it
(`momkd.tune`), all are timed at their first use in a shape, and the quickest is kept on disk and taken from then on.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import triton
from torch import Tensor

from momkd.kernels._common import next_power_of_2

_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

# The chip to cut for and the candidate to take, where they are not to be found out: for compiling ahead of time.
CHIP: str | None = None
CANDIDATE: int | None = None


# HGMMA and its successors read operands from shared memory, of which these chips have 227 KiB; older ones hold operands
# in registers too, and a program on consumer cards, those of sm_120 among them, has 99 KiB.
ROOMY = ("sm_90", "sm_100", "sm_103")


def chip(device: torch.device) -> str:
    """sm_90, or another of NVIDIA's; gfx for AMD's. Interpreted, kernels are cut as for sm_90."""
    return _chip(device) if CHIP is None else CHIP


@cache  # every call of a kernel asks
def _chip(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def at_most(columns: int, size: int) -> int:
    """The power of two, 16 at least, that holds `size` columns, or `columns` where that is less."""
    narrow = 16
    while narrow < min(size, columns):
        narrow *= 2
    return narrow


class Tiles(NamedTuple):
    """How a kernel is cut: rows and columns of a tile, warps of a program, stages of its pipeline."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2

    def fitted(self, chip: str, dtype: torch.dtype, width: int, heads: int, align: int) -> Tiles:
        """For rows of this width that begin at multiples of `align`; not wider than the rows need."""
        most = self.columns if align * dtype.itemsize >= 8 else min(self.columns, 32)  # value by value would spill
        if heads > 1 and align * dtype.itemsize < 16 and chip not in ROOMY:
            most = min(most, 64)  # 128 would spill, by Triton 3.4
        return self._replace(columns=at_most(most, width))


class SlotTiles(NamedTuple):
    """How the product of rows with the memory is cut: rows of a tile, slots and columns that it takes at a time."""

    rows: int
    slots: int
    columns: int
    warps: int = 4
    stages: int = 2

    def fitted(self, chip: str, dtype: torch.dtype, width: int, slots: int) -> SlotTiles:
        """For `slots` prototypes a class and rows of `width`; neither side is padded beyond need."""
        rows = self.rows if chip in ROOMY or chip.startswith("gfx") else min(self.rows, 32)
        return self._replace(rows=rows, slots=at_most(self.slots, slots), columns=at_most(self.columns, width))


class GraphTiles(NamedTuple):
    """How graph attention is cut: neighbours of a tile, nodes of a program, columns of a head."""

    rows: int = 8
    nodes: int = 1
    columns: int = 16
    warps: int = 1
    stages: int = 2

    def fitted(self, chip: str, dtype: torch.dtype, width: int) -> GraphTiles:
        """All columns of a head at once, 256 of them to a warp."""
        columns = at_most(1 << 30, width)
        if self.nodes > 1:
            spills = chip == "sm_100" or (_TRITON < (3, 7) and chip not in ROOMY)
        else:
            spills = _TRITON < (3, 6)
        rows = min(self.rows, 4) if spills else self.rows  # 8 would spill a few bytes
        return self._replace(rows=rows, columns=columns, warps=max(1, columns // 256))


class _Cut(Protocol):
    def fitted(self, chip: str, dtype: torch.dtype, *sizes: int) -> Any: ...


T = TypeVar("T", bound=_Cut)


class Candidates(NamedTuple, Generic[T]):
    """Tiles for 16-bit and for 32-bit values; the first are the default."""

    half: Sequence[T]
    single: Sequence[T]

    def fitted(self, like: Tensor, *sizes: int) -> list[T]:
        """Those for values of the type of `like` on its device, each once."""
        key = id(self), chip(like.device), like.dtype, sizes
        held = _FITTED.get(key)
        if held is None or held[0] is not self:
            given = self.single if like.dtype == torch.float32 else self.half
            tiles = list(dict.fromkeys(tiles.fitted(key[1], like.dtype, *sizes) for tiles in given))
            held = _FITTED[key] = self, tiles
        return held[1]

    def choose(self, op: str, like: Tensor, *sizes: int, run: Callable[[T], object]) -> T:
        """The tiles to take for rows (N, …) `like` these; `run` does the op's work with some, and may be repeated."""
        found = self.fitted(like, *sizes)
        if CANDIDATE is not None:
            return found[min(CANDIDATE, len(found) - 1)]
        if len(found) == 1 or STORE.has_nothing():
            return found[0]  # what `STORE.choose` would take, without a key for it
        return STORE.choose(key_of(op, like, sizes), found, run, like.device)


_FITTED: dict[Any, tuple[Any, list[Any]]] = {}  # asked in every call


# --- what is on disk

FILE = "tiles.json"
FORMAT = 1


@cache
def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {chip(device)}"


def key_of(op: str, like: Tensor, sizes: Sequence[int]) -> str:
    """What a choice holds for. Rows count by the power of two that holds them."""
    return _key(op, _device_name(like.device), like.dtype, tuple(sizes), next_power_of_2(max(1, like.shape[0])))


@cache
def _key(op: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...], rows: int) -> str:
    kind = str(dtype).removeprefix("torch.")
    return " | ".join(map(str, (op, device, f"triton {triton.__version__}", kind, *sizes, f"rows {rows}")))


class Store:
    """Choices by key, in memory and in a file of a folder; without a folder, in memory alone.

    A file that can't be read or written is a warning once, and tuning goes on without it. Several processes may write:
    each adds its choices to what the others wrote, under a lock where the system has one, and replaces the file whole.
    """

    def __init__(self, folder: Path | None = None, measure: Callable[[Callable[[], object]], float] | None = None):
        self.folder = folder
        self.measure = measure  # seconds of a call; None: nothing is tuned
        self._known: dict[str, Any] | None = None

    def configure(self, folder: Path | None, measure: Callable[[Callable[[], object]], float] | None) -> None:
        """Another folder is read anew."""
        if folder is not self.folder and folder != self.folder:
            self.folder, self._known = folder, None
        self.measure = measure

    def has_nothing(self) -> bool:
        """Whether no tiles were chosen before, in this process or on disk, and none are to be."""
        if self._known is None:
            self._known = self._read()
        return self.measure is None and not self._known

    def choose(self, key: str, candidates: Sequence[T], run: Callable[[T], object], device: torch.device) -> T:
        """What was chosen before, else the quickest where tuning was asked for, else the first candidate."""
        if self._known is None:
            self._known = self._read()
        held = self._known.get(key)
        for tiles in candidates if held is not None else ():
            if list(tiles) == held:
                return tiles
        measure = self.measure
        if measure is None or len(candidates) == 1 or _recording(device):
            return candidates[0]
        seconds: dict[T, float] = {}
        for tiles in candidates:
            try:
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    seconds[tiles] = measure(lambda tiles=tiles: run(tiles))  # type: ignore[misc]
            except triton.runtime.errors.OutOfResources:
                continue  # this card has less shared memory than its kind
            except Exception as error:
                if tiles == candidates[0]:
                    raise  # the default must run
                text = f"momkd: tuning {key} passes over {tiles}, which failed ({type(error).__name__}: {error})"
                warnings.warn(text, stacklevel=2)
        best = min(seconds, key=seconds.__getitem__, default=candidates[0])
        self._known[key] = list(best)
        self._write(key)
        return best

    def _read(self) -> dict[str, Any]:
        if self.folder is None:
            return {}
        try:
            held = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
            if held["format"] != FORMAT:
                return {}
            return dict(held["tiles"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._warn("read", error)
            return {}

    def _write(self, key: str) -> None:
        if self.folder is None or self._known is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{FILE}.lock"):
                self._known = self._read() | {key: self._known[key]} | self._known
                handle, name = tempfile.mkstemp(dir=self.folder, prefix=FILE)
                try:
                    with open(handle, "w", encoding="utf-8") as file:
                        json.dump({"format": FORMAT, "tiles": self._known}, file, indent=1, sort_keys=True)
                    os.replace(name, self.folder / FILE)
                except BaseException:
                    os.unlink(name)
                    raise
        except OSError as error:
            self._warn("written", error)

    def _warn(self, done: str, error: Exception) -> None:
        text = f"momkd: tuned tiles in {self.folder} cannot be {done} ({type(error).__name__}: {error}); "
        warnings.warn(text + "going on without; MOMKD_CACHE_DIR names another folder", stacklevel=2)


@contextmanager
def _locked(path: Path):
    try:
        import fcntl
    except ImportError:  # no such locks: at worst a choice is lost, never the file
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _recording(device: torch.device) -> bool:
    """Whether launches are being recorded and not run, so that nothing can be timed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


STORE = Store()

# --- the candidates

POOL = Candidates(
    half=(Tiles(64, 128), Tiles(64, 64, 4, 3), Tiles(32, 128, 4, 3), Tiles(128, 64, 8)),
    single=(Tiles(64, 64), Tiles(32, 64, 4, 3), Tiles(64, 64, 8)),
)
POOL_ONE_HEAD = Candidates(
    half=(Tiles(32, 256), Tiles(16, 256), Tiles(32, 128), Tiles(32, 512, 8)),
    single=(Tiles(32, 128), Tiles(16, 256), Tiles(32, 256, 8)),
)
POOL_BACKWARD = Candidates(  # with 4 warps, 64 rows that hold both gradients spill
    half=(Tiles(32, 128, 4), Tiles(64, 128, 8), Tiles(64, 64, 8, 3)),
    single=(Tiles(64, 64, 8), Tiles(32, 64, 4)),
)
GATE_SCORES = Candidates(
    half=(Tiles(32, 64), Tiles(64, 64, 8), Tiles(16, 128)), single=(Tiles(32, 64), Tiles(16, 64), Tiles(64, 64, 8))
)
GATE_BACKWARD = Candidates(
    half=(Tiles(32, 64), Tiles(32, 64, 8), Tiles(64, 64, 8)), single=(Tiles(32, 64, 8), Tiles(16, 64))
)
MEMORY = Candidates(
    half=(SlotTiles(64, 64, 64), SlotTiles(32, 64, 64), SlotTiles(128, 64, 64, 8)),
    single=(SlotTiles(32, 32, 64), SlotTiles(64, 32, 64, 8), SlotTiles(32, 32, 32)),
)
if _TRITON < (3, 6):
    MEMORY = MEMORY._replace(single=MEMORY.single[2:])  # Triton 3.4 spills a few bytes with 64 columns
GRAPH = Candidates(half=(GraphTiles(),), single=(GraphTiles(),))
GRAPH_BACKWARD = Candidates(half=(GraphTiles(nodes=8),), single=(GraphTiles(nodes=8),))


def register_limit(device: torch.device) -> dict[str, int]:
    """All registers that a thread may have: left alone, ptxas spills a few bytes to fit one more program."""
    return {} if chip(device).startswith("gfx") else {"maxnreg": 255}

"""Sizes of tiles: a few configurations an op, chosen by width and type alone, never by exact lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch

PLATFORM = "hip" if torch.version.hip else "cuda"


class Tiles(NamedTuple):
    """How a kernel is cut: rows and columns of a tile, warps of a program, stages of its pipeline."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2


class Choices(NamedTuple):
    """Tiles for 16-bit and for 32-bit values."""

    half: Tiles
    single: Tiles

    def choose(self, width: int, dtype: torch.dtype) -> Tiles:
        """The tiles for rows of this width; columns are not wider than the rows need."""
        tiles = self.single if dtype == torch.float32 else self.half
        most = tiles.columns if width % 16 == 0 else 32  # rows that begin anywhere load value by value
        return tiles._replace(columns=_at_most(most, width))


POOL = Choices(half=Tiles(64, 128), single=Tiles(64, 64))
POOL_BACKWARD = Choices(half=Tiles(64, 128, 8), single=Tiles(64, 64, 8))  # with 4 warps, holding both gradients spills


class GateTiles(NamedTuple):
    """How the gate product is cut: rows of a tile, columns of the gate and of the features that it takes at a time."""

    rows: int
    gate: int
    columns: int
    warps: int = 8
    stages: int = 3


class GateChoices(NamedTuple):
    """Gate tiles for 16-bit and for 32-bit features."""

    half: GateTiles
    single: GateTiles

    def choose(self, hidden: int, width: int, heads: int, dtype: torch.dtype) -> GateTiles:
        """The tiles for a gate of `hidden` columns over rows of `width`; neither side is padded beyond need."""
        tiles = self.single if dtype == torch.float32 else self.half
        if heads > 1:
            tiles = tiles._replace(gate=min(tiles.gate, 64), rows=min(tiles.rows, 64))
        if PLATFORM == "hip":  # 64 KiB of shared memory
            tiles = tiles._replace(rows=min(tiles.rows, 64), gate=min(tiles.gate, 64), warps=4, stages=2)
        return tiles._replace(gate=_at_most(tiles.gate, hidden), columns=_at_most(tiles.columns, width))


def _at_most(columns: int, size: int) -> int:
    """The power of two, 16 at least, that holds `size` columns, or `columns` where that is less."""
    narrow = 16
    while narrow < min(size, columns):
        narrow *= 2
    return narrow


# In bfloat16 on sm_90, 128 rows take every register in the plain forward; what holds more would spill.
_SINGLE = GateTiles(32, 64, 32, 4, 2)
GATE_FORWARD = GateChoices(half=GateTiles(128, 128, 64), single=_SINGLE)
GATE_FORWARD_DROPOUT = GateChoices(half=GateTiles(64, 128, 64), single=_SINGLE)
GATE_BACKWARD = GateChoices(half=GateTiles(64, 128, 64), single=_SINGLE)


class SlotTiles(NamedTuple):
    """How the product of rows with the memory is cut: rows of a tile, slots and columns that it takes at a time."""

    rows: int
    slots: int
    columns: int
    warps: int = 4
    stages: int = 2


class SlotChoices(NamedTuple):
    """Slot tiles for 16-bit and for 32-bit rows."""

    half: SlotTiles
    single: SlotTiles

    def choose(self, slots: int, width: int, dtype: torch.dtype) -> SlotTiles:
        """The tiles for `slots` prototypes a class and rows of `width`; neither side is padded beyond need."""
        tiles = self.single if dtype == torch.float32 else self.half
        return tiles._replace(slots=_at_most(tiles.slots, slots), columns=_at_most(tiles.columns, width))


MEMORY = SlotChoices(half=SlotTiles(64, 64, 64), single=SlotTiles(32, 32, 64))


def register_limit() -> dict[str, int]:
    """All registers that a thread may have: left alone, ptxas spills a few bytes to fit one more program."""
    return {"maxnreg": 255} if PLATFORM == "cuda" else {}


class GraphTiles(NamedTuple):
    """How graph attention is cut: neighbours of a tile, columns of a head, nodes of a program in backward."""

    rows: int
    columns: int
    nodes: int
    warps: int = 1
    stages: int = 2


class GraphChoices(NamedTuple):
    """Neighbours of a tile for 16-bit and for 32-bit rows, and nodes of a program."""

    half: int
    single: int
    nodes: int = 1

    def choose(self, width: int, dtype: torch.dtype) -> GraphTiles:
        """All columns of a head at once, 256 of them to a warp."""
        columns = _at_most(1 << 30, width)
        rows = self.single if dtype == torch.float32 else self.half
        return GraphTiles(rows, columns, self.nodes, max(1, columns // 256))


GRAPH = GraphChoices(half=8, single=8)
GRAPH_BACKWARD = GraphChoices(half=8, single=8, nodes=8)

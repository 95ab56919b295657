"""Sizes of tiles: a few configurations an op, chosen by width and type alone, never by exact lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
        narrow = 16
        while narrow < min(width, tiles.columns):
            narrow *= 2
        return tiles._replace(columns=narrow)


POOL = Choices(half=Tiles(64, 128), single=Tiles(64, 64))

"""A bounded sample of rows of each class, from a stream of any length, to fill a memory from."""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.models.base import MemoryRows


class Reservoir:
    """Keeps at most `size` rows a class, drawn without replacement with probabilities that grow with their mass.

    Args:
        num_classes: C.
        size: rows of a class.
        generator: of the draws, on the CPU.

    Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: keep the largest u^(1/w).
    """

    def __init__(self, num_classes: int, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * num_classes  # log-keys (n,) and rows (n, S)

    def add(self, new: MemoryRows) -> None:
        """Offer rows; those without class, without mass or with a value that is not finite are left out."""
        draws = torch.rand(new.weights.shape[0], generator=self.generator, dtype=torch.float64)
        keys = draws.clamp_min(1e-300).log().to(new.weights.device) / new.weights.double()
        usable = (new.weights > 0) & new.rows.isfinite().all(1)
        for c, kept in enumerate(self.kept):
            mine = usable & (new.row_class == c)
            key, rows = keys[mine], new.rows[mine]
            if kept is not None:
                key, rows = torch.cat([kept[0], key]), torch.cat([kept[1], rows])
            top = key.topk(min(self.size, key.shape[0])).indices
            self.kept[c] = key[top], rows[top]

    def rows(self) -> tuple[Tensor, Tensor]:
        """All kept rows (R, S) and their classes (R,)."""
        filled = [(c, kept[1]) for c, kept in enumerate(self.kept) if kept is not None]
        if not filled:
            raise ValueError("reservoir: expected rows, got none; add some first")
        classes = [torch.full((rows.shape[0],), c, device=rows.device) for c, rows in filled]
        return torch.cat([rows for _, rows in filled]), torch.cat(classes)

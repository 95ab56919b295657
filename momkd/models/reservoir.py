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
        features: S.

    Attributes:
        kept: of each class, log-keys (n,) float64 and rows (n, S), the largest key first. The reservoirs of several
            ranks become one by concatenating both and `cut`.

    Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: keep the largest u^(1/w).
    """

    def __init__(self, num_classes: int, size: int, features: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        none = torch.zeros(0, dtype=torch.float64, device=device), torch.zeros(0, features, device=device)
        self.kept: list[tuple[Tensor, Tensor]] = [none] * num_classes

    def add(self, new: MemoryRows, generator: torch.Generator) -> None:
        """Offer rows; those without class, without mass or with a value that is not finite are left out."""
        draws = torch.rand(new.weights.shape[0], generator=generator, dtype=torch.float64)
        keys = draws.clamp_min(1e-300).log().to(new.weights.device) / new.weights.double()
        usable = (new.weights > 0) & new.rows.isfinite().all(1)
        for c, (key, rows) in enumerate(self.kept):
            mine = usable & (new.row_class == c)
            self.cut(c, torch.cat([key, keys[mine]]), torch.cat([rows, new.rows[mine]]))

    def cut(self, c: int, keys: Tensor, rows: Tensor) -> None:
        """Keep of a class the `size` of these rows with the largest keys."""
        top = keys.topk(min(self.size, keys.shape[0])).indices
        self.kept[c] = keys[top], rows[top]

    def rows(self) -> tuple[Tensor, Tensor]:
        """All kept rows (R, S) and their classes (R,)."""
        if not any(len(keys) for keys, _ in self.kept):
            raise ValueError("reservoir: expected rows, got none; add some first")
        classes = [torch.full((rows.shape[0],), c, device=rows.device) for c, (_, rows) in enumerate(self.kept)]
        return torch.cat([rows for _, rows in self.kept]), torch.cat(classes)

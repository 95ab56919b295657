"""The edge of a drop-in: what the caller gave becomes rows of ragged bags, and results go back in the caller's form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.reference.segments import bag_index, segment_softmax, softmax_stats

# Modules that treat every patch by itself, so that they may run on the rows of all bags at once.
ROW_WISE = (nn.Identity, nn.Linear, nn.LayerNorm, nn.Dropout, nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SiLU)


class Rows(NamedTuple):
    """Rows of B bags. `keep` (B, M) is the mask of a padded caller and `size` its (B, M); both None for `Bags`."""

    x: Tensor  # (N, L)
    offsets: Tensor  # (B + 1,) int32
    size: tuple[int, int] | None = None
    keep: Tensor | None = None

    @property
    def bags(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    def back(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """Row values (N, H) as the caller would have them: (B, M, H), `fill` where padded; as they are for `Bags`."""
        if self.size is None:
            return rows
        if self.keep is None:
            return rows.reshape(*self.size, rows.shape[1])
        out = rows.new_full((*self.size, rows.shape[1]), fill)
        return out.masked_scatter(self.keep[..., None].expand_as(out), rows)

    def softmax(self, scores: Tensor) -> Tensor:
        """Attention (N, H) that sums to one in each bag; gradient reaches the scores."""
        if self.bags == 1:
            return torch.softmax(scores, 0)
        return segment_softmax(scores, softmax_stats(scores, self.offsets), self.offsets)

    def bag(self) -> Tensor:
        """(N,) int64, the bag of every row."""
        return bag_index(self.offsets, self.x.shape[0])


def even_offsets(bags: int, size: int, device: torch.device) -> Tensor:
    """Offsets of bags of one size, made on the device: the host does not wait."""
    return torch.arange(bags + 1, dtype=torch.int32, device=device) * size


def one_bag(x: Tensor | Bags) -> Rows:
    """One bag (N, L), as projects without a batch dimension take it, or `Bags`."""
    if isinstance(x, Bags):
        return Rows(x.features, x.offsets)
    if x.ndim != 2:
        raise ValueError(f"expected one bag (N, L) or momkd.Bags, got a tensor {tuple(x.shape)}")
    return Rows(x, even_offsets(1, x.shape[0], x.device))


def padded(x: Tensor | Bags, mask: Tensor | None) -> Rows:
    """A padded batch (B, M, L) and its mask (B, M), nonzero where a row is real, or `Bags` without a mask.

    A mask is read on the host once, to know how many rows there are; without one nothing is copied.
    """
    if isinstance(x, Bags):
        if mask is not None:
            raise ValueError("mask: expected None, because Bags hold no padding, got a tensor")
        return Rows(x.features, x.offsets)
    if x.ndim != 3:
        raise ValueError(f"expected a padded batch (B, M, L) or momkd.Bags, got a tensor {tuple(x.shape)}")
    size = x.shape[0], x.shape[1]
    if mask is None:
        return Rows(x.flatten(0, 1), even_offsets(*size, x.device), size)
    if tuple(mask.shape) != size:
        raise ValueError(f"mask: expected (B, M) = {size}, got {tuple(mask.shape)}")
    keep: Tensor = mask.to(x.device) != 0
    offsets = nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    return Rows(x[keep], offsets, size, keep)


def row_wise(module: nn.Module) -> bool:
    """Whether every patch goes through `module` by itself."""
    if type(module) is nn.Sequential:
        return all(map(row_wise, module))
    return type(module) in ROW_WISE

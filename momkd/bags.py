"""`Bags`: many bags of different sizes in one batch, without padding.

The rows of all bags lie one after the other in `features` (N, L); bag b owns rows `offsets[b]` to `offsets[b + 1]`.
The lengths are kept on the host as well, so that no op ever has to ask the device for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import overload

import torch
from torch import Tensor

from momkd.graph import Edges, batch

_MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Bags:
    """A ragged batch of B bags with N rows in all.

    Args:
        features: (N, L) any float dtype; row i is the feature vector of one patch.
        offsets: (B + 1,) int32 on the device of `features`, from 0 to N, never decreasing (`cu_seqlens` elsewhere).
        lengths: the B bag sizes on the host. Left out, they are read from `offsets`, which waits for the device once.
        edges: a graph over the N rows, whose edges stay inside a bag, for encoders that want one; see `momkd.graph`.

    Raises:
        ValueError: shapes, dtype, device or order don't fit; the message says what was expected and what came.

    Example:
        >>> bags = Bags.from_list([torch.randn(5, 8), torch.randn(0, 8), torch.randn(3, 8)])
        >>> len(bags), bags.lengths, bags.offsets.tolist()
        (3, (5, 0, 3), [0, 5, 5, 8])
    """

    features: Tensor  # (N, L)
    offsets: Tensor  # (B + 1,)
    lengths: tuple[int, ...] = ()
    edges: Edges | None = None

    def __post_init__(self) -> None:
        x, offsets = self.features, self.offsets
        if x.ndim != 2:
            raise ValueError(f"features: expected (N, L), got {tuple(x.shape)}; one bag alone is Bags.from_list([x])")
        if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int32:
            raise ValueError(
                f"offsets: expected int32 (B+1,), got {offsets.dtype} {tuple(offsets.shape)}; "
                "use Bags.from_list or offsets.int()"
            )
        if offsets.device != x.device:
            raise ValueError(
                f"offsets: expected on {x.device} like features, got {offsets.device}; use Bags.to(device)"
            )
        if not self.lengths and offsets.numel() > 1:
            host = offsets.tolist()
            lengths = tuple(b - a for a, b in pairwise(host))
            if host[0] != 0:
                raise ValueError(f"offsets: expected to start at 0, got {host[0]}")
            object.__setattr__(self, "lengths", lengths)
        if len(self.lengths) != offsets.numel() - 1:
            raise ValueError(f"lengths: expected {offsets.numel() - 1} as in offsets, got {len(self.lengths)}")
        if any(n < 0 for n in self.lengths):
            b = next(i for i, n in enumerate(self.lengths) if n < 0)
            raise ValueError(f"offsets: expected never to decrease, but bag {b} has {self.lengths[b]} rows")
        if sum(self.lengths) != x.shape[0]:
            raise ValueError(
                f"offsets: expected to end at N = {x.shape[0]} (rows of features), got {sum(self.lengths)}"
            )
        if self.edges is not None and (self.edges.num_nodes != x.shape[0] or self.edges.device != x.device):
            raise ValueError(
                f"edges: expected a graph of {x.shape[0]} nodes on {x.device} like features, got {self.edges}"
            )

    # -- making --------------------------------------------------------------------------------------------------

    @classmethod
    def from_list(cls, bags: Sequence[Tensor]) -> Bags:
        """Concatenate B tensors (n_b, L) of one dtype and device; n_b may be 0."""
        if not bags:
            raise ValueError("bags: expected at least one tensor (n, L), got an empty list")
        first = bags[0]
        width = first.shape[-1] if first.ndim else "L"
        for b, x in enumerate(bags):
            if x.ndim != 2 or x.shape[1:] != first.shape[1:] or x.dtype != first.dtype or x.device != first.device:
                raise ValueError(
                    f"bags[{b}]: expected (n, {width}) {first.dtype} on {first.device} like bags[0], "
                    f"got {tuple(x.shape)} {x.dtype} on {x.device}"
                )
        features = torch.cat(list(bags)) if len(bags) > 1 else first
        return cls.from_lengths(features, [x.shape[0] for x in bags])

    @classmethod
    def from_lengths(cls, features: Tensor, lengths: Sequence[int]) -> Bags:
        """Rows that already lie bag after bag, and the size of each bag."""
        host = tuple(int(n) for n in lengths)
        total = sum(host)
        if total > _MAX_ROWS:
            raise ValueError(f"lengths: expected at most {_MAX_ROWS} rows in a batch (int32 offsets), got {total}")
        offsets = torch.tensor([0, *accumulate(host)], dtype=torch.int32, device="cpu")
        if features.device.type == "cuda":
            offsets = offsets.pin_memory().to(features.device, non_blocking=True)
        return cls(features, offsets.to(features.device), host)

    @classmethod
    def from_padded(cls, x: Tensor, mask: Tensor | None = None) -> Bags:
        """From a padded batch x (B, M, L) and mask (B, M), nonzero where a row is real (anywhere in the row).

        Reads the mask on the host once. Rows keep their order. `None` means that every row is real.
        """
        if x.ndim != 3:
            raise ValueError(f"x: expected (B, M, L), got {tuple(x.shape)}")
        if mask is None:
            return cls.from_lengths(x.flatten(0, 1), [x.shape[1]] * x.shape[0])
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask: expected {tuple(x.shape[:2])} like x, got {tuple(mask.shape)}")
        keep = mask.to(device=x.device) != 0
        return cls.from_lengths(x[keep], keep.sum(1).tolist())

    # -- reading -------------------------------------------------------------------------------------------------

    def to_padded(self, value: float = 0.0) -> tuple[Tensor, Tensor]:
        """Padded features (B, M, L) filled with `value`, and the mask (B, M) bool, True where a row is real."""
        size = max(self.lengths, default=0)
        steps = torch.arange(size, device=self.device)
        mask = steps < self.offsets.diff()[:, None]  # (B, M)
        rows = (self.offsets[:-1, None] + steps)[mask]  # (N,)
        out = self.features.new_full((len(self), size, self.features.shape[1]), value)
        out[mask] = self.features[rows]
        return out, mask

    def unbind(self) -> tuple[Tensor, ...]:
        """The B bags as views (n_b, L) of the features."""
        return torch.split(self.features, list(self.lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind())

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Bags: ...
    def __getitem__(self, index: int | slice) -> Tensor | Bags:
        """One bag as a view (n, L), or a run of bags as `Bags` with their graph; a step other than 1 copies."""
        if isinstance(index, int):
            return self.unbind()[index]
        start, stop, step = index.indices(len(self))
        bags = self.unbind()[index]
        if not bags:
            return Bags.from_lengths(self.features[:0], [])
        if step != 1:
            return self._with_graphs_of(Bags.from_list(bags), range(start, stop, step))
        first = sum(self.lengths[:start])
        lengths = self.lengths[start:stop]
        cut = Bags.from_lengths(self.features[first : first + sum(lengths)], lengths)
        return self._with_graphs_of(cut, range(start, stop))

    def _with_graphs_of(self, cut: Bags, chosen: range) -> Bags:
        """`cut`, which holds these bags of mine, with their part of my graph."""
        if self.edges is None:
            return cut
        ends = [0, *accumulate(self.lengths)]
        return cut.with_edges(batch([self.edges.rows(ends[b], ends[b + 1]) for b in chosen]))

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def num_rows(self) -> int:
        """N, the patches of all bags."""
        return self.features.shape[0]

    # -- moving --------------------------------------------------------------------------------------------------

    def with_features(self, features: Tensor) -> Bags:
        """The same bags with other features (N, L'), for instance after an encoder."""
        if features.shape[:1] != self.features.shape[:1]:
            raise ValueError(f"features: expected {self.num_rows} rows, got {tuple(features.shape)}")
        return replace(self, features=features)

    def with_edges(self, edges: Edges | None) -> Bags:
        """The same bags with a graph over their rows; `momkd.graph.batch` joins those of the bags.

        Example:
            >>> coords = [torch.rand(70, 2), torch.rand(500, 2)]
            >>> bags = Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)])
            >>> bags.with_edges(momkd.graph.batch([momkd.graph.knn(xy) for xy in coords])).edges
            Edges(570 nodes, 4560 edges, cpu)
        """
        return replace(self, edges=edges)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Bags:
        """Move to `device`; `dtype` applies to the features alone."""
        features = self.features.to(device=device, dtype=dtype, non_blocking=non_blocking)
        edges = self.edges if self.edges is None else self.edges.to(features.device, non_blocking=non_blocking)
        return Bags(features, self.offsets.to(device=device, non_blocking=non_blocking), self.lengths, edges)

    def pin_memory(self) -> Bags:
        """Page-locked copies, so that `.to(device, non_blocking=True)` does not wait."""
        edges = None if self.edges is None else self.edges.pin_memory()
        return Bags(self.features.pin_memory(), self.offsets.pin_memory(), self.lengths, edges)

    def __repr__(self) -> str:
        n, width = self.features.shape
        return f"Bags({len(self)} bags, {n} rows of {width}, {self.dtype}, {self.device})"

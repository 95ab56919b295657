"""A ragged batch of slides, in host memory or on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from momkd.bags import Bags
from momkd.data.allocation import COPYING, memory_for
from momkd.data.prefetch import KeptRows
from momkd.graph import Edges


@dataclass(frozen=True, eq=False)
class Batch:
    """B slides: bags, labels (B,) int64 with −1 for none; profiles (B, G) and has_omics (B,) bool, or None.

    `number` is its place in the plan.
    """

    number: int
    slide_ids: tuple[str, ...]
    bags: Bags
    labels: Tensor
    omics: Tensor | None = None
    has_omics: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """On `device`; from pinned memory to a GPU without waiting."""
        waits = device.type == "cpu"  # else what came from a GPU could be read before it is there
        moved = (None if t is None else t.to(device, non_blocking=not waits) for t in (self.omics, self.has_omics))
        bags, labels = self.bags.to(device, non_blocking=not waits), self.labels.to(device, non_blocking=not waits)
        return Batch(self.number, self.slide_ids, bags, labels, *moved)

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, those of the graph too."""
        edges = () if self.bags.edges is None else self.bags.edges.tensors()
        given = (t for t in (self.omics, self.has_omics) if t is not None)
        return self.bags.features, self.bags.offsets, self.labels, *given, *edges


@dataclass(frozen=True, eq=False)
class Assembled:
    """A batch as the reader makes it, in host memory.

    A bag whose rows are kept on the device is empty in `batch`; then the graph of all bags is in `edges`.
    """

    batch: Batch
    kept: Mapping[int, KeptRows]  # by bag
    edges: Edges | None

    def to(self, device: torch.device) -> Batch:
        """On `device`; all copies are queued on the current stream."""
        patches = self.batch.bags.num_rows + sum(map(len, self.kept.values()))
        with memory_for(self.batch.slide_ids, patches, "copy", COPYING, device):
            return self._to(device)

    def _to(self, device: torch.device) -> Batch:
        if not self.kept:
            return self.batch.to(device)
        host = self.batch.bags
        lengths = [len(self.kept[b]) if b in self.kept else n for b, n in enumerate(host.lengths)]
        rows = torch.empty(sum(lengths), host.features.shape[1], dtype=host.dtype, device=device)
        for b, (target, source) in enumerate(zip(torch.split(rows, lengths), host, strict=True)):
            if b in self.kept:
                self.kept[b].write(target)
            else:
                target.copy_(source, non_blocking=True)
        bags = Bags.from_lengths(rows, lengths).with_edges(self.edges and self.edges.to(device, non_blocking=True))
        return replace(self.batch, bags=bags).to(device)

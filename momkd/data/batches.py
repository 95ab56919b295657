"""Ragged batches of slides: by a budget of patches, balanced over classes, read ahead while the model computes.

The order of an epoch follows from (seed, epoch) alone, whatever was read before: a resumed run sees the same batches,
and so does each of several ranks, which reads its own share of every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from momkd.bags import Bags
from momkd.data.allocation import READING, memory_for
from momkd.data.batch import Assembled, Batch
from momkd.data.prefetch import DeviceCache, KeptRows, Transfer, ahead, transfer_to
from momkd.errors import InputError
from momkd.graph import Edges, batch

_AHEAD = 2  # batches read while one is in use
_ON_DEVICE_AHEAD = 1  # of them copied to a GPU already
_CAST = 256  # rows cast at once


@dataclass(eq=False)
class BagLoader:
    """Reads slides and joins them into batches.

    Args:
        slide_ids: n slides.
        labels: (n,) int64, −1 for none.
        sizes: patches of each slide by id.
        read: features (N, L) of a slide; what it raises ends the epoch, unless `skipped` is given.
        omics: (n, G) float32, NaN rows for slides without a profile; None for no genomics at all.
        slides_per_step: B at most.
        patch_budget: patches of a batch at most; a larger slide is a batch of its own.
        max_patches: of a slide in `training` batches, drawn anew each time; 0 takes all.
        cache_bytes: features kept in memory between epochs.
        bucket: slides, in the order they were drawn, that are sorted by size before they are joined into batches, which
            are then shuffled: batches of like slides fill the budget better. 0 joins them as they were drawn.
        pin: page-locked batches, for a GPU.
        device_cache: features kept on a device, instead of in memory, while they fit.
        graph: the graph of a slide, or of some of its patches, for encoders that want one; see `SlideGraphs`.
        skipped: where a slide that cannot be read is noted and left out; None: reading it is an error.
        read_blocks: reads a slide so many patches at a time; None where slides are read whole alone.
        dtype: of the features in batches; None: as they are read.
    """

    slide_ids: Sequence[str]
    labels: np.ndarray[tuple[int], np.dtype[np.int64]]
    sizes: Mapping[str, int]
    read: Callable[[str], Tensor]
    omics: np.ndarray[tuple[int, int], np.dtype[np.float32]] | None = None
    slides_per_step: int = 16
    patch_budget: int = 200_000
    max_patches: int = 0
    cache_bytes: int = 0
    pin: bool = False
    bucket: int = 0
    graph: Callable[[str, np.ndarray[tuple[int], np.dtype[np.int64]] | None], Edges] | None = None
    skipped: dict[str, str] | None = None
    device_cache: DeviceCache | None = None
    read_blocks: Callable[[str, int], Iterator[Tensor]] | None = None
    dtype: torch.dtype | None = None
    _cache: dict[str, tuple[Tensor | None, Edges | None]] = field(default_factory=dict, init=False, repr=False)
    _held: int = field(default=0, init=False, repr=False)  # bytes in the cache
    _nothing: tuple[Tensor, Edges | None] | None = field(default=None, init=False, repr=False)  # of a slide: no row

    def training(self, seed: int, epoch: int, *, balanced: bool = True) -> list[list[int]]:
        """The batches of an epoch as rows of `slide_ids`.

        `balanced`: n draws with replacement that make the labelled classes equally frequent. Else every slide once.
        """
        rng = np.random.default_rng([seed, epoch])
        if balanced:
            order = rng.choice(len(self.slide_ids), len(self.slide_ids), p=class_balance(self.labels))
        else:
            order = rng.permutation(len(self.slide_ids))
        if self.bucket <= 1:
            return self._packed(order.tolist(), self.max_patches)
        plan: list[list[int]] = []
        for start in range(0, len(order), self.bucket):
            drawn = order[start : start + self.bucket].tolist()
            sizes = dict(zip(drawn, self.patches(drawn, most=self.max_patches), strict=True))
            plan += self._packed(sorted(drawn, key=lambda row: -sizes[row]), self.max_patches)
        return [plan[number] for number in rng.permutation(len(plan))]

    def once(self) -> list[list[int]]:
        """Every slide once, in order, for prediction."""
        return self._packed(list(range(len(self.slide_ids))), 0)

    def batches(
        self,
        plan: Sequence[Sequence[int]],
        *,
        seed: Sequence[int] | None = None,
        share: tuple[int, int] | None = None,
        only: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Generator[Batch, None, None]:
        """The batches of a plan, read ahead by a thread. One of which no slide can be read is left out.

        On a GPU a batch is used by the stream that is current where it is taken. While it is in use the next one is
        copied, on a stream of its own; three batches at most take memory there. Closing the iterator ends the threads.

        Args:
            plan: rows of `slide_ids`, batch by batch.
            seed: of the subsampling; None takes all patches.
            share: (rank, ranks): of every batch, the slides that fall to this rank, so that the ranks' patches are
                about equal. Then every batch comes, be it one of no slides.
            only: the numbers of the batches that are wanted, ascending; None for all.
            device: where the batches go; None leaves them in host memory.

        Raises:
            ValueError: `device_cache` is on another device.
        """
        transfer = None if device is None else transfer_to(torch.device(device))
        cache = None if transfer is None else self.device_cache
        if transfer is not None and cache is not None and cache.device != transfer.device:
            raise ValueError(f"device: expected {cache.device} like device_cache, got {device}; make a cache there")
        numbers = range(len(plan)) if only is None else only
        read = ahead((partial(self._batch, n, plan[n], seed, share, cache) for n in numbers), _AHEAD, "momkd-read")
        with closing(read):
            if transfer is None or not transfer.overlaps:
                for assembled in read:
                    if assembled is not None:
                        yield assembled.batch if transfer is None else assembled.to(transfer.device)
                return
            copies = (partial(_copied, read, transfer, transfer.mark()) for _ in numbers)
            with closing(ahead(copies, _ON_DEVICE_AHEAD, "momkd-copy")) as copied:
                for moved in copied:
                    if moved is not None:
                        transfer.receive(moved[0].tensors(), moved[1])
                        yield moved[0]

    def comes_in_blocks(self, batch: Sequence[int]) -> bool:
        """Whether a batch of a plan is one slide larger than `patch_budget` that `blocks` reads piece by piece."""
        return self.read_blocks is not None and self.graph is None and sum(self.patches(batch)) > self.patch_budget

    def blocks(self, row: int) -> Generator[Tensor, None, None]:
        """Features of a slide, `patch_budget` patches at a time, (n, L); kept where the cache has room.

        Raises:
            InputError: as `read`.
        """
        slide = self.slide_ids[row]
        if self.read_blocks is None:
            raise ValueError("blocks: expected a loader with read_blocks, got one that reads slides whole")
        kept, _ = self._cache.get(slide, (None, None))
        if kept is not None:
            yield from torch.split(kept, self.patch_budget)
            return
        done = 0
        for block in self.read_blocks(slide, self.patch_budget):
            if done == 0 and self._held + block[0].nbytes * self.sizes[slide] <= self.cache_bytes:
                kept = block.new_empty(self.sizes[slide], block.shape[1])
            if kept is not None:
                kept[done : done + len(block)] = block
            done += len(block)
            yield block
        if kept is not None:
            self._cache[slide] = kept, None
            self._held += kept.nbytes

    def patches(self, rows: Sequence[int], *, most: int = 0) -> list[int]:
        """Patches of each of these slides, `most` at most unless 0."""
        sizes = [self.sizes[self.slide_ids[row]] for row in rows]
        return [min(size, most) for size in sizes] if most else sizes

    def _packed(self, order: Sequence[int], most: int) -> list[list[int]]:
        plan: list[list[int]] = []
        patches = 0
        for row, size in zip(order, self.patches(order, most=most), strict=True):
            full = not plan or len(plan[-1]) >= self.slides_per_step or patches + size > self.patch_budget
            if full:
                plan.append([])
                patches = 0
            plan[-1].append(row)
            patches += size
        return plan

    def _batch(
        self,
        number: int,
        rows: Sequence[int],
        seed: Sequence[int] | None,
        share: tuple[int, int] | None,
        cache: DeviceCache | None,
    ) -> Assembled | None:
        features: list[Tensor] = []
        graphs: list[Edges | None] = []
        kept: list[int] = []
        on_device: dict[int, KeptRows] = {}
        most = 0 if seed is None else self.max_patches
        mine = range(len(rows)) if share is None else deal(self.patches(rows, most=most), share[1])[share[0]]
        for position in mine:
            row, drawn = rows[position], None
            slide = self.slide_ids[row]
            if seed is not None and 0 < most < self.sizes[slide]:
                rng = np.random.default_rng([*seed, number, position])
                drawn = np.sort(rng.choice(self.sizes[slide], most, replace=False))
            try:
                with memory_for([slide], self.sizes[slide], "read", READING):
                    x, edges = self._slide(slide, drawn, cache)
            except InputError as error:
                if self.skipped is None:
                    raise
                self.skipped[slide] = str(error)
                continue
            if isinstance(x, KeptRows):
                on_device[len(kept)] = x
                x = x.none()
            features.append(x)
            graphs.append(edges)
            kept.append(row)
        if not kept and share is None:
            return None
        if kept:
            names = [self.slide_ids[row] for row in kept]
            with memory_for(names, sum(map(len, features)), "join", READING):
                bags = self._joined(features)
        else:
            nothing, edges = self._no_rows()
            bags, graphs = Bags.from_lengths(nothing, []), [edges]
        omics = has_omics = None
        if self.omics is not None:
            profiles = torch.from_numpy(self.omics[kept])
            has_omics = ~profiles.isnan().any(1)
            omics = torch.where(has_omics[:, None], profiles, torch.zeros_like(profiles))
        labels = torch.from_numpy(self.labels[kept])
        if self.pin:
            labels = labels.pin_memory()
            omics, has_omics = (None if t is None else t.pin_memory() for t in (omics, has_omics))
        joined = None
        if self.graph is not None:
            joined = batch([edges for edges in graphs if edges is not None])
            joined = joined.pin_memory() if self.pin else joined
        bags = bags if on_device else bags.with_edges(joined)
        slide_ids = tuple(self.slide_ids[row] for row in kept)
        return Assembled(Batch(number, slide_ids, bags, labels, omics, has_omics), on_device, joined)

    def _no_rows(self) -> tuple[Tensor, Edges | None]:
        """Features (0, L) and their graph, cut from a slide that can be read."""
        for slide in self.slide_ids:
            if self._nothing is not None:
                break
            try:
                self._slide(slide, None)
            except InputError as error:
                if self.skipped is None:
                    raise
                self.skipped[slide] = str(error)
        if self._nothing is None:
            raise InputError(f"features: expected slides that can be read, got none of {len(self.slide_ids)}")
        return self._nothing

    def _check_rows(self, slide: str, what: str, rows: int) -> None:
        """A batch is planned by the sizes that slides had at first; the rows that are drawn are numbers below them."""
        if rows != self.sizes[slide]:
            raise InputError(
                f"{slide}: expected {what} of {self.sizes[slide]} patches as before, got {rows}: its file was changed; "
                "start again once nothing writes to it"
            )

    def _joined(self, features: list[Tensor]) -> Bags:
        """One batch; page-locked or of another type, the rows are copied once, from where they lie into it."""
        first = features[0]
        dtype = self.dtype or first.dtype
        if not self.pin and dtype == first.dtype:
            return Bags.from_list(features)
        sizes = [len(x) for x in features]
        rows = torch.empty(sum(sizes), first.shape[1], dtype=dtype, pin_memory=self.pin)
        if dtype == first.dtype:
            torch.cat(features, out=rows)
        else:
            for target, x in zip(torch.split(rows, sizes), features, strict=True):
                _cast(x, target)
        bags = Bags.from_lengths(rows, sizes)
        return replace(bags, offsets=bags.offsets.pin_memory()) if self.pin else bags

    def _slide(
        self,
        slide: str,
        drawn: np.ndarray[tuple[int], np.dtype[np.int64]] | None,
        cache: DeviceCache | None = None,
    ) -> tuple[Tensor | KeptRows, Edges | None]:
        """Features and graph of a slide, or of the patches that were drawn from it; only the whole is kept."""
        x, edges = self._cache.get(slide, (None, None))
        on_device = None if cache is None else cache.get(slide)
        new = 0  # bytes
        if x is None and on_device is None:
            x = self.read(slide)
            self._check_rows(slide, "features", len(x))
            on_device = None if cache is None else cache.keep(slide, x, pin=self.pin)
            x, new = (x, x.nbytes) if on_device is None else (None, 0)
        fresh = new > 0
        if self.graph is not None and drawn is None and edges is None:
            edges = self.graph(slide, None)
            self._check_rows(slide, "coordinates", edges.num_nodes)
            new += edges.nbytes
        if new and self._held + new <= self.cache_bytes:
            if x is not None and fresh:
                x = x.clone()  # what is mapped from a packed store would still be read from it
            self._cache[slide] = x, edges
            self._held += new
        index = None if drawn is None else torch.from_numpy(drawn)
        if drawn is not None:
            edges = None if self.graph is None else self.graph(slide, drawn)
        rows: Tensor | KeptRows
        if on_device is not None:
            rows = KeptRows(on_device, index.pin_memory() if index is not None and self.pin else index)
        else:
            assert x is not None
            rows = x if index is None else x[index]
        if self._nothing is None:
            nothing = rows.none() if isinstance(rows, KeptRows) else rows[:0].clone()
            self._nothing = nothing, None if edges is None else edges.rows(0, 0)
        return rows, edges


def _cast(x: Tensor, rows: Tensor) -> None:
    """Copy into rows of another type by way of float32, in cache: torch has no vectors from float16 to bfloat16."""
    for block, target in zip(torch.split(x, _CAST), torch.split(rows, _CAST), strict=True):
        target.copy_(block.float())


def _copied(
    read: Iterator[Assembled | None], transfer: Transfer, after: torch.cuda.Event | None
) -> tuple[Batch, torch.cuda.Event | None] | None:
    """The next batch that the reader made, copied to the device; the copier's task."""
    assembled = next(read, None)
    return None if assembled is None else transfer.copy(partial(assembled.to, transfer.device), after)


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Deals n things out so that the ranks' sums of sizes are about equal: indices by rank, each list ascending.

    The largest first, each to the rank that has least. A rank may get nothing.

    Example:
        >>> deal([5, 1, 9, 3], 2)
        [[2], [0, 1, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0, 0, r) for r in range(ranks)]  # size, number, rank
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, number, r = min(load)
        shares[r].append(i)
        load[r] = (total + sizes[i], number + 1, r)
    return [sorted(mine) for mine in shares]


def class_balance(labels: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Probability of drawing each slide: classes share equally what the unlabelled slides' own share leaves."""
    counts = np.bincount(labels[labels >= 0])
    share = (labels >= 0).sum() / max(1, (counts > 0).sum())  # slides that each class stands for
    weight = np.ones(len(labels))
    weight[labels >= 0] = share / counts[labels[labels >= 0]]
    balanced: np.ndarray[tuple[int], np.dtype[np.float64]] = weight / weight.sum()
    return balanced

"""Ragged batches of slides: by a budget of patches, balanced over classes, read ahead while the model computes.

The order of an epoch follows from (seed, epoch) alone, whatever was read before: a resumed run sees the same batches,
and so does each of several ranks, which reads its own share of every batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from momkd.bags import Bags
from momkd.errors import InputError
from momkd.graph import Edges, batch

_AHEAD = 2  # batches read while one is in use


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
        """On `device`; from pinned memory without waiting."""
        moved = (None if t is None else t.to(device, non_blocking=True) for t in (self.omics, self.has_omics))
        bags, labels = self.bags.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return Batch(self.number, self.slide_ids, bags, labels, *moved)


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
        graph: the graph of a slide, or of some of its patches, for encoders that want one; see `SlideGraphs`.
        skipped: where a slide that cannot be read is noted and left out; None: reading it is an error.
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
    _cache: dict[str, tuple[Tensor, Edges | None]] = field(default_factory=dict, init=False, repr=False)
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
    ) -> Iterator[Batch]:
        """The batches of a plan, read ahead by a thread. One of which no slide can be read is left out.

        Args:
            plan: rows of `slide_ids`, batch by batch.
            seed: of the subsampling; None takes all patches.
            share: (rank, ranks): of every batch, the slides that fall to this rank, so that the ranks' patches are
                about equal. Then every batch comes, be it one of no slides.
            only: the numbers of the batches that are wanted, ascending; None for all.
        """
        with ThreadPoolExecutor(1, "momkd-read") as pool:
            waiting: deque[Future[Batch | None]] = deque()
            for number in range(len(plan)) if only is None else only:
                waiting.append(pool.submit(self._batch, number, plan[number], seed, share))
                if len(waiting) > _AHEAD and (batch := waiting.popleft().result()) is not None:
                    yield batch
            while waiting:
                if (batch := waiting.popleft().result()) is not None:
                    yield batch

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
        self, number: int, rows: Sequence[int], seed: Sequence[int] | None, share: tuple[int, int] | None
    ) -> Batch | None:
        features, graphs, kept = [], [], []
        most = 0 if seed is None else self.max_patches
        mine = range(len(rows)) if share is None else deal(self.patches(rows, most=most), share[1])[share[0]]
        for position in mine:
            row, drawn = rows[position], None
            slide = self.slide_ids[row]
            if seed is not None and 0 < most < self.sizes[slide]:
                rng = np.random.default_rng([*seed, number, position])
                drawn = np.sort(rng.choice(self.sizes[slide], most, replace=False))
            try:
                x, edges = self._slide(slide, drawn)
            except InputError as error:
                if self.skipped is None:
                    raise
                self.skipped[slide] = str(error)
                continue
            features.append(x)
            graphs.append(edges)
            kept.append(row)
        if not kept and share is None:
            return None
        if kept:
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
        if self.graph is not None:
            edges = batch([edges for edges in graphs if edges is not None])
            bags = bags.with_edges(edges.pin_memory() if self.pin else edges)
        if self.pin:
            labels = labels.pin_memory()
        return Batch(number, tuple(self.slide_ids[row] for row in kept), bags, labels, omics, has_omics)

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

    def _joined(self, features: list[Tensor]) -> Bags:
        """One batch; page-locked, the rows are copied once, from where they lie into it."""
        if not self.pin:
            return Bags.from_list(features)
        first = features[0]
        rows = torch.empty(sum(map(len, features)), first.shape[1], dtype=first.dtype, pin_memory=True)
        bags = Bags.from_lengths(torch.cat(features, out=rows), [len(x) for x in features])
        return replace(bags, offsets=bags.offsets.pin_memory())

    def _slide(
        self, slide: str, drawn: np.ndarray[tuple[int], np.dtype[np.int64]] | None
    ) -> tuple[Tensor, Edges | None]:
        """Features and graph of a slide, or of the patches that were drawn from it; only the whole is kept."""
        x, edges = self._cache.get(slide, (None, None))
        new = 0  # bytes
        if x is None:
            x = self.read(slide)
            new += x.nbytes
        if self.graph is not None and drawn is None and edges is None:
            edges = self.graph(slide, None)
            new += edges.nbytes
        if new and self._held + new <= self.cache_bytes:
            if slide not in self._cache:
                x = x.clone()  # what is mapped from a packed store would still be read from it
            self._cache[slide] = x, edges
            self._held += new
        if drawn is not None:
            x, edges = x[torch.from_numpy(drawn)], None if self.graph is None else self.graph(slide, drawn)
        if self._nothing is None:
            self._nothing = x[:0].clone(), None if edges is None else edges.rows(0, 0)
        return x, edges


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

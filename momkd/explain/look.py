"""Slides as one model sees them, batch by batch, and what is kept of them over a cohort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momkd.bootstrap import Floats
from momkd.data.batches import BagLoader
from momkd.inference import see
from momkd.models import MILModel
from momkd.nn import MemoryBank
from momkd.predictions import decide

Integers = NDArray[np.int64]
_CELLS = 1 << 24  # cosines that are held at a time


@dataclass(frozen=True, eq=False)
class Near:
    """The patches of a slide among P = C · K prototypes, prototype p = c · K + k being slot k of class c.

    Attributes:
        prototype: (N,) the nearest prototype of any class to each patch.
        cosine: (N,) with it.
        top_rows, top_cosines: (P, m) the m patches nearest to each prototype, the nearest first.
        pooled: (S,) unit vector, projection of the pooled slide.
    """

    prototype: Integers
    cosine: Floats
    top_rows: Integers
    top_cosines: Floats
    pooled: Floats


@dataclass(frozen=True, eq=False)
class SlideView:
    """A slide as a model sees it: probs (C,), predicted class, attention (N,), and `near` if the model has a memory."""

    slide_id: str
    probs: Floats
    predicted: int
    attention: Floats
    near: Near | None


def unit_prototypes(memory: MemoryBank) -> Tensor:
    """(C, K, S) float32 unit vectors on the CPU; a prototype that was never set stays zero."""
    return torch.nn.functional.normalize(memory.memory.detach().float().cpu(), dim=2, eps=1e-12)


def look(
    model: MILModel,
    loader: BagLoader,
    plan: Sequence[Sequence[int]],
    device: torch.device,
    *,
    amp: bool,
    threshold: float,
    prototypes: Tensor | None,
    most: int = 0,
) -> Iterator[SlideView]:
    """The slides of a plan of the loader. Where a model has one branch a class, that of the predicted class is seen.

    Args:
        model: in evaluation mode, on `device`.
        threshold: from which on the second of two classes is predicted.
        prototypes: (C, K, S) of `unit_prototypes`; None leaves `near` out.
        most: m, the patches of a slide kept for each prototype.
    """
    memory = None if prototypes is None else prototypes.flatten(0, 1).to(device)
    options: dict[str, Any] = {"amp": amp, "doing": "explain", "projected": memory is not None}
    with closing(see([model], loader, plan, device, **options)) as batches:
        for seen in batches:
            (prediction,) = seen.each
            probs = torch.softmax(prediction.logits.double(), 1).cpu().numpy()
            predicted = decide(probs, threshold).tolist()
            attention = prediction.attention.float().cpu().numpy().astype(np.float64)  # (N, H)
            edges = [0, *accumulate(seen.lengths)]
            for b in seen.good:
                first, last = edges[b], edges[b + 1]
                head = predicted[b] if attention.shape[1] > 1 else 0
                near = None
                if memory is not None and seen.projections:
                    (found,) = seen.projections
                    near = nearest(found.patches[first:last], memory, found.slides[b, head], most)
                yield SlideView(seen.slide_ids[b], probs[b], predicted[b], attention[first:last, head], near)


@torch.inference_mode()
def nearest(patches: Tensor, prototypes: Tensor, pooled: Tensor, most: int) -> Near:
    """Unit patches (N, S), prototypes (P, S) and the pooled slide (S,); N > 0, among one another."""
    step = max(1, _CELLS // len(prototypes))
    best: list[tuple[Tensor, Tensor]] = []  # cosine and prototype of each patch
    top_cosines, top_rows = patches.new_zeros(len(prototypes), 0), torch.zeros(0, dtype=torch.int64)
    top_rows = top_rows.to(patches.device).expand(len(prototypes), 0)
    for start in range(0, len(patches), step):
        cosines = patches[start : start + step] @ prototypes.T  # (n, P)
        cosine, prototype = cosines.max(1)
        best.append((cosine, prototype))
        cosine, row = cosines.topk(min(most, len(cosines)), dim=0)
        joined = torch.cat([top_cosines, cosine.T], 1)
        top_cosines, order = joined.sort(dim=1, descending=True, stable=True)
        top_rows = torch.cat([top_rows, row.T + start], 1).gather(1, order)[:, :most]
        top_cosines = top_cosines[:, :most]
    cosine, prototype = (torch.cat(each) for each in zip(*best, strict=True))
    return Near(
        prototype.cpu().numpy(),
        cosine.double().cpu().numpy(),
        top_rows.cpu().numpy(),
        top_cosines.double().cpu().numpy(),
        pooled.double().cpu().numpy(),
    )


class NearestPatches:
    """Of every prototype the `most` patches that lie nearest over all slides, at most `per_slide` of a slide.

    Attributes:
        cosines: (P, m) the nearest first; −inf where there are fewer.
        slides, rows: (P, m) which slide, by the order of `add`, and which row of it.
    """

    def __init__(self, prototypes: int, most: int) -> None:
        self.cosines = np.full((prototypes, most), -np.inf)
        self.slides = np.zeros((prototypes, most), np.int64)
        self.rows = np.zeros((prototypes, most), np.int64)
        self.seen = 0

    def add(self, near: Near) -> None:
        """A further slide, whose `near` holds as many patches as may count of a slide."""
        most, number = self.cosines.shape[1], np.full_like(near.top_rows, self.seen)
        cosines = np.concatenate([self.cosines, near.top_cosines], 1)
        slides, rows = np.concatenate([self.slides, number], 1), np.concatenate([self.rows, near.top_rows], 1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :most]  # an earlier slide stays before its equal
        self.cosines, self.slides, self.rows = (np.take_along_axis(a, order, 1) for a in (cosines, slides, rows))
        self.seen += 1


class Shares:
    """How much of the slides lies nearest to each prototype; every slide counts the same, whatever its size.

    Attributes:
        patches, attention: (P,) sums over slides of the share of their patches, and of their attention.
        slides: how many.
    """

    def __init__(self, prototypes: int) -> None:
        self.patches, self.attention, self.slides = np.zeros(prototypes), np.zeros(prototypes), 0

    def add(self, view: SlideView) -> None:
        assert view.near is not None
        count = np.bincount(view.near.prototype, minlength=len(self.patches))
        self.patches += count / count.sum()
        self.attention += attention_shares(view, len(self.patches))
        self.slides += 1


def attention_shares(view: SlideView, prototypes: int) -> Floats:
    """(P,) the share of a slide's attention that falls on patches nearest to each prototype; sums to one."""
    assert view.near is not None
    weights = np.bincount(view.near.prototype, view.attention, minlength=prototypes)
    return np.asarray(weights / weights.sum(), np.float64)

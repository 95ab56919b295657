"""One model of a run over a cohort of slides: what every step of an explanation needs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from momkd.data.batches import BagLoader
from momkd.data.cohort import Cohort
from momkd.errors import InputError
from momkd.explain.look import SlideView, look
from momkd.models import MILModel
from momkd.predict import threshold_of
from momkd.runs import Run

Coords = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """How much is shown.

    Attributes:
        limit: slides with a map: of every predicted class in turn, the most certain first.
        top: share of a slide's patches in its GeoJSON, those of the highest attention; 1 for all.
        nearest: patches of a prototype.
        per_slide: of those, at most so many of one slide.
        patch_size: side of a patch in level-0 pixels, for features that don't say.
    """

    limit: int = 12
    top: float = 0.1
    nearest: int = 8
    per_slide: int = 2
    patch_size: float | None = None

    def check(self) -> None:
        """Raises InputError for what is out of range."""
        for name, good, wanted in (
            ("limit", self.limit >= 0, "0 or more"),
            ("top", 0 < self.top <= 1, "a share over 0, and at most 1"),
            ("nearest", self.nearest >= 1, "1 or more"),
            ("per-slide", self.per_slide >= 1, "1 or more"),
            ("patch-size", self.patch_size is None or 0 < self.patch_size < math.inf, "a positive number"),
        ):
            if not good:
                raise InputError(f"--{name}: expected {wanted}, got {getattr(self, name.replace('-', '_'))}")


@dataclass(frozen=True, eq=False)
class View:
    """The model of a fold, and the slides.

    Attributes:
        prototypes: (C, K, S) of `unit_prototypes`; None for a model without a memory.
        notes: what a reader must know; grows.
    """

    run: Run
    fold: int
    model: MILModel
    prototypes: Tensor | None
    cohort: Cohort
    loader: BagLoader
    device: torch.device
    options: Options
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return self.run.info.classes

    @property
    def branches(self) -> bool:
        """Whether each class has an attention of its own: where it was asked for, and where a memory guides C > 2."""
        return self.run.config.model.branch == "per_class" or (self.guided and len(self.classes) > 2)

    @property
    def guided(self) -> bool:
        """Whether a memory guides the attention, alone or beside a gate."""
        return self.run.config.model.kind == "momkd" and self.run.config.model.pooling != "gated"

    @property
    def gated(self) -> bool:
        """Whether a gate does, alone or beside a memory."""
        return self.run.config.model.kind != "momkd" or self.run.config.model.pooling != "memory"

    @property
    def slots(self) -> int:
        """K, or 0 without a memory."""
        return 0 if self.prototypes is None else self.prototypes.shape[1]

    @property
    def names(self) -> list[str]:
        """What each prototype p = c · K + k is called."""
        return [f"class {name}, slot {k}" for name in self.classes for k in range(self.slots)]

    def look(self, plan: Sequence[Sequence[int]], most: int = 0) -> Iterator[SlideView]:
        """The slides of a plan of the loader; of each prototype `most` patches a slide."""
        return look(
            self.model,
            self.loader,
            plan,
            self.device,
            amp=self.run.amp(self.device),
            threshold=threshold_of(self.run, [self.fold]),
            prototypes=self.prototypes,
            most=most,
        )

    def located(self, slide_id: str) -> tuple[Coords | None, float | None, bool]:
        """Coordinates (N, 2) and the side of a patch, as far as they are known, and whether they are level-0 pixels.

        Raises:
            InputError: a slide that cannot be used.
        """
        coords, attrs = self.cohort.source.coords(slide_id)
        size, wanted, pixels = self.patch_size(slide_id, attrs), self.options.patch_size, "coords_unit" not in attrs
        if coords is not None and size is not None and wanted is not None and not pixels:
            return np.rint(coords * (wanted / size)).astype(np.int64), wanted, True
        return coords, size, pixels

    def patch_size(self, slide_id: str, attrs: Mapping[str, Any]) -> float | None:
        """Side of a patch in level-0 pixels, or None where nobody says. Raises InputError where it is no number."""
        size = attrs.get("patch_size_level0", self.options.patch_size)
        if size is None:
            return None
        with contextlib.suppress(TypeError, ValueError):
            if 0 < float(size) < math.inf:
                return float(size)
        name = self.cohort.source.name(slide_id)
        raise InputError(f"{name}: patch_size_level0: expected a positive number, got {size}; extract it again")

"""Inference over a slide of any size, a block of patches at a time.

Attention is a softmax over all patches of a slide, and a softmax can be joined: of each block its weighted sum and
the logarithm of its sum of exponentials are enough. So a slide of a million patches needs the memory of one block, and
a few numbers a patch. An encoder whose patches see one another (gatv2) has no blocks.

Source: Milakov and Gimelshein, 2018 (arXiv 1805.02867), for the softmax that is joined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.bags import Bags
from momkd.models.base import MILModel, Pooled, Prediction
from momkd.models.momkd import MoMKD, Projections


class SlideInBlocks:
    """What a model says of one slide, whose patches come block by block.

    Args:
        model: in evaluation mode, without an encoder that wants a graph.
        projected: keep the projections of the patches too, for `projections`.

    Example:
        >>> model, slide = momkd.models.ABMIL(32).eval(), torch.randn(1000, 32)
        >>> seen = momkd.models.SlideInBlocks(model)
        >>> for block in slide.split(300):
        ...     seen.add(block)
        >>> torch.allclose(seen.prediction().logits, model(momkd.Bags.from_list([slide])).logits, atol=1e-5)
        True
    """

    def __init__(self, model: MILModel, *, projected: bool = False) -> None:
        self.model, self.projected = model, projected
        self.blocks: list[Pooled] = []  # scores, slots and projections; the vectors are in `total`
        self.total: Tensor | None = None  # (1, H, D) float32: the weighted sum so far,
        self.log_weight: Tensor | None = None  # (1, H, 1): of weights that sum to this, as a logarithm

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """The next patches of the slide: (n, L), n ≥ 1, on the device of the model."""
        found = self.model.pooled(Bags.from_lengths(features, [features.shape[0]]))
        vectors = found.vectors.float()
        log_weight = torch.logsumexp(found.scores.float(), 0)[None, :, None]
        if self.total is None or self.log_weight is None:
            self.total, self.log_weight = vectors, log_weight
        else:
            joined = torch.logaddexp(self.log_weight, log_weight)
            self.total = self.total * (self.log_weight - joined).exp() + vectors * (log_weight - joined).exp()
            self.log_weight = joined
        patches = found.patches if self.projected else None
        self.blocks.append(Pooled(found.vectors[:0], found.scores, found.slots, patches))

    def prediction(self) -> Prediction:
        """Of all patches so far; raises ValueError where there are none."""
        return self._result()[0]

    def projections(self) -> Projections:
        """As `MoMKD.project` gives them; needs `projected` and a model with a memory."""
        prediction, pooled = self._result()
        patches = [block.patches for block in self.blocks if block.patches is not None]
        if not isinstance(self.model, MoMKD) or not patches:
            raise ValueError(f"projections: expected a MoMKD and projected=True, got {type(self.model).__name__}")
        with torch.no_grad():
            return Projections(prediction, torch.cat(patches), self.model.project_slides(pooled))

    @torch.no_grad()
    def _result(self) -> tuple[Prediction, Tensor]:
        if self.total is None or self.log_weight is None:
            raise ValueError("slide: expected at least one block of patches, got none")
        pooled = self.total.to(self.blocks[0].vectors.dtype)
        scores = torch.cat([block.scores for block in self.blocks]).float()
        attention = (scores - self.log_weight[0, :, 0]).exp()
        slots = [block.slots for block in self.blocks if block.slots is not None]
        return Prediction(self.model.classifier(pooled), attention, torch.cat(slots) if slots else None), pooled

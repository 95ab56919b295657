"""Distillation inside a batch: the baseline that a memory is compared with.

The slide and the profile of a case are drawn together while both are in one batch; nothing outlives the step. Slide
branch, genomics tower and loop are those of the other models, so that only the way of distilling differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.models.abmil import ABMIL
from momkd.models.base import Mean, TrainingStep, classification_loss, pairing_loss, reconstruction_loss
from momkd.models.omics import OmicsTower

MATCHES = ("mse", "contrastive")


class BatchDistillation(ABMIL):
    """ABMIL whose pooled slide is drawn to the genomics of its own case, batch by batch.

    "mse" matches features: the mean over cases of the squared distance of both unit projections; the genomics, which a
    classifier of their own trains, are the target and get no gradient from it. "contrastive" aligns: the InfoNCE loss
    in both directions over the pairs of the batch, whose gradient reaches both.

    Args:
        in_features: L, width of the patch features.
        num_classes: C.
        omics_features: G, genes of a profile; None leaves the tower out, and nothing is distilled.
        match: "mse" or "contrastive".
        projection_features: S, where both meet.
        temperature: of the contrastive loss.
        omics_embedding, omics_hidden, omics_decoder_hidden, omics_dropout: of the tower, see `OmicsTower`.
        slide: further options of `ABMIL`.

    Source: feature matching as in Romero et al., "FitNets", ICLR 2015; InfoNCE over pairs as in Radford et al., ICML
    2021.

    Example:
        >>> model = momkd.models.BatchDistillation(32, omics_features=100, match="contrastive")
        >>> bags = momkd.Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)])
        >>> sorted(model.training_step(bags, torch.tensor([0, 1]), torch.randn(2, 100)).losses)
        ['alignment', 'classification', 'reconstruction', 'teacher']
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int = 2,
        *,
        omics_features: int | None = None,
        match: str = "mse",
        projection_features: int = 64,
        temperature: float = 0.1,
        omics_embedding: int = 512,
        omics_hidden: int = 512,
        omics_decoder_hidden: int | None = None,
        omics_dropout: float = 0.25,
        **slide: Any,
    ) -> None:
        super().__init__(in_features, num_classes, **slide)
        if match not in MATCHES:
            raise ValueError(f"match: expected {' or '.join(map(repr, MATCHES))}, got {match!r}")
        self.match, self.temperature = match, temperature
        self.genomics: nn.ModuleDict | None = None
        if omics_features is not None:
            tower = OmicsTower(
                omics_features,
                projection_features,
                features=omics_embedding,
                hidden_features=omics_hidden,
                decoder_features=omics_decoder_hidden,
                dropout=omics_dropout,
            )
            self.genomics = nn.ModuleDict(
                {
                    "tower": tower,
                    "classifier": nn.Linear(projection_features, num_classes),
                    "slide_projector": nn.Linear(self.width, projection_features),
                }
            )

    def training_step(
        self, bags: Bags, labels: Tensor, omics: Tensor | None = None, has_omics: Tensor | None = None
    ) -> TrainingStep:
        pooled = self.pooled(bags).vectors
        logits = self.classifier(pooled)
        terms = {"classification": [classification_loss(logits, labels)]}
        if self.genomics is None or omics is None:
            return TrainingStep(terms, logits)
        present = torch.ones_like(labels, dtype=torch.bool) if has_omics is None else has_omics
        profile = torch.where(present[:, None], omics, torch.zeros_like(omics))
        genomic, decoded = self.genomics["tower"](profile)
        slide = nn.functional.normalize(self.genomics["slide_projector"](pooled.mean(1)).float(), dim=1, eps=1e-12)
        known = torch.where(present, labels, torch.full_like(labels, -1))
        terms["teacher"] = [classification_loss(self.genomics["classifier"](genomic), known)]
        terms["reconstruction"] = [reconstruction_loss(decoded, profile, present)]
        terms["alignment"] = [self._alignment(slide, genomic, present)]
        return TrainingStep(terms, logits)

    def _alignment(self, slide: Tensor, genomic: Tensor, present: Tensor) -> Mean:
        """Over the cases of the batch that have a profile."""
        if self.match == "mse":
            return pairing_loss(slide, genomic, present)
        cosines = (slide @ genomic.T) / self.temperature  # (B, B), the pairs on the diagonal
        cosines = cosines.masked_fill(~(present[:, None] & present), -torch.inf)
        cosines = cosines.masked_fill(torch.diag(~present), 0.0)
        each = -(cosines.log_softmax(1).diagonal() + cosines.log_softmax(0).diagonal()) / 2
        return Mean(torch.where(present, each, 0.0).sum() / present.sum().clamp_min(1), present)

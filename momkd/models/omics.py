"""The genomics tower: part of MoMKD while it trains, and alone a model of its own, the teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.models.base import MILModel, Prediction, TrainingStep, classification_loss, reconstruction_loss, wide
from momkd.nn import OmicsDecoder, OmicsEncoder


class OmicsTower(nn.Module):
    """Encoder of a profile, its mirror image that reconstructs it, and a projector into the space of the memory.

    Args:
        omics_features: G, genes.
        projection_features: S.
        features: width of the embedding.
        hidden_features: width of encoder and decoder between.
        decoder_features: width of the decoder between, where it is another.
        dropout: while training.
    """

    def __init__(
        self,
        omics_features: int,
        projection_features: int = 64,
        *,
        features: int = 512,
        hidden_features: int = 512,
        decoder_features: int | None = None,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        mirrored = hidden_features if decoder_features is None else decoder_features
        self.encoder = OmicsEncoder(omics_features, features, hidden_features=hidden_features, dropout=dropout)
        self.decoder = OmicsDecoder(features, omics_features, hidden_features=mirrored, dropout=dropout)
        self.projector = nn.Linear(features, projection_features)

    def forward(self, profile: Tensor) -> tuple[Tensor, Tensor]:
        """profile (B, G) -> unit projection (B, S), reconstruction (B, G)."""
        embedding = wide(self.encoder, profile)
        projection = nn.functional.normalize(wide(self.projector, embedding).float(), dim=1, eps=1e-12)
        return projection, wide(self.decoder, embedding)


class OmicsClassifier(MILModel):
    """The genomics alone: tower, reconstruction and a linear classifier. It bounds what there is to distil.

    The profiles come as bags of one row, so that it trains and predicts by the same loop as a model of slides.

    Args:
        omics_features: G, genes.
        num_classes: C.
        features, hidden_features, decoder_features, dropout: as in `OmicsTower`.

    Example:
        >>> model = momkd.models.OmicsClassifier(768)
        >>> model(momkd.Bags.from_list([torch.randn(1, 768), torch.randn(1, 768)])).logits.shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        omics_features: int,
        num_classes: int = 2,
        *,
        features: int = 512,
        hidden_features: int = 512,
        decoder_features: int | None = None,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        mirrored = hidden_features if decoder_features is None else decoder_features
        self.in_features = omics_features
        self.encoder = OmicsEncoder(omics_features, features, hidden_features=hidden_features, dropout=dropout)
        self.decoder = OmicsDecoder(features, omics_features, hidden_features=mirrored, dropout=dropout)
        self.classifier = nn.Sequential(nn.LayerNorm(features), nn.Dropout(dropout), nn.Linear(features, num_classes))

    def training_step(
        self, bags: Bags, labels: Tensor, omics: Tensor | None = None, has_omics: Tensor | None = None
    ) -> TrainingStep:
        profile = _profiles(bags)
        embedding = wide(self.encoder, profile)
        logits = wide(self.classifier, embedding)
        present = torch.ones_like(labels, dtype=torch.bool)
        terms = {
            "classification": [classification_loss(logits, labels)],
            "reconstruction": [reconstruction_loss(wide(self.decoder, embedding), profile, present)],
        }
        return TrainingStep(terms, logits)

    def forward(self, bags: Bags) -> Prediction:
        logits = wide(self.classifier, wide(self.encoder, _profiles(bags)))
        return Prediction(logits, torch.ones_like(logits[:, :1]))


def _profiles(bags: Bags) -> Tensor:
    if any(n != 1 for n in bags.lengths):
        raise ValueError("bags: expected one row, the profile, in each; use Bags.from_list([profile[None], ...])")
    return bags.features

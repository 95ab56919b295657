"""What the training loop and prediction ask of a model, and the parts that the models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.nn import GraphEncoder, MemoryBank

ENCODERS = ("mlp", "identity", "gatv2")
POOLINGS = ("memory", "gated", "both")


class Prediction:
    """What a model says of B slides with N patches in all.

    Args:
        logits, slots: as below.
        attention: as below, or what computes it when it is asked for.

    Attributes:
        logits: (B, C).
        attention: (N, H), summing to one over the patches of each slide and head.
        slots: (N, C) int32, the nearest prototype of each class to each patch; None for a model without memory.
    """

    def __init__(self, logits: Tensor, attention: Tensor | Callable[[], Tensor], slots: Tensor | None = None) -> None:
        self.logits, self.slots, self._attention = logits, slots, attention

    @property
    def attention(self) -> Tensor:
        if not isinstance(self._attention, Tensor):
            self._attention = self._attention().detach()
        return self._attention

    def is_finite(self) -> bool:
        """Whether all results that are computed are finite. Attention that is not makes logits that are not."""
        known = (self.logits, self._attention) if isinstance(self._attention, Tensor) else (self.logits,)
        return all(bool(torch.isfinite(t).all()) for t in known)


@dataclass(frozen=True)
class Pooled:
    """What the attention of a model makes of B bags with N patches in all, before the classifier.

    Attributes:
        vectors: (B, H, D), the weighted sums of the encoded patches.
        scores: (N, H), before the softmax over the bag.
        slots: (N, C) int32, the nearest prototype of each class to each patch; None for a model without memory.
        patches: (N, S) float32 unit vectors, the projections that the memory sees; None for a model without memory.
    """

    vectors: Tensor
    scores: Tensor
    slots: Tensor | None = None
    patches: Tensor | None = None


@dataclass(frozen=True)
class MemoryRows:
    """What a step would scatter into the memory: rows (R, S), their classes (R,) int64 (−1: none) and masses (R,)."""

    rows: Tensor
    row_class: Tensor
    weights: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[MemoryRows]) -> MemoryRows:
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("rows", "row_class", "weights")))


@dataclass(frozen=True)
class Mean:
    """A mean over the rows of a batch that are counted, 0 where there are none: so those of ranks can become one."""

    value: Tensor  # scalar
    counted: Tensor  # (rows,) bool

    @property
    def count(self) -> Tensor:
        """Rows that are counted, a scalar."""
        return self.counted.sum()


@dataclass(frozen=True)
class TrainingStep:
    """The terms of the loss by name, without their weights, each a mean or a sum of means; the logits; and rows for the
    memory, if any."""

    terms: Mapping[str, Sequence[Mean]]
    logits: Tensor  # (B, C)
    memory_rows: MemoryRows | None = None

    @property
    def losses(self) -> dict[str, Tensor]:
        """The terms as scalars."""
        return {
            name: means[0].value if len(means) == 1 else torch.stack([mean.value for mean in means]).sum()
            for name, means in self.terms.items()
        }


class MILModel(nn.Module):
    """A slide model that the training loop can train.

    `forward(bags)` is inference and needs the slide alone. `training_step` gives the terms of the loss, and what to
    scatter into `memory` once the optimizer has stepped.
    """

    memory: MemoryBank | None
    classifier: nn.Module  # pooled vectors (B, H, D) -> logits (B, C)
    in_features: int = 0  # L, width of the rows of its bags

    def __init__(self) -> None:
        super().__init__()
        self.memory = None

    def training_step(
        self, bags: Bags, labels: Tensor, omics: Tensor | None = None, has_omics: Tensor | None = None
    ) -> TrainingStep:
        """Bags of B slides, labels (B,) int64 with −1 for none, omics (B, G), has_omics (B,) bool (None: all)."""
        raise NotImplementedError

    def forward(self, bags: Bags) -> Prediction:
        """Bags of B slides -> logits, attention and slots."""
        raise NotImplementedError

    def pooled(self, bags: Bags) -> Pooled:
        """Bags of B slides -> what `classifier` reads, with the scores of the patches; see `momkd.models.blocks`."""
        raise NotImplementedError


def make_encoder(kind: str, in_features: int, hidden_features: int, **graph: Any) -> tuple[nn.Module, int]:
    """The patch encoder and the width that it gives; `graph` are the options of `GraphEncoder`."""
    if kind == "mlp":
        layers = nn.Linear(in_features, hidden_features), nn.LayerNorm(hidden_features), nn.GELU()
        return nn.Sequential(*layers), hidden_features
    if kind == "identity":
        return nn.Identity(), in_features
    if kind == "gatv2":
        return GraphEncoder(in_features, hidden_features, **graph), hidden_features
    raise ValueError(f"encoder: expected {' or '.join(map(repr, ENCODERS))}, got {kind!r}")


def encode(encoder: nn.Module, bags: Bags, in_features: int, like: Tensor) -> Bags:
    """The bags after the patch encoder, in the float type of the parameters or, under autocast, in 16 bits."""
    if bags.features.shape[1] != in_features:
        raise ValueError(
            f"bags: expected features of width {in_features}, got {bags.features.shape[1]}; a model takes the features "
            "of the encoder it was trained with"
        )
    kind = bags.features.device.type
    half = like.dtype == torch.float32 and under_autocast(kind)
    x = bags.features.to(torch.get_autocast_dtype(kind) if half else like.dtype)  # once, whatever reads it
    if not isinstance(encoder, GraphEncoder):
        return bags.with_features(encoder(x))
    if bags.edges is None:
        raise ValueError(
            "bags: expected a graph over the patches for the encoder gatv2, got none; use bags.with_edges(momkd.graph"
            ".batch([momkd.graph.knn(coords), ...]))"
        )
    return bags.with_features(encoder(x, bags.edges))


def under_autocast(kind: str) -> bool:
    """Whether products of tensors on a kind of device are computed in 16 bits at this moment."""
    return kind != "meta" and torch.is_autocast_enabled(kind)  # of a meta device torch can't be asked


def wide(module: nn.Module, x: Tensor) -> Any:
    """The module's result in the type of its parameters, under autocast too: for the few rows of slides and profiles.

    16 bits of a logit make slides equal that are not, and casting the weights takes longer than the product.
    """
    if not under_autocast(x.device.type):
        return module(x)
    with torch.autocast(x.device.type, enabled=False):
        return module(x.to(next(module.parameters()).dtype))


class SlideClassifier(nn.Module):
    """LayerNorm → Linear(D→128) → ReLU → Dropout → Linear on the pooled vector of each class's branch, or the one.

    With one branch (H = 1) the last layer gives C logits. With a branch a class, class c's logit is read from the
    vector that its own branch pooled.
    """

    def __init__(self, in_features: int, num_classes: int, dropout: float = 0.5, hidden_features: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(in_features),
            nn.Linear(in_features, hidden_features),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_features, num_classes),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled (B, 1, D) or (B, C, D) -> logits (B, C)."""
        logits: Tensor = wide(self.layers, pooled)  # (B, H, C)
        return logits[:, 0] if pooled.shape[1] == 1 else logits.diagonal(dim1=1, dim2=2)


def classification_loss(logits: Tensor, labels: Tensor) -> Mean:
    """Cross-entropy over the labelled slides."""
    total = nn.functional.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
    labelled = labels >= 0
    return Mean(total / labelled.sum().clamp_min(1), labelled)


def reconstruction_loss(decoded: Tensor, profile: Tensor, present: Tensor) -> Mean:
    """Mean squared error over the values of the profiles that are present (B,) bool."""
    each = (decoded.float() - profile.float()).square().mean(1)  # (B,)
    return Mean(torch.where(present, each, 0.0).sum() / present.sum().clamp_min(1), present)


def pairing_loss(slide: Tensor, genomic: Tensor, present: Tensor) -> Mean:
    """Squared distance of a slide's unit projection to that of its own genomics, which get no gradient.

    slide and genomic (B, S); over the slides whose profile is present (B,) bool.
    """
    target = torch.where(present[:, None], genomic, slide).detach()  # what is absent may be NaN
    return Mean((slide - target).square().sum() / present.sum().clamp_min(1), present)

"""DSMIL (Li et al. 2021): an instance classifier finds each class's critical patch, which attends to all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.compat._gate import pool_by_scores
from momkd.compat._load import DropIn
from momkd.compat._rows import Rows, one_bag


class FCLayer(nn.Module):
    """Instance scores from features: (N, L) -> the features, scores (N, C)."""

    def __init__(self, in_size: int, out_size: int = 1) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(in_size, out_size))

    def forward(self, feats: Tensor) -> tuple[Tensor, Tensor]:
        return feats, self.fc(feats)


class IClassifier(nn.Module):
    """Features and instance scores: x -> the features (N, L), scores (N, C)."""

    def __init__(self, feature_extractor: nn.Module, feature_size: int, output_class: int) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.fc = nn.Linear(feature_size, output_class)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feats = self.feature_extractor(x).flatten(1)
        return feats, self.fc(feats)


def critical(rows: Rows, scores: Tensor) -> Tensor:
    """(B, C) int64: the row with the largest score of each class in each bag; the first of equal ones."""
    bags, edges = [], rows.offsets.tolist() if rows.bags != 1 else [0, len(scores)]
    for bag in range(rows.bags):
        part = scores[edges[bag] : edges[bag + 1]]
        if not len(part):
            raise ValueError(f"expected at least one patch in each bag, for DSMIL's critical one, got bag {bag} empty")
        bags.append(part.argmax(0) + edges[bag])
    return torch.stack(bags)


class BClassifier(DropIn):
    """Bag scores; `nonlinear` and `passing_v` as in DSMIL."""

    def __init__(
        self,
        input_size: int,
        output_class: int,
        dropout_v: float = 0.0,
        nonlinear: bool = True,
        passing_v: bool = False,
    ) -> None:
        super().__init__()
        self.q: nn.Module = nn.Linear(input_size, 128)
        if nonlinear:
            self.q = nn.Sequential(self.q, nn.ReLU(), nn.Linear(128, 128), nn.Tanh())
        self.v: nn.Module = nn.Identity()
        if passing_v:
            self.v = nn.Sequential(nn.Dropout(dropout_v), nn.Linear(input_size, input_size), nn.ReLU())
        self.fcc = nn.Conv1d(output_class, output_class, kernel_size=input_size)

    def forward(self, feats: Tensor | Bags, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (N, L), or `Bags`, and instance scores (N, C).

        Returns:
            bag scores (B, C), attention (N, C) that sums to one in each bag, pooled values (B, C, L).
        """
        rows = one_bag(feats)
        query = self.q(rows.x)  # (N, Q)
        keys = self.q(rows.x[critical(rows, c)])  # (B, C, Q)
        if rows.bags == 1:
            scores = query @ keys[0].T
        else:
            parts = query.split(rows.offsets.diff().tolist())
            scores = torch.cat([part @ key.T for part, key in zip(parts, keys, strict=True)])
        scores = scores / query.shape[1] ** 0.5  # (N, C)
        pooled = pool_by_scores(rows, self.v(rows.x), scores)
        return self.fcc(pooled).flatten(1), rows.softmax(scores), pooled


class MILNet(DropIn):
    """Both streams.

    Example:
        >>> dsmil = momkd.compat.dsmil
        >>> model = MILNet(dsmil.FCLayer(32, 2), dsmil.BClassifier(32, 2))
        >>> classes, bag, A, B = model(torch.randn(70, 32))
        >>> classes.shape, bag.shape, A.shape, B.shape
        (torch.Size([70, 2]), torch.Size([1, 2]), torch.Size([70, 2]), torch.Size([1, 2, 32]))
    """

    def __init__(self, i_classifier: nn.Module, b_classifier: nn.Module) -> None:
        super().__init__()
        self.i_classifier = i_classifier
        self.b_classifier = b_classifier

    def forward(self, x: Tensor | Bags) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One bag, or `Bags` -> instance scores (N, C), then what `BClassifier` gives."""
        feats, classes = self.i_classifier(x.features if isinstance(x, Bags) else x)
        given: Any = x.with_features(feats) if isinstance(x, Bags) else feats
        return classes, *self.b_classifier(given, classes)

"""AttentionDeepMIL's models (Ilse et al. 2018): MNIST bags, attention with and without a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.compat._gate import block_of, pool
from momkd.compat._load import DropIn
from momkd.compat._rows import one_bag


class Attention(DropIn):
    """Attention over the images of a bag.

    Example:
        >>> prob, label, attention = Attention()(torch.rand(1, 9, 1, 28, 28))
        >>> prob.shape, attention.shape
        (torch.Size([1, 1]), torch.Size([1, 9]))
    """

    def __init__(self) -> None:
        super().__init__()
        self.M, self.L, self.ATTENTION_BRANCHES = 500, 128, 1
        layers: list[nn.Module] = []
        for channels, maps in ((1, 20), (20, 50)):
            layers += [nn.Conv2d(channels, maps, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2, stride=2)]
        self.feature_extractor_part1 = nn.Sequential(*layers)
        self.feature_extractor_part2 = nn.Sequential(nn.Linear(50 * 4 * 4, self.M), nn.ReLU())
        self._attention()
        self.classifier = nn.Sequential(nn.Linear(self.M * self.ATTENTION_BRANCHES, 1), nn.Sigmoid())

    def _attention(self) -> None:
        self.attention = nn.Sequential(nn.Linear(self.M, self.L), nn.Tanh(), nn.Linear(self.L, self.ATTENTION_BRANCHES))

    def forward(self, x: Tensor | Bags) -> tuple[Tensor, Tensor, Tensor]:
        """Images (1, N, 1, 28, 28), or `Bags` of images as rows (N, 784).

        Returns:
            probability (B, 1), label (B, 1) as 0. or 1., attention (K, N) that sums to one in each bag.
        """
        if isinstance(x, Bags):
            rows = one_bag(x)
            images = x.features.reshape(-1, 1, 28, 28)
        else:
            images = x.squeeze(0)
            rows = one_bag(images.flatten(1))
        h = self.feature_extractor_part1(images).flatten(1)
        rows = rows._replace(x=self.feature_extractor_part2(h))
        pooled, scores = pool(rows, block_of(self))
        prob = self.classifier(pooled.flatten(1))
        return prob, torch.ge(prob, 0.5).float(), rows.softmax(scores).T

    def calculate_classification_error(self, X: Tensor | Bags, Y: Tensor) -> tuple[Any, Tensor]:
        """The share of wrong labels, and the labels."""
        _, label, _ = self.forward(X)
        return 1.0 - label.flatten().eq(Y.float().flatten()).float().mean().item(), label

    def calculate_objective(self, X: Tensor | Bags, Y: Tensor) -> tuple[Tensor, Tensor]:
        """The negative logarithm of the likelihood (B, 1), and the attention."""
        prob, _, attention = self.forward(X)
        prob, y = torch.clamp(prob, min=1e-5, max=1.0 - 1e-5), Y.float().reshape(-1, 1)
        return -(y * torch.log(prob) + (1.0 - y) * torch.log(1.0 - prob)), attention


class GatedAttention(Attention):
    """With a gate; arguments and results as `Attention`."""

    def _attention(self) -> None:
        self.attention_V = nn.Sequential(nn.Linear(self.M, self.L), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(self.M, self.L), nn.Sigmoid())
        self.attention_w = nn.Linear(self.L, self.ATTENTION_BRANCHES)

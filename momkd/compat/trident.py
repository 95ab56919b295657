"""TRIDENT's ABMIL: several heads of attention, each of several branches, over a padded batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.compat._gate import Block, pool
from momkd.compat._load import DropIn
from momkd.compat._rows import padded

MASKED = -1e9


def blocks(module: Any) -> list[Block]:
    """The block of every head, of an `ABMIL` of either library."""
    gates = [list(gate) for gate in module.gating_layers] if module.gated else [None] * len(module.attention_heads)
    values = [list(value) for value in module.attention_heads]
    return [Block(*parts) for parts in zip(values, gates, module.branching_layers, strict=True)]


class ABMIL(DropIn):
    """TRIDENT's ABMIL.

    Example:
        >>> features, attention = ABMIL(feature_dim=32, n_heads=4, n_branches=2)(torch.randn(3, 70, 32))
        >>> features.shape, attention.shape
        (torch.Size([3, 2, 32]), torch.Size([3, 2, 4, 70]))
    """

    def __init__(
        self,
        feature_dim: int = 1024,
        head_dim: int = 256,
        n_heads: int = 8,
        dropout: float = 0.0,
        n_branches: int = 1,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.gated, self.n_heads = gated, n_heads

        def branch(activation: type[nn.Module]) -> nn.Module:
            return nn.Sequential(nn.Linear(feature_dim, head_dim), activation(), nn.Dropout(dropout))

        self.attention_heads = nn.ModuleList(branch(nn.Tanh) for _ in range(n_heads))
        if gated:
            self.gating_layers = nn.ModuleList(branch(nn.Sigmoid) for _ in range(n_heads))
        self.branching_layers = nn.ModuleList(nn.Linear(head_dim, n_branches) for _ in range(n_heads))
        if n_heads > 1:
            self.condensing_layer = nn.Linear(n_heads * feature_dim, feature_dim)

    def forward(self, features: Tensor | Bags, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """features (B, M, F) with attn_mask (B, M), true where real, or `Bags`.

        Returns:
            (B, branches, F), and scores before softmax (B, branches, heads, M), −1e9 where masked; of `Bags`
            (branches, heads, N).
        """
        rows = padded(features, attn_mask)
        pooled, scores = zip(*(pool(rows, block) for block in blocks(self)), strict=True)
        out = torch.cat(pooled, -1)  # (B, branches, heads · F)
        if self.n_heads > 1:
            out = self.condensing_layer(out)
        attention = torch.stack([rows.back(s, MASKED) for s in scores], -1)  # (..., M, branches, heads)
        return out, attention.movedim(-3, -1)

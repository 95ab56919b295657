"""The genomics tower: an encoder of an omics profile, and its mirror image that reconstructs it."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def _tower(in_features: int, hidden_features: int, out_features: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, hidden_features),
        nn.LayerNorm(hidden_features),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_features, out_features),
    )


class OmicsEncoder(nn.Module):
    """Linear → LayerNorm → ReLU → Dropout → Linear on a standardised profile.

    Args:
        in_features: G, genes.
        out_features: width of the embedding.
        hidden_features: width between.
        dropout: while training.

    Source: MoMKD (arXiv 2602.21395), genomics encoder.

    Example:
        >>> momkd.nn.OmicsEncoder(768)(torch.randn(4, 768)).shape
        torch.Size([4, 512])
    """

    def __init__(
        self, in_features: int, out_features: int = 512, *, hidden_features: int = 512, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.encoder = _tower(in_features, hidden_features, out_features, dropout)

    def forward(self, profile: Tensor) -> Tensor:
        """profile (B, G) -> embedding (B, D)."""
        return cast(Tensor, self.encoder(profile))


class OmicsDecoder(nn.Module):
    """The mirror image of `OmicsEncoder`: embedding (B, D) -> profile (B, G).

    Args:
        in_features: width of the embedding.
        out_features: G, genes.
        hidden_features: width between.
        dropout: while training.

    Example:
        >>> momkd.nn.OmicsDecoder(512, 768)(torch.randn(4, 512)).shape
        torch.Size([4, 768])
    """

    def __init__(
        self, in_features: int, out_features: int, *, hidden_features: int = 512, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.decoder = _tower(in_features, hidden_features, out_features, dropout)

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding (B, D) -> profile (B, G)."""
        return cast(Tensor, self.decoder(embedding))

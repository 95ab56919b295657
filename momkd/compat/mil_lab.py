"""MIL-Lab's ABMIL (FEATHER has this layout): patch embedding, attention, classifier, over a padded batch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.compat._gate import ScoreBlock, block_of, pool, scores_of
from momkd.compat._load import DropIn
from momkd.compat._rows import padded


class GlobalAttention(ScoreBlock):
    """Scores without a gate, (..., L) -> (..., num_classes)."""

    def __init__(self, L: int = 1024, D: int = 256, dropout: float = 0.0, num_classes: int = 1) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(L, D), nn.Tanh(), nn.Dropout(dropout), nn.Linear(D, num_classes))


class GlobalGatedAttention(ScoreBlock):
    """Scores with a gate, (..., L) -> (..., num_classes)."""

    def __init__(self, L: int = 1024, D: int = 256, dropout: float = 0.0, num_classes: int = 1) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(L, D), nn.Tanh(), nn.Dropout(dropout))
        self.attention_b = nn.Sequential(nn.Linear(L, D), nn.Sigmoid(), nn.Dropout(dropout))
        self.attention_c = nn.Linear(D, num_classes)


class ABMIL(DropIn):
    """ABMIL of MIL-Lab; `num_classes=0` leaves the classifier out, as in its pretrained encoders.

    Example:
        >>> model = ABMIL(in_dim=32, num_classes=3)
        >>> results, log = model(torch.randn(2, 70, 32), attn_mask=torch.ones(2, 70), return_attention=True)
        >>> results["logits"].shape, log["attention"].shape
        (torch.Size([2, 3]), torch.Size([2, 1, 70]))
    """

    RENAMES: ClassVar = ((r"model\.", ""),)  # the wrapper of the model hub

    def __init__(
        self,
        in_dim: int = 1024,
        embed_dim: int = 512,
        num_fc_layers: int = 1,
        dropout: float = 0.25,
        attn_dim: int = 384,
        gate: bool = True,
        num_classes: int = 2,
    ) -> None:
        super().__init__()
        self.in_dim, self.embed_dim, self.num_classes = in_dim, embed_dim, num_classes
        layers: list[nn.Module] = []
        for _ in range(num_fc_layers - 1):
            layers += [nn.Linear(in_dim, embed_dim), nn.ReLU(), nn.Dropout(dropout)]
            in_dim = embed_dim
        self.patch_embed = nn.Sequential(*layers, nn.Linear(in_dim, embed_dim), nn.ReLU())
        attention = GlobalGatedAttention if gate else GlobalAttention
        self.global_attn = attention(embed_dim, attn_dim, dropout=dropout)
        if num_classes > 0:
            self.classifier = nn.Linear(embed_dim, num_classes)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Linear layers as for ReLU (He et al.), biases 0."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def initialize_classifier(self, num_classes: int | None = None) -> None:
        """A new classifier."""
        self.classifier = nn.Linear(self.embed_dim, self.num_classes if num_classes is None else num_classes)
        nn.init.kaiming_uniform_(self.classifier.weight, nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward_attention(self, h: Tensor | Bags, attn_mask: Tensor | None = None, attn_only: bool = True) -> Any:
        """Scores before softmax (B, 1, M), the lowest number where masked, with `attn_only=False` behind the patches.

        Embedded patches are (B, M, 512), zeros where masked. Of `Bags`: (1, N) and (N, 512).
        """
        rows = padded(h, attn_mask)
        rows = rows._replace(x=self.patch_embed(rows.x))
        scores = scores_of(rows.x, block_of(self.global_attn))
        attention = rows.back(scores, torch.finfo(scores.dtype).min).transpose(-2, -1)
        return attention if attn_only else (rows.back(rows.x), attention)

    def forward_features(
        self, h: Tensor | Bags, attn_mask: Tensor | None = None, return_attention: bool = True
    ) -> tuple[Tensor, dict[str, Any]]:
        """The pooled vectors (B, 512) and {'attention': scores as of `forward_attention`, or None}."""
        rows = padded(h, attn_mask)
        rows = rows._replace(x=self.patch_embed(rows.x))
        pooled, scores = pool(rows, block_of(self.global_attn))
        attention = rows.back(scores, torch.finfo(scores.dtype).min).transpose(-2, -1) if return_attention else None
        return pooled.flatten(1), {"attention": attention}

    def forward_head(self, h: Tensor) -> Tensor:
        """The pooled vectors (B, 512) -> logits (B, C)."""
        logits: Tensor = self.classifier(h)
        return logits

    def forward(
        self,
        h: Tensor | Bags,
        loss_fn: Any = None,
        label: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_attention: bool = False,
        return_slide_feats: bool = False,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """h (B, M, L) with attn_mask (B, M), 1 = valid, or `Bags`.

        Returns:
            {'logits' (B, C), 'loss'} and {'attention' or None, 'loss' as a number, 'slide_feats' if asked for}.
        """
        features, log = self.forward_features(h, attn_mask=attn_mask, return_attention=return_attention)
        logits = self.forward_head(features)
        loss = None if loss_fn is None else loss_fn(logits, label)
        log["loss"] = -1 if loss is None else loss.item()
        if return_slide_feats:
            log["slide_feats"] = features
        return {"logits": logits, "loss": loss}, log

"""eva's ABMIL: projection, gated attention with dropout before its activations, an MLP; padding told by its value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.compat._gate import ScoreBlock, block_of, pool
from momkd.compat._load import DropIn
from momkd.compat._rows import padded


class MLP(nn.Module):
    """Linear layers with ReLU, and Dropout if any, between them."""

    def __init__(self, input_size: int, output_size: int, hidden_layer_sizes: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in hidden_layer_sizes:
            layers += [nn.Linear(input_size, size), nn.ReLU(), *([nn.Dropout(dropout)] if dropout > 0 else [])]
            input_size = size
        self._network = nn.Sequential(*layers, nn.Linear(input_size, output_size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._network(x)
        return out


class GatedAttention(ScoreBlock):
    """Scores (..., L) -> (..., n_classes). With dropout on, its place is one the fused op has not: torch makes them."""

    def __init__(
        self, input_dim: int, hidden_dim: int, dropout: float = 0.25, n_classes: int = 1, use_bias: bool = True
    ) -> None:
        super().__init__()
        for name, activation in (("attention_a", nn.Tanh()), ("attention_b", nn.Sigmoid())):
            linear = nn.Linear(input_dim, hidden_dim, bias=use_bias)
            self.add_module(name, nn.Sequential(linear, nn.Dropout(dropout), activation))
        self.attention_c = nn.Linear(hidden_dim, n_classes)


class ABMIL(DropIn):
    """eva's ABMIL.

    Example:
        >>> model = ABMIL(input_size=32, output_size=3, projected_input_size=16)
        >>> model(torch.randn(2, 70, 32), pad_value=float("-inf")).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        projected_input_size: int | None,
        hidden_size_attention: int = 128,
        hidden_sizes_mlp: tuple[int, ...] = (128, 64),
        use_bias: bool = True,
        dropout_input_embeddings: float = 0.0,
        dropout_attention: float = 0.0,
        dropout_mlp: float = 0.0,
    ) -> None:
        super().__init__()
        drop: nn.Module = nn.Dropout(dropout_input_embeddings)
        if projected_input_size:
            drop = nn.Sequential(nn.Linear(input_size, projected_input_size), drop)
            input_size = projected_input_size
        self.projector = drop
        self.gated_attention = GatedAttention(
            input_size, hidden_size_attention, dropout=dropout_attention, use_bias=use_bias
        )
        self.classifier = MLP(input_size, output_size, hidden_sizes_mlp, dropout_mlp)

    def forward(self, input_tensor: Tensor | Bags, pad_value: float | None = None) -> Any:
        """(B, M, L), where a row that holds `pad_value` alone is padding, or `Bags` -> (B, output_size)."""
        mask = None
        if pad_value is not None and isinstance(input_tensor, Tensor):
            mask = (input_tensor != pad_value).any(-1)
        rows = padded(input_tensor, mask)
        pooled, _ = pool(rows._replace(x=self.projector(rows.x)), block_of(self.gated_attention))
        return self.classifier(torch.squeeze(pooled, 1))

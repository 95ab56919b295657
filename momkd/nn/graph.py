"""Attention over a graph as modules: the layer of GATv2, and the encoder of patches made of two of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from momkd import functional
from momkd.graph import Edges


class GATv2Layer(nn.Module):
    """A layer of GATv2 over the in-neighbours of every node and itself, its heads one after the other.

    x_l = W_l x + b_l (sources), x_r = W_r x + b_r (targets); out = graph_attention(x_l, x_r, att) + bias. Takes the
    state dict of PyG's `GATv2Conv(in_channels, out_channels_per_head, heads)` and gives its numbers.

    Args:
        in_channels: L.
        out_channels_per_head: C.
        heads: H.
        dropout: of the attention weights, while training.
        negative_slope: of the LeakyReLU.

    Source: Brody, Alon and Yahav, ICLR 2022.

    Example:
        >>> layer, edges = momkd.nn.GATv2Layer(32, 8, heads=2), momkd.graph.knn(torch.rand(50, 2))
        >>> layer(torch.randn(50, 32), edges).shape
        torch.Size([50, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels_per_head: int,
        heads: int = 1,
        *,
        dropout: float = 0.0,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        self.dropout, self.negative_slope = dropout, negative_slope
        width = heads * out_channels_per_head
        self.lin_l = nn.Linear(in_channels, width)
        self.lin_r = nn.Linear(in_channels, width)
        self.att = nn.Parameter(torch.empty(1, heads, out_channels_per_head))
        self.bias = nn.Parameter(torch.zeros(width))
        for weight in (self.lin_l.weight, self.lin_r.weight, self.att):
            nn.init.xavier_uniform_(weight)
        for linear in (self.lin_l, self.lin_r):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """x (N, L), a graph of N nodes -> (N, H·C)."""
        out = functional.graph_attention(
            self.lin_l(x),
            self.lin_r(x),
            self.att[0],
            edges,
            negative_slope=self.negative_slope,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return out + self.bias

    def extra_repr(self) -> str:
        return f"heads={self.att.shape[1]}, dropout={self.dropout}, negative_slope={self.negative_slope}"


class GraphEncoder(nn.Module):
    """Patches that see their neighbours, twice, and their neighbours' neighbours.

    h1 = drop(ELU(LN(GAT1 x))) + W x;  h2 = drop(ELU(LN(GAT2 h1))) + h1;  F = max(h1, h2).

    What is positive of ELU is ReLU, so F is computed as h1 + drop(ReLU(LN(GAT2 h1))), the same value and gradient.

    Args:
        in_features: L.
        features: D, a multiple of `heads`.
        heads: of either GATv2 layer.
        attention_dropout: of their attention weights, while training.
        dropout: of what is added to the residual, while training.

    Raises:
        ValueError: `heads` does not divide `features`.

    Source: MoMKD (arXiv 2602.21395), histology encoder.

    Example:
        >>> encoder, edges = momkd.nn.GraphEncoder(32, 16), momkd.graph.knn(torch.rand(50, 2))
        >>> encoder(torch.randn(50, 32), edges).shape
        torch.Size([50, 16])
    """

    def __init__(
        self,
        in_features: int,
        features: int = 512,
        *,
        heads: int = 2,
        attention_dropout: float = 0.5,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if heads < 1 or features % heads:
            raise ValueError(f"features: expected a multiple of heads = {heads}, got {features}")
        self.gat1 = GATv2Layer(in_features, features // heads, heads, dropout=attention_dropout)
        self.gat2 = GATv2Layer(features, features // heads, heads, dropout=attention_dropout)
        self.res_proj1 = nn.Linear(in_features, features)
        self.ln1, self.ln2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.dropout = dropout

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """x (N, L), a graph of N nodes -> (N, D)."""
        near = nn.functional.elu(self.ln1(self.gat1(x, edges)), inplace=True)
        first: Tensor = self.res_proj1(x).add_(nn.functional.dropout(near, self.dropout, self.training))
        far = nn.functional.relu(self.ln2(self.gat2(first, edges)), inplace=True)
        return first + nn.functional.dropout(far, self.dropout, self.training)

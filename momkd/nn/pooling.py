"""Gated attention pooling as a module."""

from __future__ import annotations

from torch import Tensor, nn

from momkd import functional
from momkd.bags import Bags
from momkd.reference.segments import segment_softmax, softmax_stats


class GatedAttentionPool(nn.Module):
    """Gated attention pooling of ragged bags, with parameters.

    s_ih = w_a[h] · (tanh(W_v x_i + b_v) ⊙ σ(W_u x_i + b_u)) + b_a[h]; softmax over the bag; weighted sum of x.

    Args:
        in_features: L, the width of a patch feature.
        hidden_features: D, the width of the gate.
        heads: H, branches of attention.
        gated: False leaves the σ branch out.
        dropout: probability of dropping a value of tanh(·) and, apart from it, of σ(·), while training.

    Raises:
        ValueError: bags of another width; see `momkd.functional.gated_attention_pool`.

    Source: Ilse, Tomczak and Welling, ICML 2018.

    Example:
        >>> pool = momkd.nn.GatedAttentionPool(32, 16)
        >>> pool(momkd.Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)])).shape
        torch.Size([2, 1, 32])
    """

    def __init__(
        self, in_features: int, hidden_features: int = 256, heads: int = 1, *, gated: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention_v = nn.Linear(in_features, hidden_features)
        self.attention_u = nn.Linear(in_features, hidden_features) if gated else None
        self.attention_w = nn.Linear(hidden_features, heads)
        self.dropout = dropout

    def forward(self, bags: Bags) -> Tensor:
        """Bags of width L -> pooled (B, H, L)."""
        return self.pool_with_scores(bags)[0]

    def pool_with_scores(self, bags: Bags) -> tuple[Tensor, Tensor]:
        """Bags of width L -> pooled (B, H, L) and the scores before softmax (N, H)."""
        v, u, w = self.attention_v, self.attention_u, self.attention_w
        pooled, scores = functional.gated_attention_pool(
            bags.features,
            bags.offsets,
            v.weight,
            v.bias,
            None if u is None else u.weight,
            None if u is None else u.bias,
            w.weight,
            w.bias,
            dropout_p=self.dropout if self.training else 0.0,
            return_scores=True,
        )
        return pooled, scores

    def scores(self, bags: Bags) -> Tensor:
        """Bags of width L -> the scores before softmax (N, H)."""
        return self.pool_with_scores(bags)[1]

    def extra_repr(self) -> str:
        return f"gated={self.attention_u is not None}, dropout={self.dropout}"


def attention_of(scores: Tensor, offsets: Tensor) -> Tensor:
    """Scores before softmax (N, H) -> attention (N, H) summing to one over each bag; to look at, without gradient."""
    scores = scores.detach()
    return segment_softmax(scores, softmax_stats(scores, offsets), offsets)

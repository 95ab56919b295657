"""Attention pooling as modules: by a gate, by a memory, by both."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from momkd import functional
from momkd.bags import Bags
from momkd.reference.gated_attention_pool import GateParameters
from momkd.reference.memory_guided_pool import margins
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

    def pool_with_scores(self, bags: Bags, score_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Bags of width L -> pooled (B, H, L) and the scores before softmax (N, H), to which `score_bias` is added."""
        pooled, scores = functional.gated_attention_pool(
            bags.features,
            bags.offsets,
            *self._parameters_of_gate(),
            score_bias=score_bias,
            dropout_p=self.dropout if self.training else 0.0,
            return_scores=True,
        )
        return pooled, scores

    def scores(self, bags: Bags) -> Tensor:
        """Bags of width L -> the scores before softmax (N, H)."""
        return functional.gated_attention_scores(
            bags.features, *self._parameters_of_gate(), dropout_p=self.dropout if self.training else 0.0
        )

    def _parameters_of_gate(self) -> GateParameters:
        v, u, w = self.attention_v, self.attention_u, self.attention_w
        weight, bias = (None, None) if u is None else (u.weight, u.bias)
        return GateParameters(v.weight, v.bias, weight, bias, w.weight, w.bias)

    def extra_repr(self) -> str:
        return f"gated={self.attention_u is not None}, dropout={self.dropout}"


class MemoryGuidedPool(nn.Module):
    """Attention that follows a memory, with a temperature that is learnt: τ = clamp(exp θ, 0.01, 2).

    Args:
        temperature: τ at the start.
        branch: "positive" or "per_class", see `momkd.functional.memory_guided_pool`.

    Source: MoMKD (arXiv 2602.21395), memory-guided attention.

    Example:
        >>> bags, bank = momkd.Bags.from_list([torch.randn(5, 32)]), momkd.nn.MemoryBank(2, 4, 8)
        >>> pooled, attention, slots = momkd.nn.MemoryGuidedPool()(torch.randn(5, 8), bags, bank.memory)
        >>> pooled.shape
        torch.Size([1, 1, 32])
    """

    LOWEST, HIGHEST = 0.01, 2.0

    def __init__(self, temperature: float = 0.2, *, branch: str = "positive") -> None:
        super().__init__()
        if not self.LOWEST <= temperature <= self.HIGHEST:
            raise ValueError(f"temperature: expected {self.LOWEST} to {self.HIGHEST}, got {temperature}")
        self.log_tau = nn.Parameter(torch.tensor(math.log(temperature)))
        self.branch = branch

    @property
    def temperature(self) -> Tensor:
        return self.log_tau.exp().clamp(self.LOWEST, self.HIGHEST)

    def forward(self, z: Tensor, bags: Bags, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (N, S), bags of N rows of width L, memory (C, K, S) -> pooled (B, H, L), attention (N, H), slots (N, C)."""
        return functional.memory_guided_pool(
            z, bags.features, memory, bags.offsets, self.temperature, branch=self.branch
        )

    def pool_with_scores(self, z: Tensor, bags: Bags, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, with the scores before softmax (N, H) in place of the attention."""
        scores, slots = self._scores(z, memory)
        return functional.attention_pool(bags, scores), scores, slots

    def _scores(self, z: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        similarity, slots = functional.memory_similarity(z, memory.detach())  # (N, C)
        return margins(similarity, self._per_class(memory)) / self.temperature, slots  # (N, H)

    def _per_class(self, memory: Tensor) -> bool:
        return self.branch == "per_class" or memory.shape[0] > 2


class GatedMemoryPool(MemoryGuidedPool):
    """Attention by a gate and a memory together: the scores of both are added before the softmax.

    score_ih = gate_ih + (memory score of `MemoryGuidedPool`)_ih. While the memory is zero the gate is alone.

    Args:
        in_features: L, the width of a patch feature.
        hidden_features: D, the width of the gate.
        heads: H, branches: 1, or C where there is one a class.
        temperature, branch: as in `MemoryGuidedPool`; for C > 2 there is a branch a class whatever is asked.

    Raises:
        ValueError: `heads` is not the number of branches.

    Example:
        >>> bags, bank = momkd.Bags.from_list([torch.randn(5, 32)]), momkd.nn.MemoryBank(2, 4, 8)
        >>> pooled, attention, slots = momkd.nn.GatedMemoryPool(32, 16)(torch.randn(5, 8), bags, bank.memory)
        >>> pooled.shape
        torch.Size([1, 1, 32])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 256,
        heads: int = 1,
        temperature: float = 0.2,
        *,
        branch: str = "positive",
    ) -> None:
        super().__init__(temperature, branch=branch)
        self.gate = GatedAttentionPool(in_features, hidden_features, heads)

    def forward(self, z: Tensor, bags: Bags, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, scores, slots = self.pool_with_scores(z, bags, memory)
        return pooled, attention_of(scores, bags.offsets), slots

    def pool_with_scores(self, z: Tensor, bags: Bags, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, expected = self.gate.attention_w.out_features, memory.shape[0] if self._per_class(memory) else 1
        if heads != expected:
            raise ValueError(f"heads: expected {expected} for this memory and branch, got {heads}")
        guided, slots = self._scores(z, memory)
        return (*self.gate.pool_with_scores(bags, guided), slots)


def attention_of(scores: Tensor, offsets: Tensor) -> Tensor:
    """Scores before softmax (N, H) -> attention (N, H) summing to one over each bag; to look at, without gradient."""
    scores = scores.detach()
    return segment_softmax(scores, softmax_stats(scores, offsets), offsets)

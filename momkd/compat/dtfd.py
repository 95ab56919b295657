"""DTFD-MIL's parts (Zhang et al. 2022): reduction, attention over pseudo-bags, classifiers.

Its training splits a slide into pseudo-bags and runs them one by one; as `Bags` all of them go at once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from momkd.bags import Bags
from momkd.compat._gate import block_of, pool, scores_of
from momkd.compat._load import DropIn
from momkd.compat._rows import one_bag


class Classifier_1fc(DropIn):
    """Dropout and one linear layer, (N, n_channels) -> (N, n_classes)."""

    def __init__(self, n_channels: int, n_classes: int, droprate: float = 0.0) -> None:
        super().__init__()
        self.fc = nn.Linear(n_channels, n_classes)
        self.droprate = droprate
        if droprate != 0.0:
            self.dropout = nn.Dropout(droprate)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.dropout(x) if self.droprate != 0.0 else x)
        return logits


class residual_block(nn.Module):
    """x + ReLU(W ReLU(V x))."""

    def __init__(self, nChn: int = 512) -> None:
        super().__init__()
        layers = (nn.Linear(nChn, nChn, bias=False), nn.ReLU(), nn.Linear(nChn, nChn, bias=False), nn.ReLU())
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block(x)
        return out


class DimReduction(DropIn):
    """Linear without bias, ReLU, residual blocks: (N, n_channels) -> (N, m_dim)."""

    def __init__(self, n_channels: int, m_dim: int = 512, numLayer_Res: int = 0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(n_channels, m_dim, bias=False)
        self.relu1 = nn.ReLU()
        self.numRes = numLayer_Res
        self.resBlocks = nn.Sequential(*(residual_block(m_dim) for _ in range(numLayer_Res)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resBlocks(self.relu1(self.fc1(x)))
        return out


class Attention_Gated(DropIn):
    """Attention (K, N) of the patches; `pool` also pools them."""

    def __init__(self, L: int = 512, D: int = 128, K: int = 1) -> None:
        super().__init__()
        self.L, self.D, self.K = L, D, K
        self.attention_V = nn.Sequential(nn.Linear(L, D), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(L, D), nn.Sigmoid())
        self.attention_weights = nn.Linear(D, K)

    def forward(self, x: Tensor | Bags, isNorm: bool = True) -> Tensor:
        """One bag (N, L), or `Bags` -> (K, N): summing to one in each bag, or before softmax if not `isNorm`."""
        rows = one_bag(x)
        scores = scores_of(rows.x, block_of(self))
        return (rows.softmax(scores) if isNorm else scores).T

    def pool(self, x: Tensor | Bags) -> tuple[Tensor, Tensor]:
        """One bag, or `Bags` -> pooled (B, K, L) and the scores before softmax (K, N), by one op."""
        pooled, scores = pool(one_bag(x), block_of(self))
        return pooled, scores.T


class Attention_with_Classifier(DropIn):
    """`Attention_Gated` and `Classifier_1fc`.

    Example:
        >>> model = Attention_with_Classifier(L=32, D=16)
        >>> model(torch.randn(70, 32)).shape
        torch.Size([1, 2])
        >>> model(momkd.Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)])).shape
        torch.Size([2, 1, 2])
    """

    def __init__(self, L: int = 512, D: int = 128, K: int = 1, num_cls: int = 2, droprate: float = 0) -> None:
        super().__init__()
        self.attention = Attention_Gated(L, D, K)
        self.classifier = Classifier_1fc(L, num_cls, droprate)

    def forward(self, x: Tensor | Bags) -> Any:
        """One bag (N, L) -> (K, num_cls); `Bags` -> (B, K, num_cls)."""
        pooled, _ = pool(one_bag(x), block_of(self.attention))
        return self.classifier(pooled if isinstance(x, Bags) else pooled[0])

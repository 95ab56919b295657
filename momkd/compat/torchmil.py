"""torchmil's AttentionPool and ABMIL: padded batches with a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.compat._gate import Block, pool
from momkd.compat._load import DropIn
from momkd.compat._rows import Rows, padded, row_wise

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


class LazyLinear(nn.Module):
    """A linear layer under the name `module`; without `in_features` its first input tells them."""

    def __init__(self, in_features: int | None = None, out_features: int = 512, bias: bool = True) -> None:
        super().__init__()
        if in_features is None:
            self.module: nn.Linear = nn.LazyLinear(out_features, bias=bias)
        else:
            self.module = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out


def block_of_pool(module: Any) -> Block:
    """fc1 and its activation, fc_gated and σ, fc2; of an `AttentionPool` of either library."""
    gate = [module.fc_gated.module, module.act_gated] if module.gated else None
    return Block([module.fc1.module, module.act_layer], gate, module.fc2)


def pool_rows(module: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """z (B, L) and f as the caller would have it, (B, M) or (N,)."""
    for layer in (module.fc1, module.fc_gated) if module.gated else (module.fc1,):
        if nn.parameter.is_lazy(layer.module.weight):
            layer(rows.x[:1])  # tells it the width
    pooled, scores = pool(rows, block_of_pool(module))
    return pooled[:, 0], rows.back(scores)[..., 0]


class AttentionPool(DropIn):
    """torchmil's attention pooling; `act` is "tanh", "relu" or "gelu".

    Example:
        >>> pool = AttentionPool(in_dim=32, gated=True)
        >>> z, f = pool(torch.randn(2, 70, 32), mask=torch.ones(2, 70), return_att=True)
        >>> z.shape, f.shape
        (torch.Size([2, 32]), torch.Size([2, 70]))
    """

    def __init__(self, in_dim: int | None = None, att_dim: int = 128, act: str = "tanh", gated: bool = False) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"act: expected 'tanh', 'relu' or 'gelu', got {act!r}")
        self.in_dim, self.att_dim, self.act, self.gated = in_dim, att_dim, act, gated
        self.fc1 = LazyLinear(in_dim, att_dim)
        self.fc2 = nn.Linear(att_dim, 1, bias=False)
        if gated:
            self.fc_gated = LazyLinear(in_dim, att_dim)
            self.act_gated = nn.Sigmoid()
        self.act_layer = ACTIVATIONS[act]()

    def forward(self, X: Tensor | Bags, mask: Tensor | None = None, return_att: bool = False) -> Any:
        """X (B, M, L) with mask (B, M), or `Bags` -> z (B, L), and with `return_att` f (B, M) before softmax.

        f is 0 where masked; of `Bags` it is (N,).
        """
        z, f = pool_rows(self, padded(X, mask))
        return (z, f) if return_att else z


class ABMIL(DropIn):
    """torchmil's ABMIL: feature extractor, `AttentionPool`, one logit a bag.

    A feature extractor of linear layers, activations, LayerNorm and Dropout sees the real patches only; any other sees
    the padded batch as torchmil gives it.

    Example:
        >>> model = ABMIL(in_shape=(32,), gated=True)
        >>> model(torch.randn(2, 70, 32), torch.ones(2, 70)).shape
        torch.Size([2])
        >>> model(momkd.Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        att_dim: int = 128,
        att_act: str = "tanh",
        gated: bool = False,
        feat_ext: nn.Module | None = None,
        criterion: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.criterion = criterion or nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext or nn.Identity()
        width = None
        if in_shape is not None:
            with torch.no_grad():
                width = self.feat_ext(torch.zeros(1, *in_shape)).shape[-1]
        self.pool = AttentionPool(width, att_dim, att_act, gated)
        self.classifier = LazyLinear(width, 1)

    def forward(self, X: Tensor | Bags, mask: Tensor | None = None, return_att: bool = False) -> Any:
        """X (B, M, ...) with mask (B, M), or `Bags` -> logits (B,), and with `return_att` f as `AttentionPool`."""
        if isinstance(X, Bags) or (X.ndim == 3 and row_wise(self.feat_ext)):
            rows = padded(X, mask)
            rows = rows._replace(x=self.feat_ext(rows.x))
        else:
            rows = padded(self.feat_ext(X), mask)
        z, f = pool_rows(self.pool, rows)
        logits = self.classifier(z).squeeze(-1)
        return (logits, f) if return_att else logits

    def compute_loss(self, Y: Tensor, X: Tensor | Bags, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Labels (B,) and the input -> logits (B,) and the loss under the name of the criterion."""
        logits = self.forward(X, mask)
        return logits, {type(self.criterion).__name__: self.criterion(logits.float(), Y.float())}

    def predict(self, X: Tensor | Bags, mask: Tensor | None = None, return_inst_pred: bool = True) -> Any:
        """Logits (B,), and with `return_inst_pred` f."""
        return self.forward(X, mask, return_att=return_inst_pred)

"""CLAM's models (Lu et al. 2021, "Data-efficient and weakly supervised computational pathology"); CHIEF's too."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.compat import _clam_instances as instances
from momkd.compat._gate import ScoreBlock, block_of, pool, scores_of
from momkd.compat._load import DropIn
from momkd.compat._rows import one_bag
from momkd.reference.segments import accumulate_dtype


class Attn_Net(ScoreBlock):
    """Scores without a gate: (N, L) -> scores (N, n_classes) and the input, as CLAM's."""

    def __init__(self, L: int = 1024, D: int = 256, dropout: bool = False, n_classes: int = 1) -> None:
        super().__init__()
        between = [nn.Dropout(0.25)] if dropout else []
        self.module = nn.Sequential(nn.Linear(L, D), nn.Tanh(), *between, nn.Linear(D, n_classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return scores_of(x, block_of(self)), x


class Attn_Net_Gated(ScoreBlock):
    """Scores with a gate: (N, L) -> scores (N, n_classes) and the input, as CLAM's."""

    def __init__(self, L: int = 1024, D: int = 256, dropout: bool = False, n_classes: int = 1) -> None:
        super().__init__()
        for name, activation in (("attention_a", nn.Tanh()), ("attention_b", nn.Sigmoid())):
            after = [nn.Dropout(0.25)] if dropout else []
            self.add_module(name, nn.Sequential(nn.Linear(L, D), activation, *after))
        self.attention_c = nn.Linear(D, n_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return scores_of(x, block_of(self)), x


class CLAM_SB(DropIn):
    """CLAM with one branch of attention.

    Args: as CLAM's. `size_arg` is "small" (gate of 256) or "big" (384), `dropout` its probability after the first
        layer, and any but 0 puts dropout of 0.25 behind both activations of the gate.

    Example:
        >>> model = CLAM_SB(embed_dim=32, dropout=0.25)
        >>> logits, prob, label, A_raw, results = model(torch.randn(70, 32))
        >>> logits.shape, A_raw.shape
        (torch.Size([1, 2]), torch.Size([1, 70]))
        >>> model(momkd.Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)]))[0].shape
        torch.Size([2, 2])
    """

    # Older checkpoints: the stack was wrapped for several devices, or had no Dropout between its layers.
    RENAMES: ClassVar = (
        (r"attention_net\.module\.", "attention_net."),
        (r"attention_net\.2\.(?=attention_|module)", "attention_net.3."),
    )
    STRAYS: ClassVar = (r"instance_loss_fn\..*",)

    def __init__(
        self,
        gate: bool = True,
        size_arg: str = "small",
        dropout: float = 0.0,
        k_sample: int = 8,
        n_classes: int = 2,
        instance_loss_fn: nn.Module | None = None,
        subtyping: bool = False,
        embed_dim: int = 1024,
    ) -> None:
        super().__init__()
        if size_arg not in ("small", "big"):
            raise ValueError(f"size_arg: expected 'small' or 'big', got {size_arg!r}")
        hidden = 256 if size_arg == "small" else 384
        net = Attn_Net_Gated if gate else Attn_Net
        self.attention_net = nn.Sequential(
            nn.Linear(embed_dim, 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            net(512, hidden, dropout=bool(dropout), n_classes=self._branches(n_classes)),
        )
        self.classifiers = self._classifiers(n_classes)
        self.instance_classifiers = nn.ModuleList(nn.Linear(512, 2) for _ in range(n_classes))
        self.k_sample = k_sample
        self.instance_loss_fn = instance_loss_fn or nn.CrossEntropyLoss()
        self.n_classes = n_classes
        self.subtyping = subtyping

    def _branches(self, n_classes: int) -> int:
        return 1

    def _classifiers(self, n_classes: int) -> nn.Module:
        return nn.Linear(512, n_classes)

    def inst_eval(self, A: Tensor, h: Tensor, classifier: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Of the bag's own class: attention (N,) or (K, N), patches (N, 512) -> loss, predictions, targets."""
        return instances.judge(self, A, h, classifier, inside=True)

    def inst_eval_out(self, A: Tensor, h: Tensor, classifier: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Of another class, as `inst_eval`."""
        return instances.judge(self, A, h, classifier, inside=False)

    def forward(
        self,
        h: Tensor | Bags,
        label: Tensor | None = None,
        instance_eval: bool = False,
        return_features: bool = False,
        attention_only: bool = False,
    ) -> Any:
        """One bag (N, L), or `Bags` of B; label (1,) or (B,) int64, wanted by `instance_eval`.

        Returns:
            logits (B, C), their softmax, arg-max (B, 1), scores before softmax (K, N), and a dictionary: with
            `instance_eval` the instance loss (mean over the bags), labels and predictions; with `return_features` the
            pooled vectors, (K, 512) of one bag and (B, K, 512) of Bags. With `attention_only` the scores alone.
        """
        rows = one_bag(h)
        *encoder, net = self.attention_net
        for layer in encoder:
            rows = rows._replace(x=layer(rows.x))
        if attention_only:
            return scores_of(rows.x, block_of(net)).T
        pooled, scores = pool(rows, block_of(net))
        if isinstance(self.classifiers, nn.ModuleList):  # a branch and a classifier a class
            logits = torch.cat([layer(pooled[:, c]) for c, layer in enumerate(self.classifiers)], 1)
            logits = logits.to(accumulate_dtype(logits.dtype))
        else:
            logits = self.classifiers(pooled[:, 0])
        results = instances.evaluate(self, rows, scores, label) if instance_eval else {}
        if return_features:
            results["features"] = pooled if isinstance(h, Bags) else pooled[0]
        return logits, torch.softmax(logits, 1), logits.topk(1, dim=1)[1], scores.T, results


class CLAM_MB(CLAM_SB):
    """CLAM with a branch of attention and a classifier for each class; arguments and results as `CLAM_SB`."""

    def _branches(self, n_classes: int) -> int:
        return n_classes

    def _classifiers(self, n_classes: int) -> nn.Module:
        return nn.ModuleList(nn.Linear(512, 1) for _ in range(n_classes))

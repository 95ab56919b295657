"""ABMIL: the slide alone, by gated attention. The baseline of every comparison."""

from __future__ import annotations

from torch import Tensor

from momkd.bags import Bags
from momkd.models.base import (
    MILModel,
    Pooled,
    Prediction,
    SlideClassifier,
    TrainingStep,
    classification_loss,
    encode,
    make_encoder,
)
from momkd.nn import GatedAttentionPool
from momkd.nn.pooling import attention_of


class ABMIL(MILModel):
    """Patch encoder, gated attention pooling, classifier.

    Args:
        in_features: L, width of the patch features.
        num_classes: C.
        encoder: "mlp", "identity", or "gatv2", which wants bags with a graph (`Bags.with_edges`).
        hidden_features: D, width of an encoded patch (of "identity" it is L).
        gate_features: width of the gate.
        branch: "positive", one attention; "per_class", one a class.
        dropout: in the classifier.
        classifier_features: width between its two layers.
        heads, attention_dropout, encoder_dropout: of encoder="gatv2", see `momkd.nn.GraphEncoder`.

    Source: Ilse, Tomczak and Welling, ICML 2018.

    Example:
        >>> model = momkd.models.ABMIL(32)
        >>> model(momkd.Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)])).logits.shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int = 2,
        *,
        encoder: str = "mlp",
        hidden_features: int = 512,
        gate_features: int = 256,
        branch: str = "positive",
        dropout: float = 0.5,
        classifier_features: int = 128,
        heads: int = 2,
        attention_dropout: float = 0.5,
        encoder_dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        graph = {"heads": heads, "attention_dropout": attention_dropout, "dropout": encoder_dropout}
        self.encoder, width = make_encoder(encoder, in_features, hidden_features, **graph)
        heads = num_classes if branch == "per_class" else 1
        self.pool = GatedAttentionPool(width, gate_features, heads)
        self.classifier = SlideClassifier(width, num_classes, dropout, classifier_features)
        self.width = width

    def pooled(self, bags: Bags) -> Pooled:
        encoded = encode(self.encoder, bags, self.in_features, self.pool.attention_v.weight)
        return Pooled(*self.pool.pool_with_scores(encoded))

    def training_step(
        self, bags: Bags, labels: Tensor, omics: Tensor | None = None, has_omics: Tensor | None = None
    ) -> TrainingStep:
        logits = self.classifier(self.pooled(bags).vectors)
        return TrainingStep({"classification": [classification_loss(logits, labels)]}, logits)

    def forward(self, bags: Bags) -> Prediction:
        found = self.pooled(bags)
        return Prediction(self.classifier(found.vectors), lambda: attention_of(found.scores, bags.offsets))

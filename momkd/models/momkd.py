"""MoMKD: genomics teach histology through a memory; at inference the slide alone is enough.

Patches are encoded and projected onto the unit sphere; attention follows a memory of prototypes of each class (or a
gate); the pooled slide and the genomic profile are drawn to the prototypes of their class. With a momentum memory no
gradient crosses from one modality to the other: they meet in prototypes that no gradient reaches.

Source: MoMKD, CVPR 2026 (arXiv 2602.21395).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from momkd.bags import Bags
from momkd.models.base import (
    POOLINGS,
    Mean,
    MemoryRows,
    MILModel,
    Pooled,
    Prediction,
    SlideClassifier,
    TrainingStep,
    classification_loss,
    encode,
    make_encoder,
    pairing_loss,
    reconstruction_loss,
)
from momkd.models.omics import OmicsTower
from momkd.nn import GatedAttentionPool, GatedMemoryPool, MemoryBank, MemoryGuidedPool, SoftAngleLoss
from momkd.nn.pooling import attention_of
from momkd.reference.segments import bag_index

ROWS = ("slide", "patch", "attention")


@dataclass(frozen=True)
class Projections:
    """Where B slides with N patches in all lie among the prototypes.

    Attributes:
        prediction: as `MoMKD.forward` gives it.
        patches: (N, S) float32 unit vectors; cosines with the prototypes are what guides the attention.
        slides: (B, H, S) float32 unit vectors, of what each of the H branches pooled.
    """

    prediction: Prediction
    patches: Tensor
    slides: Tensor


class MoMKD(MILModel):
    """Momentum memory knowledge distillation.

    Without `omics_features` there is no genomics tower: so it trains on slides alone, and so inference builds it.

    Args:
        in_features: L, width of the patch features.
        num_classes: C, at least 2.
        omics_features: G, genes of a profile; None leaves the tower out.
        encoder: "mlp", "identity", or "gatv2" as in the paper, which wants bags with a graph (`Bags.with_edges`).
        pooling: "memory" (attention by the memory), "gated", or "both" (the scores of both added).
        branch: "positive", one attention; "per_class", one a class, as always for C > 2 where the memory guides.
        hidden_features: D, width of an encoded patch (of "identity" it is L).
        gate_features: width of the gate, for pooling="gated" and "both".
        projection_features: S, length of a prototype.
        shared_projector: patches and pooled slides share one projector.
        slots: K, prototypes a class.
        update, adaptive: see `momkd.nn.MemoryBank`.
        rows: what a slide scatters into a momentum memory: "slide", "patch" or "attention".
        rho: share of the genomics in it; each slide brings mass 1 in all.
        temperature: of the attention at the start; it is learnt.
        dropout: in the classifier.
        classifier_features: width between its two layers.
        margin, tau, beta: of the soft-angle losses.
        assignment_tau: sharpness of the soft assignment to slots that a slide learns from its genomics; None: none.
        paired: a slide is drawn to its own genomics too, which get no gradient from it.
        coupled: one soft-angle loss of the mean of both projections takes the place of the two, so that gradients cross
            from one modality to the other. For ablation.
        heads, attention_dropout, encoder_dropout: of encoder="gatv2", see `momkd.nn.GraphEncoder`.
        omics_embedding, omics_hidden, omics_decoder_hidden, omics_dropout: of the tower, see `OmicsTower`.

    Example:
        >>> model = momkd.models.MoMKD(32, omics_features=100)
        >>> bags = momkd.Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)])
        >>> sorted(model.training_step(bags, torch.tensor([0, 1]), torch.randn(2, 100)).losses)
        ['classification', 'memory', 'reconstruction', 'soft_angle_omics', 'soft_angle_slide']
        >>> model.eval()(bags).logits.shape
        torch.Size([2, 2])
    """

    memory: MemoryBank

    def __init__(
        self,
        in_features: int,
        num_classes: int = 2,
        *,
        omics_features: int | None = None,
        encoder: str = "mlp",
        pooling: str = "memory",
        branch: str = "positive",
        hidden_features: int = 512,
        gate_features: int = 256,
        projection_features: int = 64,
        shared_projector: bool = True,
        slots: int = 16,
        update: str = "momentum",
        adaptive: bool = False,
        rows: str = "slide",
        rho: float = 0.5,
        temperature: float = 0.2,
        dropout: float = 0.5,
        classifier_features: int = 128,
        margin: float = 0.3,
        tau: float = 5.0,
        beta: float = 20.0,
        assignment_tau: float | None = None,
        paired: bool = False,
        coupled: bool = False,
        heads: int = 2,
        attention_dropout: float = 0.5,
        encoder_dropout: float = 0.25,
        omics_embedding: int = 512,
        omics_hidden: int = 512,
        omics_decoder_hidden: int | None = None,
        omics_dropout: float = 0.25,
    ) -> None:
        super().__init__()
        for name, value, choices in (("pooling", pooling, POOLINGS), ("rows", rows, ROWS)):
            if value not in choices:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")
        self.in_features, self.rows, self.rho = in_features, rows, rho
        self.assignment_tau, self.paired, self.coupled = assignment_tau, paired, coupled
        self.soft_angle = SoftAngleLoss(margin, tau, beta)
        graph = {"heads": heads, "attention_dropout": attention_dropout, "dropout": encoder_dropout}
        self.encoder, width = make_encoder(encoder, in_features, hidden_features, **graph)
        self.patch_projector = nn.Linear(width, projection_features)
        self.slide_projector = None if shared_projector else nn.Linear(width, projection_features)
        self.memory = MemoryBank(num_classes, slots, projection_features, update=update, adaptive=adaptive)
        self.pool: MemoryGuidedPool | GatedAttentionPool
        branches = num_classes if branch == "per_class" or (pooling == "both" and num_classes > 2) else 1
        if pooling == "memory":
            self.pool = MemoryGuidedPool(temperature, branch=branch)
        elif pooling == "both":
            self.pool = GatedMemoryPool(width, gate_features, branches, temperature, branch=branch)
        else:
            self.pool = GatedAttentionPool(width, gate_features, branches)
        self.classifier = SlideClassifier(width, num_classes, dropout, classifier_features)
        self.genomics: OmicsTower | None = None
        if omics_features is not None:
            self.genomics = OmicsTower(
                omics_features,
                projection_features,
                features=omics_embedding,
                hidden_features=omics_hidden,
                decoder_features=omics_decoder_hidden,
                dropout=omics_dropout,
            )

    # -- parts ---------------------------------------------------------------------------------------------------

    def _pooled(self, bags: Bags) -> tuple[Tensor, Tensor, Tensor | Callable[[], Tensor], Tensor | None]:
        """pooled (B, H, D), patch projections (N, S), attention (N, H) or what computes it, slots (N, C) or None."""
        encoded = encode(self.encoder, bags, self.in_features, self.patch_projector.weight)
        z = _unit(self.patch_projector(encoded.features))
        slots: Tensor | None = None
        if isinstance(self.pool, GatedMemoryPool):
            pooled, scores, slots = self.pool.pool_with_scores(z, encoded, self.memory.memory)
        elif isinstance(self.pool, MemoryGuidedPool):
            pooled, attention, slots = self.pool(z, encoded, self.memory.memory)
            return pooled, z, attention, slots
        else:
            pooled, scores = self.pool.pool_with_scores(encoded)
        return pooled, z, lambda: attention_of(scores, bags.offsets), slots

    def _slide_projection(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Unit projection (B, S) of the pooled slide: of the branch of its own class where there is one a class."""
        if pooled.shape[1] > 1:
            own = labels.clamp_min(0)[:, None, None].expand(-1, 1, pooled.shape[2])
            pooled = pooled.gather(1, own)
        return _unit((self.slide_projector or self.patch_projector)(pooled[:, 0]))

    # -- training ------------------------------------------------------------------------------------------------

    def training_step(
        self, bags: Bags, labels: Tensor, omics: Tensor | None = None, has_omics: Tensor | None = None
    ) -> TrainingStep:
        pooled, z, attention, _ = self._pooled(bags)
        logits = self.classifier(pooled)
        slide = self._slide_projection(pooled, labels)
        by_gradient = self.memory.update == "gradient"
        committed = slide if self.rows == "slide" and not by_gradient else z
        row_class = labels if committed is slide else labels[bag_index(bags.offsets, z.shape[0])]
        labelled = labels >= 0
        counted = labelled if row_class is labels else row_class >= 0
        terms = {
            "classification": [classification_loss(logits, labels)],
            "memory": [Mean(self.memory.commitment_loss(committed, row_class), counted)],
        }
        if by_gradient:
            terms["memory"].append(Mean(self.memory.orthogonality_loss(labels), labelled))
        genomic, taught = None, torch.zeros_like(labels, dtype=torch.bool)
        if self.genomics is not None and omics is not None:
            present = torch.ones_like(taught) if has_omics is None else has_omics
            taught = present & labelled
            genomic, decoded = self.genomics(omics)
            terms["reconstruction"] = [reconstruction_loss(decoded, omics, present)]
            if self.assignment_tau is not None:
                assigned = self.memory.assignment_loss(slide, genomic, present, tau=self.assignment_tau)
                terms["assignment"] = [Mean(assigned, present)]
            if self.paired:
                terms["pairing"] = [pairing_loss(slide, genomic, present)]
            if not self.coupled:
                own = torch.where(taught, labels, -1)
                terms["soft_angle_omics"] = [Mean(self.soft_angle(genomic, self.memory.memory, own), taught)]
        drawn = slide
        if self.coupled and genomic is not None:
            drawn = torch.where(taught[:, None], _unit(slide + genomic), slide)
        terms["soft_angle_slide"] = [Mean(self.soft_angle(drawn, self.memory.memory, labels), labelled)]
        return TrainingStep(terms, logits, self._memory_rows(bags, labels, z, attention, slide, genomic, taught))

    @torch.no_grad()
    def _memory_rows(
        self,
        bags: Bags,
        labels: Tensor,
        z: Tensor,
        attention: Tensor | Callable[[], Tensor],
        slide: Tensor,
        genomic: Tensor | None,
        taught: Tensor,
    ) -> MemoryRows:
        """Rows of the histology, of mass 1 − ρ a slide (1 where it has no genomics), and of the genomics, of mass ρ."""
        seen = (1 - self.rho * taught.float()) * (bags.offsets.diff() > 0)  # (B,) mass of the histology
        if self.rows == "slide":
            rows, row_class, weights = slide, labels, seen
        else:
            index = bag_index(bags.offsets, z.shape[0])  # (N,)
            rows, row_class = z, labels[index]
            if self.rows == "patch":
                share = 1 / bags.offsets.diff().clamp_min(1).float()[index]
            else:
                found = attention if isinstance(attention, Tensor) else attention()
                head = row_class.clamp_min(0) if found.shape[1] > 1 else torch.zeros_like(row_class)
                share = found.gather(1, head[:, None])[:, 0].float()
            weights = share * seen[index]
        made = [MemoryRows(rows.detach().float(), row_class, weights)]
        if genomic is not None:
            made.append(MemoryRows(genomic.detach(), torch.where(taught, labels, -1), self.rho * taught.float()))
        return MemoryRows.concatenate(made)

    # -- inference -----------------------------------------------------------------------------------------------

    def pooled(self, bags: Bags) -> Pooled:
        encoded = encode(self.encoder, bags, self.in_features, self.patch_projector.weight)
        z = _unit(self.patch_projector(encoded.features))
        if isinstance(self.pool, MemoryGuidedPool):
            return Pooled(*self.pool.pool_with_scores(z, encoded, self.memory.memory), z)
        return Pooled(*self.pool.pool_with_scores(encoded), None, z)

    def forward(self, bags: Bags) -> Prediction:
        pooled, _, attention, slots = self._pooled(bags)
        return Prediction(self.classifier(pooled), attention, slots)

    @torch.no_grad()
    def project(self, bags: Bags) -> Projections:
        """The prediction, and the projections of patches and pooled slides that it came by; without gradient.

        Example:
            >>> model = momkd.models.MoMKD(32, projection_features=8).eval()
            >>> found = model.project(momkd.Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)]))
            >>> found.patches.shape, found.slides.shape
            (torch.Size([570, 8]), torch.Size([2, 1, 8]))
        """
        pooled, z, attention, slots = self._pooled(bags)
        return Projections(Prediction(self.classifier(pooled), attention, slots), z, self.project_slides(pooled))

    def project_slides(self, pooled: Tensor) -> Tensor:
        """pooled (B, H, D) -> unit projections (B, H, S) float32."""
        return _unit((self.slide_projector or self.patch_projector)(pooled))


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x.float(), dim=-1, eps=1e-12)

"""A training step of the default model as one writes it by hand: plain torch on a padded batch.

Every slide has a label and a profile, so nothing is masked but padding. The layers are those of the model that is
compared, copied; what momkd does by its ops is written here: pooling by gate and memory, losses, move of the memory.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momkd.config import LossConfig
from momkd.models import MoMKD


class PaddedMoMKD(nn.Module):
    """The layers of a `MoMKD` with pooling="both", two classes, one branch and a shared projector; see `MoMKD`."""

    def __init__(self, model: MoMKD, losses: LossConfig, *, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.model, self.weights, self.soft_angle = deepcopy(model), losses, model.soft_angle
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), learning_rate, weight_decay=weight_decay, fused=True
        )

    def encode(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, M, L), padding (B, M) bool -> pooled (B, D), attention (B, M)."""
        model, gate = self.model, self.model.pool.gate  # type: ignore[union-attr]
        encoded = model.encoder(x)
        z = F.normalize(model.patch_projector(encoded), dim=2)
        near = (z @ model.memory.memory.flatten(0, 1).T).unflatten(2, (2, -1)).amax(3)  # (B, M, 2)
        gated = gate.attention_w(torch.tanh(gate.attention_v(encoded)) * torch.sigmoid(gate.attention_u(encoded)))
        scores = gated[..., 0] + (near[..., 1] - near[..., 0]) / model.pool.log_tau.exp().clamp(0.01, 2.0)  # type: ignore
        attention = scores.masked_fill(padding, -torch.inf).softmax(1)
        return (attention[:, None] @ encoded)[:, 0], attention

    def classify(self, pooled: Tensor) -> Tensor:
        """pooled (B, D) -> logits (B, 2)."""
        logits: Tensor = self.model.classifier.layers(pooled)  # type: ignore[operator, union-attr]
        return logits

    def _soft_angle(self, z: Tensor, labels: Tensor) -> Tensor:
        """z (B, S) unit -> scalar."""
        m, tau, beta = self.soft_angle.margin, self.soft_angle.tau, self.soft_angle.beta
        cosines = (z @ self.model.memory.memory.flatten(0, 1).T).unflatten(1, (2, -1))
        s = torch.logsumexp(tau * cosines, 2) / tau
        own = labels[:, None]
        return F.softplus(beta * (m - (s.gather(1, own) - s.gather(1, 1 - own)))).mean()

    def losses(
        self, x: Tensor, padding: Tensor, labels: Tensor, profiles: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The terms without their weights, and the unit projections of slides and profiles (B, S)."""
        pooled, _ = self.encode(x, padding)
        logits = self.classify(pooled)
        slide = F.normalize(self.model.patch_projector(pooled), dim=1)
        own = self.model.memory.memory[labels]  # (B, K, S)
        genomic, decoded = self.model.genomics(profiles)  # type: ignore[misc]
        terms = {
            "classification": F.cross_entropy(logits, labels),
            "memory": 1 - (own @ slide[:, :, None])[..., 0].amax(1).mean(),
            "reconstruction": F.mse_loss(decoded, profiles),
            "soft_angle_omics": self._soft_angle(genomic, labels),
            "soft_angle_slide": self._soft_angle(slide, labels),
        }
        return terms, slide, genomic

    @torch.no_grad()
    def move_memory_(self, rows: Tensor, labels: Tensor, weight: float, momentum: float) -> None:
        """Every row (R, S) into the nearest slot of its class (R,)."""
        bank = self.model.memory
        memory, slots = bank.memory.flatten(0, 1), bank.slots  # (2K, S)
        nearest = (bank.memory[labels] @ rows[:, :, None])[..., 0].argmax(1) + labels * slots
        sums = torch.zeros_like(memory).index_add_(0, nearest, rows, alpha=weight)
        mass = memory.new_zeros(len(memory)).index_add_(0, nearest, rows.new_full((len(rows),), weight))
        got = mass[:, None] > 0
        moved = F.normalize(momentum * memory + (1 - momentum) * sums / mass[:, None].clamp_min(1e-12), dim=1)
        memory.copy_(torch.where(got, moved, memory))
        bank.usage.lerp_(mass.view_as(bank.usage), 1 - momentum)

    def step(
        self, x: Tensor, padding: Tensor, labels: Tensor, profiles: Tensor, *, momentum: float, clip_norm: float
    ) -> dict[str, Tensor]:
        """Forward, losses, backward, clipping, AdamW and the memory; returns the terms."""
        terms, slide, genomic = self.losses(x, padding, labels, profiles)
        weights = self.weights
        total = weights.classification * terms["classification"] + weights.memory * terms["memory"]
        total = total + weights.reconstruction * terms["reconstruction"]
        total = total + weights.soft_angle_omics * terms["soft_angle_omics"]
        total = total + weights.soft_angle_slide * terms["soft_angle_slide"]
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.move_memory_(torch.cat([slide, genomic]).detach(), labels.repeat(2), 0.5, momentum)
        return terms

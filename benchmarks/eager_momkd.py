"""The released MoMKD written plainly, on PyG's GATv2Conv: what momkd is compared with.

One slide a call. Its codebooks are vector-quantize-pytorch's as released, or `PlainCodebook`, which computes the same
losses by itself. Its state dict has the released names. PyG is imported here; callers skip where it is missing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv


class Encoder(nn.Module):
    def __init__(self, width: int, features: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        each = features // heads
        self.gat1 = GATv2Conv(width, each, heads=heads, dropout=attention_dropout)
        self.gat2 = GATv2Conv(features, each, heads=heads, dropout=attention_dropout)
        self.res_proj1 = nn.Linear(width, features)
        self.ln1, self.ln2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h1 = F.dropout(F.elu(self.ln1(self.gat1(x, edge_index))), self.dropout, self.training) + self.res_proj1(x)
        h2 = F.dropout(F.elu(self.ln2(self.gat2(h1, edge_index))), self.dropout, self.training) + h1
        return torch.stack([h1, h2]).max(0).values


def tower(first: int, hidden: int, last: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(first, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(0.25), nn.Linear(hidden, last)
    )


class _Vectors(nn.Module):
    """Under the names of vector-quantize-pytorch's codebook; the buffers have no effect where a gradient moves it."""

    def __init__(self, size: int, slots: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(1, slots, size)))
        self.register_buffer("initted", torch.tensor(True))
        self.register_buffer("cluster_size", torch.ones(1, slots))
        self.register_buffer("embed_avg", self.embed.detach().clone())


class PlainCodebook(nn.Module):
    """The losses of vector-quantize-pytorch's VectorQuantize with a learnable codebook, frozen, in plain torch."""

    def __init__(self, size: int, slots: int) -> None:
        super().__init__()
        self._codebook = _Vectors(size, slots)

    def forward(self, z: Tensor) -> Tensor:
        """Commitment to the nearest vector plus ten times the orthogonality of all; z (N, S) -> scalar."""
        embed = self._codebook.embed[0]
        with torch.no_grad():
            nearest = torch.cdist(z.float(), embed).argmin(1)
        unit = F.normalize(embed, dim=1)
        orthogonality = (unit @ unit.T).square().mean() - 1 / len(embed)
        return F.mse_loss(embed.detach()[nearest], z) + 10 * orthogonality


def released_codebook(size: int, slots: int) -> nn.Module:
    """The codebook as the released code makes it.

    Raises:
        ImportError: vector-quantize-pytorch is missing.
    """
    from vector_quantize_pytorch import VectorQuantize

    class ReleasedCodebook(VectorQuantize):  # type: ignore[misc]
        def forward(self, z: Tensor) -> Tensor:
            self.train()  # in evaluation it gives no losses
            loss: Tensor = super().forward(z[None], freeze_codebook=True, return_loss_breakdown=True)[2]
            return loss

    options = {"learnable_codebook": True, "ema_update": False, "orthogonal_reg_weight": 10.0}
    return ReleasedCodebook(size, codebook_size=slots, **options)


class EagerMoMKD(nn.Module):
    """`codebook` is "vector-quantize-pytorch" or "plain torch"."""

    def __init__(
        self,
        width: int = 1536,
        genes: int = 768,
        features: int = 512,
        size: int = 64,
        slots: int = 16,
        *,
        heads: int = 2,
        attention_dropout: float = 0.5,
        dropout: float = 0.25,
        codebook: str = "vector-quantize-pytorch",
    ) -> None:
        super().__init__()
        self.attn_log_tau = nn.Parameter(torch.tensor(0.2).log())
        self.rna_tower = nn.ModuleDict({"encoder": tower(genes, 512, 512)})
        self.rna_decoder = nn.ModuleDict({"decoder": tower(512, 512, genes)})
        self.rna_projector = nn.Linear(512, size)
        self.wsi_encoder = Encoder(width, features, heads, attention_dropout, dropout)
        self.wsi_patch_projector, self.wsi_pool_projector = nn.Linear(features, size), nn.Linear(features, size)
        makers = {"vector-quantize-pytorch": released_codebook, "plain torch": PlainCodebook}
        self.mem_pos, self.mem_neg = (makers[codebook](size, slots) for _ in range(2))
        self.wsi_classifier_proto = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 2)
        )

    def _banks(self) -> Tensor:
        return torch.cat([self.mem_neg._codebook.embed, self.mem_pos._codebook.embed])  # (2, K, S)

    def _attend(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoded = self.wsi_encoder(x, edge_index)
        z = F.normalize(self.wsi_patch_projector(encoded), dim=1)
        similar = torch.einsum("ns,cks->nck", z, F.normalize(self._banks().detach(), dim=-1)).amax(2)
        tau = self.attn_log_tau.exp().clamp(0.01, 2.0)
        attention = torch.softmax((similar[:, 1] - similar[:, 0]) / (tau + 1e-9), 0)
        return (attention[:, None] * encoded).sum(0, keepdim=True), attention, z

    def infer(self, x: Tensor, edge_index: Tensor) -> dict[str, Tensor]:
        pooled, attention, _ = self._attend(x, edge_index)
        return {"logits": self.wsi_classifier_proto(pooled), "attention": attention}

    def _soft_angle(self, z: Tensor, label: int) -> Tensor:
        cosines = torch.einsum("bs,cks->bck", z, F.normalize(self._banks(), dim=-1))
        s = torch.logsumexp(5 * cosines, 2) / 5
        return F.softplus(20 * (0.3 - (s[:, label] - s[:, 1 - label]))).mean()

    def losses(self, x: Tensor, edge_index: Tensor, label: int, profile: Tensor) -> dict[str, Tensor]:
        """The terms without their weights; profile (1, G)."""
        pooled, _, z = self._attend(x, edge_index)
        logits = self.wsi_classifier_proto(pooled)
        memory = (self.mem_pos if label == 1 else self.mem_neg)(z)
        embedding = self.rna_tower["encoder"](profile)
        decoded = self.rna_decoder["decoder"](embedding)
        genomic = F.normalize(self.rna_projector(embedding), dim=1)
        slide = F.normalize(self.wsi_pool_projector(pooled), dim=1)
        return {
            "classification": F.cross_entropy(logits, torch.tensor([label], device=x.device)),
            "memory": memory,
            "soft_angle_omics": self._soft_angle(genomic, label),
            "soft_angle_slide": self._soft_angle(slide, label),
            "reconstruction": F.mse_loss(decoded, profile),
        }

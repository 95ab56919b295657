"""Models of other people: the layouts as plain modules with forwards of their own, on momkd's restatements.

Their parts are taken out of a drop-in, so that names and shapes are right; what they compute is plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momkd.compat import attention_deep_mil, clam, dsmil, dtfd, eva, mil_lab, torchmil, trident
from momkd.reference import mil


def adopt(module: nn.Module, drop_in: nn.Module) -> None:
    """Its parts and attributes, under their names."""
    for name, value in vars(drop_in).items():
        if name == "_modules":
            for child, part in value.items():
                module.add_module(child, part)
        elif not name.startswith("_") and name != "training":
            setattr(module, name, value)


class PlainCLAM(nn.Module):
    multi = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        adopt(self, (clam.CLAM_MB if self.multi else clam.CLAM_SB)(**options))

    inst_eval = clam.CLAM_SB.inst_eval
    inst_eval_out = clam.CLAM_SB.inst_eval_out

    def forward(
        self,
        h: Tensor,
        label: Tensor | None = None,
        instance_eval: bool = False,
        return_features: bool = False,
        attention_only: bool = False,
    ) -> Any:
        p = dict(self.named_parameters())
        out = mil.clam(p, h)
        if attention_only:
            return out["A_raw"]
        results: dict[str, Any] = {}
        if instance_eval:
            assert label is not None
            results["instance_loss"] = mil.clam_instance_loss(p, out, int(label), self.k_sample, self.subtyping)
        if return_features:
            results["features"] = out["M"]
        logits = out["logits"]
        return logits, torch.softmax(logits, 1), logits.topk(1, dim=1)[1], out["A_raw"], results


class PlainCLAM_MB(PlainCLAM):
    multi = True


class PlainMILLab(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        adopt(self, mil_lab.ABMIL(**options))

    def forward_features(self, h: Tensor, attn_mask: Tensor | None = None, return_attention: bool = True) -> Any:
        h = self.patch_embed(h)
        attention = self.global_attn(h).transpose(-2, -1)
        if attn_mask is not None:
            attention = attention + (1 - attn_mask)[:, None] * torch.finfo(attention.dtype).min
        pooled = (torch.softmax(attention, -1) @ h)[:, 0]
        return pooled, {"attention": attention if return_attention else None}

    def forward(self, h: Tensor, attn_mask: Tensor | None = None, return_attention: bool = False) -> Any:
        features, log = self.forward_features(h, attn_mask=attn_mask, return_attention=return_attention)
        return {"logits": self.classifier(features)}, log


class PlainAttentionPool(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        adopt(self, torchmil.AttentionPool(**options))

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:
        h = self.act_layer(self.fc1(X))
        if self.gated:
            h = h * self.act_gated(self.fc_gated(X))
        f = self.fc2(h)[..., 0]
        hidden = f if mask is None else f.masked_fill(mask == 0, -torch.inf)
        z = (torch.softmax(hidden, 1)[:, None] @ X)[:, 0]
        return (z, f) if return_att else z


class PlainDeepMIL(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        adopt(self, attention_deep_mil.GatedAttention())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prob, attention = mil.attention_deep_mil(dict(self.named_parameters()), x[0])
        return prob, (prob >= 0.5).float(), attention


class PlainDTFD(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        adopt(self, dtfd.Attention_with_Classifier(*sizes))

    def forward(self, x: Tensor) -> Tensor:
        return mil.dtfd(dict(self.named_parameters()), x)


class PlainEva(nn.Module):
    def __init__(self, *sizes: Any) -> None:
        super().__init__()
        adopt(self, eva.ABMIL(*sizes))

    def forward(self, input_tensor: Tensor, pad_value: float | None = None) -> Tensor:
        p = dict(self.named_parameters())
        real = [x if pad_value is None else x[(x != pad_value).any(1)] for x in input_tensor]
        return torch.stack([mil.eva_abmil(p, x) for x in real])


class PlainTrident(nn.Module):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__()
        adopt(self, trident.ABMIL(*sizes, **options))

    def forward(self, features: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = dict(self.named_parameters())
        keep = torch.ones(features.shape[:2], dtype=torch.bool) if attn_mask is None else attn_mask
        each = [mil.trident_abmil(p, x[k]) for x, k in zip(features, keep, strict=True)]
        attention = features.new_full((len(features), *each[0][1].shape[:2], features.shape[1]), -1e9)
        for b, (_, s) in enumerate(each):
            attention[b][..., keep[b]] = s
        return torch.stack([z for z, _ in each]), attention


class PlainBClassifier(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        adopt(self, dsmil.BClassifier(*sizes))

    def forward(self, feats: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(feats)
        a = torch.softmax(q @ self.q(feats[c.argmax(0)]).T / q.shape[1] ** 0.5, 0)
        b = (a.T @ self.v(feats))[None]
        return self.fcc(b).reshape(1, -1), a, b


class PlainMILNet(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.i_classifier = dsmil.FCLayer(width, classes)
        self.b_classifier = PlainBClassifier(width, classes)

    def forward(self, x: Tensor) -> Any:
        feats, c = self.i_classifier(x)
        return c, *self.b_classifier(feats, c)


class PlainGate(nn.Module):
    """CLAM's Attn_Net_Gated."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__()
        adopt(self, clam.Attn_Net_Gated(*sizes, **options))

    def forward(self, x: Tensor) -> Any:
        return self.attention_c(self.attention_a(x).mul(self.attention_b(x))), x


class PlainNet(nn.Module):
    """CLAM's Attn_Net."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__()
        adopt(self, clam.Attn_Net(*sizes, **options))

    def forward(self, x: Tensor) -> Any:
        return self.module(x), x


class PlainScores(PlainGate):
    """Scores alone, of rows that have another name."""

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        scores: Tensor = super().forward(features)[0]
        return scores


class PlainAttentionGated(nn.Module):
    """DTFD-MIL's Attention_Gated."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        adopt(self, dtfd.Attention_Gated(*sizes))

    def forward(self, x: Tensor, isNorm: bool = True) -> Tensor:
        scores = torch.transpose(self.attention_weights(self.attention_V(x) * self.attention_U(x)), 1, 0)
        return torch.softmax(scores, 1) if isNorm else scores


class Sharper(PlainCLAM):
    """The layout of CLAM, but a softmax of its own: not to be swapped."""

    def forward(
        self,
        h: Tensor,
        label: Tensor | None = None,
        instance_eval: bool = False,
        return_features: bool = False,
        attention_only: bool = False,
    ) -> Any:
        patches = self.attention_net[:3](h)
        scores = 3 * self.attention_net[3](patches)[0].T
        if attention_only:
            return scores
        m = torch.softmax(scores, 1) @ patches
        logits = self.classifiers(m)
        return logits, torch.softmax(logits, 1), logits.topk(1, dim=1)[1], scores, {"features": m}


class OtherSignature(PlainCLAM):
    def forward(self, h: Tensor, temperature: float = 1.0) -> Any:  # type: ignore[override]
        return super().forward(h)


class Survival(nn.Module):
    """A model of one's own around a score block: only its caller knows what becomes of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.block = PlainGate(8, 4)
        self.risk = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores, h = self.block(x)
        return self.risk(torch.softmax(scores, 0).T @ h)

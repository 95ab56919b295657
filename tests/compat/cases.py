"""One case a layout: the drop-in, how it is called, and its restatement in plain torch on the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from momkd import Bags
from momkd.compat import attention_deep_mil, clam, dsmil, dtfd, eva, mil_lab, torchmil, trident
from momkd.reference import mil

WIDTH = 24
Outputs = tuple[Tensor, Tensor | None]  # of the bags (B, ...), of the patches (N, ...)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    run: Callable[..., Outputs]  # (model, one bag or padded batch or Bags, mask)
    want: Callable[[Any, Tensor], Outputs]  # (state, one bag)
    padded: bool = False
    width: int = WIDTH


def flat(*parts: Tensor) -> Tensor:
    """Side by side, (B, ...) each."""
    return torch.cat([p.reshape(p.shape[0], -1) for p in parts], 1)


def patches_first(attention: Tensor, mask: Tensor | None) -> Tensor:
    """(..., M) or (B, ..., M) -> (N, ...): those of the patches that are there."""
    moved = attention.movedim(-1, 0)  # (M, ...) or (M, B, ...)
    if mask is None:
        return moved.reshape(moved.shape[0], -1)
    return moved.transpose(0, 1)[mask != 0].reshape(int((mask != 0).sum()), -1)


def run_clam(model: Any, x: Tensor | Bags, mask: Tensor | None = None) -> Outputs:
    logits, _, _, a_raw, results = model(x, return_features=True)
    return flat(logits, results["features"].reshape(logits.shape[0], -1)), a_raw.T


def want_clam(p: Any, x: Tensor) -> Outputs:
    out = mil.clam(p, x)
    return flat(out["logits"], out["M"].reshape(1, -1)), out["A_raw"].T


def run_mil_lab(model: Any, x: Tensor | Bags, mask: Tensor | None = None) -> Outputs:
    results, log = model(x, attn_mask=mask, return_attention=True, return_slide_feats=True)
    return flat(results["logits"], log["slide_feats"]), patches_first(log["attention"], mask)


def want_mil_lab(p: Any, x: Tensor) -> Outputs:
    z, s, logits = mil.mil_lab_abmil(p, x)
    return flat(logits, z.reshape(1, -1)), s.T


def run_torchmil(model: Any, x: Tensor | Bags, mask: Tensor | None = None) -> Outputs:
    z, f = model(x, mask, return_att=True)
    return z.reshape(z.shape[0], -1), patches_first(f, mask)


def want_torchmil(act: str, whole: bool) -> Callable[[Any, Tensor], Outputs]:
    def want(p: Any, x: Tensor) -> Outputs:
        z, f = (mil.torchmil_abmil if whole else mil.torchmil_attention_pool)(p, x, act)
        return z.reshape(1, -1), f[:, None]

    return want


def run_images(model: Any, x: Tensor | Bags, mask: Tensor | None = None) -> Outputs:
    prob, _, attention = model(x if isinstance(x, Bags) else x.reshape(1, -1, 1, 28, 28))
    return prob, attention.T


def want_images(p: Any, x: Tensor) -> Outputs:
    prob, attention = mil.attention_deep_mil(p, x.reshape(-1, 1, 28, 28))
    return prob, attention.T


def run_dtfd(model: Any, x: Tensor | Bags, mask: Tensor | None = None) -> Outputs:
    out = model(x)
    return (out.flatten(1) if isinstance(x, Bags) else out.reshape(1, -1)), None


def run_eva(model: Any, x: Tensor | Bags, mask: Tensor | None = None) -> Outputs:
    if isinstance(x, Bags):
        return model(x), None
    return model(x if mask is None else x.masked_fill((mask == 0)[..., None], -torch.inf), -torch.inf), None


def run_trident(model: Any, x: Tensor | Bags, mask: Tensor | None = None) -> Outputs:
    out, attention = model(x, None if mask is None else mask.bool())
    return out.flatten(1), patches_first(attention, mask)


def want_trident(p: Any, x: Tensor) -> Outputs:
    out, s = mil.trident_abmil(p, x)
    return out.reshape(1, -1), s.movedim(-1, 0).flatten(1)


def run_dsmil(model: Any, x: Tensor | Bags, mask: Tensor | None = None) -> Outputs:
    instance, bag, a, b = model(x)
    return flat(bag, b), flat(instance, a)


def want_dsmil(p: Any, x: Tensor) -> Outputs:
    out = mil.dsmil(p, x)
    return flat(out["bag"], out["B"]), flat(out["instance"], out["A"])


def make_dsmil(**options: Any) -> nn.Module:
    return dsmil.MILNet(dsmil.FCLayer(WIDTH, 3), dsmil.BClassifier(WIDTH, 3, **options))


def features(n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, n), nn.ReLU())


CASES: dict[str, Case] = {
    "CLAM_SB": Case(lambda: clam.CLAM_SB(embed_dim=WIDTH), run_clam, want_clam),
    "CLAM_SB big": Case(lambda: clam.CLAM_SB(embed_dim=WIDTH, size_arg="big", n_classes=3), run_clam, want_clam),
    "CLAM_SB ungated": Case(lambda: clam.CLAM_SB(gate=False, embed_dim=WIDTH), run_clam, want_clam),
    "CLAM_MB": Case(lambda: clam.CLAM_MB(embed_dim=WIDTH, n_classes=3, dropout=0.25), run_clam, want_clam),
    "CLAM_MB ungated": Case(lambda: clam.CLAM_MB(gate=False, embed_dim=WIDTH, dropout=0.25), run_clam, want_clam),
    "MIL-Lab": Case(lambda: mil_lab.ABMIL(in_dim=WIDTH, num_classes=3), run_mil_lab, want_mil_lab, True),
    "MIL-Lab deep, ungated": Case(
        lambda: mil_lab.ABMIL(in_dim=WIDTH, num_fc_layers=2, gate=False), run_mil_lab, want_mil_lab, True
    ),
    "torchmil pool": Case(
        lambda: torchmil.AttentionPool(WIDTH, gated=True), run_torchmil, want_torchmil("tanh", False), True
    ),
    "torchmil pool, relu": Case(
        lambda: torchmil.AttentionPool(WIDTH, act="relu"), run_torchmil, want_torchmil("relu", False), True
    ),
    "torchmil": Case(lambda: torchmil.ABMIL((WIDTH,)), run_torchmil, want_torchmil("tanh", True), True),
    "torchmil gelu, gated": Case(
        lambda: torchmil.ABMIL((WIDTH,), att_act="gelu", gated=True), run_torchmil, want_torchmil("gelu", True), True
    ),
    "AttentionDeepMIL": Case(attention_deep_mil.Attention, run_images, want_images, width=784),
    "AttentionDeepMIL gated": Case(attention_deep_mil.GatedAttention, run_images, want_images, width=784),
    "DTFD-MIL": Case(
        lambda: dtfd.Attention_with_Classifier(WIDTH, 16, K=2, num_cls=3),
        run_dtfd,
        lambda p, x: (mil.dtfd(p, x).reshape(1, -1), None),
    ),
    "eva": Case(lambda: eva.ABMIL(WIDTH, 3, 16), run_eva, lambda p, x: (mil.eva_abmil(p, x)[None], None), True),
    "eva, no projector": Case(
        lambda: eva.ABMIL(WIDTH, 3, None, use_bias=False, dropout_mlp=0.5),
        run_eva,
        lambda p, x: (mil.eva_abmil(p, x)[None], None),
        True,
    ),
    "TRIDENT": Case(
        lambda: trident.ABMIL(WIDTH, 16, n_heads=3, n_branches=2, gated=True), run_trident, want_trident, True
    ),
    "TRIDENT one head": Case(lambda: trident.ABMIL(WIDTH, 16, n_heads=1), run_trident, want_trident, True),
    "DSMIL": Case(make_dsmil, run_dsmil, want_dsmil),
    "DSMIL with values": Case(lambda: make_dsmil(passing_v=True), run_dsmil, want_dsmil),
    "DSMIL linear": Case(lambda: make_dsmil(nonlinear=False), run_dsmil, want_dsmil),
}

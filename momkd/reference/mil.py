"""Other projects' MIL models restated in plain torch, bag by bag: what `momkd.compat` is compared with.

Each takes the state dict of the project's layout and computes on its tensors, so that gradients reach them; without
dropout. Sources: the papers and the layouts, not the projects' code. A bag without patches, or with none that the mask
leaves, pools to zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
}


def linear(p: State, name: str, x: Tensor) -> Tensor:
    """x Wᵀ + b; the bias may be absent."""
    return torch.nn.functional.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def scores(p: State, v: str, u: str | None, w: str, h: Tensor, activation: str = "tanh") -> Tensor:
    """w · (act(V h) ⊙ σ(U h)): (N, L) -> (N, H); without `u` no gate."""
    hidden = ACTIVATIONS[activation](linear(p, v, h))
    if u is not None:
        hidden = hidden * torch.sigmoid(linear(p, u, h))
    return linear(p, w, hidden)


def pool(s: Tensor, h: Tensor) -> Tensor:
    """softmax over the patches, weighted sum: (N, H), (N, L) -> (H, L)."""
    return torch.softmax(s, 0).T @ h


def clam(p: State, x: Tensor) -> dict[str, Tensor]:
    """One bag (N, L): patches h (N, 512), A_raw (K, N), pooled M (K, 512), logits (1, C)."""
    h = torch.relu(linear(p, "attention_net.0", x))
    net = "attention_net.3"
    if f"{net}.attention_c.weight" in p:
        s = scores(p, f"{net}.attention_a.0", f"{net}.attention_b.0", f"{net}.attention_c", h)
    else:
        last = max(int(k.split(".")[3]) for k in p if k.startswith(f"{net}.module."))
        s = scores(p, f"{net}.module.0", None, f"{net}.module.{last}", h)
    m = pool(s, h)
    if "classifiers.weight" in p:
        logits = linear(p, "classifiers", m)
    else:
        logits = torch.stack([linear(p, f"classifiers.{c}", m[c]) for c in range(len(m))], 1)
    return {"h": h, "A_raw": s.T, "M": m, "logits": logits}


def clam_instance_loss(p: State, out: Mapping[str, Tensor], label: int, k: int, subtyping: bool) -> Tensor:
    """Cross-entropy of the k most and least attended patches of the own class; `subtyping`: the most of others too."""
    classes = len({key.split(".")[1] for key in p if key.startswith("instance_classifiers.")})
    total = out["h"].new_zeros(())
    for c in range(classes):
        order = out["A_raw"][c if len(out["A_raw"]) > 1 else 0].argsort(descending=True)
        if c == label:
            chosen, wanted = torch.cat([order[:k], order.flip(0)[:k]]), torch.tensor([1] * k + [0] * k)
        elif subtyping:
            chosen, wanted = order[:k], torch.zeros(k, dtype=torch.int64)
        else:
            continue
        logits = linear(p, f"instance_classifiers.{c}", out["h"][chosen])
        total = total + torch.nn.functional.cross_entropy(logits, wanted.to(logits.device))
    return total / classes if subtyping else total


def mil_lab_abmil(p: State, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One bag (N, L): pooled (H, 512), scores (H, N), logits (1, C)."""
    layers = sorted({int(k.split(".")[1]) for k in p if k.startswith("patch_embed.")})
    h = x
    for layer in layers:
        h = torch.relu(linear(p, f"patch_embed.{layer}", h))
    net = "global_attn"
    if f"{net}.attention_c.weight" in p:
        s = scores(p, f"{net}.attention_a.0", f"{net}.attention_b.0", f"{net}.attention_c", h)
    else:
        s = scores(p, f"{net}.module.0", None, f"{net}.module.3", h)
    z = pool(s, h)
    return z, s.T, linear(p, "classifier", z.reshape(1, -1))


def torchmil_attention_pool(p: State, x: Tensor, act: str = "tanh", prefix: str = "") -> tuple[Tensor, Tensor]:
    """One bag (N, L): z (L,), f (N,)."""
    gate = f"{prefix}fc_gated.module" if f"{prefix}fc_gated.module.weight" in p else None
    s = scores(p, f"{prefix}fc1.module", gate, f"{prefix}fc2", x, act)
    return pool(s, x)[0], s[:, 0]


def torchmil_abmil(p: State, x: Tensor, act: str = "tanh") -> tuple[Tensor, Tensor]:
    """One bag (N, L): logit (), f (N,)."""
    z, f = torchmil_attention_pool(p, x, act, "pool.")
    return linear(p, "classifier.module", z)[0], f


def attention_deep_mil(p: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28): probability (1, 1), attention (K, N)."""
    conv, shrink = torch.nn.functional.conv2d, torch.nn.functional.max_pool2d
    for layer in (0, 3):
        name = f"feature_extractor_part1.{layer}"
        x = shrink(torch.relu(conv(x, p[f"{name}.weight"], p[f"{name}.bias"])), 2)
    h = torch.relu(linear(p, "feature_extractor_part2.0", x.flatten(1)))
    if "attention_w.weight" in p:
        s = scores(p, "attention_V.0", "attention_U.0", "attention_w", h)
    else:
        s = scores(p, "attention.0", None, "attention.2", h)
    return torch.sigmoid(linear(p, "classifier.0", pool(s, h).reshape(1, -1))), torch.softmax(s, 0).T


def dtfd(p: State, x: Tensor) -> Tensor:
    """One pseudo-bag (N, L): logits (K, C)."""
    s = scores(p, "attention.attention_V.0", "attention.attention_U.0", "attention.attention_weights", x)
    return linear(p, "classifier.fc", pool(s, x))


def eva_abmil(p: State, x: Tensor) -> Tensor:
    """One bag (N, L) without padding: logits (C,)."""
    h = linear(p, "projector.0", x) if "projector.0.weight" in p else x
    net = "gated_attention"
    z = pool(scores(p, f"{net}.attention_a.0", f"{net}.attention_b.0", f"{net}.attention_c", h), h)[0]
    layers = sorted({int(k.split(".")[2]) for k in p if k.startswith("classifier.")})
    for layer in layers[:-1]:
        z = torch.relu(linear(p, f"classifier._network.{layer}", z))
    return linear(p, f"classifier._network.{layers[-1]}", z)


def trident_abmil(p: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """One bag (N, F): (branches, F), scores (branches, heads, N)."""
    heads = len({k.split(".")[1] for k in p if k.startswith("attention_heads.")})
    gated = "gating_layers.0.0.weight" in p
    each = [
        scores(p, f"attention_heads.{i}.0", f"gating_layers.{i}.0" if gated else None, f"branching_layers.{i}", x)
        for i in range(heads)
    ]
    out = torch.cat([pool(s, x) for s in each], 1)
    return linear(p, "condensing_layer", out) if heads > 1 else out, torch.stack([s.T for s in each], 1)


def dsmil(p: State, x: Tensor) -> dict[str, Any]:
    """One bag (N, L): instance scores (N, C), bag scores (1, C), A (N, C), B (1, C, L)."""
    name = "i_classifier.fc.0" if "i_classifier.fc.0.weight" in p else "i_classifier.fc"
    instance = linear(p, name, x)

    def query(h: Tensor) -> Tensor:
        if "b_classifier.q.weight" in p:
            return linear(p, "b_classifier.q", h)
        return torch.tanh(linear(p, "b_classifier.q.2", torch.relu(linear(p, "b_classifier.q.0", h))))

    v = torch.relu(linear(p, "b_classifier.v.1", x)) if "b_classifier.v.1.weight" in p else x
    q = query(x)
    a = torch.softmax(q @ query(x[instance.argmax(0)]).T / q.shape[1] ** 0.5, 0)
    b = (a.T @ v)[None]
    bag = torch.nn.functional.conv1d(b, p["b_classifier.fcc.weight"], p["b_classifier.fcc.bias"])
    return {"instance": instance, "bag": bag[:, :, 0], "A": a, "B": b}

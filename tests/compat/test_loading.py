"""State dicts of the layouts, as they are written in the projects' checkpoints, load unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from momkd.compat import attention_deep_mil, clam, dsmil, dtfd, eva, mil_lab, torchmil, trident
from momkd.errors import InputError

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, width), **({f"{name}.bias": (out,)} if bias else {})}


def gated(prefix: str, d: int, width: int, heads: int) -> Shapes:
    parts = (("attention_a.0", d, width), ("attention_b.0", d, width), ("attention_c", heads, d))
    return {k: s for name, *size in parts for k, s in linear(f"{prefix}{name}", *size).items()}


def clam_state(first: str, block: str, d: int = 256, heads: int = 1, classes: int = 2, width: int = 1024) -> Shapes:
    shapes = {**linear(first, 512, width), **gated(f"{block}.", d, 512, heads)}
    if heads == 1:
        shapes |= linear("classifiers", classes, 512)
    for c in range(classes):
        shapes |= linear(f"instance_classifiers.{c}", 2, 512)
        shapes |= {} if heads == 1 else linear(f"classifiers.{c}", 1, 512)
    return shapes


def deep_mil(*attention: Shapes) -> Shapes:
    shapes: Shapes = {"feature_extractor_part1.0.weight": (20, 1, 5, 5), "feature_extractor_part1.0.bias": (20,)}
    shapes |= {"feature_extractor_part1.3.weight": (50, 20, 5, 5), "feature_extractor_part1.3.bias": (50,)}
    shapes |= {**linear("feature_extractor_part2.0", 500, 800), **linear("classifier.0", 1, 500)}
    for each in attention:
        shapes |= each
    return shapes


MIL_LAB = {**linear("patch_embed.0", 512, 1024), **gated("global_attn.", 384, 512, 1)}
TRIDENT = {
    k: s
    for h in range(8)
    for name, *size in (("attention_heads", 256, 1024), ("gating_layers", 256, 1024), ("branching_layers", 1, 256))
    for k, s in linear(f"{name}.{h}" + ("" if name == "branching_layers" else ".0"), *size).items()
}
DSMIL = {**linear("b_classifier.q.0", 128, 64), **linear("b_classifier.q.2", 128, 128)}
DSMIL |= {"b_classifier.fcc.weight": (2, 2, 64), "b_classifier.fcc.bias": (2,)}

LAYOUTS: dict[str, tuple[Any, Shapes]] = {
    "CLAM_SB": (clam.CLAM_SB, clam_state("attention_net.0", "attention_net.3")),
    "CLAM_SB of several devices": (
        clam.CLAM_SB,
        clam_state("attention_net.module.0", "attention_net.module.3"),
    ),
    "CLAM_SB without dropout, old": (clam.CLAM_SB, clam_state("attention_net.0", "attention_net.2")),
    "CLAM_MB big": (
        lambda: clam.CLAM_MB(size_arg="big", n_classes=3),
        clam_state("attention_net.0", "attention_net.3", 384, 3, 3),
    ),
    "CHIEF": (lambda: clam.CLAM_SB(embed_dim=768), clam_state("attention_net.0", "attention_net.3", width=768)),
    "MIL-Lab": (mil_lab.ABMIL, {**MIL_LAB, **linear("classifier", 2, 512)}),
    "MIL-Lab from the hub": (lambda: mil_lab.ABMIL(num_classes=0), {f"model.{k}": s for k, s in MIL_LAB.items()}),
    "torchmil": (
        lambda: torchmil.ABMIL((64,), gated=True),
        {
            **linear("pool.fc1.module", 128, 64),
            **linear("pool.fc_gated.module", 128, 64),
            **linear("pool.fc2", 1, 128, bias=False),
            **linear("classifier.module", 1, 64),
        },
    ),
    "AttentionDeepMIL": (
        attention_deep_mil.Attention,
        deep_mil(linear("attention.0", 128, 500), linear("attention.2", 1, 128)),
    ),
    "AttentionDeepMIL gated": (
        attention_deep_mil.GatedAttention,
        deep_mil(linear("attention_V.0", 128, 500), linear("attention_U.0", 128, 500), linear("attention_w", 1, 128)),
    ),
    "DTFD-MIL attention": (
        dtfd.Attention_with_Classifier,
        {
            **linear("attention.attention_V.0", 128, 512),
            **linear("attention.attention_U.0", 128, 512),
            **linear("attention.attention_weights", 1, 128),
            **linear("classifier.fc", 2, 512),
        },
    ),
    "DTFD-MIL reduction, of several devices": (
        lambda: dtfd.DimReduction(1024),
        {f"module.{k}": s for k, s in linear("fc1", 512, 1024, bias=False).items()},
    ),
    "eva": (
        lambda: eva.ABMIL(384, 2, 128),
        {
            **linear("projector.0", 128, 384),
            **gated("gated_attention.", 128, 128, 1),
            **linear("classifier._network.0", 128, 128),
            **linear("classifier._network.2", 64, 128),
            **linear("classifier._network.4", 2, 64),
        },
    ),
    "TRIDENT": (lambda: trident.ABMIL(gated=True), {**TRIDENT, **linear("condensing_layer", 1024, 8 * 1024)}),
    "DSMIL": (
        lambda: dsmil.MILNet(dsmil.FCLayer(64, 2), dsmil.BClassifier(64, 2, passing_v=True)),
        {**linear("i_classifier.fc.0", 2, 64), **DSMIL, **linear("b_classifier.v.1", 64, 64)},
    ),
    "DSMIL, own extractor": (
        lambda: dsmil.MILNet(dsmil.IClassifier(nn.Identity(), 64, 2), dsmil.BClassifier(64, 2)),
        {**linear("i_classifier.fc", 2, 64), **DSMIL},
    ),
}


def filled(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_loads_unchanged(name: str) -> None:
    make, shapes = LAYOUTS[name]
    model, state = make(), filled(shapes)
    kept = dict(state)
    missing, unexpected = model.load_state_dict(state)
    assert not missing
    assert not unexpected
    assert state == kept, "the caller's state dict is left as it is"
    values = sorted(float(t.sum()) for t in model.state_dict().values())
    assert values == sorted(float(t.sum()) for t in state.values()), "every tensor found its place"


def test_strays_are_dropped_with_a_message() -> None:
    state = filled(clam_state("attention_net.module.0", "attention_net.module.3"))
    state["instance_loss_fn.labels"] = torch.arange(2)
    with pytest.warns(UserWarning, match="CLAM_SB: left out of the checkpoint, as no parameter: instance_loss_fn.labe"):
        clam.CLAM_SB().load_state_dict(state)


def test_a_loss_with_such_a_buffer_keeps_it() -> None:
    class Loss(nn.CrossEntropyLoss):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("labels", torch.zeros(2))

    model = clam.CLAM_SB(instance_loss_fn=Loss())
    state = {**model.state_dict(), "instance_loss_fn.labels": torch.ones(2)}
    model.load_state_dict(state)
    assert model.instance_loss_fn.labels.tolist() == [1, 1]


def test_inside_another_model() -> None:
    whole = nn.ModuleDict({"mil": clam.CLAM_SB(), "other": nn.Linear(2, 2)})
    shapes = clam_state("attention_net.module.0", "attention_net.module.3")
    state = {**{f"mil.{k}": t for k, t in filled(shapes).items()}, **filled(linear("other", 2, 2))}
    assert whole.load_state_dict(state) == ([], [])
    assert torch.equal(
        whole["mil"].attention_net[3].attention_c.weight, state["mil.attention_net.module.3.attention_c.weight"]
    )


@pytest.mark.parametrize("prefix", ["", "mil."])
def test_a_wrong_shape_names_its_key(prefix: str) -> None:
    model: nn.Module = clam.CLAM_SB(size_arg="big")
    whole = nn.ModuleDict({"mil": model}) if prefix else model
    state = {prefix + k: t for k, t in filled(clam_state("attention_net.0", "attention_net.3")).items()}
    told = rf"{prefix}attention_net.3.attention_a.0.weight: expected \(384, 512\) as CLAM_SB was made, got \(256, 512\)"
    with pytest.raises(InputError, match=told):
        whole.load_state_dict(state)


def test_what_is_missing_is_said_as_torch_says_it() -> None:
    state = filled(clam_state("attention_net.0", "attention_net.3"))
    del state["classifiers.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*classifiers.weight"):
        clam.CLAM_SB().load_state_dict(state)
    assert clam.CLAM_SB().load_state_dict(state, strict=False).missing_keys == ["classifiers.weight"]

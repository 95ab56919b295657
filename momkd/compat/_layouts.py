"""The layouts that `accelerate` knows: how to tell one, what it swaps, and inputs that show whether numbers agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from momkd.compat import attention_deep_mil, clam, dsmil, dtfd, eva, mil_lab, torchmil, trident
from momkd.compat._gate import Block, block_of, find_block, forward_alone, forward_with_input, read
from momkd.compat._rows import row_wise

Draw = Callable[..., Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """A model of another project, told by its attributes.

    Attributes:
        name: of the project and its class.
        marks: attributes that a module of this layout has.
        methods: of the drop-in, that take the place of the module's own.
        unfit: why a module with these marks has another layout after all, or None.
        blocks: its blocks that score patches.
        probe: calls of the first method on random inputs, made by `draw(*shape)`.
        any_name: the methods take one argument, and don't mind how the module's own call it.
    """

    name: str
    marks: tuple[str, ...]
    methods: dict[str, Callable[..., Any]]
    unfit: Callable[[Any], str | None]
    blocks: Callable[[Any], list[Block]]
    probe: Callable[[Any, Draw], Iterator[Call]]
    any_name: bool = False


def _no_block(module: nn.Module) -> str | None:
    found = find_block(module)
    return None if found is not None else f"no block that scores patches inside {type(module).__name__}"


def _clam_unfit(module: Any) -> str | None:
    if not isinstance(module.attention_net, nn.Sequential):
        return "attention_net is no Sequential"
    return _no_block(module.attention_net[-1])


def _clam_probe(module: Any, draw: Draw) -> Iterator[Call]:
    patches = draw(max(9, 2 * module.k_sample), module.attention_net[0].in_features)
    yield (patches,), {"return_features": True}
    yield (patches, torch.zeros(1, dtype=torch.int64, device=patches.device)), {"instance_eval": True}
    yield (patches,), {"attention_only": True}


def _mil_lab_unfit(module: Any) -> str | None:
    if not row_wise(module.patch_embed):
        return "patch_embed does not treat every patch by itself"
    return _no_block(module.global_attn)


def _mask(x: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    """A mask that hides the last rows of the first bag."""
    mask = torch.ones(x.shape[:2], dtype=dtype, device=x.device)
    mask[0, -3:] = 0
    return mask


def _mil_lab_probe(module: Any, draw: Draw) -> Iterator[Call]:
    x = draw(2, 9, module.patch_embed[0].in_features)
    yield (x,), {"return_attention": True}
    yield (x,), {"attn_mask": _mask(x, x.dtype), "return_attention": True}


def _torchmil_unfit(module: Any) -> str | None:
    parts = [module.fc1, *([module.fc_gated] if module.gated else [])]
    if not all(isinstance(getattr(part, "module", None), nn.Linear) for part in parts):
        return "fc1 or fc_gated holds no Linear under the name module"
    return None


def _torchmil_probe(module: Any, draw: Draw) -> Iterator[Call]:
    x = draw(2, 9, module.fc1.module.in_features)
    yield (x,), {"return_att": True}
    yield (x, _mask(x)), {}


def _images_unfit(module: Any) -> str | None:
    first = next(module.feature_extractor_part1.children(), None)
    if not isinstance(first, nn.Conv2d) or first.in_channels != 1:
        return "its feature extractor is not the one of MNIST bags"
    return _no_block(module)


def _eva_width(module: Any) -> int:
    return block_of(module.gated_attention).width if isinstance(module.projector, nn.Dropout) else _first(module)


def _first(module: Any) -> int:
    return int(module.projector[0].in_features)


def _eva_unfit(module: Any) -> str | None:
    if not row_wise(module.projector):
        return "projector does not treat every patch by itself"
    return _no_block(module.gated_attention)


def _eva_probe(module: Any, draw: Draw) -> Iterator[Call]:
    x = draw(2, 9, _eva_width(module))
    yield (x,), {}
    yield (x.masked_fill(~_mask(x)[..., None], -torch.inf),), {"pad_value": -torch.inf}


def _trident_unfit(module: Any) -> str | None:
    lists = [module.attention_heads, module.branching_layers, *([module.gating_layers] if module.gated else [])]
    return None if all(isinstance(each, nn.ModuleList) for each in lists) else "its heads are no ModuleLists"


def _trident_probe(module: Any, draw: Draw) -> Iterator[Call]:
    x = draw(2, 9, module.attention_heads[0][0].in_features)
    yield (x,), {}
    yield (x, _mask(x)), {}


def _dsmil_probe(module: Any, draw: Draw) -> Iterator[Call]:
    yield (draw(9, module.fcc.kernel_size[0]), draw(9, module.fcc.in_channels)), {}


def _gate_unfit(module: Any) -> str | None:
    block = block_of(module)
    told = read(block)
    if isinstance(told, str):
        return told
    layers = (*block.value, *(block.gate or ()), block.out)
    known = {id(part) for layer in layers for part in (layer, *layer.parameters())}
    others = [name for name, part in module.named_modules() if not list(part.children()) and id(part) not in known]
    others += [name for name, parameter in module.named_parameters() if id(parameter) not in known]
    return f"it has other parts too: {', '.join(others)}" if others else None


def _runs(module: nn.Module, x: Tensor) -> bool:
    try:
        module.forward(x)
    except Exception:
        return False
    return True


def _gate_probe(module: Any, draw: Draw) -> Iterator[Call]:
    width = block_of(module).width
    padded = draw(2, 5, width)
    yield (draw(9, width),), {}
    if _runs(module, padded):
        yield (padded,), {}
    module.training = True  # its layers stay as they are: only what it drops by itself differs
    yield (draw(9, width),), {}


def _forward(drop_in: Any) -> dict[str, Callable[..., Any]]:
    return {"forward": drop_in.forward}


LAYOUTS = (
    Layout(
        "CLAM's CLAM_SB or CLAM_MB",
        ("attention_net", "classifiers", "instance_classifiers", "k_sample", "inst_eval"),
        _forward(clam.CLAM_SB),
        _clam_unfit,
        lambda m: [block_of(m.attention_net[-1])],
        _clam_probe,
    ),
    Layout(
        "MIL-Lab's ABMIL",
        ("patch_embed", "global_attn", "forward_features"),
        {"forward_features": mil_lab.ABMIL.forward_features},
        _mil_lab_unfit,
        lambda m: [block_of(m.global_attn)],
        _mil_lab_probe,
    ),
    Layout(
        "torchmil's AttentionPool",
        ("fc1", "fc2", "act_layer", "gated"),
        _forward(torchmil.AttentionPool),
        _torchmil_unfit,
        lambda m: [torchmil.block_of_pool(m)],
        _torchmil_probe,
    ),
    Layout(
        "AttentionDeepMIL's Attention or GatedAttention",
        ("feature_extractor_part1", "feature_extractor_part2", "classifier"),
        _forward(attention_deep_mil.Attention),
        _images_unfit,
        lambda m: [block_of(m)],
        lambda m, draw: iter([((draw(1, 5, 1, 28, 28),), {})]),
    ),
    Layout(
        "DTFD-MIL's Attention_with_Classifier",
        ("attention.attention_V", "attention.attention_weights", "classifier"),
        _forward(dtfd.Attention_with_Classifier),
        lambda m: _no_block(m.attention),
        lambda m: [block_of(m.attention)],
        lambda m, draw: iter([((draw(9, block_of(m.attention).width),), {})]),
    ),
    Layout(
        "eva's ABMIL",
        ("projector", "gated_attention", "classifier"),
        _forward(eva.ABMIL),
        _eva_unfit,
        lambda m: [block_of(m.gated_attention)],
        _eva_probe,
    ),
    Layout(
        "TRIDENT's ABMIL",
        ("attention_heads", "branching_layers", "gated", "n_heads"),
        _forward(trident.ABMIL),
        _trident_unfit,
        trident.blocks,
        _trident_probe,
    ),
    Layout(
        "DSMIL's BClassifier",
        ("q", "v", "fcc.kernel_size"),
        _forward(dsmil.BClassifier),
        lambda m: None,
        lambda m: [],
        _dsmil_probe,
    ),
)

# Blocks whose softmax and pooling are their caller's, told by `find_block`: what they return says which it is.
GATES = (
    Layout(
        "CLAM's Attn_Net or Attn_Net_Gated",
        (),
        {"forward": forward_with_input},
        _gate_unfit,
        lambda m: [block_of(m)],
        _gate_probe,
        any_name=True,
    ),
    Layout(
        "a gate that returns its scores",
        (),
        {"forward": forward_alone},
        _gate_unfit,
        lambda m: [block_of(m)],
        _gate_probe,
        any_name=True,
    ),
    Layout(
        "DTFD-MIL's Attention_Gated",
        ("attention_V", "attention_U", "attention_weights"),
        _forward(dtfd.Attention_Gated),
        _gate_unfit,
        lambda m: [block_of(m)],
        lambda m, draw: iter([((draw(9, block_of(m).width),), {}), ((draw(9, block_of(m).width), False), {})]),
    ),
)

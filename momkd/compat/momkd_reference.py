"""The authors' released MoMKD: its checkpoints become momkd models, and back.

`load` gives a `momkd.models.MoMKD` with the graph encoder and a memory moved by gradients. In evaluation its logits and
attention are those of the released model, and so are the terms of its training step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from momkd.bags import Bags
from momkd.compat.state_dicts import check_state_dict
from momkd.errors import InputError
from momkd.graph import Edges, from_edge_index, knn
from momkd.models import MoMKD
from momkd.nn import GraphEncoder

# Names there and here. What ends in a dot is the start of a name.
_NAMES = {
    "attn_log_tau": "pool.log_tau",
    "rna_tower.encoder.": "genomics.encoder.encoder.",
    "rna_decoder.decoder.": "genomics.decoder.decoder.",
    "rna_projector.": "genomics.projector.",
    "wsi_encoder.": "encoder.",
    "wsi_patch_projector.": "patch_projector.",
    "wsi_pool_projector.": "slide_projector.",
    "wsi_classifier_proto.": "classifier.layers.",
}
_BANKS = ("mem_neg", "mem_pos")  # the banks of classes 0 and 1
_EMBEDDED = tuple(f"{bank}._codebook.embed" for bank in _BANKS)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_BUFFERS = ("initted", "cluster_size", "embed_avg")  # of a codebook: without effect, its vectors move by gradient


def load(state_dict: Mapping[str, Tensor]) -> MoMKD:
    """A momkd model of a released checkpoint.

    Args:
        state_dict: of the released model, with or without the genomics (`rna_*`) and a leading `module.`. Every width
            is taken from it.

    Returns:
        A `MoMKD` in evaluation mode; without genomics in the checkpoint it has no genomics tower.

    Raises:
        InputError: a tensor that is missing, unknown, of another shape, not dense or not finite.

    Source: MoMKD (arXiv 2602.21395), released code.

    Example:
        >>> released = momkd.models.MoMKD(32, encoder="gatv2", update="gradient", shared_projector=False)
        >>> model = load(dump(released))
        >>> sorted(infer(model, torch.randn(50, 32), coords=torch.rand(50, 2)))
        ['attention', 'logits']
    """
    given = check_state_dict(state_dict, finite=False)
    state = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    buffers = {name: tensor for name, tensor in state.items() if name not in _EMBEDDED and _is_of_codebook(name)}
    state = {name: tensor for name, tensor in state.items() if name not in buffers}
    check_state_dict(state)
    check_state_dict({name: tensor for name, tensor in buffers.items() if tensor.dtype not in _WHOLE})
    hidden, width = _shape(state, "wsi_encoder.gat1.lin_l.weight", 2)
    _, heads, _ = _shape(state, "wsi_encoder.gat1.att", 3)
    _, slots, features = _shape(state, "mem_pos._codebook.embed", 3)
    widths = {
        "hidden_features": hidden,
        "heads": heads,
        "projection_features": features,
        "slots": slots,
        "classifier_features": _shape(state, "wsi_classifier_proto.1.weight", 2)[0],
    }
    if "rna_tower.encoder.0.weight" in state:
        widths["omics_hidden"], widths["omics_features"] = _shape(state, "rna_tower.encoder.0.weight", 2)
        widths["omics_embedding"], _ = _shape(state, "rna_tower.encoder.4.weight", 2)
        widths["omics_decoder_hidden"], _ = _shape(state, "rna_decoder.decoder.0.weight", 2)
    options: dict[str, Any] = {"encoder": "gatv2", "update": "gradient", "shared_projector": False, **widths}
    if hidden % heads:
        raise InputError(
            f"checkpoint: wsi_encoder.gat1: expected a width that {heads} heads divide, got {hidden}; give another one"
        )
    with torch.device("meta"):  # whether all fits, before anything takes memory
        wanted = {name: tuple(tensor.shape) for name, tensor in MoMKD(width, **options).state_dict().items()}
    found: dict[str, Tensor] = {"memory.usage": torch.zeros(wanted["memory.usage"])}
    for name, tensor in state.items():
        if here := _name_here(name):
            found[here] = tensor
        elif name not in _EMBEDDED:
            raise InputError(f"checkpoint: expected the tensors of the released MoMKD, got {name!r} beside them")
    for name, tensor in buffers.items():
        shapes: dict[str, tuple[int, ...]] = {"cluster_size": (1, slots), "embed_avg": (1, slots, features)}
        shapes["initted"] = () if tensor.ndim == 0 else (1,)  # by the version of vector-quantize-pytorch
        _expected(tensor, name, shapes.get(name.rpartition(".")[2], tuple(tensor.shape)))
    banks = [_expected(state.get(there), there, (1, slots, features)) for there in _EMBEDDED]
    found["memory.memory"] = torch.cat(banks)
    for name, shape in wanted.items():
        _expected(found.get(name), _name_there(name), shape)
    model = MoMKD(width, **options)
    model.load_state_dict({name: found[name].float() for name in wanted})
    return model.eval()


def dump(model: MoMKD) -> dict[str, Tensor]:
    """The state dict that the released code loads: the inverse of `load`.

    Args:
        model: of two classes, with the graph encoder, memory-guided pooling by one branch and two projectors. A memory
            of either kind is written as the two codebooks.

    Raises:
        InputError: the model has a part that the released one lacks.
    """
    classes = model.memory.num_classes
    for wrong, got in (
        (not isinstance(model.encoder, GraphEncoder), "another encoder than gatv2"),
        (classes != 2, f"{classes} classes"),
        (model.slide_projector is None, "one projector for patches and slides"),
        (getattr(model.pool, "branch", "") != "positive", "another pooling than memory with branch positive"),
    ):
        if wrong:
            raise InputError(
                f"model: expected one of the released form (encoder gatv2, 2 classes, pooling memory, branch positive, "
                f"shared_projector false), got {got}; train with these options"
            )
    state = {_name_there(name): t.detach() for name, t in model.state_dict().items() if not name.startswith("memory.")}
    for bank, embed in zip(_BANKS, model.memory.memory.detach(), strict=True):
        values = {"initted": torch.ones(1), "cluster_size": embed.new_zeros(1, len(embed)), "embed_avg": embed[None]}
        state[f"{bank}._codebook.embed"] = embed[None]
        state |= {f"{bank}._codebook.{name}": values[name] for name in _BUFFERS}
    return {name: tensor.cpu().clone() for name, tensor in state.items()}


@torch.no_grad()
def infer(
    model: MoMKD,
    x: Tensor,
    edge_index: Tensor | None = None,
    *,
    coords: Tensor | None = None,
    k: int = 8,
) -> dict[str, Tensor]:
    """A slide through a model of `load`, in evaluation mode.

    Args:
        model: see `load`.
        x: (N, L) features of the patches.
        edge_index: (2, E) int64 edges, source over target, as the released code makes them.
        coords: (N, 2), in place of `edge_index`: the graph of the k nearest patches, see `momkd.graph.knn`.
        k: neighbours of a patch.

    Returns:
        "logits" (1, 2) and "attention" (N,), which sums to one.

    Raises:
        ValueError: neither or both of edge_index and coords, or shapes that don't fit.
    """
    if (edge_index is None) == (coords is None):
        raise ValueError("edge_index, coords: expected one of them, got both or none")
    if edge_index is not None:
        edges: Edges = from_edge_index(edge_index, x.shape[0])
    else:
        assert coords is not None
        edges = knn(coords, k)
    training = model.training
    model.eval()
    prediction = model(Bags.from_list([x]).with_edges(edges.to(x.device)))
    model.train(training)
    return {"logits": prediction.logits, "attention": prediction.attention[:, 0]}


def _name_here(name: str) -> str:
    """The name of a released tensor in momkd, or nothing."""
    return next((here + name[len(there) :] for there, here in _NAMES.items() if _starts(name, there)), "")


def _is_of_codebook(name: str) -> bool:
    return any(name.startswith(f"{bank}._codebook.") for bank in _BANKS)


def _name_there(name: str) -> str:
    """The released name of a momkd tensor; the memory is both banks."""
    if name.startswith("memory."):
        return "mem_pos._codebook.embed"
    return next(there + name[len(here) :] for there, here in _NAMES.items() if _starts(name, here))


def _starts(name: str, start: str) -> bool:
    return name == start or (start.endswith(".") and name.startswith(start))


def _present(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise InputError(f"checkpoint: expected a tensor {name!r} of the released MoMKD, got none; give its state dict")
    return tensor


def _expected(tensor: Tensor | None, name: str, shape: tuple[int, ...]) -> Tensor:
    if _present(tensor, name).shape != shape:
        raise InputError(f"checkpoint: {name}: expected {shape}, got {tuple(_present(tensor, name).shape)}")
    return _present(tensor, name)


def _shape(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    shape = tuple(_present(state.get(name), name).shape)
    if len(shape) != ndim or 0 in shape:
        raise InputError(f"checkpoint: {name}: expected {ndim} dimensions, none of them 0, got {shape}")
    return shape

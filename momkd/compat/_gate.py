"""The block that scores patches, as the projects write it, alone or with its pooling, by momkd's ops.

A block is a tanh branch, perhaps a σ branch, and a linear layer on their product. Where it is the block that
`gated_attention_pool` computes, and that is quicker here, one op makes scores and pooled vectors, or the scores alone.
Where it isn't (another activation, dropout before it), the modules make the scores and `attention_pool` pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from momkd import dispatch, functional
from momkd.bags import Bags
from momkd.compat._rows import Rows
from momkd.reference.gated_attention_pool import GateParameters

# How the projects name the three parts.
GATED = (
    ("attention_a", "attention_b", "attention_c"),
    ("attention_V", "attention_U", "attention_w"),
    ("attention_V", "attention_U", "attention_weights"),
)
UNGATED = ("module", "attention")


class Branch(NamedTuple):
    """What the fused op needs to know of Linear, activation and dropout in a row."""

    linear: Any
    activation: type[nn.Module]
    dropout: float  # as it is now: 0 when its module is not in training
    dropout_last: bool  # or none


class Block(NamedTuple):
    """Modules that are applied one after the other: `value`, times `gate` where there is one, then `out`."""

    value: Sequence[nn.Module]
    gate: Sequence[nn.Module] | None
    out: nn.Module

    def scores(self, x: Tensor) -> Tensor:
        """As the project computes them, (..., L) -> (..., H)."""
        hidden = _chain(self.value, x)
        if self.gate is not None:
            hidden = hidden * _chain(self.gate, x)
        scores: Tensor = self.out(hidden)
        return scores

    @property
    def width(self) -> int:
        """L, the width that the block takes."""
        return int(self.value[0].in_features)  # type: ignore[arg-type]


def _chain(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _plain(module: nn.Module) -> bool:
    """A linear layer of torch whose forward nobody has changed."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def read_branch(modules: Sequence[nn.Module]) -> Branch | str:
    """The parts of a branch, or why it is none that the fused op has."""
    if not modules or not _plain(modules[0]):
        return "its first layer is no plain Linear"
    dropouts = [m for m in modules[1:] if isinstance(m, nn.Dropout)]
    activations = [m for m in modules[1:] if not isinstance(m, nn.Dropout)]
    if len(activations) != 1 or len(dropouts) > 1:
        names = ", ".join(type(m).__name__ for m in modules)
        return f"expected Linear, activation and at most one Dropout, got {names}"
    p = dropouts[0].p if dropouts and dropouts[0].training else 0.0
    return Branch(modules[0], type(activations[0]), p, modules[-1] is not activations[0])


def read(block: Block) -> tuple[Branch, Branch | None] | str:
    """The branches, where `gated_attention_pool` computes this block as it is now; else what it can't express."""
    value = read_branch(block.value)
    gate = None if block.gate is None else read_branch(block.gate)
    if isinstance(value, str) or isinstance(gate, str):
        return value if isinstance(value, str) else str(gate)
    if value.activation is not nn.Tanh:
        return f"activation {value.activation.__name__} where the op has Tanh"
    if gate is not None and gate.activation is not nn.Sigmoid:
        return f"gate {gate.activation.__name__} where the op has Sigmoid"
    if gate is not None and gate.dropout != value.dropout:
        return f"dropout {value.dropout} on one branch and {gate.dropout} on the other"
    if value.dropout > 0 and not (value.dropout_last and (gate is None or gate.dropout_last)):
        return "dropout before the activation where the op has it after"
    if value.dropout >= 1:
        return "dropout of everything"
    return (value, gate) if _plain(block.out) else "its last layer is no plain Linear"


def fused_is_quicker(x: Tensor, offsets: Tensor | None, weight: Tensor) -> bool:
    """Whether a kernel of `gated_attention_pool` takes less time on these tensors than the modules one after the other.

    The op asks the same: where it would be plain torch anyway, the modules stay what they are.
    """
    if torch.compiler.is_compiling():  # which backends are there can't be traced
        return x.is_cuda
    op, tensors = "gated_attention_pool", (x, offsets, weight)
    return dispatch.choose(op, None, tensors) != "torch" and not dispatch.plain_form(op, None, tensors)


def pool_by_scores(rows: Rows, values: Tensor, scores: Tensor) -> Tensor:
    """Values (N, L) by scores (N, H) -> (B, H, L). One bag on the CPU is a product; an op around it would only cost."""
    if rows.bags == 1 and values.device.type == "cpu":
        return (torch.softmax(scores, 0).T @ values)[None]
    return functional.attention_pool(values, scores, rows.offsets)


def pool(rows: Rows, block: Block) -> tuple[Tensor, Tensor]:
    """Pooled (B, H, L) and scores before softmax (N, H), both in the dtype of the rows; gradient comes from both."""
    branches = read(block)
    if isinstance(branches, str) or not fused_is_quicker(rows.x, rows.offsets, branches[0].linear.weight):
        scores = block.scores(rows.x)
        return pool_by_scores(rows, rows.x, scores), scores
    pooled, scores = functional.gated_attention_pool(
        rows.x, rows.offsets, *_parameters(branches, block), dropout_p=branches[0].dropout, return_scores=True
    )
    return pooled, scores.to(pooled.dtype)


def scores_of(x: Tensor, block: Block) -> Tensor:
    """Patches (..., L) -> scores before softmax (..., H), in the dtype that the modules give."""
    branches, rows = read(block), x.reshape(-1, x.shape[-1])
    if isinstance(branches, str) or not fused_is_quicker(rows, None, branches[0].linear.weight):
        return block.scores(x)
    scores = functional.gated_attention_scores(rows, *_parameters(branches, block), dropout_p=branches[0].dropout)
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return scores.to(dtype).view(*x.shape[:-1], scores.shape[1])


def _parameters(branches: tuple[Branch, Branch | None], block: Block) -> GateParameters:
    v, u, out = branches[0].linear, branches[1] and branches[1].linear, cast(nn.Linear, block.out)
    weight, bias = (None, None) if u is None else (u.weight, u.bias)
    return GateParameters(v.weight, v.bias, weight, bias, out.weight, out.bias)


class ScoreBlock(nn.Module):
    """The base of the drop-ins of blocks: (..., L) -> scores before softmax (..., H)."""

    def forward(self, x: Tensor) -> Any:
        return scores_of(x, block_of(self))


def forward_alone(self: nn.Module, *x: Tensor | Bags, **by_name: Tensor | Bags) -> Tensor:
    """The forward of a block of others, whatever the name of its one argument: scores (..., H), of `Bags` (N, H)."""
    (rows,) = *x, *by_name.values()
    return scores_of(rows.features if isinstance(rows, Bags) else rows, block_of(self))


def forward_with_input(self: nn.Module, *x: Tensor | Bags, **by_name: Tensor | Bags) -> tuple[Tensor, Tensor | Bags]:
    """As `forward_alone`, and what was given, as CLAM's `Attn_Net` and `Attn_Net_Gated` return it."""
    (rows,) = *x, *by_name.values()
    return forward_alone(self, rows), rows


def find_block(module: nn.Module) -> Block | None:
    """The block that lies right inside `module`, by the names that the projects give its parts."""
    for names in GATED:
        value, gate, out = (getattr(module, name, None) for name in names)
        if isinstance(value, nn.Sequential) and isinstance(gate, nn.Sequential) and isinstance(out, nn.Linear):
            return Block(list(value), list(gate), out)
    for name in UNGATED:
        layers = getattr(module, name, None)
        if isinstance(layers, nn.Sequential) and len(layers) in (3, 4) and isinstance(layers[-1], nn.Linear):
            *value, out = layers
            if isinstance(value[0], nn.Linear):
                return Block(value, None, out)
    return None


def block_of(module: nn.Module) -> Block:
    """`find_block` where there must be one."""
    block = find_block(module)
    if block is None:
        raise ValueError(f"{type(module).__name__}: expected a block that scores patches, found none by its names")
    return block

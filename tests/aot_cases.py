"""What `tests.aot` compiles: for each op, calls of its launchers on small CPU tensors, a spread over dtypes and widths.

Only widths, dtypes and switches matter to the compiler; rows are few, and no values are read.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF, FLOAT16, SINGLE = torch.bfloat16, torch.float16, torch.float32
ROWS = 77  # neither 1 nor a multiple of 16: Triton compiles those apart
LENGTHS = (0, 7, 70)


class Case(NamedTuple):
    """One op in one shape. `default` cases are compiled by the tests, the rest by the slow ones and the command."""

    op: str
    dtype: torch.dtype
    sizes: dict[str, Any]
    default: bool = False

    def __str__(self) -> str:
        dtype = {HALF: "bf16", FLOAT16: "fp16", SINGLE: "fp32"}[self.dtype]
        words = [f"{k}={v}" if not isinstance(v, bool) else k for k, v in self.sizes.items() if v is not False]
        return " ".join([self.op, dtype, *words])


def start(module: ModuleType, case: Case) -> None:
    """Calls the launchers of the case's op, forward and backward."""
    _START[case.op](module, case.dtype, **case.sizes)


def _offsets(more: int = 0) -> Tensor:
    """Of the bags; the last has so many rows more."""
    return torch.tensor([0, *LENGTHS[:-1], LENGTHS[-1] + more], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _attention_pool(
    kernels: ModuleType, dtype: torch.dtype, L: int, H: int, frozen: bool = False, giant: bool = False
) -> None:
    """giant: so many rows that their tiles are combined in groups."""
    more = 256 * 128 if giant else 0
    rows, offsets = ROWS + more, _offsets(more)
    values, scores = torch.zeros(rows, L, dtype=dtype), torch.zeros(rows, H, dtype=dtype)
    pooled, stats = kernels.attention_pool(values, scores, offsets)
    grad = torch.zeros_like(pooled)
    kernels.attention_pool_backward(grad, values, scores, offsets, pooled, stats, (not frozen, True))


def _gated_attention_pool(
    kernels: ModuleType,
    dtype: torch.dtype,
    L: int,
    D: int,
    H: int,
    ungated: bool = False,
    dropout: bool = False,
    frozen: bool = False,
    kept: bool = False,
) -> None:
    """frozen: no gradient of x; kept: backward has the products of forward."""
    from momkd.reference.gated_attention_pool import GateParameters

    x, offsets = torch.zeros(ROWS, L, dtype=dtype), _offsets()
    w, b = torch.zeros(D, L, dtype=dtype), torch.zeros(D, dtype=dtype)
    branch = torch.zeros(H, D, dtype=dtype), torch.zeros(H, dtype=dtype)
    gate = (None, None) if ungated else (w.clone(), b.clone())
    parameters = GateParameters(w, b, *gate, *branch)
    p, seed = (0.25, torch.tensor(7)) if dropout else (0.0, None)
    bias = torch.zeros(ROWS, H)
    pooled, scores, stats, products = kernels.gated_attention_pool(x, offsets, parameters, p, seed, bias, kept)
    needs = (not frozen, True, True, not ungated, not ungated, True, True, True)
    given = x, offsets, parameters, p, seed, pooled, scores, stats, products if kept else None, needs
    kernels.gated_attention_pool_backward(torch.zeros_like(pooled), None, *given)


def _memory(dtype: torch.dtype, C: int, K: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, the memory, and slots."""
    return torch.zeros(ROWS, S, dtype=dtype), torch.zeros(C, K, S), torch.zeros(ROWS, C, dtype=torch.int32)


def _memory_similarity(
    kernels: ModuleType, dtype: torch.dtype, C: int, K: int, S: int, reduce: str, learned: bool = False
) -> None:
    z, memory, slots = _memory(dtype, C, K, S)
    kernels.memory_similarity(z, memory, reduce, 5.0)
    grad = torch.zeros(ROWS, C)
    kernels.memory_similarity_backward(grad, z, memory, reduce, 5.0, slots, (True, learned))


def _memory_guided_pool(
    kernels: ModuleType, dtype: torch.dtype, L: int, C: int, K: int, S: int, per_class: bool = False
) -> None:
    z, memory, slots = _memory(dtype, C, K, S)
    values, offsets, temperature = torch.zeros(ROWS, L, dtype=dtype), _offsets(), torch.tensor(0.2)
    pooled, attention, _ = kernels.memory_guided_pool(z, values, memory, offsets, temperature, per_class)
    given = z, values, memory, offsets, temperature, per_class
    needs = True, True, True
    kernels.memory_guided_pool_backward(torch.zeros_like(pooled), *given, pooled, attention, slots, needs)


def _soft_angle_loss(kernels: ModuleType, dtype: torch.dtype, C: int, K: int, S: int, learned: bool = False) -> None:
    z, memory, _ = _memory(dtype, C, K, S)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    kernels.soft_angle_loss(z, memory, labels, 0.3, 5.0, 20.0)
    needs = True, learned
    kernels.soft_angle_loss_backward(torch.zeros(ROWS), z, memory, labels, 0.3, 5.0, 20.0, needs)


def _graph_attention(
    kernels: ModuleType, dtype: torch.dtype, L: int, H: int, dropout: bool = False, frozen: bool = False
) -> None:
    """L columns a head; frozen: no gradient of x_r."""
    from momkd.graph import from_edge_index

    edges = from_edge_index(torch.arange(2 * ROWS).view(2, ROWS) % ROWS, ROWS)
    x_l, x_r = torch.zeros(2, ROWS, H * L, dtype=dtype)
    att = torch.zeros(H, L, dtype=dtype)
    given = x_l, x_r, att, edges, 0.2, *((0.5, torch.tensor(7)) if dropout else (0.0, None))
    out, scores, stats = kernels.graph_attention(*given)
    kernels.graph_attention_backward(torch.zeros_like(out), *given, out, scores, stats, (True, not frozen, True))


_START: dict[str, Callable[..., None]] = {
    "attention_pool": _attention_pool,
    "gated_attention_pool": _gated_attention_pool,
    "graph_attention": _graph_attention,
    "memory_similarity": _memory_similarity,
    "memory_guided_pool": _memory_guided_pool,
    "soft_angle_loss": _soft_angle_loss,
}

CASES: tuple[Case, ...] = (
    Case("attention_pool", HALF, {"L": 1024, "H": 1}, default=True),
    Case("attention_pool", HALF, {"L": 1024, "H": 4}, default=True),
    Case("attention_pool", HALF, {"L": 500, "H": 4}, default=True),
    Case("attention_pool", FLOAT16, {"L": 500, "H": 1}),
    Case("attention_pool", FLOAT16, {"L": 1024, "H": 1}),
    Case("attention_pool", SINGLE, {"L": 1024, "H": 1}, default=True),
    Case("attention_pool", SINGLE, {"L": 1024, "H": 4}, default=True),
    Case("attention_pool", SINGLE, {"L": 500, "H": 4}),
    Case("attention_pool", HALF, {"L": 1024, "H": 1, "frozen": True}),
    Case("attention_pool", HALF, {"L": 1024, "H": 4, "giant": True}, default=True),
    Case("gated_attention_pool", HALF, {"L": 1024, "D": 256, "H": 1}, default=True),
    Case("gated_attention_pool", HALF, {"L": 1024, "D": 256, "H": 1, "kept": True}, default=True),
    Case("gated_attention_pool", HALF, {"L": 1024, "D": 256, "H": 1, "dropout": True, "frozen": True}, default=True),
    Case("gated_attention_pool", HALF, {"L": 1536, "D": 512, "H": 4}, default=True),
    Case("gated_attention_pool", FLOAT16, {"L": 1024, "D": 256, "H": 1, "kept": True}, default=True),
    Case("gated_attention_pool", HALF, {"L": 1024, "D": 384, "H": 4, "ungated": True, "dropout": True}),
    Case("gated_attention_pool", FLOAT16, {"L": 500, "D": 384, "H": 4, "dropout": True}),
    Case("gated_attention_pool", SINGLE, {"L": 1024, "D": 256, "H": 1, "dropout": True}, default=True),
    Case("gated_attention_pool", SINGLE, {"L": 500, "D": 64, "H": 4, "kept": True}),
    Case("gated_attention_pool", SINGLE, {"L": 100, "D": 50, "H": 1}),
    Case("gated_attention_pool", SINGLE, {"L": 1536, "D": 512, "H": 1, "ungated": True}),
    Case("graph_attention", HALF, {"L": 256, "H": 2, "dropout": True}, default=True),
    Case("graph_attention", HALF, {"L": 256, "H": 2}, default=True),
    Case("graph_attention", HALF, {"L": 1024, "H": 1, "frozen": True}, default=True),
    Case("graph_attention", FLOAT16, {"L": 100, "H": 4, "dropout": True}),
    Case("graph_attention", SINGLE, {"L": 256, "H": 2, "dropout": True}, default=True),
    Case("graph_attention", SINGLE, {"L": 64, "H": 8}, default=True),
    Case("memory_similarity", HALF, {"C": 2, "K": 16, "S": 64, "reduce": "max"}, default=True),
    Case("memory_similarity", HALF, {"C": 4, "K": 256, "S": 512, "reduce": "lse", "learned": True}, default=True),
    Case("memory_similarity", FLOAT16, {"C": 2, "K": 256, "S": 64, "reduce": "max", "learned": True}),
    Case("memory_similarity", SINGLE, {"C": 4, "K": 16, "S": 512, "reduce": "lse"}, default=True),
    Case("memory_guided_pool", HALF, {"L": 512, "C": 2, "K": 16, "S": 64}, default=True),
    Case("memory_guided_pool", HALF, {"L": 1024, "C": 4, "K": 256, "S": 512, "per_class": True}, default=True),
    Case("memory_guided_pool", FLOAT16, {"L": 500, "C": 2, "K": 256, "S": 64}),
    Case("memory_guided_pool", SINGLE, {"L": 512, "C": 2, "K": 16, "S": 512}, default=True),
    Case("soft_angle_loss", SINGLE, {"C": 2, "K": 16, "S": 64}, default=True),
    Case("soft_angle_loss", HALF, {"C": 4, "K": 256, "S": 512, "learned": True}, default=True),
    Case("soft_angle_loss", FLOAT16, {"C": 2, "K": 256, "S": 64, "learned": True}),
)
OPS = tuple(_START)

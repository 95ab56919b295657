"""Every op that has a backward as a call of its public function, for tests of what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from momkd import functional as F
from momkd.graph import Edges, knn

OFFSETS = torch.tensor([0, 3, 3, 7], dtype=torch.int32)


class Case(NamedTuple):
    """A call of some tensors that may want a gradient, and these tensors."""

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def differentiable(
    dtype: torch.dtype = torch.float32, device: str = "cpu", backend: str | None = None
) -> dict[str, Case]:
    """Each op on a few rows; `device` may be meta."""
    torch.manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).to(device)

    offsets, memory = OFFSETS.to(device), made(2, 3, 4)
    labels = (torch.arange(7) % 3 - 1).to(device)
    edges = Edges(*(t.to(device) for t in knn(torch.rand(7, 2), 3).tensors()))
    gate = (made(7, 4), made(3, 4), made(3), made(3, 4), made(3), made(2, 3), made(2))
    return {
        "gated_attention_pool": Case(
            lambda x, *rest: F.gated_attention_pool(
                x, offsets, *rest[:6], score_bias=rest[6], dropout_p=0.2, seed=3, backend=backend
            ),
            (*gate, made(7, 2)),
        ),
        "gated_attention_scores": Case(
            lambda *tensors: F.gated_attention_scores(*tensors, dropout_p=0.2, seed=3, backend=backend), gate
        ),
        "attention_pool": Case(lambda v, s: F.attention_pool(v, s, offsets, backend=backend), (made(7, 4), made(7, 2))),
        "memory_similarity": Case(
            lambda z, m: F.memory_similarity(z, m, reduce="lse", backend=backend)[0], (made(7, 4), memory)
        ),
        "memory_guided_pool": Case(
            lambda z, v, t: F.memory_guided_pool(z, v, memory, offsets, t, backend=backend)[0],
            (made(7, 4), made(7, 5), made().abs() + 0.5),
        ),
        "soft_angle_loss": Case(lambda z, m: F.soft_angle_loss(z, m, labels, backend=backend), (made(7, 4), memory)),
        "graph_attention": Case(
            lambda x_l, x_r, att: F.graph_attention(x_l, x_r, att, edges, dropout_p=0.2, seed=3, backend=backend),
            (made(7, 8), made(7, 8), made(2, 4)),
        ),
    }

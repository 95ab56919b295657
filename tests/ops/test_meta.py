"""Every op runs on meta tensors: the shapes and dtypes of a real call, forward and backward, and no work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from momkd import functional as F
from tests.ops.cases import differentiable

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def about(result: object) -> object:
    if isinstance(result, Tensor):
        return tuple(result.shape), result.dtype
    return [about(each) for each in result] if isinstance(result, (tuple, list)) else result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", differentiable())
def test_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    seen = []
    for device in ("cpu", "meta"):
        call, inputs = differentiable(dtype, device)[name]
        leaves = [t.requires_grad_() for t in inputs]
        out = call(*leaves)
        assert out.device.type == device
        out.sum().backward()
        seen.append(about([out, *(leaf.grad for leaf in leaves)]))
    assert seen[0] == seen[1]


def offsets(like: Tensor) -> Tensor:
    return torch.tensor([0, 3, 7], dtype=torch.int32, device=like.device)


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], object]] = {
    "ema_accumulate": lambda m, _, z, c: F.ema_accumulate(m, z, c),
    "ema_apply_": lambda m, u, *_: F.ema_apply_(m, u, torch.empty_like(m), torch.empty_like(u), momentum=0.9),
    "ema_scatter_": lambda m, u, z, c: F.ema_scatter_(m, u, z, c, momentum=0.9),
    "ema_scatter_ with reseeding": lambda m, u, z, c: F.ema_scatter_(m, u, z, c, momentum=0.9, reseed_below=0.1),
    "reseed_": lambda m, u, z, c: F.reseed_(m, u, z, c, threshold=0.1),
    "spherical_kmeans": lambda m, u, z, c: F.spherical_kmeans(z, 2),
    "drawn dropout": lambda m, u, z, c: F.gated_attention_pool(
        *(z, offsets(z), m[0], None, m[1], None, m[0, :1, :3], None),
        dropout_p=0.5,
        return_scores=True,
    ),
    "slots": lambda m, u, z, c: F.memory_guided_pool(z, z, m, offsets(z), 0.2),
}


@pytest.mark.parametrize("name", CALLS)
def test_results(name: str) -> None:
    seen = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        memory = torch.nn.functional.normalize(torch.randn(2, 3, 4), dim=-1).to(device)
        rows = torch.randn(7, 4).to(device), (torch.arange(7) % 2).to(device)
        seen.append(about(CALLS[name](memory, torch.zeros(2, 3).to(device), *rows)))
    assert seen[0] == seen[1]

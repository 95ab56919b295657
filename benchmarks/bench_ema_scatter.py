"""ema_scatter_: the native CPU kernel and the CUDA kernel, against plain torch and vector-quantize-pytorch's codebook.

Floor: rows read once, N·S·itemsize bytes, at the rate of a large copy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import compare
from momkd import dispatch, reference
from momkd import functional as F

S, K, C, MOMENTUM = 64, 16, 2, 0.99


def one_hot_form(memory: Tensor, usage: Tensor, z: Tensor, row_class: Tensor) -> None:
    """The quickest plain-torch form that we know: all slots in one product, masked by class, sums by a product."""
    unit = torch.nn.functional.normalize(z, dim=1)
    cosines = (unit @ memory.view(C * K, S).T).view(-1, C, K)
    nearest = cosines[torch.arange(len(z), device=z.device), row_class].argmax(1) + row_class * K
    hot = torch.zeros(len(z), C * K, device=z.device).scatter_(1, nearest[:, None], 1.0)
    mass = hot.sum(0)
    mean = hot.T @ unit / mass.clamp_min(1)[:, None]
    moved = torch.nn.functional.normalize(MOMENTUM * memory.view(C * K, S) + (1 - MOMENTUM) * mean, dim=1)
    memory.copy_(torch.where((mass > 0)[:, None], moved, memory.view(C * K, S)).view(C, K, S))
    usage.mul_(MOMENTUM).add_(mass.view(C, K), alpha=1 - MOMENTUM)


def codebooks(memory: Tensor) -> list[Any]:
    """One EMA codebook a class, as vector-quantize-pytorch makes them."""
    module = pytest.importorskip(
        "vector_quantize_pytorch", reason="the peer needs vector-quantize-pytorch: pip install -e '.[peers]'"
    )
    made = []
    for bank in memory:
        layer = (
            module.VectorQuantize(dim=S, codebook_size=K, decay=MOMENTUM, use_cosine_sim=True).train().to(memory.device)
        )
        layer._codebook.embed.data.copy_(bank[None])
        made.append(layer)
    return made


@pytest.mark.parametrize("kernel", ["native", "cuda"])
@pytest.mark.parametrize("peer", ["torch", "vector-quantize-pytorch"])
def test_ema_scatter(benchmark: Any, full: bool, peer: str, kernel: str) -> None:
    able, reason = dispatch.can_run("ema_scatter_", kernel)
    if not able:
        pytest.skip(f"the {kernel} kernel can't run: {reason}")
    device = "cuda" if kernel == "cuda" else "cpu"
    n = 4_000_000 if kernel == "cuda" else 1_000_000 if full else 200_000
    torch.manual_seed(0)
    memory = torch.nn.functional.normalize(torch.randn(C, K, S), dim=-1)
    memory, usage = memory.to(device), torch.zeros(C, K, device=device)
    z, row_class = torch.randn(n, S, device=device), torch.randint(0, C, (n,), device=device)

    wanted, wanted_usage = memory.double(), usage.double()
    slots = reference.ema_scatter_(wanted, wanted_usage, z.double(), row_class, None, MOMENTUM)
    got, got_usage = memory.clone(), usage.clone()
    same = (F.ema_scatter_(got, got_usage, z, row_class, momentum=MOMENTUM, backend=kernel) == slots).float().mean()
    error = float((got - wanted).norm() / wanted.norm())
    assert same > 0.9999, f"the kernel is wrong: {1 - same:.1e} of the rows in another slot; no time is reported"
    assert error < 1e-5, f"the kernel is wrong: relative error {error:.1e}; no time is reported"

    calls = {kernel: lambda: F.ema_scatter_(got, got_usage, z, row_class, momentum=MOMENTUM, backend=kernel)}
    if peer == "torch":
        calls["reference"] = lambda: F.ema_scatter_(got, got_usage, z, row_class, momentum=MOMENTUM, backend="torch")
        calls["one-hot products"] = lambda: one_hot_form(got, got_usage, z, row_class)
    else:
        layers = codebooks(memory)
        rows = [z[row_class == c] for c in range(C)]
        calls[peer] = lambda: [layer(x[None]) for layer, x in zip(layers, rows, strict=True)]
    compare(benchmark, device, calls, work=(2 * n * K * S, z.nbytes), rounds=15, rows=n)

"""ema_scatter_: the native CPU kernel and the CUDA kernel, against plain torch and vector-quantize-pytorch's codebook.

Floor: rows read once, N·S·itemsize bytes, at the rate of a large copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    """One EMA codebook a class, as vector-quantize-pytorch makes them.

    Raises:
        ImportError: the package is missing.
    """
    from vector_quantize_pytorch import VectorQuantize

    made = []
    for bank in memory:
        layer = VectorQuantize(dim=S, codebook_size=K, decay=MOMENTUM, use_cosine_sim=True).train().to(memory.device)
        layer._codebook.embed.data.copy_(bank[None])
        made.append(layer)
    return made


class Inputs(NamedTuple):
    """A memory and the rows that are scattered into it."""

    memory: Tensor
    usage: Tensor
    z: Tensor
    row_class: Tensor


def inputs(device: str, n: int) -> Inputs:
    torch.manual_seed(0)
    memory = torch.nn.functional.normalize(torch.randn(C, K, S), dim=-1).to(device)
    rows = torch.randn(n, S, device=device), torch.randint(0, C, (n,), device=device)
    return Inputs(memory, torch.zeros(C, K, device=device), *rows)


def check(given: Inputs, backend: str | None) -> float:
    """Return the relative error of the memory; a wrong kernel is refused."""
    wanted, wanted_usage = given.memory.double(), given.usage.double()
    slots = reference.ema_scatter_(wanted, wanted_usage, given.z.double(), given.row_class, None, MOMENTUM)
    got, got_usage = given.memory.clone(), given.usage.clone()
    chosen = F.ema_scatter_(got, got_usage, given.z, given.row_class, momentum=MOMENTUM, backend=backend)
    same, error = (chosen == slots).float().mean(), float((got - wanted).norm() / wanted.norm())
    assert same > 0.9999, f"the kernel is wrong: {1 - same:.1e} of the rows in another slot; no time is reported"
    assert error < 1e-5, f"the kernel is wrong: relative error {error:.1e}; no time is reported"
    return error


def scatter(given: Inputs, backend: str | None) -> Callable[[], object]:
    memory, usage, z, row_class = given.memory.clone(), given.usage.clone(), given.z, given.row_class
    return lambda: F.ema_scatter_(memory, usage, z, row_class, momentum=MOMENTUM, backend=backend)


def plain_peers(given: Inputs) -> dict[str, Callable[[], object]]:
    memory, usage = given.memory.clone(), given.usage.clone()
    return {
        "reference": scatter(given, "torch"),
        "one-hot products": lambda: one_hot_form(memory, usage, given.z, given.row_class),
    }


def codebook_peer(given: Inputs) -> Callable[[], object]:
    """vector-quantize-pytorch's codebooks on the same rows, which are sorted by class beforehand."""
    layers = codebooks(given.memory)
    rows = [given.z[given.row_class == c] for c in range(C)]
    return lambda: [layer(x[None]) for layer, x in zip(layers, rows, strict=True)]


def work(given: Inputs) -> tuple[float, float]:
    """Operations and bytes that can't be avoided."""
    return 2 * len(given.z) * K * S, given.z.nbytes


@pytest.mark.parametrize("kernel", ["native", "cuda"])
@pytest.mark.parametrize("peer", ["torch", "vector-quantize-pytorch"])
def test_ema_scatter(benchmark: Any, full: bool, peer: str, kernel: str) -> None:
    able, reason = dispatch.can_run("ema_scatter_", kernel)
    if not able:
        pytest.skip(f"the {kernel} kernel can't run: {reason}")
    device = "cuda" if kernel == "cuda" else "cpu"
    n = 4_000_000 if kernel == "cuda" else 1_000_000 if full else 200_000
    given = inputs(device, n)
    check(given, kernel)
    calls = {kernel: scatter(given, kernel)}
    if peer == "torch":
        calls |= plain_peers(given)
    else:
        why = "the peer needs vector-quantize-pytorch: pip install -e '.[peers]'"
        pytest.importorskip("vector_quantize_pytorch", reason=why)
        calls[peer] = codebook_peer(given)
    compare(benchmark, device, calls, work=work(given), rounds=15, rows=n)

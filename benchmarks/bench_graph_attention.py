"""A layer of GATv2, forward and backward, against PyG's GATv2Conv on the graph of a slide's patches.

Floor: its matrix products alone, 2·N·L·2HC operations forward and as many for the weights (features are frozen), in
the same rounds. Peak memory is counted by torch's allocator, above what was held before the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import interleaved, peak_bytes
from momkd import dispatch, graph, nn

WIDTH, CHANNELS, HEADS = 1536, 512, 2


def tissue(nodes: int) -> Tensor:
    """Patches on a grid, column by column, some of them missing, as segmentation leaves them."""
    side = int((nodes / 0.8) ** 0.5) + 1
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    kept = torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))[:nodes].sort().values
    return grid[kept] * 256


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("nodes", [4096, 65_536])
def test_gatv2_layer(benchmark: Any, full: bool, device: str, nodes: int) -> None:
    peer = pytest.importorskip("torch_geometric.nn", reason="the peer needs PyG: pip install -e '.[peers]'")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    if nodes > 10_000 and not (full or device == "cuda"):
        pytest.skip("a large graph takes minutes on a CPU: --full runs it")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    edges = graph.knn(tissue(nodes)).to(device)
    edge_index = edges.edge_index()
    x, grad = torch.randn(nodes, WIDTH), torch.randn(nodes, CHANNELS)
    conv, layer = peer.GATv2Conv(WIDTH, CHANNELS // HEADS, heads=HEADS), nn.GATv2Layer(WIDTH, CHANNELS // HEADS, HEADS)
    layer.load_state_dict(conv.state_dict())
    want = conv(x[:1000], graph.knn(tissue(nodes)[:1000]).edge_index())
    got = layer(x[:1000], graph.knn(tissue(nodes)[:1000]))
    error = float((got - want).norm() / want.norm())
    assert error < 1e-5, f"wrong by {error:.1e}: no time is reported"
    x, grad, conv, layer = x.to(device, dtype), grad.to(device, dtype), conv.to(device, dtype), layer.to(device, dtype)
    error = float((layer(x, edges).float() - conv(x, edge_index).float()).norm() / conv(x, edge_index).float().norm())
    assert error < (1e-5 if dtype == torch.float32 else 2e-2), f"wrong by {error:.1e}: no time is reported"

    def step(module: torch.nn.Module, *given: Any) -> Callable[[], None]:
        def run() -> None:
            module.zero_grad(set_to_none=True)
            module(*given).backward(grad)

        return run

    def products() -> None:
        for linear in (layer.lin_l, layer.lin_r):
            torch.nn.functional.linear(x, linear.weight.detach())
            _ = grad.T @ x

    calls = {"momkd": step(layer, x, edges), "PyG": step(conv, x, edge_index), "matrix products": products}
    peaks = {name: peak_bytes(calls[name], device) for name in ("momkd", "PyG")}
    seconds = interleaved(calls, rounds=9)
    benchmark.extra_info["backend"] = dispatch.choose("graph_attention", None, (grad, grad, layer.att[0]))
    benchmark.extra_info["nodes"], benchmark.extra_info["edges"] = nodes, edges.num_edges
    for name, each in seconds.items():
        benchmark.extra_info[f"seconds of {name}"] = each
    benchmark.extra_info["times as fast as PyG"] = seconds["PyG"] / seconds["momkd"]
    benchmark.extra_info["attained"] = seconds["matrix products"] / seconds["momkd"]
    benchmark.extra_info["peak MB"] = peaks["momkd"] / 1e6
    benchmark.extra_info["share of PyG's peak memory"] = peaks["momkd"] / peaks["PyG"]
    benchmark.pedantic(calls["momkd"], rounds=3)

"""A layer of GATv2, forward and backward, against PyG's GATv2Conv on the graph of a slide's patches.

Floor: its matrix products alone, 2·N·L·2HC operations forward and as many for the weights (features are frozen), in
the same rounds. Peak memory is counted by torch's allocator, above what was held before the call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import interleaved, must_agree, on_each_device, peak_bytes, record, require
from momkd import dispatch, graph, nn

WIDTH, CHANNELS, HEADS = 1536, 512, 2


def tissue(nodes: int) -> Tensor:
    """Patches on a grid, column by column, some of them missing, as segmentation leaves them."""
    side = int((nodes / 0.8) ** 0.5) + 1
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    kept = torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))[:nodes].sort().values
    return grid[kept] * 256


def layer_calls(device: str, nodes: int, dtype: torch.dtype) -> tuple[dict[str, Callable[[], None]], dict[str, Any]]:
    """Steps of our layer, of PyG's where it is installed, and of the matrix products alone; and facts about them.

    Raises:
        AssertionError: our layer is wrong, so that no time may be reported.
    """
    torch.manual_seed(0)
    edges = graph.knn(tissue(nodes))
    x, grad = torch.randn(nodes, WIDTH), torch.randn(nodes, CHANNELS)
    layer = nn.GATv2Layer(WIDTH, CHANNELS // HEADS, HEADS)
    few = min(nodes, 1000)
    corner = graph.knn(tissue(nodes)[:few])
    state = copy.deepcopy(layer.state_dict())
    want = copy.deepcopy(layer).double()(x[:few].double(), corner)
    must_agree(layer(x[:few], corner), want, 1e-5)
    x32, edges = x, edges.to(device)
    x, grad, layer = x.to(device, dtype), grad.to(device, dtype), layer.to(device, dtype)
    on_device = layer(x[:few], corner.to(device)).cpu()
    must_agree(on_device, want, 1e-5 if dtype == torch.float32 else 2e-2)

    def step(module: torch.nn.Module, *given: Any) -> Callable[[], None]:
        def run() -> None:
            module(*given).backward(grad)
            module.zero_grad(set_to_none=True)

        return run

    def products() -> None:
        for linear in (layer.lin_l, layer.lin_r):
            torch.nn.functional.linear(x, linear.weight.detach())
            _ = grad.T @ x

    calls = {"momkd": step(layer, x, edges)}
    with suppress(ImportError):
        from torch_geometric.nn import GATv2Conv

        conv = GATv2Conv(WIDTH, CHANNELS // HEADS, heads=HEADS)
        conv.load_state_dict(state)
        must_agree(conv(x32[:few], corner.edge_index()), want, 1e-5)
        conv, edge_index = conv.to(device, dtype), edges.edge_index()
        calls["PyG"] = step(conv, x, edge_index)
    calls["matrix products"] = products
    backend = dispatch.choose("graph_attention", None, (grad, grad, layer.att[0]))
    return calls, {"backend": backend, "nodes": nodes, "edges": edges.num_edges}


@on_each_device
@pytest.mark.parametrize("nodes", [4096, 65_536])
def test_gatv2_layer(benchmark: Any, full: bool, device: str, nodes: int) -> None:
    pytest.importorskip("torch_geometric.nn", reason="the peer needs PyG: pip install -e '.[peers]'")
    require(device)
    if nodes > 10_000 and not (full or device == "cuda"):
        pytest.skip("a large graph takes minutes on a CPU: --full runs it")
    calls, facts = layer_calls(device, nodes, torch.bfloat16 if device == "cuda" else torch.float32)
    peaks = {name: peak_bytes(calls[name], device) for name in ("momkd", "PyG")}
    seconds = interleaved(calls, device, rounds=9)
    benchmark.extra_info.update(facts)
    for name, each in seconds.items():
        benchmark.extra_info[f"seconds of {name}"] = each
    benchmark.extra_info["times as fast as PyG"] = seconds["PyG"] / seconds["momkd"]
    benchmark.extra_info["attained"] = seconds["matrix products"] / seconds["momkd"]
    benchmark.extra_info["peak MB"] = peaks["momkd"] / 1e6
    benchmark.extra_info["share of PyG's peak memory"] = peaks["momkd"] / peaks["PyG"]
    record(benchmark, calls["momkd"], device)

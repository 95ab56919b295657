"""A whole training step of the paper's configuration against the same mathematics in eager torch, PyG and
vector-quantize-pytorch, one slide a call, as the authors' code trains.

The step: encoder, memory-guided pooling, all five losses, backward, gradient clipping, AdamW. The memory moves by
gradient on both sides; dropout is off, so that the losses can be compared before a time is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.bench_graph_attention import tissue
from benchmarks.measure import interleaved, peak_bytes
from momkd import Bags, graph
from momkd.compat import momkd_reference
from momkd.config import LossConfig

WIDTH, GENES = 1536, 768
WEIGHTS = {
    name: getattr(LossConfig(), name)
    for name in ("classification", "memory", "soft_angle_omics", "soft_angle_slide", "reconstruction")
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("slides", [1, 16])
def test_training_step(benchmark: Any, full: bool, device: str, slides: int) -> None:
    why = "the peers need PyG and vector-quantize-pytorch: pip install -e '.[peers]'"
    pytest.importorskip("torch_geometric", reason=why)
    pytest.importorskip("vector_quantize_pytorch", reason=why)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    from benchmarks.eager_momkd import EagerMoMKD

    torch.manual_seed(0)
    large = full or device == "cuda"
    median = 4000 if large or slides == 1 else 500
    spread = torch.exp(0.6 * torch.randn(slides, generator=torch.Generator().manual_seed(1)))
    sizes = [median] if slides == 1 else (median * spread).long().tolist()
    labels = torch.arange(slides) % 2
    graphs = [graph.knn(tissue(n)).to(device) for n in sizes]
    features = [torch.randn(n, WIDTH, device=device) for n in sizes]
    profiles = torch.randn(slides, GENES, device=device)
    peer = EagerMoMKD(WIDTH, GENES).to(device).eval()
    model = momkd_reference.load(peer.state_dict()).to(device)
    bags = Bags.from_list(features).with_edges(graph.batch(graphs))
    given = bags, labels.to(device), profiles
    edge_indices = [g.edge_index() for g in graphs]

    def eager(slide: int) -> dict[str, torch.Tensor]:
        return peer.losses(features[slide], edge_indices[slide], int(labels[slide]), profiles[slide : slide + 1])

    with torch.no_grad():
        each = [eager(slide) for slide in range(slides)]
        for name, term in model.training_step(*given).losses.items():
            want = torch.stack([terms[name] for terms in each]).mean()
            assert abs(float(term / want) - 1) < 1e-3, f"{name}: {term} and {want} differ: no time is reported"

    def stepper(module: torch.nn.Module, fused: bool) -> Callable[[dict[str, torch.Tensor]], None]:
        optimizer = torch.optim.AdamW(module.parameters(), 1e-6, fused=fused)

        def step(terms: dict[str, torch.Tensor]) -> None:
            torch.stack([WEIGHTS[name] * term for name, term in terms.items()]).sum().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    ours, theirs = stepper(model, fused=True), stepper(peer, fused=False)  # as each is trained
    calls: dict[str, Callable[[], object]] = {
        "momkd": lambda: ours(model.training_step(*given).losses),
        "eager": lambda: [theirs(eager(slide)) for slide in range(slides)],
    }
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    seconds = interleaved(calls, rounds=9 if slides == 1 else 5)
    for name, took in seconds.items():
        benchmark.extra_info[f"seconds of {name}"] = took
        benchmark.extra_info[f"slides a second of {name}"] = slides / took
        benchmark.extra_info[f"peak MB of {name}"] = peaks[name] / 1e6
    benchmark.extra_info["times as fast as eager"] = seconds["eager"] / seconds["momkd"]
    benchmark.extra_info["patches"] = sum(sizes)
    benchmark.pedantic(calls["momkd"], rounds=3)

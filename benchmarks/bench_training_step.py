"""A whole training step of the paper's configuration against the same mathematics in eager torch, PyG and
vector-quantize-pytorch, one slide a call, as the authors' code trains. Without vector-quantize-pytorch the eager form
computes the losses of its codebook by itself, and its name says so.

The step: encoder, memory-guided pooling, all five losses, backward, gradient clipping, AdamW. The memory moves by
gradient on both sides; dropout is off, so that the losses can be compared before a time is reported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_gated_attention_pool import multiplies
from benchmarks.bench_graph_attention import tissue
from benchmarks.measure import on_each_device, peak_bytes, record, require, timings
from momkd import Bags, graph
from momkd.compat import momkd_reference
from momkd.config import LossConfig
from momkd.models import MoMKD

WIDTH, GENES = 1536, 768
WEIGHTS = {
    name: getattr(LossConfig(), name)
    for name in ("classification", "memory", "soft_angle_omics", "soft_angle_slide", "reconstruction")
}


def own_codebook() -> bool:
    """Whether the peer computes its codebook's losses by itself, for want of vector-quantize-pytorch."""
    return importlib.util.find_spec("vector_quantize_pytorch") is None


def eager_model(width: int, genes: int) -> Any:
    """The peer; None without PyG."""
    try:
        from benchmarks.eager_momkd import EagerMoMKD
    except ImportError:
        return None
    return EagerMoMKD(width, genes, codebook="plain torch" if own_codebook() else "vector-quantize-pytorch")


def step_calls(
    device: str,
    sizes: Sequence[int],
    *,
    autocast: bool = False,
    with_peer: bool = True,
    width: int = WIDTH,
    genes: int = GENES,
) -> dict[str, Callable[[], object]]:
    """A step of momkd on all slides at once and, where PyG is installed, of the eager form slide by slide.

    Raises:
        AssertionError: the losses differ, so that no time may be reported.
    """
    torch.manual_seed(0)
    slides = len(sizes)
    labels = torch.arange(slides) % 2
    graphs = [graph.knn(tissue(n)).to(device) for n in sizes]
    features = [torch.randn(n, width, device=device) for n in sizes]
    profiles = torch.randn(slides, genes, device=device)
    lower = torch.autocast(device, torch.bfloat16, enabled=autocast)
    peer = eager_model(width, genes) if with_peer else None
    if peer is None:
        model = MoMKD(width, encoder="gatv2", update="gradient", shared_projector=False, omics_features=genes).eval()
    else:
        model, peer = momkd_reference.load(peer.state_dict()), peer.to(device).eval()
    model = model.to(device)
    bags = Bags.from_list(features).with_edges(graph.batch(graphs))
    given = bags, labels.to(device), profiles
    edge_indices = [g.edge_index() for g in graphs]

    def ours() -> dict[str, Tensor]:
        with lower:
            return model.training_step(*given).losses

    def eager(slide: int, precision: torch.autocast = lower) -> dict[str, Tensor]:
        with precision:
            return peer.losses(features[slide], edge_indices[slide], int(labels[slide]), profiles[slide : slide + 1])

    if peer is not None:
        with torch.no_grad():
            wide = torch.autocast(device, enabled=False)
            exact = _mean([eager(slide, wide) for slide in range(slides)])
            plain = _mean([eager(slide) for slide in range(slides)])
            for name, term in ours().items():
                want = exact[name]  # under autocast, twice plain torch's own error is allowed too
                allowed = 2e-2 * abs(want) + 2 * abs(plain[name] - want) if autocast else 1e-3 * abs(want)
                assert abs(float(term) - want) < allowed, f"{name}: {term} and {want} differ: no time is reported"

    def stepper(module: torch.nn.Module, fused: bool) -> Callable[[dict[str, Tensor]], None]:
        optimizer = torch.optim.AdamW(module.parameters(), 1e-6, fused=fused)

        def step(terms: dict[str, Tensor]) -> None:
            torch.stack([WEIGHTS[name] * term for name, term in terms.items()]).sum().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    step = stepper(model, fused=True)
    calls: dict[str, Callable[[], object]] = {"momkd": lambda: step(ours())}
    if peer is not None:
        theirs = stepper(peer, fused=False)  # as each is trained
        name = "eager, own codebook" if own_codebook() else "eager"
        calls[name] = lambda: [theirs(eager(slide)) for slide in range(slides)]
    return calls


def _mean(each: list[dict[str, Tensor]]) -> dict[str, float]:
    return {name: float(torch.stack([terms[name].float() for terms in each]).mean()) for name in each[0]}


def sizes_of(slides: int, median: int) -> list[int]:
    """Patches of each slide: log-normal, one slide has the median."""
    spread = torch.exp(0.6 * torch.randn(slides, generator=torch.Generator().manual_seed(1)))
    return [median] if slides == 1 else [int(n) for n in median * spread]


@on_each_device
@pytest.mark.parametrize("slides", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_step(benchmark: Any, full: bool, device: str, slides: int, dtype: torch.dtype) -> None:
    """Both sides in float32, or under bfloat16 autocast."""
    pytest.importorskip("torch_geometric", reason="the peer needs PyG: pip install -e '.[peers]'")
    require(device)
    multiplies(device, dtype)
    sizes = sizes_of(slides, 4000 if full or device == "cuda" or slides == 1 else 500)
    calls = step_calls(device, sizes, autocast=dtype == torch.bfloat16)
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    taken = timings(calls, device, rounds=9 if slides == 1 else 5)
    for name, each in taken.items():  # until the device has finished: the host's work is part of a step
        benchmark.extra_info[f"seconds of {name}"] = each.wall
        benchmark.extra_info[f"slides a second of {name}"] = slides / each.wall
        benchmark.extra_info[f"peak MB of {name}"] = peaks[name] / 1e6
    mine, peer = taken
    benchmark.extra_info[f"times as fast as {peer}"] = taken[peer].wall / taken[mine].wall
    benchmark.extra_info["patches"] = sum(sizes)
    record(benchmark, calls["momkd"], device)

"""Where the time of a training step goes: `python -m benchmarks.profile_step --out DIR`.

MoMKD as `momkd train --preset paper` makes it, on simulated features of a batch of slides. DIR then holds profile.txt,
the ops by their own time on the device, and trace.json, which chrome://tracing and Perfetto open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.bench_graph_attention import tissue
from momkd import Bags, graph
from momkd.models import MoMKD

WIDTH, GENES = 1536, 768


def main(
    out: Annotated[Path, typer.Option(help="Folder for what comes out.")],
    slides: Annotated[int, typer.Option(help="Slides of a step.")] = 16,
    patches: Annotated[int, typer.Option(help="Patches of a slide.")] = 4000,
    steps: Annotated[int, typer.Option(help="Steps that are recorded.")] = 5,
) -> None:
    """Profile a training step on the GPU, or on the CPU where there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    bags = Bags.from_list([torch.randn(patches, WIDTH) for _ in range(slides)])
    bags = bags.with_edges(graph.batch([graph.knn(tissue(patches))] * slides)).to(device)
    labels, profiles = torch.arange(slides, device=device) % 2, torch.randn(slides, GENES, device=device)
    model = MoMKD(WIDTH, omics_features=GENES, encoder="gatv2").to(device).train()
    model.memory.memory.copy_(torch.nn.functional.normalize(torch.randn_like(model.memory.memory), dim=-1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        made = model.training_step(bags, labels, profiles)
        torch.stack(list(made.losses.values())).sum().backward()
        rows = made.memory_rows
        assert rows is not None
        model.memory.update_(rows.rows, rows.row_class, momentum=0.99, weights=rows.weights)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    step()
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    out.mkdir(parents=True, exist_ok=True)
    table = profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=30)
    (out / "profile.txt").write_text(table)
    profile.export_chrome_trace(str(out / "trace.json"))
    print(f"Wrote {out / 'profile.txt'} and trace.json: {steps} steps of {slides} slides on {device.type}.")


if __name__ == "__main__":
    typer.run(main)

"""Where the time of a training step goes: `python -m benchmarks.profile_step --out DIR [--bf16]`.

MoMKD as `momkd train --preset paper` makes it, on simulated features of a batch of slides. DIR then holds
step_profile.txt, the ops by their own time on the device; step_trace.json, which chrome://tracing and Perfetto open;
and step_profile.json: launches, the share of the time that the device is busy, and milliseconds a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from benchmarks.bench_graph_attention import tissue
from benchmarks.measure import synchronize, timings
from momkd import Bags, graph
from momkd.models import MoMKD

WIDTH, GENES = 1536, 768


class Activity(NamedTuple):
    """One thing that the device did; times in nanoseconds."""

    name: str
    start: int
    end: int


def summary(activities: Iterable[Activity], steps: int) -> dict[str, float]:
    """Kernel launches a step, milliseconds a step that the device was busy, and that as a share of first to last.

    The profiler slows the host down: the share of a step without it is larger.
    """
    ordered = sorted(activities, key=lambda each: each.start)
    launches = sum(not each.name.startswith(("Memcpy", "Memset")) for each in ordered)
    busy, reached = 0, ordered[0].start
    for each in ordered:  # what runs at once counts once
        busy += max(0, each.end - max(each.start, reached))
        reached = max(reached, each.end)
    return {
        "launches a step": launches / steps,
        "device ms a step": busy / steps / 1e6,
        "device busy share, profiled": busy / (reached - ordered[0].start),
    }


def training_step(device: str, slides: int, patches: int, bf16: bool) -> Callable[[], None]:
    """One step of MoMKD in training, the memory's update and the optimizer's step with it."""
    torch.manual_seed(0)
    bags = Bags.from_list([torch.randn(patches, WIDTH) for _ in range(slides)])
    bags = bags.with_edges(graph.batch([graph.knn(tissue(patches))] * slides)).to(torch.device(device))
    labels, profiles = torch.arange(slides, device=device) % 2, torch.randn(slides, GENES, device=device)
    model = MoMKD(WIDTH, omics_features=GENES, encoder="gatv2").to(device).train()
    model.memory.memory.copy_(torch.nn.functional.normalize(torch.randn_like(model.memory.memory), dim=-1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            made = model.training_step(bags, labels, profiles)
        torch.stack([term.float() for term in made.losses.values()]).sum().backward()
        rows = made.memory_rows
        assert rows is not None
        model.memory.update_(rows.rows, rows.row_class, momentum=0.99, weights=rows.weights)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(
    out: Annotated[Path, typer.Option(help="Folder for what comes out.")],
    slides: Annotated[int, typer.Option(help="Slides of a step.")] = 16,
    patches: Annotated[int, typer.Option(help="Patches of a slide.")] = 4000,
    steps: Annotated[int, typer.Option(help="Steps that are recorded.")] = 5,
    bf16: Annotated[bool, typer.Option(help="Under autocast to bfloat16.")] = False,
) -> None:
    """Profile a training step on the GPU, or on the CPU where there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = training_step(device, slides, patches, bf16)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    wall = timings({"step": step}, device, rounds=steps)["step"].wall  # the profiler would slow it down
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(steps):
            step()
        synchronize(device)
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    done = [
        Activity(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    figures |= {"slides": slides, "patches": slides * patches, "steps": steps, "bf16 autocast": bf16}
    figures["wall ms a step"] = 1e3 * wall
    if done:
        figures |= summary(done, steps)
        figures["device busy share"] = figures["device ms a step"] / figures["wall ms a step"]
    out.mkdir(parents=True, exist_ok=True)
    table = profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=30)
    (out / "step_profile.txt").write_text(table, encoding="utf-8")
    (out / "step_profile.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    profile.export_chrome_trace(str(out / "step_trace.json"))
    print(f"Wrote {out}/step_profile.txt, step_profile.json and step_trace.json: {figures}")


if __name__ == "__main__":
    typer.run(main)

"""A training step in bfloat16 against float32 on a CPU: from how many values of a step on `train.amp=auto` takes it.

`python -m benchmarks.bench_precision` prints both within a minute, for the default model without genomics, 128 and 512
wide, with one thread and with two. `momkd.precision.ENOUGH` lies above the steps that gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.measure import record, timings
from momkd.config import Config
from momkd.data.batches import BagLoader
from momkd.precision import ENOUGH
from momkd.runs import build_model
from momkd.train import Trainer

STEPS = [  # slides, patches of each, their width, width of the model
    *((16, 30, 192, 128), (16, 80, 192, 128), (16, 160, 192, 128), (16, 640, 192, 128)),
    *((2, 60, 1024, 512), (4, 60, 1024, 512), (8, 60, 1024, 512), (4, 1000, 1024, 512)),
]


def step_calls(slides: int, patches: int, width: int, hidden: int) -> dict[str, Callable[[], Any]]:
    """A step of the trainer in each precision, by its name; features are stored as float16."""
    torch.manual_seed(0)
    settings = [f"model.{name}_features={hidden}" for name in ("hidden", "gate", "classifier")]
    config = Config().with_settings([*settings, "memory.warmup=0", f"train.slides_per_step={slides}"])
    names = [f"slide_{n}" for n in range(slides)]
    features = {name: torch.randn(patches, width).half() for name in names}
    loader = BagLoader(names, np.arange(slides) % 2, dict.fromkeys(names, patches), features.__getitem__)
    (batch,) = loader.batches([list(range(slides))])
    calls: dict[str, Callable[[], Any]] = {}
    first = {}
    for name, amp in (("bfloat16", True), ("float32", False)):
        torch.manual_seed(0)
        model = build_model(config, width, 2).train()
        model.memory.fill_(torch.randn(200, model.memory.memory.shape[2]), torch.arange(200) % 2)  # type: ignore[union-attr]
        trainer = Trainer(model, config, loader, amp=amp)
        calls[name] = lambda trainer=trainer: trainer._step(batch, slides, [], last=True)
        torch.manual_seed(1)  # of dropout
        first[name] = calls[name]()
    for term, value in first["float32"].items():
        torch.testing.assert_close(
            first["bfloat16"][term], value, rtol=0.05, atol=0.02, msg=lambda m, t=term: f"{t}: {m}"
        )
    return calls


@pytest.mark.parametrize("step", [STEPS[0], STEPS[-1]], ids=lambda step: "x".join(map(str, step)))
def test_step(benchmark: Any, step: tuple[int, int, int, int]) -> None:
    calls = step_calls(*step)
    taken = timings(calls, rounds=5)
    for name, each in taken.items():
        benchmark.extra_info[f"seconds of {name}"] = each.wall
    benchmark.extra_info["times as fast as float32"] = taken["float32"].wall / taken["bfloat16"].wall
    record(benchmark, calls["bfloat16"], "cpu")


def main() -> None:
    """Print the median milliseconds of each and their ratio."""
    print(f"auto takes bfloat16 from {ENOUGH:,} values of a step on, where it is the faster")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for step in STEPS:
            slides, patches, width, hidden = step
            taken = timings(step_calls(*step), rounds=max(5, min(60, 20_000_000 // (slides * patches * width))))
            lower, single = (1e3 * taken[name].wall for name in ("bfloat16", "float32"))
            shape = f"{slides} slides of {patches} x {width}, {hidden} wide, {slides * patches * width:,} values"
            print(
                f"{threads} thread(s), {shape}: float32 {single:.2f} ms, bfloat16 {lower:.2f} ms",
                f"{single / lower:.2f} times as fast",
                sep=", ",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""A training step on small bags, which overhead bounds and not arithmetic: momkd against its mathematics by hand.

`python -m benchmarks.bench_small_step` prints both within a minute. 16 slides of 30 regions of 192 features, the
default model 128 wide, with genomics: a step of `momkd.train.Trainer` on a batch against `PaddedMoMKD` on the same
patches, padded; validation as `momkd.inference.probabilities` does it against a plain forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.measure import record, timings
from benchmarks.padded_momkd import PaddedMoMKD
from momkd.config import Config
from momkd.data.batches import BagLoader
from momkd.inference import probabilities
from momkd.runs import build_model
from momkd.train import Trainer

SLIDES, REGIONS, WIDTH, GENES = 16, 30, 192, 128
SETTINGS = [
    *("model.hidden_features=128", "model.gate_features=128", "omics.features=128", "omics.hidden_features=128"),
    *("memory.warmup=0", "train.slides_per_step=16"),
]
TARGET = 2.5  # times the step by hand


class Small(NamedTuple):
    """The calls to compare, by what they do: momkd first, then by hand."""

    step: dict[str, Callable[[], object]]
    validation: dict[str, Callable[[], object]]


def make_trainer(slides: int = SLIDES, regions: int = REGIONS) -> Trainer:
    """The trainer of the default model on random slides that lie in memory; its memory is filled."""
    torch.manual_seed(0)
    config = Config().with_settings(SETTINGS)
    names = [f"slide_{n}" for n in range(slides)]
    features = {name: torch.randn(regions, WIDTH) for name in names}
    profiles = torch.randn(slides, GENES).numpy()
    sizes = dict.fromkeys(names, regions)
    loader = BagLoader(
        names, np.arange(slides) % 2, sizes, features.__getitem__, omics=profiles, slides_per_step=SLIDES
    )
    model = build_model(config, WIDTH, 2, GENES)
    model.memory.fill_(torch.randn(200, model.memory.memory.shape[2]), torch.arange(200) % 2)  # type: ignore[union-attr]
    return Trainer(model.train(), config, loader, loader, amp=False)  # as by hand, in float32


def padded(trainer: Trainer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slides of a trainer as one padded batch: features, padding, labels and profiles."""
    loader = trainer.training
    (batch,) = loader.batches([list(range(len(loader.slide_ids)))])
    x, real = batch.bags.to_padded()
    assert batch.omics is not None
    return x, ~real, batch.labels, batch.omics


def small_calls() -> Small:
    """A step and a validation of each.

    Raises:
        AssertionError: the numbers differ, so that no time may be reported.
    """
    trainer = make_trainer()
    (batch,) = trainer.training.batches([list(range(SLIDES))])
    train = trainer.config.train
    hand = PaddedMoMKD(
        trainer.model, trainer.config.loss, learning_rate=train.learning_rate, weight_decay=train.weight_decay
    )
    given = padded(trainer)
    momentum = 2.0 ** (-SLIDES / (trainer.config.memory.half_life * SLIDES))

    def ours() -> dict[str, Tensor]:
        return trainer._step(batch, SLIDES, [], last=True)

    def by_hand() -> dict[str, Tensor]:
        return hand.step(*given, momentum=momentum, clip_norm=train.clip_norm)

    def validate() -> Any:
        found = probabilities(trainer.model, trainer.training, torch.device("cpu"))[1]
        trainer.model.train()
        return found

    @torch.inference_mode()
    def forward() -> Any:
        hand.eval()
        probs = hand.classify(hand.encode(*given[:2])[0]).softmax(1).tolist()
        hand.train()
        return probs

    check(trainer, hand, ours, by_hand)
    np.testing.assert_allclose(validate(), forward(), atol=1e-4)
    return Small({"momkd": ours, "by hand": by_hand}, {"momkd": validate, "by hand": forward})


def check(
    trainer: Trainer, hand: PaddedMoMKD, ours: Callable[[], dict[str, Tensor]], by_hand: Callable[[], dict[str, Tensor]]
) -> None:
    """Raise AssertionError where three steps without dropout end with other losses, weights or prototypes."""
    rates = [(m, m.p) for model in (trainer.model, hand) for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    for module, _ in rates:
        module.p = 0.0
    for _ in range(3):
        mine, theirs = ours(), by_hand()
        for name, term in mine.items():
            torch.testing.assert_close(
                term, theirs[name].detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    wanted = hand.model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        if name == "pool.gate.attention_w.bias":  # its gradient is rounding alone: softmax does not see it
            continue
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for module, p in rates:
        module.p = p


@pytest.mark.parametrize("what", Small._fields)
def test_small_step(benchmark: Any, what: str) -> None:
    calls = getattr(small_calls(), what)
    taken = timings(calls, rounds=100, warmup=20)
    for name, each in taken.items():
        benchmark.extra_info[f"seconds of {name}"] = each.wall
    ratio = taken["momkd"].wall / taken["by hand"].wall
    benchmark.extra_info["times the seconds by hand"] = ratio
    benchmark.extra_info["target met"] = ratio <= TARGET
    record(benchmark, calls["momkd"], "cpu")


def main() -> None:
    """Print the median seconds of each and their ratio, with one thread and with two."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for what, calls in small_calls()._asdict().items():
            taken = timings(calls, rounds=200, warmup=20)
            times = ", ".join(f"{name} {1e3 * each.wall:.2f} ms" for name, each in taken.items())
            ratio = taken["momkd"].wall / taken["by hand"].wall
            print(f"{what}, {threads} thread(s): {times}, ratio {ratio:.2f} (target {TARGET})", flush=True)


if __name__ == "__main__":
    main()

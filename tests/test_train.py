"""The loop: it learns, stops, chooses its epoch, moves the memory as configured, and resumes to the same bits."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from momkd.config import Config
from momkd.data.batches import BagLoader
from momkd.data.prefetch import DeviceCache
from momkd.errors import InputError
from momkd.models import MILModel
from momkd.runs import build_model
from momkd.train import Progress, Trainer
from tests.data.fake_streams import install

L, G, SMALL = 6, 5, ["model.hidden_features=16", "model.projection_features=8", "memory.slots=3", "omics.features=8"]


def slides(n: int, seed: int, *, signal: float = 3.0, labels: np.ndarray | None = None) -> BagLoader:
    """Bags whose first feature tells the class in a fifth of the patches; every third without genomics."""
    rng = np.random.default_rng(seed)
    given = np.arange(n) % 2 if labels is None else labels
    features = {}
    for i in range(n):
        x = rng.standard_normal((int(rng.integers(5, 30)), L)).astype(np.float32)
        x[: max(1, len(x) // 5), 0] += signal * (2 * given[i] - 1)
        features[f"s{i}"] = torch.from_numpy(x)
    omics = rng.standard_normal((n, G)).astype(np.float32)
    omics[:, 0] += 2 * given
    omics[::3] = np.nan
    sizes = {slide: len(x) for slide, x in features.items()}
    return BagLoader(list(features), given.astype(np.int64), sizes, features.__getitem__, omics, slides_per_step=4)


def trainer(preset: str = "fast", *settings: str, folder: Path | None = None, **options: object) -> Trainer:
    config = Config.preset(preset).with_settings([*SMALL, "train.learning_rate=0.01", *settings])
    torch.manual_seed(config.train.seed)
    model = build_model(config, L, 2, G if preset == "fast" else None)
    given = {"training": slides(24, 0), "validation": slides(12, 1), **options}
    return Trainer(model, config, given["training"], given["validation"], folder=folder, report=options.get("report"))


def same(a: MILModel, b: MILModel) -> bool:
    other = b.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("fast", []),
        ("fast", ["memory.rows=patch", "memory.reseed_below=0.01"]),
        ("fast", ["memory.rows=attention", "model.branch=per_class"]),
        ("fast", ["memory.update=gradient"]),
        ("fast", ["memory.update=fixed", "model.pooling=gated"]),
        ("abmil", []),
    ],
)
def test_it_learns(preset: str, settings: list[str]) -> None:
    made = trainer(preset, "train.epochs=8", *settings)
    made.run()
    assert made.best is not None
    assert made.best[0] >= 0.9
    first, last = made.log[1]["classification_loss"], made.log[-1]["classification_loss"]
    assert last < first


def test_max_patches_bounds_what_fills_the_memory_too() -> None:
    training = slides(24, 0)
    training.max_patches = 7
    made, seen = trainer("fast", training=training), []
    step = made.model.training_step
    made.model.training_step = lambda bags, *given: seen.append(max(bags.lengths)) or step(bags, *given)  # type: ignore
    made._fill_memory()
    assert made.model.memory.is_filled
    assert max(seen) == 7


def test_what_is_kept_is_the_epoch_of_the_best_score() -> None:
    made = trainer("abmil", "train.epochs=6")
    model = made.run()
    scores = [(row["val_auc"], -row["val_loss"]) for row in made.log]
    assert made.best == max(scores)
    assert not model.training
    assert (made._validate()["val_auc"], -made._validate()["val_loss"]) == pytest.approx(made.best)


def test_resuming_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trainer("fast", "train.epochs=6", "memory.reseed_below=0.02", "train.max_patches=7", folder=tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    torch.manual_seed(99)  # whatever the state of the generator
    with pytest.raises(KeyboardInterrupt):
        stopping(trainer("fast", "train.epochs=6", "memory.reseed_below=0.02", "train.max_patches=7", folder=broken), 3)
    resumed = trainer("fast", "train.epochs=6", "memory.reseed_below=0.02", "train.max_patches=7", folder=broken)
    assert same(whole.run(), resumed.run())
    timeless = [{k: v for k, v in row.items() if k != "patches_per_second"} for row in resumed.log]
    assert timeless == [{k: v for k, v in row.items() if k != "patches_per_second"} for row in whole.log]
    assert resumed.log[:3] != []
    assert (tmp_path / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kept", [None, 0, 1500, 10**9])
def test_streams_and_features_kept_on_a_device_change_no_bit(kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["fast", "train.epochs=3", "memory.reseed_below=0.02", "train.max_patches=7"]
    loaders = [{"training": slides(24, 0), "validation": slides(12, 1)} for _ in range(2)]
    for one in (each for pair in loaders for each in pair.values()):
        one.max_patches = 7
    plain = trainer(*settings, **loaders[0])
    model = plain.run()
    fake = install(monkeypatch)
    for one in loaders[1].values():
        one.device_cache = None if kept is None else DeviceCache("cpu", kept)
    made = trainer(*settings, **loaders[1])
    assert same(model, made.run())
    assert len(fake.of("copy")) >= 3 * 6 + 3 * 3 + 6, "training, validation, and the filling of the memory"
    for row, other in zip(made.log, plain.log, strict=True):
        assert {**row, "patches_per_second": 0} == {**other, "patches_per_second": 0}


@pytest.mark.parametrize("streams", [False, True])
def test_training_that_is_stopped_leaves_no_thread(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if streams:
        install(monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        stopping(trainer("fast", "train.epochs=3"), 1)
    assert caught.tb is not None, "which keeps the frames of the loop alive"
    assert [t.name for t in threading.enumerate() if t.name.startswith("momkd-")] == []


def stopping(made: Trainer, epoch: int) -> None:
    """Run until the middle of an epoch."""

    def stop(progress: Progress) -> None:
        if progress.epoch == epoch:
            raise KeyboardInterrupt

    made.report = stop
    made.run()


def test_same_seed_same_model_and_other_seed_another() -> None:
    a, b, c = (trainer("fast", "train.epochs=2", f"train.seed={seed}").run() for seed in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)


def test_accumulated_steps_are_one_large_step() -> None:
    settings = ["model.dropout=0", "train.balanced=false"]
    gradients = []
    for size, options in ((4, ["train.accumulate=2"]), (8, [])):
        made = trainer("abmil", *settings, *options, training=slides(8, 0))
        made.training.slides_per_step = size
        moves: list[dict[str, torch.Tensor]] = []
        made._move = lambda taken, made=made, moves=moves: moves.append(
            {name: p.grad.clone() for name, p in made.model.named_parameters()}
        )
        made._train_epoch()
        assert len(moves) == 1
        gradients.append(moves[0])
    for name, whole in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], whole, atol=1e-6, rtol=1e-4)


def test_the_memory_moves_only_by_momentum() -> None:
    fixed = trainer("fast", "train.epochs=3", "memory.update=fixed", "memory.warmup=1")
    moving = trainer("fast", "train.epochs=3", "memory.warmup=1")
    for made in (fixed, moving):
        made.epoch = 1
        made._fill_memory()
    before = fixed.model.memory.memory.clone()
    assert torch.equal(before, moving.model.memory.memory)
    for made in (fixed, moving):
        made._train_epoch()
    assert torch.equal(fixed.model.memory.memory, before)
    assert not torch.equal(moving.model.memory.memory, before)
    norms = moving.model.memory.memory.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_memory_moved_by_gradients_waits_for_its_filling(monkeypatch: pytest.MonkeyPatch) -> None:
    """At zero its gradient is past 1e11, and clipping that would leave nothing of the others'."""
    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, n: norms.append(float(clip(p, n))))
    made = trainer("fast", "train.epochs=3", "memory.update=gradient", "memory.warmup=2")
    made._train_epoch()
    assert not made.model.memory.is_filled
    assert max(norms) < 1e3
    made.epoch = 2
    made._fill_memory()
    before = made.model.memory.memory.detach().clone()
    made._train_epoch()
    assert not torch.equal(made.model.memory.memory, before)


def test_half_life_means_the_same_for_any_size_of_step() -> None:
    """Over half_life epochs the momenta of all steps multiply to one half."""
    for size in (1, 5, 24):
        made = trainer("abmil", "memory.half_life=2")
        total, n = 1.0, len(made.training.slide_ids)
        for _ in range(2):
            for start in range(0, n, size):
                total *= 2.0 ** (-min(size, n - start) / (made.config.memory.half_life * n))
        assert total == pytest.approx(0.5)
    seen: list[float] = []
    made = trainer("fast", "memory.half_life=2", "memory.warmup=0", "train.balanced=false")
    update = made.model.memory.update_
    made.model.memory.update_ = lambda *a, **k: (seen.append(k["momentum"]), update(*a, **k))[1]
    made._fill_memory()
    made._train_epoch()
    made.epoch = 1
    made._train_epoch()
    assert np.prod(seen) == pytest.approx(0.5)


def test_early_stopping_and_the_falling_rate() -> None:
    """Labels that nothing explains: no better validation score for long."""
    settings = ["train.epochs=40", "train.patience=6", "train.plateau_patience=2", "train.learning_rate=0.05"]
    noise = np.random.default_rng(3).integers(0, 2, 24)
    made = trainer("abmil", *settings, training=slides(24, 0, signal=0, labels=noise))
    made.run()
    assert made.waited == 6
    assert len(made.log) < 40
    rates = [row["learning_rate"] for row in made.log]
    assert rates[-1] <= rates[0] * 0.2 * 1.001


def test_without_a_validation_score_the_last_epoch_is_kept() -> None:
    one_class = slides(4, 1, labels=np.zeros(4, np.int64))
    for validation in (None, one_class, slides(4, 1, labels=np.full(4, -1))):
        made = trainer("abmil", "train.epochs=3", "train.patience=1", validation=validation)
        made.run()
        assert len(made.log) == 3
        assert np.isnan(made.log[-1]["val_auc"])
        assert all(torch.equal(made.kept[name], t) for name, t in made.model.state_dict().items())


def test_the_warm_up_is_never_longer_than_the_training(tmp_path: Path) -> None:
    made = trainer("fast", "train.epochs=1", "memory.warmup=5", folder=tmp_path)
    made.run()
    assert made.model.memory.is_filled


ADAPTIVE = ["memory.adaptive=true", "train.max_patches=7"]


def many(n: int = 120) -> dict[str, BagLoader]:
    return {"training": slides(n, 0), "validation": slides(12, 1)}


def test_an_adaptive_memory_grows_where_slides_are_many_and_all_slots_are_used() -> None:
    made = trainer("fast", "train.epochs=6", "memory.warmup=2", "memory.slots=2", *ADAPTIVE, **many())
    made.run()
    slots = [row["slots"] for row in made.log]
    assert slots[:3] == [2, 2, 2], "not before an epoch that uses the filled memory"
    assert slots[3] == 3
    assert max(slots) <= 60 // 8 + 1
    assert "slots" not in trainer("fast")._prepare_memory()


def test_an_adaptive_memory_shrinks_where_slides_are_few() -> None:
    """Twelve of a class; eight a slot would leave one, and two are the least."""
    made = trainer("fast", "train.epochs=7", "memory.slots=9", *ADAPTIVE)
    made.run()
    assert [row["slots"] for row in made.log] == [9, 9, 7, 6, 5, 4, 3]
    norms = made.model.memory.memory.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_class_without_label_or_slide_does_not_count() -> None:
    labels = np.arange(96) % 3 - 1
    made = trainer("fast", "memory.slots=4", "memory.warmup=0", *ADAPTIVE, training=slides(96, 0, labels=labels))
    made._prepare_memory()
    made.training.labels[made.training.labels == 0] = -1
    made.epoch = 1
    assert made._prepare_memory() == {"slots": 4}, "32 slides of the class that has some: eight a slot"


@pytest.mark.parametrize("best", [1, 3, 6])
def test_the_epoch_that_is_kept_has_its_own_slots(best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer("fast", "train.epochs=7", "memory.slots=9", *ADAPTIVE, folder=tmp_path)
    memories: list[torch.Tensor] = []

    def validate() -> dict[str, float]:
        memories.append(made.model.memory.memory.clone())
        return {"val_loss": 1.0, "val_auc": 0.9 if made.epoch == best else 0.5}

    monkeypatch.setattr(made, "_validate", validate)
    model = made.run()
    assert model.memory.slots == made.log[best]["slots"]
    assert torch.equal(model.memory.memory, memories[best])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["memory.memory"], memories[best])
    assert pd.read_csv(tmp_path / "log.csv")["slots"].tolist() == [9, 9, 7, 6, 5, 4, 3]


@pytest.mark.parametrize(("slots", "stop"), [(9, 4), (2, 4)])
def test_an_adaptive_memory_resumes_to_the_same_bits(slots: int, stop: int, tmp_path: Path) -> None:
    settings = ["fast", "train.epochs=6", f"memory.slots={slots}", *ADAPTIVE]
    n = 24 if slots > 2 else 120
    whole, broken = trainer(*settings, folder=tmp_path, **many(n)), tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(KeyboardInterrupt):
        stopping(trainer(*settings, folder=broken, **many(n)), stop)
    state = torch.load(broken / "state.pt")
    assert state["epoch"] == stop
    assert state["model"]["memory.memory"].shape[1] != slots
    torch.manual_seed(99)
    resumed = trainer(*settings, folder=broken, **many(n))
    assert same(whole.run(), resumed.run())
    assert [row["slots"] for row in resumed.log] == [row["slots"] for row in whole.log]
    for name in ("model.safetensors", "genomics.safetensors"):
        assert (tmp_path / name).read_bytes() == (broken / name).read_bytes()
    assert torch.equal(
        torch.load(tmp_path / "state.pt")["model"]["memory.memory"],
        torch.load(broken / "state.pt")["model"]["memory.memory"],
    )


def test_progress_tells_every_term() -> None:
    told: list[Progress] = []
    trainer("fast", "train.epochs=2", report=told.append).run()
    assert {p.epoch for p in told} == {0, 1}
    assert told[-1].step == told[-1].steps
    assert set(told[-1].losses) == {
        "classification",
        "memory",
        "soft_angle_slide",
        "soft_angle_omics",
        "reconstruction",
    }
    assert told[-1].patches_per_second > 0


def test_log_and_checkpoint_of_every_epoch(tmp_path: Path) -> None:
    made = trainer("abmil", "train.epochs=3", folder=tmp_path)
    made.run()
    log = pd.read_csv(tmp_path / "log.csv")
    assert log["epoch"].tolist() == [0, 1, 2]
    assert {"classification_loss", "val_auc", "learning_rate"} <= set(log.columns)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "model.safetensors", "state.pt"]


def test_a_loss_that_leaves_the_numbers_is_said() -> None:
    bad = slides(8, 0)
    read = bad.read
    bad.read = lambda slide: read(slide) * float("nan")
    with pytest.raises(InputError, match=r"expected finite losses, got .* in epoch 0; lower train.learning_rate"):
        trainer("abmil", training=bad).run()


def test_state_of_another_model_or_a_damaged_one(tmp_path: Path) -> None:
    trainer("abmil", "train.epochs=1", folder=tmp_path).run()
    with pytest.raises(InputError, match=r"state.pt: .*another configuration"):
        trainer("abmil", "model.gate_features=7", folder=tmp_path).run()
    (tmp_path / "state.pt").write_bytes(b"PK not a state")
    with pytest.raises(InputError, match=r"state.pt: expected the state of a run, got a file that does not read"):
        trainer("abmil", folder=tmp_path).run()

"""train.amp: what it means on which processor, what a run keeps of it, and what is computed in bfloat16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from momkd import experiment, precision
from momkd.bags import Bags
from momkd.config import Config
from momkd.data.batches import BagLoader
from momkd.doctor import doctor
from momkd.errors import InputError
from momkd.evaluate import evaluate_external
from momkd.experiment import Reporter, train_run
from momkd.models import ABMIL, MoMKD
from momkd.precision import ENOUGH, autocast, choose, multiplier, values_of_step
from momkd.predict import predict_run
from momkd.runs import Run
from momkd.simulate import SimulatedCohort
from momkd.train import Progress

CPU = torch.device("cpu")
QUICK = [
    "train.epochs=2",
    "model.hidden_features=16",
    "model.projection_features=8",
    "omics.genes=20",
    "omics.select=variance",
]
Processor = Callable[[str], None]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Processor:
    """Makes the CPU one with AMX, with AVX-512-BF16 alone or with neither; torch computes in bfloat16 on any."""

    def has(name: str) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: name == "AMX")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: name in ("AMX", "AVX-512-BF16"))

    return has


class Notes(Reporter):
    """Keeps the notes; stops after the first epoch of the first fold where told to."""

    def __init__(self, *, stops: bool = False) -> None:
        self.notes, self.stops = [], stops

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, progress: Progress) -> None:
        if self.stops and progress.epoch == 1:
            raise KeyboardInterrupt


def train(cohort: SimulatedCohort, out: Path, *settings: str, **options: object) -> Run:
    """A run of the first fold, which is not scored: that would take most of the time."""
    given = {"features": cohort.features, "labels": cohort.labels, "splits": cohort.splits, "omics": cohort.omics}
    config = Config.preset("fast").with_settings([*QUICK, *settings])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "evaluate_run", lambda run: None)
        return train_run(out=out, config=config, **given, **{"folds": [0], **options})


@pytest.fixture(scope="module")
def lower(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        return train(tiny_cohort, tmp_path_factory.mktemp("runs") / "lower", "train.amp=true")


@pytest.fixture(scope="module")
def single(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny_cohort, tmp_path_factory.mktemp("runs") / "single", "train.amp=false")


# -- what it means ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AMX", "AVX-512-BF16", ""])
def test_what_the_cpu_has_decides(processor: Processor, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    processor(name)
    monkeypatch.setattr(precision, "_speed_up", lambda: 2.0)
    assert multiplier(CPU) == name == doctor(show=False).bfloat16
    assert choose("auto", CPU, ENOUGH) is bool(name)
    assert choose("auto", CPU, ENOUGH - 1) is False, "casting costs more than the products save"
    assert choose(False, CPU, ENOUGH) is False
    if name:
        assert choose(True, CPU, 0) is True
    else:
        with pytest.raises(InputError, match=r"^train.amp: expected .* for true, got a CPU without .*; set train.amp="):
            choose(True, CPU, ENOUGH)


def test_avx512_bf16_alone_has_to_be_faster(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some processors multiply with it no faster than in float32; by name it is taken there too."""
    assert precision._speed_up() > 0
    monkeypatch.setattr(precision, "_speed_up", lambda: 1.1)
    for name in ("AMX", "AVX-512-BF16"):
        processor(name)
        assert choose("auto", CPU, ENOUGH) is (name == "AMX")
        assert choose(True, CPU, 0)


def test_values_of_a_step() -> None:
    def values(*settings: str, ranks: int = 1) -> float:
        options = Config().with_settings([f"train.{setting}" for setting in settings]).train
        return values_of_step([100, 300], 10, options, ranks)

    assert values("slides_per_step=4") == 4 * 200 * 10
    assert values("slides_per_step=4", ranks=2) == 2 * 200 * 10
    assert values("slides_per_step=4", "max_patches=100") == 4 * 100 * 10
    assert values("slides_per_step=4", "patch_budget=500") == 500 * 10
    assert values("slides_per_step=4", "patch_budget=50") == 200 * 10, "a larger slide is a step of its own"
    assert values_of_step([], 10, Config().train) == 0


@pytest.mark.parametrize("value", ['"bf16"', "1", '"true"', '["auto"]'])
def test_other_words_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"train.amp: expected auto or true or false, got "):
        Config.from_toml(f"[train]\namp = {value}")


def test_the_three_of_them_survive_their_file() -> None:
    for word in ("auto", "true", "false"):
        config = Config().with_settings([f"train.amp={word}"])
        assert Config.from_toml(config.to_toml()) == config
        assert config.train.amp == {"auto": "auto", "true": True, "false": False}[word]


# -- what a run keeps of it ------------------------------------------------------------------------------------------


def test_a_training_in_bfloat16(
    tiny_cohort: SimulatedCohort, tmp_path: Path, processor: Processor, lower: Run, single: Run
) -> None:
    assert (lower.info.precision, single.info.precision) == ("bfloat16", "float32")
    a, b = lower.predictions(), single.predictions()
    assert list(a["slide_id"]) == list(b["slide_id"])
    difference = np.abs(a["prob_1"] - b["prob_1"]).max()
    assert 0 < difference < 0.05
    processor("AMX")
    notes = Notes()
    train(tiny_cohort, tmp_path / "run", "train.amp=true", "train.epochs=1", reporter=notes)
    assert "products in bfloat16, by AMX; --set train.amp=false computes them in float32" in notes.notes


def test_auto_takes_it_for_steps_of_enough_values(
    tiny_cohort: SimulatedCohort, tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor("AMX")
    loaders = []
    monkeypatch.setattr(
        experiment, "BagLoader", lambda *given, **named: loaders.append(BagLoader(*given, **named)) or loaders[-1]
    )
    assert train(tiny_cohort, tmp_path / "small", "train.epochs=1").info.precision == "float32"
    assert {loader.dtype for loader in loaders} == {None}
    loaders.clear()
    monkeypatch.setattr(precision, "ENOUGH", 1000)
    assert train(tiny_cohort, tmp_path / "large", "train.epochs=1").info.precision == "bfloat16"
    assert {loader.dtype for loader in loaders} == {torch.bfloat16}


def test_an_interrupted_training_in_bfloat16_ends_the_same(
    tiny_cohort: SimulatedCohort, tmp_path: Path, processor: Processor, lower: Run
) -> None:
    processor("AMX")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_cohort, tmp_path / "run", "train.amp=true", reporter=Notes(stops=True))
    run = train(tiny_cohort, tmp_path / "run", resume=True)  # auto: as it began
    assert (run.config.train.amp, run.info.precision) == (True, "bfloat16")
    for name in ("predictions.csv", "fold_0/model.safetensors"):
        assert (run.folder / name).read_bytes() == (lower.folder / name).read_bytes(), name


def test_a_run_in_bfloat16_on_a_cpu_without(
    tiny_cohort: SimulatedCohort, tmp_path: Path, processor: Processor, lower: Run
) -> None:
    """Its models are used in float32; its training goes on in float32 unless bfloat16 was asked for by name."""
    processor("")
    predict_run(lower, tiny_cohort.features, tmp_path / "there.csv")
    processor("AMX")
    predict_run(lower, tiny_cohort.features, tmp_path / "here.csv")
    there, here = (pd.read_csv(tmp_path / name)["prob_1"] for name in ("there.csv", "here.csv"))
    assert 0 < np.abs(there - here).max() < 0.02
    with pytest.raises(KeyboardInterrupt):
        train(tiny_cohort, tmp_path / "run", "train.amp=true", reporter=Notes(stops=True))
    processor("")
    with pytest.raises(InputError, match=r"^train.amp: expected .* got a CPU without 16-bit products"):
        train(tiny_cohort, tmp_path / "run", "train.amp=true", resume=True)
    notes = Notes()
    assert train(tiny_cohort, tmp_path / "run", resume=True, reporter=notes).info.precision == "float32"
    assert [note for note in notes.notes if note.endswith("going on in float32")]
    finished = tmp_path / "finished"
    shutil.copytree(lower.folder, finished)
    assert train(tiny_cohort, finished, resume=True).info.precision == "bfloat16", "nothing was trained"


def test_another_precision_is_not_gone_on_with(
    tiny_cohort: SimulatedCohort, tmp_path: Path, processor: Processor, single: Run
) -> None:
    processor("AMX")
    shutil.copytree(single.folder, tmp_path / "run")
    with pytest.raises(InputError, match=r"expected the configuration of its config.toml, got 'amp = true'"):
        train(tiny_cohort, tmp_path / "run", "train.amp=true", resume=True)
    assert train(tiny_cohort, tmp_path / "run", resume=True, folds=[1]).info.precision == "float32"


@pytest.mark.parametrize("name", ["AMX", ""])
def test_a_run_whose_true_meant_gpus_alone(
    tiny_cohort: SimulatedCohort, tmp_path: Path, processor: Processor, single: Run, name: str
) -> None:
    """Such runs hold `amp = true`, by a default, and no precision; on a CPU they were trained in float32."""
    out = tmp_path / "run"
    shutil.copytree(single.folder, out)
    info = json.loads((out / "run.json").read_text())
    del info["precision"]
    (out / "run.json").write_text(json.dumps(info))
    (out / "config.toml").write_text((out / "config.toml").read_text().replace("amp = false", "amp = true"))
    processor(name)
    old = Run(out)
    assert not old.amp(CPU)
    assert old.amp(torch.device("cuda"))
    for run, file in ((single, "single.csv"), (old, "old.csv")):
        predict_run(run, tiny_cohort.features, tmp_path / file)
    assert (tmp_path / "old.csv").read_bytes() == (tmp_path / "single.csv").read_bytes()
    evaluate_external(old, tiny_cohort.features, tiny_cohort.labels)
    for settings in ([], ["train.amp=true"]):  # as it was begun, with the default of then left out or written down
        shutil.rmtree(out / "fold_0")
        run = train(tiny_cohort, out, *settings, resume=True)
        assert run.info.precision == "float32"
        model = "fold_0/model.safetensors"
        assert (run.folder / model).read_bytes() == (single.folder / model).read_bytes()


# -- what is computed in it ------------------------------------------------------------------------------------------


class Conversions(TorchDispatchMode):
    """Notes from what to what tensors as large as the features are converted."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.seen = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        both = isinstance(out, torch.Tensor) and isinstance(first, torch.Tensor)
        if both and out.shape == first.shape == self.shape and out.dtype != first.dtype:
            self.seen.append((first.dtype, out.dtype))
        return out


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("encoder", ["mlp", "identity"])
@pytest.mark.parametrize("pooling", ["memory", "gated", "both"])
def test_features_are_cast_once(stored: torch.dtype, encoder: str, pooling: str) -> None:
    model = MoMKD(24, encoder=encoder, pooling=pooling, hidden_features=16, gate_features=16, slots=2)
    torch.nn.init.normal_(model.memory.memory)
    bags = Bags.from_lengths(torch.randn(50, 24).to(stored), [20, 30])
    with autocast(CPU, True), Conversions(bags.features.shape) as conversions:
        sum(model.training_step(bags, torch.tensor([0, 1])).losses.values()).backward()
    assert conversions.seen == [(stored, torch.bfloat16)]


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_batches_are_joined_in_bfloat16(stored: torch.dtype) -> None:
    features = {f"s{n}": torch.randn(n * 100, 8).to(stored) for n in (1, 0, 7)}
    sizes = {slide: len(x) for slide, x in features.items()}
    loader = BagLoader(list(features), np.zeros(3, np.int64), sizes, features.__getitem__, dtype=torch.bfloat16)
    (batch,) = loader.batches(loader.once())
    assert batch.bags.lengths == (100, 0, 700)
    assert torch.equal(batch.bags.features, torch.cat(list(features.values())).to(torch.bfloat16))


@pytest.mark.parametrize("make", [MoMKD, ABMIL])
def test_logits_are_float32(make: type[MoMKD] | type[ABMIL]) -> None:
    """In bfloat16 the probabilities of many slides would be ties."""
    model = make(24, encoder="mlp", hidden_features=16).eval()
    bags = Bags.from_lengths(torch.randn(64, 24), [1] * 64)
    with autocast(CPU, True), torch.no_grad():
        logits = model(bags).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())

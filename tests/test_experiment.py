"""The whole way from files: train, evaluate, predict; and everything that can be wrong with the input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from momkd import cli, evaluate, experiment, inference
from momkd.config import Config
from momkd.data import prefetch
from momkd.data.cohort import Cohort
from momkd.data.omics import read_omics
from momkd.data.prefetch import DeviceCache
from momkd.errors import InputError
from momkd.evaluate import evaluate_external, evaluate_run
from momkd.experiment import Reporter, train_run
from momkd.models import MoMKD
from momkd.predict import predict_run, threshold_of
from momkd.runs import Run, load_weights
from momkd.simulate import SimulatedCohort
from momkd.train import Progress
from tests.data.fake_streams import install

QUICK = [
    "train.epochs=2",
    "model.hidden_features=16",
    "model.projection_features=8",
    "memory.slots=4",
    "omics.genes=20",
]


COLUMNS = ["slide_id", "case_id", "label", "fold", "part", "prob_0", "prob_1", "predicted"]


def config(preset: str = "fast", *settings: str) -> Config:
    return Config.preset(preset).with_settings([*QUICK, *settings])


def train(cohort: SimulatedCohort, out: Path, preset: str = "fast", *settings: str, **options: object) -> Run:
    given = {"features": cohort.features, "labels": cohort.labels, "splits": cohort.splits, "omics": cohort.omics}
    paths = {**given, **{name: options.pop(name) for name in list(options) if name in given}}
    return train_run(out=out, config=config(preset, *settings), **paths, **options)


@pytest.fixture(scope="module")
def trained(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny_cohort, tmp_path_factory.mktemp("runs") / "momkd")


# -- what comes out --------------------------------------------------------------------------------------------------


def test_a_run_holds_what_its_docstring_says(trained: Run, tiny_cohort: SimulatedCohort) -> None:
    files = {str(p.relative_to(trained.folder)) for p in trained.folder.rglob("*") if p.is_file()}
    fold = {"model.safetensors", "genomics.safetensors", "genes.json", "log.csv", "predictions.csv"}
    top = {"config.toml", "run.json", "predictions.csv", "metrics.json", "roc.png", "training.png"}
    assert files == top | {f"fold_{k}/{name}" for k in (0, 1) for name in fold}
    table = pd.read_csv(trained.folder / "predictions.csv")
    assert list(table.columns) == COLUMNS
    labels = pd.read_csv(tiny_cohort.labels)
    tested = table[table["part"] == "test"]
    assert sorted(tested["slide_id"]) == sorted(labels["slide_id"])  # each slide once
    metrics = json.loads((trained.folder / "metrics.json").read_text())
    assert set(metrics["test"]["auc"]) == {"estimate", "low", "high"}
    assert [fold["fold"] for fold in metrics["folds"]] == [0, 1]


def test_genes_are_chosen_and_scaled_inside_the_training_part(
    own_cohort: SimulatedCohort, tmp_path: Path, trained: Run
) -> None:
    """Other expression of test cases changes nothing in the fold."""
    split = pd.read_csv(own_cohort.splits / "splits_0.csv")
    labels = pd.read_csv(own_cohort.labels).set_index("slide_id")
    held_out = labels.loc[pd.concat([split["val"], split["test"]]).dropna(), "case_id"]
    omics = pd.read_csv(own_cohort.omics)
    omics.loc[omics["case_id"].isin(held_out), omics.columns[1:]] *= 50
    omics.to_csv(own_cohort.omics, index=False)
    run = train(own_cohort, tmp_path / "run", folds=[0])
    for name in ("genes.json", "model.safetensors", "genomics.safetensors"):
        assert (run.fold(0) / name).read_bytes() == (trained.fold(0) / name).read_bytes(), name


def test_predicting_needs_no_genomics(trained: Run, tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    """Its files may be gone, and what is loaded has no tower."""
    copy = tmp_path / "run"
    shutil.copytree(trained.folder, copy, ignore=shutil.ignore_patterns("genomics.safetensors", "genes.json"))
    features = tiny_cohort.external.features
    _, skipped = predict_run(Run(copy), features, tmp_path / "out.csv", attention=tmp_path / "attention")
    assert not skipped
    model = Run(copy).load_model(0)
    assert isinstance(model, MoMKD)
    assert model.genomics is None
    assert not model.training

    written = pd.read_csv(tmp_path / "out.csv")
    assert list(written.columns) == COLUMNS
    assert sorted(written["slide_id"]) == sorted(p.stem for p in features.glob("*.h5"))
    np.testing.assert_allclose(written["prob_0"] + written["prob_1"], 1, atol=1e-9)
    for slide in written["slide_id"]:
        with h5py.File(tmp_path / "attention" / f"{slide}.h5") as file, h5py.File(features / f"{slide}.h5") as given:
            n = len(given["features"])
            assert file["attention"].shape == (n, 1)
            assert file["attention"][:].sum() == pytest.approx(1, abs=1e-4)
            assert file["slots"].shape == (2, n, 2)
            assert (file["slots"][:] < 4).all()
            np.testing.assert_array_equal(file["coords"][:], given["coords"][:])
            assert file["coords"].attrs["patch_size_level0"] == given["coords"].attrs["patch_size_level0"]


def test_predictions_are_the_mean_of_the_folds(trained: Run, tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    features = tiny_cohort.external.features
    both, *single = (
        predict_run(trained, features, tmp_path / "o.csv", folds=folds)[0].set_index("slide_id")["prob_1"]
        for folds in (None, [0], [1])
    )
    np.testing.assert_allclose(both, (single[0] + single[1]) / 2, atol=1e-12)
    with pytest.raises(InputError, match="fold: expected one of 0, 1, got 7"):
        predict_run(trained, features, tmp_path / "o.csv", folds=[7])


def test_predictions_are_those_of_the_saved_model(trained: Run, tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    again, _ = predict_run(trained, tiny_cohort.features, tmp_path / "o.csv", folds=[1])
    written = pd.read_csv(trained.folder / "predictions.csv")
    written = written[(written["fold"] == 1) & (written["part"] == "test")].set_index("slide_id")["prob_1"]
    np.testing.assert_allclose(again.set_index("slide_id").loc[written.index, "prob_1"], written, atol=1e-6)


def test_an_external_cohort_is_scored_beside(trained: Run, tiny_cohort: SimulatedCohort) -> None:
    assert tiny_cohort.external is not None
    assert not evaluate_external(trained, tiny_cohort.external.features, tiny_cohort.external.labels)
    metrics = evaluate_run(trained)
    assert {"test", "external", "external_ensemble"} <= set(metrics)
    (trained.folder / "predictions_external.csv").unlink()
    assert "external" not in evaluate_run(trained)


@pytest.mark.parametrize("preset", ["abmil", "omics"])
def test_other_presets(tiny_cohort: SimulatedCohort, tmp_path: Path, preset: str) -> None:
    features = None if preset == "omics" else tiny_cohort.features
    run = train(tiny_cohort, tmp_path / "run", preset, features=features)
    assert not (run.fold(0) / "genomics.safetensors").exists()
    if preset == "omics":
        missing = set(pd.read_csv(tiny_cohort.labels)["case_id"]) - set(read_omics(tiny_cohort.omics).table.index)
        assert not set(pd.read_csv(run.folder / "predictions.csv")["case_id"]) & missing
        with pytest.raises(InputError, match="expected a model of slides, got genomics alone"):
            predict_run(run, tiny_cohort.features, tmp_path / "o.csv")
    else:
        predict_run(run, tiny_cohort.features, tmp_path / "o.csv", attention=tmp_path / "a")
        with h5py.File(next((tmp_path / "a").iterdir())) as file:
            assert "slots" not in file


def test_more_than_two_classes(own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    labels = pd.read_csv(own_cohort.labels)
    labels["label"] = [f"type {'abc'[i % 3]}" for i in pd.factorize(labels["case_id"])[0]]
    labels.to_csv(own_cohort.labels, index=False)
    run = train(own_cohort, tmp_path / "run", folds=[0])
    assert run.info.classes == ["type a", "type b", "type c"]
    table, _ = predict_run(run, own_cohort.features, tmp_path / "o.csv")
    assert set(table["predicted"]) <= set(run.info.classes)


# -- going on --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_the_same(tiny_cohort: SimulatedCohort, tmp_path: Path, trained: Run) -> None:
    class Stop(Reporter):
        def progress(self, progress: Progress) -> None:
            if self.fold == 1 and progress.epoch == 1:
                raise KeyboardInterrupt

        def fold_begins(self, fold: int, folds: int, slides: dict[str, int]) -> None:
            self.fold = fold

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_cohort, out, reporter=Stop())
    assert (out / "fold_1" / "state.pt").is_file()
    with pytest.raises(InputError, match=r"expected predictions.csv, got none; training has not ended"):
        evaluate_run(Run(out))
    with pytest.raises(
        InputError, match="expected a new folder, got a run; go on with --resume or choose another --out"
    ):
        train(tiny_cohort, out)
    with pytest.raises(InputError, match=r"expected the configuration of its config.toml, got 'slots = 5'"):
        train(tiny_cohort, out, "fast", "memory.slots=5", resume=True)
    run = train(tiny_cohort, out, resume=True)
    for name in ("predictions.csv", "fold_1/model.safetensors", "metrics.json"):
        assert (run.folder / name).read_bytes() == (trained.folder / name).read_bytes(), name
    assert not list(out.rglob("state.pt"))


def swap_slides(cohort: SimulatedCohort) -> None:
    one, two = sorted(cohort.features.iterdir())[:2]
    one.rename(cohort.features / "other")
    two.rename(one)
    (cohort.features / "other").rename(two)


def swap_test_slides(cohort: SimulatedCohort) -> None:
    one, two = (cohort.splits / f"splits_{fold}.csv" for fold in (0, 1))
    two.write_text(one.read_text())


def change_features(cohort: SimulatedCohort) -> None:
    with h5py.File(sorted(cohort.features.iterdir())[-1], "r+") as file:
        file["features"][3, 5] += 1


def change_expression(cohort: SimulatedCohort) -> None:
    table = pd.read_csv(cohort.omics)
    table.iloc[3, 5] += 1
    table.to_csv(cohort.omics, index=False)


def change_label(cohort: SimulatedCohort) -> None:
    table = pd.read_csv(cohort.labels)
    table.loc[3, "label"] = 1 - table.loc[3, "label"]
    table.to_csv(cohort.labels, index=False)


CHANGES = {
    swap_slides: "features",
    change_features: "features",
    change_label: "labels",
    swap_test_slides: "splits",
    change_expression: "omics",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_only_with_what_it_began_with(
    trained: Run, own_cohort: SimulatedCohort, tmp_path: Path, change: Callable[[SimulatedCohort], None]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained.folder, out)
    change(own_cohort)
    with pytest.raises(InputError) as caught:
        train(own_cohort, out, resume=True)
    assert f"{out}: expected the {CHANGES[change]} that it began with, got others ({CHANGES[change]} " in str(
        caught.value
    )
    assert contents(out) == contents(trained.folder)
    for fold in (0, 1):
        shutil.rmtree(out / f"fold_{fold}")  # nothing has been learned from them yet
    with pytest.raises(StopIteration):
        train(own_cohort, out, resume=True, reporter=StopsAtOnce())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class StopsAtOnce(Reporter):
    def fold_begins(self, fold: int, folds: int, slides: dict[str, int]) -> None:
        raise StopIteration


def test_other_folds_are_added_to_a_run_from_files_that_have_moved(
    trained: Run, own_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    """Finished folds stay; one that was begun and neither finished nor asked for is not of the run."""
    out, table = tmp_path / "run", own_cohort.labels
    shutil.copytree(trained.folder, out)
    shutil.rmtree(out / "fold_0")
    pd.read_csv(table, dtype=str)[::-1].to_csv(table, index=False)  # the same content, written otherwise
    run = train(own_cohort, out, folds=[0], resume=True)
    assert run.info.folds == [0, 1]
    assert run.info.data["features"] == str(own_cohort.features)
    for name in ("predictions.csv", "metrics.json", "fold_0/model.safetensors"):
        assert (out / name).read_bytes() == (trained.folder / name).read_bytes(), name
    (out / "fold_0" / "predictions.csv").unlink()
    run = train(own_cohort, out, folds=[1], resume=True)
    assert run.info.folds == [1]
    assert set(pd.read_csv(out / "predictions.csv")["fold"]) == {1}


def test_a_run_of_before_digests_were_kept_goes_on(trained: Run, own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained.folder, out)
    values = json.loads((out / "run.json").read_text())
    del values["digests"]
    (out / "run.json").write_text(json.dumps(values))
    assert train(own_cohort, out, resume=True).info.digests == trained.info.digests


def test_features_kept_on_a_device_serve_all_folds_and_change_nothing(
    tiny_cohort: SimulatedCohort, tmp_path: Path, trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, reads, read = install(monkeypatch), [], Cohort.read
    monkeypatch.setattr(Cohort, "read", lambda cohort, slide: reads.append(slide) or read(cohort, slide))
    for module in (experiment, evaluate):
        monkeypatch.setattr(module, "device_cache", lambda options, device: DeviceCache(device, 10**9))
    run = train(tiny_cohort, tmp_path / "run", "fast", "train.cache_gb=0")
    assert (run.folder / "predictions.csv").read_bytes() == (trained.folder / "predictions.csv").read_bytes()
    for fold in (0, 1):
        for name in ("model.safetensors", "genomics.safetensors"):
            assert (run.fold(fold) / name).read_bytes() == (trained.fold(fold) / name).read_bytes()
    assert sorted(reads) == sorted(pd.read_csv(tiny_cohort.labels)["slide_id"]), "each slide once, for both folds"
    reads.clear()
    assert tiny_cohort.external is not None
    evaluate_external(run, tiny_cohort.external.features, tiny_cohort.external.labels)
    assert len(reads) == len(set(reads)) == 10
    assert fake.of("copy")


def test_predictions_through_streams_are_the_same(
    tiny_cohort: SimulatedCohort, tmp_path: Path, trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = predict_run(trained, tiny_cohort.features, tmp_path / "plain.csv", attention=tmp_path / "plain")
    fake = install(monkeypatch)
    copied, _ = predict_run(trained, tiny_cohort.features, tmp_path / "copied.csv", attention=tmp_path / "copied")
    assert fake.of("copy")
    pd.testing.assert_frame_equal(plain, copied, check_exact=True)
    for path in (tmp_path / "plain").iterdir():
        with h5py.File(path) as one, h5py.File(tmp_path / "copied" / path.name) as other:
            assert np.array_equal(one["attention"][:], other["attention"][:])


def test_features_are_kept_only_on_a_gpu_and_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    options = config("fast", "train.device_cache_gb=1.5").train
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(prefetch, "_transfer", prefetch.Transfer)
    cache = inference.device_cache(options, gpu)
    assert cache is not None
    assert (cache.device, cache.limit) == (gpu, 1_500_000_000)
    assert inference.device_cache(options, torch.device("cpu")) is None
    assert inference.device_cache(config().train, gpu) is None


@pytest.mark.parametrize("harm", ["rows", "fold", "other"])
def test_a_part_of_the_predictions_is_not_scored(trained: Run, tmp_path: Path, harm: str) -> None:
    shutil.copytree(trained.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    path = run.folder / "predictions.csv"
    table = pd.read_csv(path, dtype=str)
    if harm == "rows":
        table.iloc[:-2].to_csv(path, index=False)
        told = r"predictions\.csv: expected the \d+ rows of .*fold_1.predictions\.csv, got others"
    elif harm == "fold":
        table[table["fold"] == "1"].to_csv(path, index=False)
        told = r"predictions\.csv: expected predictions of fold 0 as run\.json says, got none"
    else:
        table["prob_0"], table["prob_1"] = table["prob_1"], table["prob_0"]
        table.to_csv(path, index=False)
        told = "got others"
    for used in (lambda: evaluate_run(run, bootstrap=0), lambda: threshold_of(run, [0], patients="mean")):
        with pytest.raises(InputError, match=told):
            used()
    shutil.rmtree(run.folder / "fold_0")
    shutil.rmtree(run.folder / "fold_1")
    pd.read_csv(trained.folder / "predictions.csv", dtype=str).iloc[::-1].to_csv(path, index=False)
    assert evaluate_run(run, bootstrap=10)["test"]  # of a run that was copied without its folds


def test_a_folder_with_other_files_is_refused(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new folder, got one with other files"):
        train(tiny_cohort, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_of_another_configuration_or_a_damaged_one(trained: Run, tmp_path: Path) -> None:
    path = trained.fold(0) / "model.safetensors"
    with pytest.raises(InputError, match=r"memory.memory: expected \(2, 9, 8\), got \(2, 4, 8\); .*config.toml"):
        load_weights(MoMKD(16, hidden_features=16, projection_features=8, slots=9), path)
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="expected a safetensors checkpoint, got a file that does not read"):
        load_weights(MoMKD(16), broken)
    with pytest.raises(InputError, match="expected a checkpoint, got nothing there"):
        load_weights(MoMKD(16), tmp_path / "none.safetensors")
    for folder, message in ((tmp_path, "got a folder without config.toml"), (tmp_path / "none", "got nothing there")):
        with pytest.raises(InputError, match=f"expected the folder of a run, {message}"):
            Run(folder)


@pytest.fixture(scope="module")
def adaptive(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose best epoch holds fewer slots than its configuration names."""
    settings = ["train.epochs=4", "memory.slots=20", "memory.adaptive=true", "memory.warmup=0"]
    return train(tiny_cohort, tmp_path_factory.mktemp("runs") / "adaptive", "fast", *settings, folds=[0])


def test_a_run_of_an_adaptive_memory_is_read_with_its_own_slots(
    adaptive: Run, tiny_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    log = pd.read_csv(adaptive.fold(0) / "log.csv")
    best = log.sort_values(["val_auc", "val_loss"], ascending=[False, True])["epoch"].iloc[0]
    model = Run(adaptive.folder).load_model(0)
    assert model.memory.slots == log["slots"].iloc[best]
    assert log["slots"].iloc[0] == 20
    assert (adaptive.fold(0) / "genomics.safetensors").is_file()
    external = tiny_cohort.external
    table, skipped = predict_run(adaptive, external.features, tmp_path / "p.csv", attention=tmp_path / "a")
    assert not skipped
    assert table.filter(like="prob_").notna().all(axis=None)
    with h5py.File(next((tmp_path / "a").glob("*.h5"))) as file:
        assert 0 <= file["slots"][:].min() <= file["slots"][:].max() < model.memory.slots
    assert evaluate_external(adaptive, external.features, external.labels) == {}


@pytest.mark.parametrize("slots", [3, 31, 256])
def test_other_slots_than_configured_are_read_only_where_the_memory_is_adaptive(
    adaptive: Run, trained: Run, slots: int, tmp_path: Path
) -> None:
    for run in (adaptive, trained):
        copy = tmp_path / run.folder.name
        shutil.copytree(run.folder, copy)
        path = copy / "fold_0" / "model.safetensors"
        state = load_file(path)
        memory = torch.nn.functional.normalize(torch.randn(2, slots, 8), dim=-1)
        save_file({**state, "memory.memory": memory, "memory.usage": memory.norm(dim=2)}, path)
        if run is adaptive:
            assert torch.equal(Run(copy).load_model(0).memory.memory, memory)
        else:
            with pytest.raises(InputError, match=rf"memory.memory: expected \(2, 4, 8\), got \(2, {slots}, 8\)"):
                Run(copy).load_model(0)


@pytest.mark.parametrize("shape", [(2, 257, 8), (2, 0, 8), (3, 20, 8), (2, 20, 9), (2, 20)])
def test_a_memory_that_no_adaptive_run_comes_to(adaptive: Run, shape: tuple[int, ...], tmp_path: Path) -> None:
    shutil.copytree(adaptive.folder, tmp_path / "run")
    path = tmp_path / "run" / "fold_0" / "model.safetensors"
    state = load_file(path)
    save_file({**state, "memory.memory": torch.ones(shape), "memory.usage": torch.ones(shape[:2])}, path)
    with pytest.raises(InputError, match=rf"memory.memory: expected \(2, 20, 8\), got {re.escape(str(shape))}; "):
        Run(tmp_path / "run").load_model(0)
    save_file({**state, "memory.memory": torch.ones(2, 9, 8), "memory.usage": torch.ones(2, 20)}, path)
    with pytest.raises(InputError, match=r"memory.usage: expected \(2, 9\), got \(2, 20\); "):
        Run(tmp_path / "run").load_model(0)


# -- bad input, by the command line ----------------------------------------------------------------------------------


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def momkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command, in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["momkd", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capsys.readouterr())

    return run


def edit(path: Path, **columns: object) -> pd.DataFrame:
    table = pd.read_csv(path, dtype=str)
    for name, values in columns.items():
        table.loc[0, name] = values
    table.to_csv(path, index=False)
    return table


def first_train_slide(cohort: SimulatedCohort) -> str:
    return str(pd.read_csv(cohort.splits / "splits_0.csv")["train"].iloc[0])


def break_features(cohort: SimulatedCohort, kind: str) -> None:
    path = cohort.features / f"{first_train_slide(cohort)}.h5"
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:900])
    else:
        with h5py.File(path, "r+") as file:
            x = file["features"][:]
            if kind == "no dataset":
                del file["features"]
            elif kind == "nan":
                file["features"][1, 2] = np.nan
            elif kind in ("wide", "empty"):
                del file["features"], file["coords"]
                file["features"] = np.zeros((3, 17), x.dtype) if kind == "wide" else x[:0]


FEATURES = {
    "missing": "expected a feature file of slide",
    "truncated": "expected a whole HDF5 file, got 900 bytes that do not read",
    "no dataset": "got coordinates of patches alone; give the folder of the features",
    "nan": "features: expected finite values, got 1 NaN or infinite, the first in row 1",
    "wide": "features: expected width 16, got 17; all slides need features of one encoder",
    "empty": "expected patches, got none (an empty slide)",
}


@pytest.mark.parametrize("kind", FEATURES)
def test_bad_features_end_in_one_line_or_are_skipped(own_cohort: SimulatedCohort, tmp_path: Path, kind: str) -> None:
    break_features(own_cohort, kind)
    out = tmp_path / "run"
    with pytest.raises(InputError) as caught:
        train(own_cohort, out, folds=[0])
    assert FEATURES[kind] in str(caught.value)
    assert "\n" not in str(caught.value)
    told: list[str] = []

    class Listen(Reporter):
        def note(self, text: str) -> None:
            told.append(text)

    run = train(own_cohort, tmp_path / "again", folds=[0], skip_bad=True, reporter=Listen())
    assert any(FEATURES[kind] in text and text.startswith("skipped ") for text in told)
    assert first_train_slide(own_cohort) in run.info.skipped


def command(cohort: SimulatedCohort, out: Path) -> list[object]:
    paths = ["--features", cohort.features, "--labels", cohort.labels, "--omics", cohort.omics]
    return ["train", *paths, "--splits", cohort.splits, "--out", out, *(w for s in QUICK for w in ("--set", s))]


def break_tables(cohort: SimulatedCohort, kind: str) -> None:
    if kind == "duplicated slide":
        table = pd.read_csv(cohort.labels, dtype=str)
        pd.concat([table, table[:1]]).to_csv(cohort.labels, index=False)
    elif kind == "slide in two splits":
        split = pd.read_csv(cohort.splits / "splits_0.csv", dtype=str)
        split.loc[0, "test"] = split.loc[0, "train"]
        split.to_csv(cohort.splits / "splits_0.csv", index=False)
    elif kind == "case in two splits":
        split = pd.read_csv(cohort.splits / "splits_0.csv", dtype=str)
        table = pd.read_csv(cohort.labels, dtype=str).set_index("slide_id")
        table.loc[split["test"].iloc[0], "case_id"] = table.loc[split["train"].iloc[0], "case_id"]
        table.to_csv(cohort.labels)
    elif kind == "ids that do not meet":
        omics = pd.read_csv(cohort.omics)
        omics["case_id"] = [f"TCGA-{i}" for i in range(len(omics))]
        omics.to_csv(cohort.omics, index=False)
    elif kind == "gene of text":
        edit(cohort.omics, **{pd.read_csv(cohort.omics, nrows=1).columns[3]: "high"})
    elif kind == "no labels":
        cohort.labels.unlink()
    elif kind == "no splits":
        for path in cohort.splits.iterdir():
            path.unlink()


TABLES = {
    "duplicated slide": "expected each slide once, got",
    "slide in two splits": "in train and test; remove one",
    "case in two splits": "expected each case in one part, got",
    "ids that do not meet": "got none: they are named like 'TCGA-0' here and 'sim",
    "gene of text": "'high'",
    "no labels": "expected a CSV table, got nothing there",
    "no splits": "expected splits_0.csv, got no such file; make it with momkd splits",
}


@pytest.mark.parametrize("kind", TABLES)
def test_bad_tables_end_in_one_line(own_cohort: SimulatedCohort, tmp_path: Path, kind: str) -> None:
    break_tables(own_cohort, kind)
    with pytest.raises(InputError) as caught:
        train(own_cohort, tmp_path / "run")
    assert TABLES[kind] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_line_from_end_to_end(
    momkd: Callable[..., Done], own_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = momkd(*command(own_cohort, out), "--fold", 0)
    assert done.returncode == 0, done.stderr
    assert "fold 0: 2 epochs on" in done.stdout
    assert "AUC" in done.stdout
    done = momkd("predict", out, "--features", own_cohort.features, "--out", tmp_path / "p.csv")
    assert done.returncode == 0, done.stderr
    assert f"{len(pd.read_csv(tmp_path / 'p.csv'))} slides predicted" in done.stdout
    done = momkd("evaluate", out, "--bootstrap", 20)
    assert done.returncode == 0, done.stderr
    done = momkd("splits", own_cohort.labels, "--out", tmp_path / "s", "--folds", 3)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "s").glob("splits_*.csv"))) == 3


def test_the_command_line_says_one_line_and_exits_with_2(
    momkd: Callable[..., Done], own_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    break_features(own_cohort, "truncated")
    out = tmp_path / "run"
    done = momkd(*command(own_cohort, out))
    assert done.returncode == 2
    assert done.stderr.startswith("momkd: error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert not out.exists()
    for arguments, message in (
        (["train", "--labels", own_cohort.labels], "--splits"),
        (["evaluate", tmp_path / "none"], "expected the folder of a run, got nothing there"),
        ([*command(own_cohort, out), "--set", "memory.slot=3"], "did you mean 'memory.slots'?"),
        (
            [*command(own_cohort, out), "--preset", "poster"],
            "preset: expected one of paper, fast, abmil, omics, got 'poster'",
        ),
        (["simulate", tmp_path / "sim", "--visibility", "3"], "visibility: expected a number from 0 to 1"),
    ):
        done = momkd(*arguments)
        assert done.returncode == 2, arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_nothing_half_written(own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    """Files are limited to 20 kB, as a full disk would: the first checkpoint does not fit."""
    out = tmp_path / "run"
    program = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    program += "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from momkd.cli import main; main()"
    line = [sys.executable, "-c", program, *map(str, command(own_cohort, out)), "--fold", "0"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot write it: File too large; raise the file size limit" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in out.rglob("*") if p.suffix in (".safetensors", ".tmp") or p.name == "state.pt"]


def test_help_of_every_command() -> None:
    assert CliRunner().invoke(cli.app, ["--help"]).exit_code == 0
    for name in ("train", "evaluate", "predict", "splits", "demo", "doctor"):
        done = CliRunner().invoke(cli.app, [name, "--help"])
        assert done.exit_code == 0, name
        assert "Traceback" not in done.output
    assert torch.is_grad_enabled()

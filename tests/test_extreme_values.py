"""Slides whose values are finite but too large, through training, evaluation, prediction and explanation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from momkd import cli, experiment
from momkd.config import Config
from momkd.errors import InputError
from momkd.evaluate import evaluate_external
from momkd.experiment import train_run
from momkd.explain import Options, explain_run
from momkd.predict import predict_run
from momkd.runs import Run
from momkd.simulate import SimulatedCohort

TOO_LARGE = r"slide '{}': expected finite results, got NaN or infinity of features up to 3e\+38; extract its features"


def run_of(cohort: SimulatedCohort, out: Path, **options: object) -> Run:
    settings = ["train.epochs=1", "model.hidden_features=8", "model.projection_features=4", "memory.slots=2"]
    config = Config.preset("abmil").with_settings(settings)
    return train_run(cohort.features, cohort.labels, cohort.splits, out, config=config, folds=[0], **options)


def slides(cohort: SimulatedCohort, part: str) -> list[str]:
    return pd.read_csv(cohort.splits / "splits_0.csv", dtype=str)[part].dropna().tolist()


def spoil(folder: Path, slide: str, value: float = 3e38) -> None:
    with h5py.File(folder / f"{slide}.h5", "r+") as file:
        x = file["features"][:].astype(np.float32)
        x[0] = value * (-1.0) ** np.arange(x.shape[1])  # a hidden unit may ignore values of one sign
        del file["features"]
        file["features"] = x


@pytest.fixture(autouse=True, scope="module")
def _no_intervals() -> Iterator[None]:
    """Scores and their plot are not looked at here, and take most of the time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experiment, "evaluate_run", lambda run: None)
        yield


@pytest.mark.parametrize("part", ["val", "test"])
def test_in_validation_or_test_the_slide_is_named_and_the_fold_is_not_finished(
    own_cohort: SimulatedCohort, tmp_path: Path, part: str
) -> None:
    bad = slides(own_cohort, part)[0]
    spoil(own_cohort.features, bad)
    with pytest.raises(InputError, match=TOO_LARGE.format(bad)) as caught:
        run_of(own_cohort, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not Run(tmp_path / "run").finished(0)
    run = run_of(own_cohort, tmp_path / "run", resume=True, skip_bad=True)
    table = pd.read_csv(run.folder / "predictions.csv", dtype=str)
    assert bad not in set(table["slide_id"])
    assert len(table) == len(slides(own_cohort, "val")) + len(slides(own_cohort, "test")) - 1
    assert run.info.skipped[bad].endswith("extract its features again")


def test_in_training_the_slide_is_named(own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    """Every training slide, so that it is drawn; the one with the largest values is named."""
    for slide in slides(own_cohort, "train"):
        spoil(own_cohort.features, slide, 1e37)
    bad = slides(own_cohort, "train")[1]
    spoil(own_cohort.features, bad)
    others = len(slides(own_cohort, "train")) - 1
    told = (
        rf"expected finite losses, got classification_loss nan.* in epoch 0; slide '{bad}' has features up to 3e\+38, "
        rf"and {others} others above 10,000: extract them again or take such slides out of the splits"
    )
    for options, end in (({}, "$"), ({"skip_bad": True, "resume": True}, "; --skip-bad leaves out no slide that .*g$")):
        with pytest.raises(InputError, match=told + end) as caught:
            run_of(own_cohort, tmp_path / "run", **options)
        assert "{" not in str(caught.value)


def test_all_test_slides_bad_is_one_line(own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    for slide in slides(own_cohort, "test"):
        (own_cohort.features / f"{slide}.h5").write_bytes(b"none")
    first = slides(own_cohort, "test")[0]
    with pytest.raises(InputError, match=rf"splits_0.csv: test: expected slides .* got none of \d+; slide '{first}'"):
        run_of(own_cohort, tmp_path / "run", skip_bad=True)
    assert not Run(tmp_path / "run").finished(0)


@pytest.fixture(scope="module")
def trained(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_of(tiny_cohort, tmp_path_factory.mktemp("runs") / "run")


def test_other_cohorts(
    trained: Run, own_cohort: SimulatedCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.folder, tmp_path / "run")
    run, external = Run(tmp_path / "run"), own_cohort
    every = sorted(path.stem for path in external.features.glob("*.h5"))
    bad = every[0]
    spoil(external.features, bad)
    given = (run, external.features)
    for use in (
        lambda **o: evaluate_external(*given, external.labels, **o),
        lambda **o: predict_run(*given, tmp_path / "p.csv", attention=tmp_path / "a", **o),
        lambda **o: explain_run(*given, tmp_path / "x", options=Options(limit=1), **o),
    ):
        with pytest.raises(InputError, match=TOO_LARGE.format(bad)):
            use()
    assert not (run.folder / "predictions_external.csv").exists()
    assert not (tmp_path / "p.csv").exists()
    assert set(evaluate_external(*given, external.labels, skip_bad=True)) == {bad}
    table, skipped = predict_run(*given, tmp_path / "p.csv", attention=tmp_path / "a", skip_bad=True)
    assert set(skipped) == {bad}
    assert len(table) == len(every) - 1
    assert not (tmp_path / "a" / f"{bad}.h5").exists()
    assert set(explain_run(*given, tmp_path / "x", options=Options(limit=1), skip_bad=True).skipped) == {bad}

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(type(run.load_model(0)), "forward", full)
        patched.setattr(type(run.load_model(0)), "training_step", full)
        named = r"slides? .*expected memory of cpu to {} \d+ patches, got none left; lower"
        with pytest.raises(InputError, match=named.format("train on")):
            run_of(own_cohort, tmp_path / "again")
        with pytest.raises(InputError, match=named.format("predict")):
            evaluate_external(*given, external.labels)
        with pytest.raises(InputError, match=named.format("predict")):
            predict_run(*given, tmp_path / "p.csv")
        with pytest.raises(InputError, match=named.format("explain")):
            explain_run(*given, tmp_path / "x")

    for path in list(external.features.glob("*.h5"))[3:]:
        path.unlink()
    for path in external.features.glob("*.h5"):
        spoil(external.features, path.stem)
    for command in (
        ["predict", run.folder, "--features", external.features, "--out", tmp_path / "q.csv"],
        ["evaluate", run.folder, "--features", external.features, "--labels", external.labels],
        ["explain", run.folder, "--features", external.features, "--out", tmp_path / "y"],
    ):
        done = CliRunner().invoke(cli.app, [*map(str, command), "--skip-bad"])
        assert isinstance(done.exception, InputError), done.exception
        assert "expected finite results" in str(done.exception)
        assert "\n" not in str(done.exception)
    assert not (tmp_path / "q.csv").exists()


def test_patients_of_predictions(trained: Run, own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    run = trained
    told: list[str] = []
    plain, _ = predict_run(run, own_cohort.features, tmp_path / "p.csv", note=told.append)
    assert list(plain["case_id"]) == list(plain["slide_id"])
    assert set(plain["part"]) == {"predict"}
    assert set(plain["fold"]) == {0}
    assert plain["label"].isna().all()
    assert told == []
    cases = {"cases": own_cohort.labels, "out_patients": tmp_path / "patients.csv"}
    table, _ = predict_run(run, own_cohort.features, tmp_path / "p.csv", patients="max", **cases)
    patients = pd.read_csv(tmp_path / "patients.csv", dtype={"case_id": str}).set_index("case_id")
    assert list(patients.columns) == ["slides", "label", "fold", "part", "prob_0", "prob_1", "predicted"]
    assert (patients["slides"] > 1).any()
    most = table.groupby("case_id")["prob_1"].max()
    np.testing.assert_allclose(patients["prob_1"], most[patients.index])
    names = dict(zip(pd.read_csv(own_cohort.labels)["slide_id"], plain["slide_id"], strict=True))
    (own_cohort.labels.parent / "few.csv").write_text(f"slide_id,case_id\n{next(iter(names))},a\n")
    with pytest.raises(InputError, match=r"few.csv: expected the case_id of slide .*, got none \(\d+ of \d+ slides"):
        predict_run(run, own_cohort.features, tmp_path / "p.csv", cases=own_cohort.labels.parent / "few.csv")
    with pytest.raises(InputError, match="--case-from tcga: expected slides named like TCGA-XX-XXXX, got"):
        predict_run(run, own_cohort.features, tmp_path / "p.csv", case_from="tcga")
    for n, path in enumerate(sorted(own_cohort.features.glob("*.h5"))):
        path.rename(path.with_name(f"TCGA-AB-{n // 2:04d}-01Z-00-DX{n}.1.h5"))
    predict_run(run, own_cohort.features, tmp_path / "p.csv", note=told.append)
    assert len(told) == 1
    assert f"make {(len(plain) + 1) // 2} patients of {len(plain)} slides; --case-from tcga takes those" in told[0]
    again, _ = predict_run(run, own_cohort.features, tmp_path / "p.csv", case_from="tcga")
    assert again["case_id"][0] == "TCGA-AB-0000"
    assert again["case_id"].nunique() == (len(plain) + 1) // 2

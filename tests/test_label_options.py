"""Labels on the way through the commands: which class is positive, what is missing, which cases and ids are meant."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import pandas as pd
import pytest
import torch

from momkd import evaluate
from momkd.data import LabelOptions
from momkd.data.cohort import open_cohort
from momkd.data.pack import pack
from momkd.runs import Run
from momkd.simulate import SimulatedCohort
from momkd.study import Study, StudyCohort
from momkd.study.labels import read_task, task_options
from momkd.study.run import _make_splits
from tests.command import Done, momkd, one_line
from tests.data.conftest import refused

QUICK = ["--preset", "abmil", "--set", "train.epochs=1", "--set", "model.hidden_features=8", "--device", "cpu"]


def relabelled(cohort: SimulatedCohort, path: Path, negative: str = "neg", positive: str = "pos") -> Path:
    """The labels under other names, with two of them unknown."""
    table = pd.read_csv(cohort.labels, dtype=str)
    table["HER2"] = table.pop("label").map({"0": negative, "1": positive})
    table.loc[:1, "HER2"] = "Unknown"
    table[["slide_id", "case_id", "HER2"]].to_csv(path, index=False)
    return path


def train(cohort: SimulatedCohort, out: Path, *options: object, **paths: Path) -> Done:
    given = {"features": cohort.features, "labels": cohort.labels, "splits": cohort.splits} | paths
    words = [word for name, path in given.items() for word in (f"--{name}", path)]
    return momkd("train", *words, "--out", out, *QUICK, *options)


@pytest.fixture(scope="module", autouse=True)
def _no_plots() -> Iterator[None]:
    """They are drawn by other tests."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("plot_roc", "plot_training"):
            patched.setattr(evaluate, name, lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def her2(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Labels, and a run of one fold that was trained on them: "neg" is positive."""
    folder = tmp_path_factory.mktemp("her2")
    labels = relabelled(tiny_cohort, folder / "labels.csv")
    options = ["--positive", "neg", "--missing", "Unknown", "--fold", "0", "--fold", "0"]
    done = train(tiny_cohort, folder / "run", *options, labels=labels)
    assert done.code == 0, done.err
    assert done.out.count("fold 0: 1 epochs") == 1  # named twice, trained once
    assert "note label HER2: 7 pos, 27 neg (the positive class), 2 missing" in done.out
    return labels, folder / "run"


def test_splits_say_the_classes_and_take_every_option(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    labels = relabelled(tiny_cohort, tmp_path / "labels.csv")
    done = momkd("splits", labels, "--out", tmp_path / "s", "--folds", 2, "--missing", "Unknown")
    assert done.code == 0, done.err
    assert "label HER2: 27 neg, 7 pos (the positive class), 2 missing\n" in done.out
    done = momkd(
        "splits", labels, "--out", tmp_path / "t", "--folds", 2, "--missing", "Unknown", "--classes", "pos, neg"
    )
    assert "7 pos, 27 neg (the positive class)" in done.out
    for name in ("splits_0.csv", "splits_1.csv"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()
    done = momkd("splits", labels, "--out", tmp_path / "u", "--positive", "HER2+", "--missing", "Unknown")
    assert "--positive: expected a class that occurs, got 'HER2+'; it has 'neg', 'pos'" in one_line(done)
    assert not (tmp_path / "u").exists()
    bare = tmp_path / "bare.csv"
    bare.write_text("slide_id,er\n" + "".join(f"TCGA-A1-A{i // 2:03}-{i % 2},{i // 2 % 2}\n" for i in range(24)))
    done = momkd("splits", bare, "--out", tmp_path / "v", "--folds", 2)
    assert "barcodes make 12 patients, not 24; --case-from tcga takes those" in done.out
    assert momkd("splits", bare, "--out", tmp_path / "w", "--folds", 2, "--case-from", "tcga").code == 0
    split = pd.read_csv(tmp_path / "w" / "splits_0.csv")
    patients = [set(split[part].dropna().str[:12]) for part in ("train", "val", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 12


def test_the_run_keeps_the_order_of_the_classes(her2: tuple[Path, Path]) -> None:
    assert Run(her2[1]).info.classes == ["pos", "neg"]


def test_an_external_cohort_is_scored_on_the_label_of_the_run_alone(
    her2: tuple[Path, Path], tiny_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    external, run = tiny_cohort.external, her2[1]
    assert external is not None
    table = pd.read_csv(external.labels, dtype=str).rename(columns={"label": "EGFR"})
    other = tmp_path / "egfr.csv"
    table.assign(EGFR=table["EGFR"].map({"0": "neg", "1": "pos"})).to_csv(other, index=False)
    for command in ("evaluate", "explain"):
        words = ["--out", tmp_path / "page"] if command == "explain" else []
        done = momkd(command, run, "--features", external.features, "--labels", other, "--device", "cpu", *words)
        told = one_line(done)
        assert f"{other}: expected a column 'HER2', got" in told
        assert "'EGFR', 'site'; the run predicts 'HER2': name the column that holds it with --label" in told
    done = momkd(
        "evaluate", run, "--features", external.features, "--labels", other, "--label", "EGFR", "--bootstrap", 0
    )
    assert done.code == 0, done.err
    assert "label EGFR: " in done.out
    told = "external: scored on the column 'EGFR', while the run was trained on 'HER2'"
    assert told in done.out
    done = momkd("evaluate", run, "--bootstrap", 0)  # and whenever it is shown
    assert told in " ".join(done.out.split())
    assert told in (run / "metrics.json").read_text()
    assert "are not external" not in done.out


def test_slides_of_the_runs_own_cohort_are_told(her2: tuple[Path, Path], tiny_cohort: SimulatedCohort) -> None:
    labels, run = her2
    words = ["evaluate", run, "--features", tiny_cohort.features, "--labels", labels, "--bootstrap", 0]
    message = one_line(momkd(*words))
    assert "expected one of 'pos', 'neg', got 'Unknown'" in message
    assert "--missing Unknown" in message
    done = momkd(*words, "--missing", "Unknown")
    assert done.code == 0, done.err
    cases = pd.read_csv(labels)["case_id"].nunique()
    assert (
        f"36 of 36 slides and {cases} of {cases} cases have ids of the cohort that the run was trained on" in done.out
    )


def test_explain_asks_for_no_column_of_cases(
    her2: tuple[Path, Path], tiny_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    labels, run = her2
    table = pd.read_csv(labels, dtype=str).rename(columns={"case_id": "patient"})
    table.assign(submitter_id=table["patient"]).to_csv(tmp_path / "two.csv", index=False)
    words = ("--features", tiny_cohort.features, "--labels", tmp_path / "two.csv", "--limit", 0, "--missing", "UNKNOWN")
    done = momkd("explain", run, "--out", tmp_path / "page", *words)
    assert done.code == 0, done.err
    assert "taken as a patient" not in done.out


def test_ids_of_labels_match_files_without_their_endings(
    her2: tuple[Path, Path], tiny_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    table = pd.read_csv(her2[0], dtype=str)
    labels = tmp_path / "labels.csv"
    table.assign(slide_id=table["slide_id"] + ".svs").to_csv(labels, index=False)
    features = tiny_cohort.features
    options = ["--positive", "neg", "--missing", "Unknown", "--fold", "0"]
    done = train(tiny_cohort, tmp_path / "run", *options, labels=labels, features=features)
    assert done.code == 0, done.err
    assert f"{tiny_cohort.splits}: 36 ids such as" in done.out
    assert f"{labels}: 36 ids such as" in done.out
    assert f"matched those of {features} without endings such as .svs" in done.out
    written, without = (pd.read_csv(run / "predictions.csv") for run in (tmp_path / "run", her2[1]))
    assert written["slide_id"].tolist() == [f"{slide}.svs" for slide in without["slide_id"]]
    assert written.filter(like="prob").equals(without.filter(like="prob"))
    words = ["--features", features, "--labels", labels, "--missing", "Unknown", "--limit", 1, "--device", "cpu"]
    done = momkd("explain", tmp_path / "run", "--out", tmp_path / "page", *words)
    assert done.code == 0, done.err
    assert pd.read_csv(tmp_path / "page" / "slides.csv")["label"].notna().sum() == 34
    assert "36 ids such as" in done.out
    store = tmp_path / "store.h5"
    pack(features, store)
    packed = open_cohort(store, pd.read_csv(labels)["slide_id"], neighbours=2)
    slide, *_ = packed.paths
    assert slide.endswith(".svs")
    assert torch.equal(packed.read(slide), open_cohort(features).read(slide.removesuffix(".svs")))
    assert packed.graphs is not None
    assert packed.graphs(slide).num_edges > 0
    assert packed.notes[0].startswith("labels: 36 ids such as")


def test_a_fold_that_cannot_be_learned_is_told_before_any_epoch(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    splits = tmp_path / "splits"
    shutil.copytree(tiny_cohort.splits, splits)
    labels = pd.read_csv(tiny_cohort.labels, dtype=str).set_index("slide_id")["label"]
    one = pd.read_csv(splits / "splits_1.csv")
    one["train"] = pd.Series([slide for slide in one["train"].dropna() if labels[slide] == "0"])
    one.to_csv(splits / "splits_1.csv", index=False)
    message = one_line(train(tiny_cohort, tmp_path / "run", splits=splits))
    assert "splits_1.csv: expected two or more classes in train, got only '0'" in message
    assert not (tmp_path / "run").exists()
    one = pd.read_csv(splits / "splits_0.csv")
    one.assign(test=None).to_csv(splits / "splits_0.csv", index=False)
    done = train(tiny_cohort, tmp_path / "run", "--fold", "0", splits=splits)
    assert done.code == 0, done.err
    assert "splits_0.csv: test has no slide; the fold has no metrics of test slides" in done.out


def test_counts_leave_out_slides_that_were_skipped(own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    split = pd.read_csv(own_cohort.splits / "splits_0.csv")
    broken = own_cohort.features / f"{split['train'][0]}.h5"
    data = bytearray(broken.read_bytes())
    with h5py.File(broken) as file:
        at = file["features"].id.get_offset()
    data[at : at + 4] = b"\xff" * 4  # NaN: found when the values are read
    broken.write_bytes(data)
    done = train(own_cohort, tmp_path / "run", "--skip-bad", "--fold", "0")
    assert done.code == 0, done.err
    counts = {part: split[part].notna().sum() - (part == "train") for part in ("train", "val", "test")}
    assert f"on {', '.join(f'{count} {part}' for part, count in counts.items())} slides" in done.out


def test_a_study_takes_the_options_and_keeps_to_them(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    labels = relabelled(tiny_cohort, tmp_path / "labels.csv")
    table = pd.read_csv(labels, dtype=str)
    table.assign(slide_id=table["slide_id"] + ".svs").to_csv(labels, index=False)
    external = tiny_cohort.external
    assert external is not None
    outside = relabelled(external, tmp_path / "outside.csv")
    words = ["study", "--out", tmp_path / "study", "--features", tiny_cohort.features, "--labels", labels]
    words += ["--external-features", external.features, "--external-labels", outside, "--arms", "abmil", "--seeds", 1]
    words += ["--folds", 2, "--bootstrap", 0, "--missing", "Unknown", *QUICK[2:]]
    words += ["--instances", tiny_cohort.instances, "--instance-type", "tumour"]
    done = momkd(*words, "--positive", "neg")
    assert done.code == 0, done.err
    assert "label HER2: 7 pos, 27 neg (the positive class), 2 missing" in done.out
    assert f"{outside}: label HER2: " in done.out
    run = Run(tmp_path / "study" / "runs" / "HER2" / "abmil" / "seed_0")
    assert run.info.classes == ["pos", "neg"]
    found = pd.read_csv(run.folder / "attention.csv")
    assert len(found) > 0
    assert found["slide_id"].str.endswith(".svs").all()
    message = one_line(momkd(*words, "--positive", "pos"))
    assert (
        "expected the classes ['pos', 'neg'] as when it began, got ['neg', 'pos']; give the same --positive" in message
    )


def test_splits_of_a_study_that_are_a_part_are_written_again(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    study = Study(tmp_path, StudyCohort(tiny_cohort.features, tiny_cohort.labels, ("label",)), (), folds=3)
    labels = read_task(study.cohort, "label")
    folder = study.splits("label", 0)
    _make_splits(study, labels, "label", 0)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for lost in (name for name in whole if name.startswith("splits_")):
        (folder / lost).unlink()
        _make_splits(study, labels, "label", 0)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_options_of_several_labels_name_theirs() -> None:
    options = task_options(["er", "pr"], classes=["er=b, a"], positive=["pr=x=y"], missing=["?"], case_from="tcga")
    assert options == {
        "er": LabelOptions(("b", "a"), None, ("?",), "tcga"),
        "pr": LabelOptions(None, "x=y", ("?",), "tcga"),
    }
    assert task_options(["er"], positive=["a=b"])["er"].positive == "a=b"
    with refused("--positive: expected LABEL=... for one of the labels er, pr, got 'x'; name the label"):
        task_options(["er", "pr"], positive=["x"])
    with refused("--classes: expected one value for 'er', got also 'er=b,c'; leave one out"):
        task_options(["er"], classes=["a,b", "er=b,c"])


def test_labels_of_a_study_tell_cases_of_both_cohorts(tmp_path: Path) -> None:
    own, other = tmp_path / "own.csv", tmp_path / "other.csv"
    own.write_text("slide_id,Patient,er\na,x,wt\nb,y,mut\n")
    other.write_text("slide_id,Patient,er\nc,x,mut\nd,z,wt\nb.svs,u,mut\n")
    told: list[str] = []
    cohort = StudyCohort(tmp_path, own, ("er",), external_features=tmp_path, external_labels=other)
    assert read_task(cohort, "er", told.append).classes == ("wt", "mut")
    assert told[0] == "label er: 1 wt, 1 mut (the positive class)"
    assert told[-1].startswith(
        f"{other}: 1 of 3 slides and 2 of 3 cases have ids of the cohort that the run was trained"
    )
    other.write_text("slide_id,Patient,er\nc,x,MUT\nd,z,wt\n")
    with refused(other, "line 2: column 'er': expected one of 'wt', 'mut', got 'MUT'"):
        read_task(cohort, "er")

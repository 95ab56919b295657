"""Labels and clinical metadata beside the genes, from the options of a command to what is learned from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from momkd import cli
from momkd.config import Config
from momkd.errors import InputError
from momkd.experiment import Reporter, _fit_genes, read_inputs, train_run
from momkd.simulate import SimulatedCohort
from momkd.study import Study, StudyCohort, choose_arms, run_study
from momkd.study.cohort import semisynthetic_cohort

CONFIG = Config.preset("omics").with_settings(["omics.select=all", "train.epochs=1", "train.slides_per_step=8"])
ADDED = ["copy", "months_to_live", "Stage"]


class Listen(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def cohort(own_cohort: SimulatedCohort) -> SimulatedCohort:
    """Its expression, and beside it a column of text, one that is clinical and one that tells the label."""
    omics = pd.read_csv(own_cohort.omics)
    labels = pd.read_csv(own_cohort.labels).drop_duplicates("case_id").set_index("case_id")["label"]
    told = omics["case_id"].map(labels)
    omics.assign(copy=told * 10 + 100.0, months_to_live=told * 30, Stage="II").to_csv(own_cohort.omics, index=False)
    return own_cohort


def read(
    cohort: SimulatedCohort, keep: object = None, config: Config = CONFIG
) -> tuple[list[str], list[str], list[bool]]:
    """The genes of the first fold, the notes, and whether each fold takes logarithms."""
    listen = Listen()
    given = {"omics": cohort.omics, "omics_columns": keep, "reporter": listen}
    inputs = read_inputs(None, cohort.labels, cohort.splits, config=config, **given)
    fitted = [_fit_genes(inputs, split, config) for split in inputs.splits]
    return [*fitted[0].genes], listen.notes, [transform.log for transform in fitted]


def test_genes_alone_are_learned_from(cohort: SimulatedCohort) -> None:
    genes, notes, _ = read(cohort)
    assert not set(genes) & set(ADDED)
    assert any(
        "left out 3 columns that are no genes: months_to_live, Stage (clinical names); "
        "copy (correlation above 0.98 with the label)" in note
        for note in notes
    )
    assert set(read(cohort, ["copy"])[0]) - set(genes) == {"copy"}
    with pytest.raises(InputError, match="gene 'Stage': expected a number, got 'II'"):
        read(cohort, "all")


def test_a_column_named_like_the_label_ends_every_way_to_train(cohort: SimulatedCohort, tmp_path: Path) -> None:
    omics = pd.read_csv(cohort.omics)
    omics.assign(Label=omics["copy"]).to_csv(cohort.omics, index=False)
    expected = "expected genes, got a column 'Label' named like the label 'label'"
    with pytest.raises(InputError, match=expected):
        read(cohort)
    arms = tuple(choose_arms(["abmil", "momkd"]))
    files = StudyCohort(cohort.features, cohort.labels, ("label",), cohort.omics, cohort.splits)
    with pytest.raises(InputError, match=expected):
        run_study(Study(tmp_path / "study", files, arms))
    assert not (tmp_path / "study" / "runs").exists()  # told before the arm that needs no genes was trained
    cases = pd.read_csv(cohort.labels).drop_duplicates("case_id")[["case_id", "label"]]
    cases.to_csv(tmp_path / "labels.csv", index=False)
    semi = tmp_path / "semi", cohort.omics, tmp_path / "labels.csv", ["label"]
    with pytest.raises(InputError, match=expected):
        semisynthetic_cohort(*semi, {"programs": 4, "patches": 4, "patches_max": 4})


def test_logarithms_are_the_same_in_all_folds(cohort: SimulatedCohort) -> None:
    """One case of counts decides for the table, whichever folds train on it."""
    omics = pd.read_csv(cohort.omics)
    genes = omics.columns.difference(["case_id", *ADDED])
    omics[genes] = omics[genes].clip(0, 9) + 0.25
    omics.to_csv(cohort.omics, index=False)
    assert set(read(cohort)[2]) == {False}  # for all that `copy` and months are above 50
    test = pd.read_csv(cohort.splits / "splits_0.csv")["test"].dropna()
    case = pd.read_csv(cohort.labels).set_index("slide_id").loc[test, "case_id"].iloc[0]
    omics.loc[omics["case_id"] == case, genes] += 100
    omics.to_csv(cohort.omics, index=False)
    assert set(read(cohort)[2]) == {True}


def test_the_option_of_the_commands(cohort: SimulatedCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["--labels", cohort.labels, "--splits", cohort.splits, "--omics", cohort.omics, "--out", tmp_path / "out"]
    options = {
        "train": ["--preset=omics", "--omics-columns=stages"],
        "study": ["--features", cohort.features, "--omics-columns", "copy,stages"],
    }
    for command, given in options.items():
        with pytest.raises(InputError, match=r"expected a column 'stages', .* got none; did you mean 'Stage'"):
            CliRunner().invoke(cli.app, [command, *map(str, files + given)], catch_exceptions=False)
    monkeypatch.setattr("momkd.experiment._train_fold", lambda *_: None)
    monkeypatch.setattr("momkd.experiment._finish", lambda run, inputs: run)
    run = train_run(
        None, cohort.labels, cohort.splits, tmp_path / "run", config=CONFIG, omics=cohort.omics, omics_columns="copy"
    )
    assert run.info.data["omics_columns"] == "copy"
    run.fold(0).mkdir(exist_ok=True)
    (run.fold(0) / "state.pt").touch()
    with pytest.raises(InputError, match="expected the omics that it began with, got others"):
        train_run(None, cohort.labels, cohort.splits, run.folder, config=CONFIG, omics=cohort.omics, resume=True)

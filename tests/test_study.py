"""Studies: what is run and what is not run again, and that the tables are those of the predictions."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from momkd import cli
from momkd.data.omics import Omics, read_omics
from momkd.data.slides import read_slide
from momkd.errors import InputError
from momkd.experiment import _share_of
from momkd.predict import predict_run
from momkd.runs import Run
from momkd.simulate import SimulatedCohort, SimulationConfig
from momkd.simulate.semisynthetic import simulate_slides
from momkd.study import (
    ARMS,
    Study,
    StudyCohort,
    choose_arms,
    hold_out,
    run_study,
    semisynthetic_cohort,
    simulated_cohort,
    study_results,
    write_study_report,
)
from momkd.study.attention import attention_table

TINY = (
    *("train.epochs=2", "model.hidden_features=8", "model.gate_features=4", "model.projection_features=4"),
    *("omics.features=8", "omics.hidden_features=8", "omics.genes=8", "omics.select=variance", "memory.slots=2"),
)


@pytest.fixture(scope="module")
def finished(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Study:
    assert tiny_cohort.external is not None
    cohort = StudyCohort(
        tiny_cohort.features,
        tiny_cohort.labels,
        ("label",),
        tiny_cohort.omics,
        external_features=tiny_cohort.external.features,
        external_labels=tiny_cohort.external.labels,
        instances=(tiny_cohort.instances, "tumour"),
        note="Tiny and simulated.",
    )
    arms = tuple(choose_arms(["abmil", "momkd", "mse", "omics"], ["k3=memory.slots=3"]))
    study = Study(tmp_path_factory.mktemp("study") / "out", cohort, arms, seeds=2, folds=2, settings=TINY)
    run_study(study)
    return study


def test_every_cell_is_a_run_of_its_arm(finished: Study) -> None:
    cells = finished.cells()
    assert len(cells) == 5 * 2
    assert len({cell.folder for cell in cells}) == len(cells)
    for cell in cells:
        assert finished.finished(cell)
        text = (cell.folder / "config.toml").read_text()
        assert f"seed = {cell.seed} " in text
        assert f"slots = {3 if cell.arm.name == 'k3' else 2} " in text
        assert (cell.folder / "predictions_external.csv").is_file() == cell.arm.slides
    first, second = (pd.read_csv(finished.splits("label", seed) / "splits_0.csv") for seed in (0, 1))
    assert set(first["test"].dropna()) != set(second["test"].dropna())


def test_results_are_those_of_the_predictions(finished: Study) -> None:
    results = study_results(finished, bootstrap=200).set_index(["arm", "part"])
    assert set(results.index) == {(a, p) for a in ("abmil", "momkd", "mse", "k3") for p in ("test", "external")} | {
        ("omics", "test")
    }
    for arm, file, part in [("mse", "predictions.csv", "test"), ("k3", "predictions_external.csv", "external")]:
        aucs, by_slide = [], []
        for seed in range(2):
            table = pd.read_csv(finished.out / "runs" / "label" / arm / f"seed_{seed}" / file)
            for _, rows in table[table["part"] == part].groupby("fold"):
                by_slide.append(roc_auc_score(rows["label"], rows["prob_1"]))
                patients = rows.groupby("case_id")[["label", "prob_1"]].mean()
                aucs.append(roc_auc_score(patients["label"], patients["prob_1"]))
        row = results.loc[(arm, part)]
        assert row["auc"] == pytest.approx(np.mean(aucs))
        assert row["auc_by_slide"] == pytest.approx(np.mean(by_slide))
        assert row["rule"] == "mean"
        assert row["auc_low"] <= row["auc"] <= row["auc_high"]
        assert row["folds"] == 4
        difference = results.loc[("momkd", part), "auc"] - row["auc"]
        assert row["difference"] == pytest.approx(difference)
        assert row["difference_low"] <= difference <= row["difference_high"]
    assert np.isnan(results.loc[("momkd", "test"), "difference"])
    assert (
        results.loc[("omics", "test"), "patients"] < results.loc[("abmil", "test"), "patients"]
    )  # some lack a profile


def test_what_is_done_is_not_done_again_and_what_was_lost_is(finished: Study) -> None:
    cells = finished.cells()
    lost, kept = cells[1], cells[0]
    before = {cell.folder: (cell.folder / "predictions.csv").read_bytes() for cell in cells}
    stamp = (kept.folder / "metrics.json").stat().st_mtime_ns
    (lost.folder / "metrics.json").unlink()
    (lost.folder / "fold_1" / "predictions.csv").unlink()
    told: list[tuple[str, int, int]] = []
    run_study(finished, jobs=2, report=lambda *what: told.append(what))
    assert told == [(f"label {lost.arm.name} seed {lost.seed}", len(cells), len(cells))]
    assert (kept.folder / "metrics.json").stat().st_mtime_ns == stamp
    assert {folder: (folder / "predictions.csv").read_bytes() for folder in before} == before


def test_a_folder_of_another_study_is_refused(finished: Study) -> None:
    other = Study(finished.out, finished.cohort, finished.arms, 1, 2, (*TINY, "train.epochs=3"))
    with pytest.raises(InputError, match="expected a study with settings="):
        run_study(other)
    arms = tuple(choose_arms(["abmil"], ["k3=memory.slots=4"]))  # its runs are there, with 3 slots
    with pytest.raises(InputError, match=r"expected a study with arm k3=.*slots=3.* as it began, got .*slots=4"):
        run_study(Study(finished.out, finished.cohort, arms, 1, 2, TINY))
    run_study(Study(finished.out, finished.cohort, arms[:1], 2, 2, TINY))  # fewer arms; the others are not forgotten
    assert "k3" in json.loads((finished.out / "study.json").read_text())["arms"]


def test_the_report_says_what_the_data_are(finished: Study, tmp_path: Path) -> None:
    results = study_results(finished, bootstrap=50)
    page = write_study_report(finished, results).read_text()
    markdown = (finished.out / "report.md").read_text()
    for text in (page, markdown):
        assert "Metrics are by patient (mean of the probabilities of its slides), but for the AUC by slide." in text
        assert "patients, positive class 1" in text
        assert "Tiny and simulated." in text
        assert ARMS["abmil"].title in text
        assert f"{results['auc'].iloc[0]:.3f}" in text
    assert "http:" not in page
    assert "https:" not in page
    assert page.count('<img src="data:image/png;base64,') == 2
    written = pd.read_csv(finished.out / "results.csv", dtype={"positive": str})
    pd.testing.assert_frame_equal(written, results, check_dtype=False)


def test_attention_is_compared_with_the_truth(finished: Study, tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    results = study_results(finished, bootstrap=10).set_index(["arm", "part"])
    assert np.isnan(results.loc[("omics", "test"), "attention_auc"])
    run, fold = Run(finished.out / "runs" / "label" / "momkd" / "seed_0"), 1
    table = pd.read_csv(run.folder / "attention.csv", dtype={"slide_id": str})
    found = [_attention_of(finished, seed).groupby("fold")["attention_auc"].mean() for seed in range(2)]
    assert results.loc[("momkd", "test"), "attention_auc"] == pytest.approx(np.mean(found))
    own = table[table["fold"] == fold]
    test = pd.read_csv(run.fold(fold) / "predictions.csv", dtype={"slide_id": str})
    assert set(own["slide_id"]) == set(test.loc[(test["part"] == "test") & (test["label"] == 1), "slide_id"])
    predict_run(run, tiny_cohort.features, tmp_path / "p.csv", attention=tmp_path / "a", folds=[fold])
    truth = pd.read_csv(tiny_cohort.instances)
    slide = own["slide_id"].iloc[0]
    with h5py.File(tmp_path / "a" / f"{slide}.h5") as file:
        attention = file["attention"][:, 0]
    is_tumour = truth.loc[truth["slide_id"] == slide].sort_values("row")["type"] == "tumour"
    assert own["attention_auc"].iloc[0] == pytest.approx(roc_auc_score(is_tumour, attention))
    with pytest.raises(InputError, match="expected patches of type 'tumor', got background, immune, stroma, tumour"):
        attention_table(run, tiny_cohort.features, tiny_cohort.instances, "tumor")
    short = tmp_path / "short.csv"
    truth[truth["row"] > 0].to_csv(short, index=False)
    with pytest.raises(InputError, match="expected rows 0 to"):
        attention_table(run, tiny_cohort.features, short, "tumour")


def _attention_of(study: Study, seed: int) -> pd.DataFrame:
    return pd.read_csv(study.out / "runs" / "label" / "momkd" / f"seed_{seed}" / "attention.csv")


# -- cohorts -----------------------------------------------------------------------------------------------------


def expression(cases: int = 60, genes: int = 20) -> Omics:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((cases, 4)) @ rng.standard_normal((4, genes)) + 0.1 * rng.standard_normal(
        (cases, genes)
    )
    names = [f"P{i:03d}" for i in range(cases)]
    return Omics(pd.DataFrame(values.astype(np.float32), index=pd.Index(names, name="case_id")).add_prefix("g"))


def test_slides_show_the_programs_of_their_patient(tmp_path: Path) -> None:
    """The mean tumour patch of slides tells the first principal components, the better the more is visible."""
    omics = expression()
    labels = pd.DataFrame({"y": ["0", "1"] * 30, "site": ["a", "b", ""] * 20}, index=omics.table.index)
    z = np.linalg.svd(omics.table - omics.table.mean(), full_matrices=False)[0][:, :4]
    explained = {}
    for visibility in (0.0, 1.0):
        dials = SimulationConfig(
            programs=4, visibility=visibility, patches=150, features=24, program_strength=3.0, site_effect=0.2
        )
        out = simulate_slides(tmp_path / str(visibility), omics, labels, dials, site="site")
        truth = pd.read_csv(out / "instances.csv")
        rows = []
        for case in omics.table.index:
            own = truth[truth["slide_id"] == case]
            x = read_slide(out / "features" / f"{case}.h5").features.astype(np.float64)
            assert len(own) == len(x)
            rows.append(x[own.loc[own["type"] == "tumour", "row"]].mean(0))
        shown = np.array(rows) - np.mean(rows, 0)
        fitted = shown @ np.linalg.lstsq(shown, z, rcond=None)[0]
        explained[visibility] = 1 - ((z - fitted) ** 2).sum() / (z**2).sum()
    assert explained[1.0] > 0.8
    assert explained[0.0] < 0.6  # 24 columns on 60 patients fit some of anything
    table = pd.read_csv(tmp_path / "1.0" / "labels.csv", keep_default_na=False, dtype=str)
    assert list(table.columns) == ["slide_id", "case_id", "y", "site"]
    assert list(table["y"]) == list(labels["y"])
    assert "simulated" in (tmp_path / "1.0" / "README.txt").read_text()


def test_more_programs_than_a_slide_has_dimensions(tmp_path: Path) -> None:
    omics, config = expression(30), SimulationConfig(programs=12, features=8, patches=20, patches_max=20)
    out = simulate_slides(tmp_path / "out", omics, pd.DataFrame({"y": ["0"] * 30}, index=omics.table.index), config)
    assert len(list((out / "features").iterdir())) == 30


def test_slides_of_other_tables_are_not_taken_for_these(tmp_path: Path) -> None:
    omics = expression(30)
    omics.table.to_csv(tmp_path / "omics.csv")
    labels = pd.DataFrame({"case_id": omics.table.index, "y": ["0", "1"] * 15, "site": ["a", "b", "c"] * 10})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    files = tmp_path / "cohort", tmp_path / "omics.csv", tmp_path / "labels.csv"
    dials = {"programs": 4, "patches": 20, "patches_max": 20, "features": 8}
    made = semisynthetic_cohort(*files, ["y"], dials)
    assert semisynthetic_cohort(*files, ["y"], dials) == made
    for change in ("site", "labels", "omics"):
        if change == "labels":
            labels.assign(y="1").to_csv(tmp_path / "labels.csv", index=False)
        if change == "omics":
            labels.to_csv(tmp_path / "labels.csv", index=False)
            (omics.table + 1).to_csv(tmp_path / "omics.csv")
        with pytest.raises(
            InputError,
            match="expected the expression, labels and --site that its slides were simulated from, got others",
        ):
            semisynthetic_cohort(*files, ["y"], dials, site="site" if change == "site" else None)
    with pytest.raises(InputError, match="simulated from, got others"):
        simulated_cohort(tmp_path / "cohort", {**dials, "genes": 500})
    with pytest.raises(InputError, match="expected a column 'z', got 'case_id', 'y', 'site'"):
        semisynthetic_cohort(tmp_path / "new", *files[1:], ["z"], dials)
    pd.concat([labels, labels]).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(InputError, match="expected a row for each case_id, got 'P000' again"):
        semisynthetic_cohort(tmp_path / "new", *files[1:], ["y"], dials)


def test_too_few_patients_for_the_programs(tmp_path: Path) -> None:
    omics = expression(5)
    with pytest.raises(InputError, match="expected more cases with labels than programs=24, got 5"):
        simulate_slides(tmp_path / "out", omics, pd.DataFrame({"y": ["0"] * 5}, index=omics.table.index))
    assert not (tmp_path / "out").exists()


def test_real_expression(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "tcga_brca"
    dials = {"patches": 20, "patches_max": 20, "features": 32}
    files = folder / "expression.csv.gz", folder / "labels.csv"
    cohort = semisynthetic_cohort(tmp_path / "cohort", *files, ["HER2", "PR"], dials, site="site")
    again = semisynthetic_cohort(tmp_path / "cohort", *files, ["HER2", "PR"], dials, site="site")
    assert again == cohort
    with pytest.raises(InputError, match="expected slides simulated with patches=20, got patches=21"):
        semisynthetic_cohort(
            tmp_path / "cohort", *files, ["HER2"], {**dials, "patches": 21, "patches_max": 21}, site="site"
        )
    held = hold_out(cohort, tmp_path, "site_fold", "3")
    inside, outside = (pd.read_csv(path) for path in (held.labels, held.external_labels or ""))
    assert len(inside) == 628
    assert len(outside) == 309
    assert not set(inside["site"]) & set(outside["site"])
    with pytest.raises(InputError, match="expected some rows with site_fold=9, got 0 of 937"):
        hold_out(cohort, tmp_path, "site_fold", "9")


def test_a_share_of_the_profiles(tiny_cohort: SimulatedCohort) -> None:
    omics = read_omics(tiny_cohort.omics)
    shares = {share: set(_share_of(omics, share, 3).table.index) for share in (0.1, 0.5, 0.9)}
    assert [len(s) for s in shares.values()] == [round(share * len(omics)) for share in shares]
    assert shares[0.1] < shares[0.5] < shares[0.9]
    assert set(_share_of(omics, 0.5, 4).table.index) != shares[0.5]


# -- the command -------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    dials = {"slides": 24, "external_slides": 8, "patches": 20, "patches_max": 20, "features": 8, "genes": 16}
    options = [f"--dial={name}={value}" for name, value in dials.items()] + [f"--set={setting}" for setting in TINY]
    options += ["--arms=abmil,momkd", "--seeds=1", "--folds=2", "--bootstrap=20", f"--out={tmp_path / 's'}"]
    done = CliRunner().invoke(cli.app, ["study", *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert "Everything here is simulated" in done.output
    assert "2/2 label momkd seed 0" in done.output
    facts = json.loads((tmp_path / "s" / "study.json").read_text())
    assert list(facts["arms"]) == ["abmil", "momkd"]
    assert (tmp_path / "s" / "index.html").is_file()
    listed = CliRunner().invoke(cli.app, ["study", "--list"])
    assert all(arm.title in listed.output for arm in ARMS.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms=abmill"], "arms: expected some of .*, got 'abmill'; did you mean 'abmil'?"),
        (["--arms=momkd", "--arm=momkd=memory.slots=2"], "expected each name once, got 'momkd' twice"),
        (["--arm=memory.slots=2"], "arm: expected NAME=section.key=value"),
        (["--arm=a=memory.slot=2"], "unknown option 'memory.slot'"),
        (["--dial=visible=1"], "dial: expected name=value with one of"),
        (["--dial=slides=many"], "dial: expected slides as int, got 'many'"),
        (["--features=x"], "expected --labels with --features"),
        (["--omics=x"], "expected --labels and --omics to simulate slides"),
        (["--omics=x", "--labels=y"], "expected --label, the columns that are tasks"),
        (["--features=x", "--labels=y", "--dial=slides=20"], "expected --dial where slides are simulated"),
        (["--external-labels=y"], "expected --external-features and --external-labels together"),
        (["--hold-out=a=b", "--splits=x"], "expected --hold-out alone"),
        (["--features=x", "--labels=gone.csv", "--label=y", "--hold-out=a=b"], "gone.csv: expected a CSV table"),
        (["--patients=median"], "patients: expected one of mean, max, noisy-or, got 'median'"),
        (["--instances=x"], "expected --instances and --instance-type with --features"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(cli.app, ["study", f"--out={tmp_path / 's'}", *options], catch_exceptions=False)
    assert not (tmp_path / "s" / "runs").exists()

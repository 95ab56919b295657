"""Simulated cohorts: their files, that nothing is half-written or wrongly replaced, that dials do what they say."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import momkd
from momkd.data import folders
from momkd.data.slides import find_slides, read_slide, write_trident
from momkd.data.splits import check_splits, read_splits
from momkd.data.tables import read_labels
from momkd.errors import InputError
from momkd.simulate import SimulatedCohort, SimulationConfig, simulate, write
from momkd.simulate.model import (
    EXTERNAL,
    INTERNAL,
    TISSUES,
    TUMOUR,
    Case,
    Site,
    SlideDraw,
    World,
    draw_cases,
    draw_omics,
    draw_sites,
    draw_slides,
    draw_world,
)

SMALL = SimulationConfig(
    seed=3,
    slides=40,
    external_slides=12,
    multi_slide=0.4,
    missing_omics=0.3,
    features=16,
    patches=40,
    patches_max=200,
    genes=24,
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> SimulatedCohort:
    return simulate(tmp_path_factory.mktemp("simulate") / "cohort", SMALL)


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# -- files -------------------------------------------------------------------------------------------------------


def test_the_cohort_reads_back(cohort: SimulatedCohort) -> None:
    labels = read_labels(cohort.labels)
    assert (len(labels), labels.name, labels.classes) == (40, "label", ("0", "1"))
    assert list(pd.read_csv(cohort.labels).columns) == ["slide_id", "case_id", "label", "site"]
    slides = find_slides(cohort.features)
    assert set(slides) == set(labels.table.index)
    truth = pd.read_csv(cohort.instances)
    assert list(truth.columns) == ["slide_id", "row", "type"]
    assert set(truth["type"]) == set(TISSUES)
    by_slide = dict(list(truth.groupby("slide_id")))
    for slide_id, path in slides.items():
        slide = read_slide(path, width=16)
        assert slide.features.dtype == np.float16
        assert slide.coords is not None
        assert slide.attrs["patch_size_level0"] == 512
        assert len(np.unique(slide.coords, axis=0)) == len(slide.coords)
        assert (slide.coords % 512 == 0).all()
        assert (slide.coords >= 0).all()
        assert by_slide[slide_id]["row"].tolist() == list(range(len(slide.features)))

    assert cohort.splits is not None
    splits = read_splits(cohort.splits)
    assert len(splits) == 5
    check_splits(splits, labels)  # no case in two parts
    assert labels.table["case_id"].duplicated().any(), "some cases own several slides"
    for split in splits:
        assert sorted(split.train + split.val + split.test) == sorted(slides)
    assert sorted(slide for split in splits for slide in split.test) == sorted(slides)


def test_omics(cohort: SimulatedCohort) -> None:
    omics = pd.read_csv(cohort.omics, index_col="case_id")
    assert omics.shape[1] == 24
    assert (omics.dtypes == np.int64).all()
    assert (omics >= 0).all(axis=None)
    cases = list(dict.fromkeys(pd.read_csv(cohort.labels)["case_id"]))
    assert 0 < len(omics) < len(cases)
    assert [case for case in cases if case in omics.index] == list(omics.index)


def test_the_external_cohort_is_one_of_other_hospitals(cohort: SimulatedCohort) -> None:
    external = cohort.external
    assert external is not None
    assert external.root == cohort.root / "external"
    assert external.splits is None
    assert not (external.root / "splits").exists()
    inside, outside = pd.read_csv(cohort.labels), pd.read_csv(external.labels)
    assert len(outside) == len(find_slides(external.features)) == 12
    for column in ("slide_id", "case_id", "site"):
        assert not set(inside[column]) & set(outside[column])
    assert set(pd.read_csv(external.omics)["case_id"]) <= set(outside["case_id"])
    assert set(pd.read_csv(external.instances)["slide_id"]) == set(outside["slide_id"])


def test_it_says_that_it_is_simulated(cohort: SimulatedCohort) -> None:
    told = json.loads((cohort.root / "simulation.json").read_text())
    assert told["note"].startswith("Everything here is simulated")
    assert told["momkd"] == momkd.__version__
    assert SimulationConfig(**told["config"]) == SMALL
    assert "no patient" in (cohort.root / "README.txt").read_text()
    written = {p.name for p in cohort.root.iterdir()}
    assert folders.LIST in written
    for name in written - {"README.txt", folders.LIST}:
        assert name in (cohort.root / "README.txt").read_text()
    assert [p.name for p in cohort.root.parent.iterdir()] == ["cohort"], "nothing is left beside it"


def test_the_same_seed_gives_the_same_files(cohort: SimulatedCohort, tmp_path: Path) -> None:
    again = simulate(tmp_path / "again", replace(SMALL))
    assert [p.name for p in tmp_path.iterdir()] == ["again"]
    one, two = files(cohort.root), files(again.root)
    assert one.keys() == two.keys()
    for name in one:
        if not name.endswith(".h5"):
            assert one[name] == two[name], name
            continue
        with h5py.File(cohort.root / name) as a, h5py.File(again.root / name) as b:
            for key in ("features", "coords"):
                np.testing.assert_array_equal(a[key][:], b[key][:])
    other = simulate(tmp_path / "other", replace(SMALL, seed=4, external_slides=0))
    assert other.external is None
    assert not (other.root / "external").exists()
    assert other.labels.read_bytes() != cohort.labels.read_bytes()


def test_more_slides_never_change_the_earlier_ones(cohort: SimulatedCohort, tmp_path: Path) -> None:
    more = simulate(tmp_path / "more", replace(SMALL, slides=53, external_slides=0))
    for name in ("labels.csv", "omics.csv", "instances.csv"):
        lines = (cohort.root / name).read_text().splitlines()
        assert (more.root / name).read_text().splitlines()[: len(lines)] == lines
    for path in cohort.features.iterdir():
        was, now = read_slide(path), read_slide(more.features / path.name)
        np.testing.assert_array_equal(was.features, now.features)
        np.testing.assert_array_equal(was.coords, now.coords)


def test_progress_counts_all_slides(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    simulate(tmp_path / "out", replace(SMALL, patches=20, features=8), progress=lambda *step: seen.append(step))
    assert seen == [(done, 52) for done in range(1, 53)]


@pytest.mark.parametrize("dials", [{"dtype": "float32"}, {"missing_omics": 1.0}, {"classes": 3}, {"multi_slide": 1.0}])
def test_other_dials(dials: dict[str, object], tmp_path: Path) -> None:
    config = replace(SMALL, slides=60, patches=20, external_slides=0, **dials)
    cohort = simulate(tmp_path / "out", config)
    slide = read_slide(next(iter(find_slides(cohort.features).values())))
    assert slide.features.dtype == config.dtype
    assert len(read_labels(cohort.labels).classes) == config.classes
    assert len(pd.read_csv(cohort.omics)) == 0 or config.missing_omics < 1
    owned = pd.read_csv(cohort.labels)["case_id"].value_counts()
    assert owned.max() <= 3
    assert config.multi_slide < 1 or (owned[:-1] >= 2).all()


# -- the folder --------------------------------------------------------------------------------------------------


def test_an_empty_folder_and_a_new_nested_one_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    small = replace(SMALL, external_slides=0, patches=20, features=8)
    for out in (tmp_path / "empty", tmp_path / "new" / "nested", str(tmp_path / "text")):
        assert len(list(simulate(out, small).features.iterdir())) == 40


def test_a_simulation_is_replaced_only_when_asked(tmp_path: Path) -> None:
    small, out = replace(SMALL, external_slides=0, patches=20, features=8), tmp_path / "out"
    simulate(out, SMALL)
    before = files(out)
    with pytest.raises(InputError, match=f"^{out}: expected a new or an empty folder, got a simulation; .*overwrite"):
        simulate(out, small)
    assert files(out) == before
    simulate(out, small, overwrite=True)
    assert "external/labels.csv" in before
    assert not any(name.startswith("external") for name in files(out))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_not_a_simulation_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"got 'thesis.txt' in it; choose another folder$"):
        simulate(tmp_path, SMALL, overwrite=True)
    with pytest.raises(InputError, match="got a file; choose another name"):
        simulate(tmp_path / "thesis.txt", SMALL, overwrite=True)
    out = tmp_path / "out"
    simulate(out, replace(SMALL, external_slides=0, patches=20))
    (out / "run").mkdir()
    (out / "run" / "model.txt").write_text("a day of training")
    with pytest.raises(InputError, match=r"got also 'run/model.txt'; move it elsewhere"):
        simulate(out, SMALL, overwrite=True)
    assert (out / "run" / "model.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "thesis.txt"]


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for name in (".", ".."):
        with pytest.raises(InputError, match=rf"^{name}: expected a new folder, got one that you are in; name one in"):
            simulate(name, SMALL)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow over 3,000 bytes: stands in for a full disk. Never while pytest writes, maybe to a file."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_nothing(old: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if old:
        out.mkdir()
        (out / "simulation.json").write_text("{}")
        folders.list_files(out)
    before = files(tmp_path)
    with pytest.raises(InputError) as caught, small_files():
        simulate(out, SMALL, overwrite=True)
    message = str(caught.value)
    assert message.startswith(f"{out}")
    assert "File too large; raise the file size limit (ulimit -f) or choose another folder" in message
    assert "\n" not in message
    assert ".tmp" not in message
    assert files(tmp_path) == before


def test_a_run_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "out", SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_killed_leaves_no_cohort(tmp_path: Path) -> None:
    code = (
        "import os, sys; from momkd.simulate import *; "
        "simulate(sys.argv[1], SimulationConfig(slides=20, patches=20, genes=16, features=8), "
        "progress=lambda done, total: done == 5 and os._exit(9))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "out").exists()
    assert all(p.name.startswith(".out.") for p in tmp_path.iterdir()), "what is left is hidden and has another name"


def test_the_old_cohort_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, small = tmp_path / "out", replace(SMALL, external_slides=0, patches=20, features=8)
    simulate(out, small)
    before, rename, calls = files(out), folders.os.rename, []

    def second_fails(source: object, target: object) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(folders.os, "rename", second_fails)
    with pytest.raises(InputError, match="cannot write it: Device or resource busy; choose a new folder inside it"):
        simulate(out, replace(small, seed=9), overwrite=True)
    assert files(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def someone_else(done: int, total: int) -> None:
        if done == total:
            out.mkdir()
            (out / "theirs.txt").write_text("hello")

    with pytest.raises(InputError, match=r"got 'theirs.txt' in it"):
        simulate(out, SMALL, progress=someone_else)
    assert list(files(out)) == ["theirs.txt"]


# -- dials -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"slides": 9}, r"simulation: slides: expected a whole number from 10 to 1000000 \(slides\), got 9; change it"),
        ({"slides": 40.0}, "slides: expected a whole number"),
        ({"slides": True}, "slides: expected a whole number"),
        ({"visibility": 1.5}, r"visibility: expected a number from 0 to 1 \(correlation\), got 1.5"),
        ({"visibility": float("nan")}, "visibility: expected a number from 0 to 1"),
        ({"dtype": "float64"}, "dtype: expected float16 or float32"),
        ({"patches": 500, "patches_max": 400}, "patches_max: expected at least the median patches=500, got 400"),
        ({"slides": 19}, r"slides: expected at least 4 a fold \(20\), got 19; simulate more slides or fewer folds"),
        ({"genes": 20, "programs": 11}, r"genes: expected at least 2 a program \(22\), got 20"),
    ],
)
def test_dials_out_of_range(dials: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SimulationConfig(**dials)


def test_what_dials_in_range_cannot_do_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"class '\d': expected a case for every part of 5 folds, got \d cases; use fewer"
    ):
        simulate(tmp_path / "out", replace(SMALL, classes=10))
    loud = {"program_strength": 100.0, "heterogeneity": 1.0, "site_effect": 10.0, "sites": 200}
    many = {"slides": 200, "external_slides": 0, "patches": 20, "programs": 64, "genes": 128}
    with pytest.raises(InputError, match=r"dtype: expected one that holds values up to \d+, got float16; use float32"):
        simulate(tmp_path / "out", replace(SMALL, **loud, **many))
    assert list(tmp_path.iterdir()) == []
    simulate(tmp_path / "out", replace(SMALL, **loud, **many, dtype="float32"))


def test_dials_are_listed() -> None:
    listed = {name: (default, unit, meaning) for name, default, unit, meaning in SimulationConfig.dials()}
    assert {name: default for name, (default, _, _) in listed.items()} == SimulationConfig().as_dict()
    assert listed["visibility"][1] == "correlation, 0 to 1"
    assert all(meaning for _, _, meaning in listed.values())


# -- the model ---------------------------------------------------------------------------------------------------


class Drawn:
    """A cohort in memory."""

    def __init__(self, config: SimulationConfig, cohort: int = INTERNAL) -> None:
        self.config, self.cohort = config, cohort
        self.world: World = draw_world(config)
        self.sites: list[Site] = draw_sites(config, cohort)
        self.cases: list[Case] = draw_cases(config, self.world, cohort)
        self.labels = np.array([case.label for case in self.cases])

    def genes(self) -> np.ndarray:
        return np.stack([draw_omics(self.config, self.world, self.sites[c.site], c, self.cohort) for c in self.cases])

    def slides(self) -> Iterator[SlideDraw]:
        """The first of each case."""
        for case in self.cases:
            yield next(draw_slides(self.config, self.world, self.sites[case.site], case, self.cohort))[1]

    def tumour_means(self) -> np.ndarray:
        return np.stack([s.features[s.tissue == TUMOUR].astype(np.float64).mean(0) for s in self.slides()])


def probe(x: np.ndarray, labels: np.ndarray) -> float:
    """Cross-validated AUC of a linear rule."""
    rule = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    return float(roc_auc_score(labels, cross_val_predict(rule, x, labels, cv=5, method="predict_proba")[:, 1]))


def test_genes_predict_the_label() -> None:
    drawn = Drawn(SimulationConfig(seed=1))
    has = np.array([case.has_omics for case in drawn.cases])
    assert probe(np.log1p(drawn.genes())[has], drawn.labels[has]) >= 0.85
    # Not just because of the hospital that the label leads to.
    assert probe(np.log1p(Drawn(SimulationConfig(seed=1, site_bias=0)).genes()), drawn.labels) >= 0.85


def test_visibility_is_what_slides_tell_about_the_label() -> None:
    """Without site bias, or the stain would tell."""
    config = SimulationConfig(seed=1, slides=400, patches=60, features=32, site_bias=0.0)
    none, some, all_ = (Drawn(replace(config, visibility=v)) for v in (0.0, 0.6, 1.0))
    np.testing.assert_array_equal(none.labels, all_.labels)
    auc = [probe(drawn.tumour_means(), drawn.labels) for drawn in (none, some, all_)]
    assert abs(auc[0] - 0.5) < 0.08  # about 2.5 standard errors
    assert auc[0] + 0.1 < auc[1] < auc[2] - 0.03
    assert auc[2] >= 0.85
    # What it looks like is as loud with and without it: only what can be learnt changes.
    for drawn in (none, some, all_):
        assert np.std([case.visible for case in drawn.cases]) == pytest.approx(1, abs=0.05)


def test_only_the_tumour_tells() -> None:
    drawn = Drawn(SimulationConfig(seed=2, slides=300, patches=60, features=32, site_bias=0.0, visibility=1.0))
    others = np.stack([s.features[s.tissue != TUMOUR].astype(np.float64).mean(0) for s in drawn.slides()])
    assert abs(probe(others, drawn.labels) - 0.5) < 0.09


def test_shares_of_labels_cases_and_omics() -> None:
    drawn = Drawn(SimulationConfig(slides=4000, positive=0.3, multi_slide=0.2, missing_omics=0.25))
    cases = drawn.cases
    assert drawn.labels.mean() == pytest.approx(0.3, abs=0.025)
    assert np.mean([case.slides > 1 for case in cases]) == pytest.approx(0.2, abs=0.025)
    assert np.mean([case.has_omics for case in cases]) == pytest.approx(0.75, abs=0.025)
    assert sum(case.slides for case in cases) == 4000
    assert roc_auc_score(drawn.labels, [case.score for case in cases]) == pytest.approx(0.98, abs=0.02)
    for classes in (3, 5):
        counts = np.bincount(Drawn(replace(drawn.config, classes=classes)).labels) / len(cases)
        np.testing.assert_allclose(counts, [0.7, *[0.3 / (classes - 1)] * (classes - 1)], atol=0.03)


def test_sites_are_biased_inside_only() -> None:
    config = SimulationConfig(slides=2000, external_slides=2000, site_bias=0.5, sites=4, external_sites=4)

    def share(cohort: int) -> list[float]:
        """Of class 1, at the even and the odd hospitals."""
        drawn = Drawn(config, cohort)
        odd = np.array([case.site % 2 for case in drawn.cases])
        assert set(odd) == {0, 1}
        return [float(drawn.labels[odd == parity].mean()) for parity in (0, 1)]

    inside, outside = share(INTERNAL), share(EXTERNAL)
    assert inside[1] - inside[0] > 0.3
    assert abs(outside[1] - outside[0]) < 0.08
    for few in ({"sites": 1, "external_sites": 1}, {"sites": 2, "classes": 5}):
        assert len(Drawn(replace(config, site_bias=1.0, **few)).cases) > 1000


def test_sites_shift_features_and_genes() -> None:
    """The same case at two hospitals; without a site effect they would not differ."""
    for effect, differ in ((0.0, False), (1.0, True)):
        drawn = Drawn(SimulationConfig(slides=20, site_effect=effect, patches=60, folds=2))
        case, (one, two) = drawn.cases[0], drawn.sites[:2]

        def slide(site: Site, case: Case = case, drawn: Drawn = drawn) -> SlideDraw:
            return next(draw_slides(drawn.config, drawn.world, site, case, INTERNAL))[1]

        genes = [draw_omics(drawn.config, drawn.world, site, case, INTERNAL) for site in (one, two)]
        assert np.array_equal(*genes) is not differ
        assert np.array_equal(slide(one).features, slide(two).features) is not differ
        np.testing.assert_array_equal(slide(one).tissue, slide(two).tissue)


def test_bag_sizes_are_lognormal() -> None:
    config = SimulationConfig(slides=600, patches=150, patches_spread=0.5, patches_max=100_000, features=8)
    logs = np.log([len(slide.features) for slide in Drawn(config).slides()])
    assert np.exp(np.median(logs)) == pytest.approx(150, rel=0.08)
    assert np.std(logs) == pytest.approx(0.5, rel=0.1)
    assert abs(((logs - logs.mean()) ** 3).mean() / logs.std() ** 3) < 0.4, "symmetric in the logarithm"
    clipped = [len(s.features) for s in Drawn(replace(config, patches_spread=3.0, patches_max=200)).slides()]
    assert (min(clipped), max(clipped)) == (20, 200)


def test_tissue_is_one_piece_with_coherent_tumour() -> None:
    shares, beside, alone = [], [], []
    for slide in Drawn(SimulationConfig(slides=150, patches=300, features=8)).slides():
        tumour = slide.tissue == TUMOUR
        np.testing.assert_array_equal(slide.region >= 0, tumour)
        at = {tuple(cell): bool(is_tumour) for cell, is_tumour in zip(slide.coords // 512, tumour, strict=True)}
        assert len(at) == len(tumour)
        assert (np.lexsort((slide.coords[:, 0], slide.coords[:, 1])) == np.arange(len(tumour))).all(), "raster order"
        for (x, y), is_tumour in at.items():
            around = [at[near] for near in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)) if near in at]
            alone.append(not around)
            if is_tumour and around:
                beside.append(np.mean(around))
        shares.append(np.bincount(slide.tissue, minlength=len(TISSUES)) / len(tumour))
    mean = np.mean(shares, axis=0)
    assert mean[TUMOUR] == pytest.approx(0.2, abs=0.02)
    np.testing.assert_allclose(mean[:TUMOUR] / (1 - mean[TUMOUR]), [0.55, 0.30, 0.15], atol=0.025)
    assert np.min(shares, axis=0)[TUMOUR] >= 0.09
    assert np.max(shares, axis=0)[TUMOUR] <= 0.31
    assert np.mean(beside) > 0.7, "neighbours of a tumour patch are tumour, against 0.2 of all"
    assert np.mean(alone) < 0.01


def test_writes_go_through_the_trident_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file after the other: no slide is drawn before the last one is written."""
    order: list[str] = []
    monkeypatch.setattr(
        write, "write_trident", lambda path, *a, **k: (order.append(path.stem), write_trident(path, *a, **k))
    )
    cohort = simulate(tmp_path / "out", replace(SMALL, external_slides=0))
    assert order == pd.read_csv(cohort.labels)["slide_id"].tolist()

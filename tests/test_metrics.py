"""Metrics against hand-computed tables and scikit-learn; intervals that resample patients."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from momkd import bootstrap as bootstrap_module
from momkd.bootstrap import METRICS, PatientBootstrap, Rows, ranking_metrics, weighted_metrics
from momkd.errors import InputError
from momkd.metrics import attention_auc, evaluate_predictions, mean_attention_auc, paired_difference
from momkd.predictions import check_predictions, read_predictions, youden_threshold

CLASSES = ("neg", "pos")


def fold_table(
    fold: int,
    labels: list[int],
    scores: list[float],
    part: str = "test",
    prefix: str = "s",
    patients: list[str] | None = None,
) -> pd.DataFrame:
    ids = [f"{prefix}{fold}-{part}-{i}" for i in range(len(labels))]
    data: dict[str, Any] = {
        "slide_id": ids,
        "case_id": patients or [f"c-{i}" for i in ids],
        "label": labels,
        "fold": fold,
    }
    return pd.DataFrame({**data, "part": part, "prob_neg": 1 - np.array(scores), "prob_pos": scores})


def small() -> pd.DataFrame:
    """Fold 0: threshold 0.3, AUC 3/4. Fold 1: threshold 0.6, AUC 1."""
    return pd.concat(
        [
            fold_table(0, [0, 1], [0.2, 0.4], "val"),
            fold_table(0, [0, 0, 1, 1, -1], [0.1, 0.4, 0.35, 0.8, 0.9]),
            fold_table(1, [0, 1], [0.5, 0.7], "val"),
            fold_table(1, [0, 0, 1], [0.2, 0.65, 0.9]),
        ]
    )


def noisy(folds: int = 3, n: int = 40, seed: int = 0, gap: float = 1.5, slides_a_case: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    tables = []
    for fold in range(folds):
        for part in ("val", "test"):
            labels = np.repeat(rng.integers(0, 2, n), slides_a_case)
            labels[: 2 * slides_a_case] = np.repeat([0, 1], slides_a_case)
            scores = 1 / (1 + np.exp(-(rng.normal(size=len(labels)) + gap * (labels - 0.5))))
            patients = [f"p{fold}{part}{i // slides_a_case}" for i in range(len(labels))]
            tables.append(fold_table(fold, labels.tolist(), scores.tolist(), part, patients=patients))
    return pd.concat(tables, ignore_index=True)


def three_classes(n: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    labels[:3] = (0, 1, 2)
    logits = rng.normal(size=(n, 3)) + 1.2 * np.eye(3)[labels]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = pd.DataFrame({"slide_id": [f"s{i}" for i in range(n)], "case_id": [f"c{i}" for i in range(n)]})
    return table.assign(label=labels, fold=0, part="test", prob_a=probs[:, 0], prob_b=probs[:, 1], prob_c=probs[:, 2])


# Estimates


def test_small_table_by_hand() -> None:
    got = evaluate_predictions(small(), CLASSES, bootstrap=50)
    first, second = got["folds"]
    assert (first["threshold"], second["threshold"]) == (pytest.approx(0.3), pytest.approx(0.6))
    # Fold 0 calls 0, 1, 1, 1 for 0, 0, 1, 1; its precision is 1 at the first positive and 2/3 at the second.
    want0 = {"auc": 3 / 4, "auprc": (1 + 2 / 3) / 2, "f1": 4 / 5, "balanced_accuracy": 3 / 4, "accuracy": 3 / 4}
    # Fold 1 calls 0, 1, 1 for 0, 0, 1.
    want1 = {"auc": 1.0, "auprc": 1.0, "f1": 2 / 3, "balanced_accuracy": 3 / 4, "accuracy": 2 / 3}
    for metric in METRICS:
        assert first[metric] == pytest.approx(want0[metric])
        assert second[metric] == pytest.approx(want1[metric])
        assert got["test"][metric]["estimate"] == pytest.approx((want0[metric] + want1[metric]) / 2)
    # Pooled: positives .35 .8 .9, negatives .1 .4 .2 .65; of 12 pairs .35 loses to .4 and .65.
    assert got["pooled"]["auc"]["estimate"] == pytest.approx(10 / 12)
    assert got["pooled"]["accuracy"]["estimate"] == pytest.approx(5 / 7)  # each row by its own fold's threshold
    assert (first["n_slides"], first["n_cases"], first["n_per_class"]) == (4, 4, [2, 2])
    assert got["unlabelled"] == {"val": 0, "test": 1, "external": 0}
    assert "external" not in got
    assert got["notes"] == []


def test_three_classes_are_macro_one_vs_rest() -> None:
    table = three_classes()
    got = evaluate_predictions(table, ("a", "b", "c"), bootstrap=100)
    y, p = table["label"], table[["prob_a", "prob_b", "prob_c"]].to_numpy()
    assert got["test"]["auc"]["estimate"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr", average="macro"))
    each = [average_precision_score(y == c, p[:, c]) for c in range(3)]
    assert got["test"]["auprc"]["estimate"] == pytest.approx(np.mean(each))
    assert got["test"]["f1"]["estimate"] == pytest.approx(f1_score(y, p.argmax(1), average="macro"))
    assert got["test"]["balanced_accuracy"]["estimate"] == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert got["folds"][0]["threshold"] is None
    assert got["test"]["auc"]["low"] < got["test"]["auc"]["estimate"] < got["test"]["auc"]["high"]


@pytest.mark.parametrize(
    ("labels", "scores", "want"),
    [
        ([0, 1], [0.2, 0.4], 0.3),
        ([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9], 0.4),
        # Either of two cuts is right three times in four, at 0.2 and 0.55: the second is nearer 0.5.
        ([0, 1, 0, 1], [0.1, 0.3, 0.5, 0.6], 0.55),
        ([0, 1, 0, 1], [0.4, 0.5, 0.8, 0.9], 0.45),
        ([0, 0], [0.1, 0.2], None),
        ([], [], None),
        ([1, 0], [0.2, 0.4], None),  # worse than chance
        ([0, 1], [0.4, 0.4], None),
        ([0, 1], [0.5, np.nextafter(0.5, 1)], None),  # equal but for rounding
        ([0, 0, 1], [0.5, 0.5000002, 0.500001], 0.5000006),  # above all of the lower group
    ],
)
def test_youden_threshold(labels: list[int], scores: list[float], want: float | None) -> None:
    got = youden_threshold(np.array(labels, dtype=np.int64), np.array(scores))
    assert got == (None if want is None else pytest.approx(want, abs=1e-16, rel=0))


def test_no_threshold_from_validation_falls_back_and_says_so() -> None:
    table = small()
    got = evaluate_predictions(table[(table["part"] != "val") | (table["fold"] == 1)], CLASSES, bootstrap=10)
    assert got["folds"][0]["threshold"] == 0.5
    assert [note for note in got["notes"] if "fold 0" in note and "0.5" in note]
    assert not [note for note in got["notes"] if "fold 1" in note]


def test_a_fold_of_one_class_is_undefined_and_left_out_of_the_mean() -> None:
    table = pd.concat([small(), fold_table(2, [0, 1], [0.3, 0.5], "val"), fold_table(2, [0, 0, 0], [0.1, 0.2, 0.6])])
    got = evaluate_predictions(table, CLASSES, bootstrap=50)
    assert got["test"]["auc"]["estimate"] == pytest.approx(7 / 8)
    fold = got["folds"][2]
    assert (fold["auc"], fold["auc_low"], fold["f1"], fold["balanced_accuracy"]) == (None, None, None, None)
    assert fold["accuracy"] == pytest.approx(2 / 3)
    assert got["test"]["accuracy"]["estimate"] == pytest.approx((3 / 4 + 2 / 3 + 2 / 3) / 3)
    (note,) = got["notes"]
    assert note.startswith("test, fold 2: no slide of class 'pos': auc, auprc, f1 and balanced_accuracy are undefined")
    json.dumps(got, allow_nan=False)


def test_nothing_defined_is_none_in_json() -> None:
    got = evaluate_predictions(fold_table(0, [1], [0.7]), CLASSES, bootstrap=50)
    assert got["test"]["auc"] == {"estimate": None, "low": None, "high": None}
    assert got["test"]["accuracy"] == {"estimate": 1.0, "low": None, "high": None}
    assert any("one patient" in note for note in got["notes"])
    json.dumps(got, allow_nan=False)


def test_only_unlabelled_rows_give_no_part() -> None:
    got = evaluate_predictions(fold_table(0, [-1, -1], [0.7, 0.2]), CLASSES)
    assert not {"test", "pooled", "folds", "external"} & got.keys()
    assert got["unlabelled"]["test"] == 2


def test_external_folds_and_ensemble_by_hand() -> None:
    labels, patients = [0, 1, 0, 1], ["a", "b", "c", "d"]
    one = fold_table(0, labels, [0.1, 0.2, 0.3, 0.9], "external", patients=patients)
    two = fold_table(1, labels, [0.2, 0.8, 0.4, 0.3], "external", patients=patients).assign(slide_id=one["slide_id"])
    got = evaluate_predictions(pd.concat([small(), one, two]), CLASSES, bootstrap=200)
    assert [f["auc"] for f in got["external_folds"]] == [3 / 4, 3 / 4]
    assert got["external"]["auc"]["estimate"] == 3 / 4
    # Means .15 .5 .35 .6 rank perfectly; the threshold is the mean of .3 and .6, so all are called right.
    assert got["external_ensemble"]["auc"]["estimate"] == 1.0
    assert got["external_ensemble"]["accuracy"]["estimate"] == 1.0
    assert got["test"] == evaluate_predictions(small(), CLASSES, bootstrap=200)["test"]  # external rows change nothing
    with pytest.raises(InputError, match=r"external slide .* 2 folds, got 1"):
        evaluate_predictions(pd.concat([one, two.iloc[:3]]), CLASSES)


# Bootstrap


@pytest.mark.parametrize("distinct", [1, 2, 5, 1000])
@pytest.mark.parametrize("classes", [2, 4])
def test_weighted_metrics_equal_scikit_learn(distinct: int, classes: int) -> None:
    rng = np.random.default_rng(distinct)
    labels = rng.permutation(np.arange(30) % classes)
    probs = rng.integers(1, distinct + 1, (30, classes)).astype(float)  # few distinct values: many ties
    probs /= probs.sum(axis=1, keepdims=True)
    rows = Rows("", labels, probs, probs.argmax(1), np.arange(30).astype(str))
    weights = rng.integers(0, 4, (6, 30)).astype(float)
    for c in range(classes):
        weights[:, np.flatnonzero(labels == c)[0]] += 1  # no class may be missing
    got = weighted_metrics(weights, rows)
    for r, w in enumerate(weights):
        scored = [1] if classes == 2 else range(classes)
        aucs = [roc_auc_score(labels == c, probs[:, c], sample_weight=w) for c in scored]
        precisions = [average_precision_score(labels == c, probs[:, c], sample_weight=w) for c in scored]
        average = "binary" if classes == 2 else "macro"
        want = {
            "auc": np.mean(aucs),
            "auprc": np.mean(precisions),
            "f1": f1_score(labels, rows.predicted, average=average, sample_weight=w, zero_division=0),
            "balanced_accuracy": balanced_accuracy_score(labels, rows.predicted, sample_weight=w),
            "accuracy": accuracy_score(labels, rows.predicted, sample_weight=w),
        }
        assert {m: got[m][r] for m in METRICS} == pytest.approx(want, abs=1e-12)


def test_rank_auc_with_ties_by_hand() -> None:
    positive, scores = np.array([True, False, True, False]), np.array([0.5, 0.5, 0.8, 0.1])
    auc, precision = ranking_metrics(np.array([[1.0, 1, 1, 1], [2, 0, 1, 1], [1, 1, 0, 0]]), positive, scores)
    assert auc == pytest.approx([3.5 / 4, 1.0, 0.5])
    assert precision == pytest.approx([0.5 + 0.5 * 2 / 3, 1.0, 0.5])


def test_a_resample_is_the_patients_slides_repeated() -> None:
    table = noisy(folds=1, n=20, slides_a_case=3)
    test = table[table["part"] == "test"]
    labels, scores = test["label"].to_numpy(), test["prob_pos"].to_numpy()
    probs = np.stack([1 - scores, scores], axis=1)
    rows = Rows("", labels, probs, (scores > 0.5).astype(np.int64), test["case_id"].to_numpy(object).astype(str))
    boot = PatientBootstrap(5, seed=3)
    ((weights,),) = boot._weights([rows])
    got = PatientBootstrap(5, seed=3).metrics([[rows]])[0][0]["auc"]
    for w, auc in zip(weights, got, strict=True):
        assert w.sum() == 60
        assert (w.reshape(20, 3) == w.reshape(20, 3)[:, :1]).all()  # all slides of a patient come along
        taken = np.repeat(np.arange(60), w.astype(int))
        assert auc == pytest.approx(roc_auc_score(labels[taken], scores[taken]), abs=1e-12)


def test_same_seed_same_interval() -> None:
    table = noisy()
    one, two, other = (evaluate_predictions(table, CLASSES, bootstrap=200, seed=s) for s in (1, 1, 2))
    assert one == two
    assert one["test"]["auc"]["low"] != other["test"]["auc"]["low"]
    assert one["test"]["auc"]["estimate"] == other["test"]["auc"]["estimate"]
    shuffled = evaluate_predictions(table.sample(frac=1, random_state=0), CLASSES, bootstrap=200, seed=1)
    assert shuffled["test"]["auc"] == pytest.approx(one["test"]["auc"], abs=1e-12)  # the order of rows is no matter


def test_level_widens_and_zero_resamples_give_none() -> None:
    narrow, wide = (evaluate_predictions(noisy(), CLASSES, level=v)["test"]["auc"] for v in (0.5, 0.99))
    assert wide["low"] < narrow["low"] < narrow["estimate"] < narrow["high"] < wide["high"]
    none = evaluate_predictions(noisy(), CLASSES, bootstrap=0)["test"]["auc"]
    assert (none["low"], none["high"]) == (None, None)
    assert none["estimate"] == narrow["estimate"]


def test_patients_are_resampled_not_slides() -> None:
    """Nine equal slides a patient carry one patient's information: the interval is that of the patients alone."""
    single = noisy(folds=1, n=40)
    repeated = pd.concat([single.assign(slide_id=single["slide_id"] + f"-{k}") for k in range(9)])
    by_slide = repeated.assign(case_id=repeated["slide_id"])
    width = {}
    for name, table in (("single", single), ("patient", repeated), ("slide", by_slide)):
        auc = evaluate_predictions(table, CLASSES, bootstrap=2000)["test"]["auc"]
        width[name] = auc["high"] - auc["low"]
    assert width["patient"] == pytest.approx(width["single"], abs=1e-12)  # the same draws of the same patients
    assert width["patient"] / width["slide"] == pytest.approx(3, rel=0.15)  # √9 too narrow


def test_folds_that_share_patients_are_resampled_together() -> None:
    """Two folds with the same slides and scores hold no more information than one of them."""
    one = noisy(folds=1, n=40)
    both = pd.concat([one, one.assign(fold=1)])
    a, b = (evaluate_predictions(t, CLASSES, bootstrap=300) for t in (one, both))
    assert b["test"]["auc"] == pytest.approx(a["test"]["auc"], abs=1e-12)
    assert any("more than one fold" in note for note in b["notes"])
    apart = both.assign(
        case_id=both["case_id"] + both["fold"].astype(str), slide_id=both["slide_id"] + both["fold"].astype(str)
    )
    independent = evaluate_predictions(apart, CLASSES, bootstrap=1000)["test"]["auc"]
    assert independent["high"] - independent["low"] < 0.85 * (b["test"]["auc"]["high"] - b["test"]["auc"]["low"])


def test_a_fold_of_one_patient_that_others_share_has_an_accuracy_in_every_resample() -> None:
    """A joint resample may hold none of its slides, and then its accuracy would be 0 / 0."""
    shared = ["a", "b", "c", "d"]
    one = fold_table(0, [0, 1, 0, 1], [0.1, 0.7, 0.6, 0.8], patients=shared)
    two = fold_table(1, [0], [0.2], patients=["a"])
    got = evaluate_predictions(pd.concat([one, two]), CLASSES, bootstrap=200)
    json.dumps(got, allow_nan=False)
    assert got["test"]["accuracy"]["low"] is not None


@pytest.mark.slow
def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Scores N(1, 1) against N(0, 1): the true AUC is Φ(1/√2) = 0.7602."""
    hits, reps = 0, 150
    rng = np.random.default_rng(7)
    for rep in range(reps):
        labels = np.arange(80) % 2
        scores = 1 / (1 + np.exp(-(rng.normal(size=80) + labels)))
        auc = evaluate_predictions(fold_table(0, labels.tolist(), scores.tolist()), CLASSES, bootstrap=200, seed=rep)
        hits += auc["test"]["auc"]["low"] <= 0.7602 <= auc["test"]["auc"]["high"]
    assert 0.88 <= hits / reps <= 0.99, hits / reps


def test_resamples_without_a_class_are_drawn_again_and_counted() -> None:
    table = fold_table(0, [0] * 9 + [1], np.linspace(0.1, 0.9, 10).tolist())
    got = evaluate_predictions(table, CLASSES, bootstrap=500)
    again = got["bootstrap"]["redrawn"]["test"]
    # A resample lacks the one positive with probability 0.9^10 = 0.349: 500 · 0.349 / 0.651 = 268 redraws.
    assert 200 < again < 340
    assert got["bootstrap"]["dropped"]["test"] == 0
    assert got["test"]["auc"]["low"] == 1.0
    never = evaluate_predictions(fold_table(0, [0, 1], [0.2, 0.8], patients=["p", "p"]), CLASSES, bootstrap=10)
    assert never["test"]["auc"] == {"estimate": 1.0, "low": None, "high": None}


def test_resamples_that_never_hold_every_class_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap_module, "_REDRAW_ROUNDS", 0)
    table = fold_table(0, [0] * 9 + [1], np.linspace(0.1, 0.9, 10).tolist())
    got = evaluate_predictions(table, CLASSES, bootstrap=500)
    assert 130 < got["bootstrap"]["dropped"]["test"] < 220
    assert got["test"]["auc"]["low"] == 1.0


def test_chunks_hold_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap_module, "_CHUNK_ELEMENTS", 1000)
    rows = Rows("", np.arange(30) % 2, np.full((30, 2), 0.5), np.arange(30) % 2, np.arange(30).astype(str))
    got = PatientBootstrap(101, 0).metrics([[rows]])[0][0]
    assert {m: len(v) for m, v in got.items()} == dict.fromkeys(METRICS, 101)


def test_five_folds_of_two_hundred_slides_take_no_time() -> None:
    table = noisy(folds=5, n=200)
    start = time.perf_counter()
    evaluate_predictions(table, CLASSES, bootstrap=1000)
    assert time.perf_counter() - start < 3


# Differences


def test_difference_of_identical_tables_is_exactly_zero() -> None:
    table = noisy()
    for metric in METRICS:
        got = paired_difference(table, table.sample(frac=1, random_state=1), CLASSES, metric, bootstrap=100)
        assert got == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_difference_by_hand_and_its_sign() -> None:
    a = small()
    b = a.assign(prob_pos=a["prob_neg"], prob_neg=a["prob_pos"])  # turned round: AUC 1/4 and 0
    got, turned = (paired_difference(x, y, CLASSES, bootstrap=100) for x, y in ((a, b), (b, a)))
    assert got["difference"] == pytest.approx((3 / 4 - 1 / 4 + 1 - 0) / 2)
    assert turned["difference"] == pytest.approx(-got["difference"])
    assert (turned["low"], turned["high"]) == (pytest.approx(-got["high"]), pytest.approx(-got["low"]))


def test_pairing_narrows_the_interval_of_similar_models() -> None:
    a = noisy(n=60)
    shift = np.random.default_rng(0).normal(scale=0.02, size=len(a))
    scores = np.clip(a["prob_pos"] + shift, 0, 1)
    b = a.assign(prob_pos=scores, prob_neg=1 - scores)
    got = paired_difference(a, b, CLASSES)
    alone = evaluate_predictions(a, CLASSES)["test"]["auc"]
    assert got["low"] <= got["difference"] <= got["high"]
    assert got["high"] - got["low"] < 0.3 * (alone["high"] - alone["low"])


def test_difference_refuses_other_slides_labels_or_patients() -> None:
    a = small().reset_index(drop=True)
    with pytest.raises(
        InputError, match="ours: expected a labelled test row for slide s1-test-2 of fold 1 as in theirs"
    ):
        paired_difference(a.iloc[:-1], a, CLASSES, names=("ours", "theirs"))
    with pytest.raises(InputError, match="b: slide s1-test-2: expected label 1 as in a, got 0"):
        paired_difference(a, a.assign(label=[*a["label"][:-1], 0]), CLASSES)
    with pytest.raises(InputError, match="expected case_id"):
        paired_difference(a, a.assign(case_id=[*a["case_id"][:-1], "x"]), CLASSES)
    with pytest.raises(InputError, match="part 'external', got none"):
        paired_difference(a, a, CLASSES, part="external")
    with pytest.raises(InputError, match="expected a metric"):
        paired_difference(a, a, CLASSES, metric="auroc")


def test_difference_without_a_defined_fold_is_none() -> None:
    table = fold_table(0, [1, 1], [0.4, 0.7])
    assert paired_difference(table, table, CLASSES) == {"difference": None, "low": None, "high": None}


# Validation


def _with(column: str, value: object) -> pd.DataFrame:
    table = small().reset_index(drop=True).astype({column: object})
    table.loc[3, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (small().drop(columns="prob_pos"), "run.csv: missing column 'prob_pos'"),
        (small().drop(columns="case_id"), "missing column 'case_id'"),
        (small().iloc[:0], "empty table"),
        (_with("prob_pos", 1.2), r"row 3 \(slide s0-test-1, fold 0, test\), prob_pos: .* got 1.2"),
        (_with("prob_pos", float("nan")), "prob_pos: expected a probability within 0..1, got nan"),
        (_with("prob_pos", "high"), "prob_pos: expected a probability within 0..1, got high"),
        (_with("prob_pos", 0.5), "sum to 1, got 1.1"),
        (_with("label", 2), "label: expected one of the classes 'neg', 'pos', or nothing, got 2; check the classes"),
        (_with("label", "Pos"), "label: expected one of the classes 'neg', 'pos', or nothing, got Pos"),
        (_with("label", 0.5), "label: expected one of the classes 'neg', 'pos', or nothing, got 0.5"),
        (_with("fold", 0.5), "fold: expected a whole number from 0 on, got 0.5"),
        (_with("fold", 1e300), "fold: expected a whole number from 0 on, got 1e"),
        (_with("fold", -1), "fold: expected a whole number from 0 on, got -1"),
        (_with("part", "train"), "part: expected val, test or external, got train"),
        (_with("case_id", None), "case_id: expected an id"),
        (_with("slide_id", "s0-test-0"), "one row a fold and part, got s0-test-0"),
        (pd.concat([small(), small().assign(fold=5, label=0)]), "label: expected the same in all rows of a slide"),
    ],
)
def test_wrong_tables_raise_one_line(table: pd.DataFrame, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        evaluate_predictions(table, CLASSES, source="run.csv")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("run.csv: ")


def test_wrong_settings_raise() -> None:
    for settings in ({"bootstrap": -1}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(InputError, match="bootstrap: expected"):
            evaluate_predictions(small(), CLASSES, **settings)
    with pytest.raises(InputError, match="two or more different classes"):
        evaluate_predictions(small(), ("pos",))


def test_input_is_not_changed_and_extra_columns_are_allowed() -> None:
    table = small().assign(note="x", slide_id=range(12))
    before = table.copy()
    evaluate_predictions(table, CLASSES, bootstrap=0)
    pd.testing.assert_frame_equal(table, before)


def test_labels_are_names_of_classes() -> None:
    """Numbers stand for classes only where they cannot be taken for names."""
    numbers = small()
    got = evaluate_predictions(numbers, CLASSES, bootstrap=0)
    for labels in (
        numbers["label"].map({0: "neg", 1: "pos", -1: ""}),
        numbers["label"].map({0: "neg", 1: "pos"}),  # NaN
        numbers["label"].astype(float),
        numbers["label"].astype(str),
    ):
        assert evaluate_predictions(numbers.assign(label=labels), CLASSES, bootstrap=0) == got
    renamed = numbers.rename(columns={"prob_neg": "prob_1", "prob_pos": "prob_2"})
    one_two = renamed.assign(label=numbers["label"].map({0: 1, 1: 2}))
    assert evaluate_predictions(one_two, ("1", "2"), bootstrap=0)["test"] == got["test"]
    assert evaluate_predictions(one_two, ("1", "2"), bootstrap=0)["folds"][0]["auc"] == 0.75
    with pytest.raises(InputError, match="label: expected one of the classes '1', '2', or nothing, got 0"):
        evaluate_predictions(renamed, ("1", "2"))
    signs = numbers.rename(columns={"prob_neg": "prob_-1", "prob_pos": "prob_1"})
    signs = signs.assign(label=numbers["label"].map({0: -1, 1: 1}))
    assert evaluate_predictions(signs, ("-1", "1"), bootstrap=0)["test"] == got["test"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,case_id,label,fold,part\na,b,c,0,test\n", "got no column 'prob_<class>'"),
        ("slide_id,case_id,fold,part,prob_a\na,b,0,test,1\n", "expected a column 'label', got"),
        ("slide_id,case_id,label,fold,part,prob_a\na,b,c,0.5,test,1\n", "row 1, fold: expected a whole number, got"),
        ("slide_id,case_id,label,fold,part,prob_a\na,b,c,1e400,test,1\n", "row 1, fold: expected a whole number"),
        ("slide_id,case_id,label,fold,part,prob_a\na,b,c,0,test,1\na,b,c,0,test,\n", "row 2, prob_a: .* got ''"),
        ("slide_id,case_id,label,fold,part,prob_a\na,b,c,0,test,inf\n", "row 1, prob_a: expected a finite number"),
        ("slide_id,case_id,label,fold,part,prob_a\na,b,c,0,test,high\n", "row 1, prob_a: expected a finite number"),
        ("slide_id,case_id,label,fold,part,prob_a\na,b,c,0,test,1,2\n", "line 2: expected 6 cells, got 7"),
        ("", "expected a header and rows, got an empty file"),
        ('a,b\n"1,2\n', "expected a CSV table of predictions, got"),
    ],
)
def test_predictions_that_are_none(tmp_path, text: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        check_predictions(read_predictions(tmp_path / "p.csv"), ("a", "b"))
    assert "\n" not in str(caught.value)


def test_too_many_resamples_are_refused() -> None:
    with pytest.raises(InputError, match="expected 0 to 100000 samples"):
        evaluate_predictions(small(), CLASSES, bootstrap=10**8)


def test_predictions_read_back_from_csv_score_the_same(tmp_path) -> None:
    table = noisy()
    table["slide_id"] = ["NA", *(f"{i:04d}" for i in range(1, len(table)))]
    table["case_id"] = table["slide_id"]
    table.to_csv(tmp_path / "predictions.csv", index=False)
    back = read_predictions(tmp_path / "predictions.csv")
    assert back["slide_id"].iloc[3] == "0003"
    assert evaluate_predictions(back, CLASSES, bootstrap=50) == evaluate_predictions(table, CLASSES, bootstrap=50)
    with pytest.raises(InputError, match=r"none.csv"):
        read_predictions(tmp_path / "none.csv")


# Attention


def test_attention_auc_by_hand() -> None:
    assert attention_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert attention_auc([1.0, 1.0], [0, 1]) == 0.5
    assert attention_auc([1.0, 2.0], [1, 1]) is None
    assert attention_auc([], []) is None
    slides = {
        "a": ([0.1, 0.9], [0, 1]),
        "b": ([0.9, 0.1], [0, 1]),
        "c": ([0.9, 0.1], [0, 0]),
        "d": ([0, 1], [False, True]),
    }
    assert mean_attention_auc(slides) == {
        "mean": pytest.approx(2 / 3),
        "slides": {"a": 1.0, "b": 0.0, "c": None, "d": 1.0},
        "undefined": 1,
    }
    assert mean_attention_auc({})["mean"] is None


@pytest.mark.parametrize(
    ("scores", "truth"), [([1.0], [0, 1]), ([[1.0]], [[1]]), ([np.nan, 1], [0, 1]), ([0.1, 0.2], [0, 2])]
)
def test_attention_auc_refuses(scores: list[float], truth: list[int]) -> None:
    with pytest.raises(InputError, match="attention: expected"):
        attention_auc(scores, truth)


# -- calibration -------------------------------------------------------------------------------------------------


def test_calibration_by_hand_and_by_scikit_learn() -> None:
    from sklearn.metrics import brier_score_loss

    from momkd.metrics import calibration

    rng = np.random.default_rng(0)
    p, y = rng.random(400), rng.integers(0, 2, 400)
    table = pd.DataFrame({"fold": np.repeat([0, 1], 200), "label": y, "prob_a": 1 - p, "prob_b": p})
    found = calibration(table, ["a", "b"])
    folds = [slice(0, 200), slice(200, 400)]
    assert found["brier"] == pytest.approx(np.mean([brier_score_loss(y[f], p[f]) for f in folds]))
    want = []
    for f in folds:
        confidence, right = np.maximum(p[f], 1 - p[f]), (p[f] >= 0.5) == y[f]
        bins = np.minimum((confidence * 10).astype(int), 9)
        want.append(
            sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins))
        )
    assert found["ece"] == pytest.approx(np.mean(want))
    sure = pd.DataFrame(
        {"fold": 0, "label": [0, 1, 2], "prob_a": [1.0, 0, 0], "prob_b": [0, 1.0, 0], "prob_c": [0, 0, 1.0]}
    )
    assert calibration(sure, ["a", "b", "c"]) == {"ece": 0.0, "brier": 0.0}
    wrong = sure.assign(label=[1, 2, 0])
    assert calibration(wrong, ["a", "b", "c"]) == {"ece": 1.0, "brier": 2.0}

"""Predictions by patient, and metrics by slide and by patient beside each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from momkd.errors import InputError
from momkd.metrics import evaluate_predictions, paired_difference
from momkd.patients import RULES, by_patient
from momkd.predictions import check_predictions
from momkd.report import comparison_table, metrics_table
from tests.test_metrics import CLASSES, fold_table, noisy, small


def several() -> pd.DataFrame:
    """Patient a: 0.2 and 0.6, label 0; b: 0.5, label 1; c: 0.9 and 0.1 and 0.1, label 1. Validation likewise."""
    patients = ["a", "a", "b", "c", "c", "c"]
    labels, scores = [0, 0, 1, 1, 1, 1], [0.2, 0.6, 0.5, 0.9, 0.1, 0.1]
    tables = [
        fold_table(0, labels, scores, part, patients=[f"{part}-{p}" for p in patients]) for part in ("val", "test")
    ]
    return pd.concat(tables, ignore_index=True)


def hand(rule: str, p: list[float]) -> float:
    return {"mean": float(np.mean(p)), "max": max(p), "noisy-or": 1 - float(np.prod(1 - np.array(p)))}[rule]


@pytest.mark.parametrize("rule", RULES)
def test_a_patient_by_hand(rule: str) -> None:
    table = by_patient(check_predictions(several(), CLASSES), CLASSES, rule)
    test = table[table["part"] == "test"].set_index("case_id")
    for patient, own in {"a": [0.2, 0.6], "b": [0.5], "c": [0.9, 0.1, 0.1]}.items():
        assert test.loc[f"test-{patient}", "prob_pos"] == pytest.approx(hand(rule, own))
        assert test.loc[f"test-{patient}", "slides"] == len(own)
    np.testing.assert_allclose(table["prob_neg"] + table["prob_pos"], 1)
    got = evaluate_predictions(several(), CLASSES, bootstrap=0, patients=rule)
    auc = roc_auc_score([0, 1, 1], [hand(rule, p) for p in ([0.2, 0.6], [0.5], [0.9, 0.1, 0.1])])
    assert got["by_patient"]["test"]["auc"]["estimate"] == pytest.approx(auc)
    assert got["by_patient"]["folds"][0]["n_cases"] == 3
    assert got["test"]["auc"]["estimate"] == pytest.approx(3 / 8), "by slide"
    if rule == "noisy-or":  # a 0.68, b 0.5, c 0.919: the cut that is best for the patients of validation
        assert got["by_patient"]["folds"][0]["threshold"] == pytest.approx((0.68 + 0.919) / 2)


@pytest.mark.parametrize("rule", RULES)
def test_several_classes_sum_to_one(rule: str) -> None:
    probs = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.0, 0.0, 1.0]])
    table = pd.DataFrame({"slide_id": ["x", "y", "z"], "case_id": ["p", "p", "q"], "label": "a", "fold": 0})
    table = table.assign(part="test", **{f"prob_{c}": probs[:, i] for i, c in enumerate("abc")})
    got = by_patient(check_predictions(table, "abc"), "abc", rule)[["prob_a", "prob_b", "prob_c"]].to_numpy()
    np.testing.assert_allclose(got.sum(1), 1)
    joined = {"mean": [0.4, 0.25, 0.35], "max": [0.6, 0.3, 0.6], "noisy-or": [0.68, 0.44, 0.64]}[rule]
    np.testing.assert_allclose(got, [np.array(joined) / sum(joined), [0, 0, 1]])


def test_labels_of_a_patient() -> None:
    """Slides without a label count for the probability; a patient whose slides differ is left out, with a note."""
    table = several().astype({"label": object})
    table.loc[table["slide_id"] == "s0-test-1", "label"] = -1
    table.loc[table["slide_id"] == "s0-test-5", "label"] = 0
    got = evaluate_predictions(table, CLASSES, bootstrap=0)
    assert got["by_patient"]["folds"][0]["n_per_class"] == [1, 1]
    assert "by patient: left out, for their slides differ in class: 1" in got["notes"]
    patients = by_patient(check_predictions(table, CLASSES), CLASSES)
    assert patients.set_index("case_id").loc["test-a", "prob_pos"] == pytest.approx(0.4)


def test_the_external_ensemble_is_that_of_predict() -> None:
    """Slides are averaged over folds first, then joined: as `momkd predict` does."""
    one = fold_table(0, [0, 0, 1], [0.1, 0.9, 0.7], "external", patients=["a", "a", "b"])
    two = fold_table(1, [0, 0, 1], [0.5, 0.1, 0.3], "external", patients=["a", "a", "b"])
    both = pd.concat([small(), one, two.assign(slide_id=one["slide_id"])])
    got = evaluate_predictions(both, CLASSES, bootstrap=0, patients="max")["by_patient"]
    assert got["external_ensemble"]["auc"]["estimate"] == 0.5  # 0.5 and 0.5, not 0.7 and 0.5
    assert got["external"]["auc"]["estimate"] == 0.0


def test_four_parts_fit_eighty_columns() -> None:
    table = several()
    external = table[table["part"] == "test"].assign(part="external", slide_id=lambda t: "e" + t["slide_id"])
    both = pd.concat([table, external], ignore_index=True)
    shown = text(metrics_table(evaluate_predictions(both, CLASSES, bootstrap=10), "run"), width=80)
    assert "External" in shown
    assert "…" not in shown


def test_one_slide_each_is_said_once() -> None:
    got = evaluate_predictions(noisy(), CLASSES, bootstrap=10)
    assert got["by_patient"] == {"rule": "mean", "one_slide_each": True}
    shown = text(metrics_table(got, "run"))
    assert "Positive class: pos. Every patient has one slide: metrics by slide and by patient are the same." in shown
    assert shown.count("Balanced accuracy") == 1
    assert "by patient" not in text(comparison_table({"x": got}))


def test_both_are_shown_by_name() -> None:
    got = evaluate_predictions(several(), CLASSES, bootstrap=10, patients="max")
    shown = text(metrics_table(got, "run"))
    by_slide, by_patients = shown.split("By slide")[1].split("By patient", 1)
    for words in ("AUC ", "Balanced accuracy", "AUC, fold 0"):
        assert words in by_slide
        assert words in by_patients
    assert "By patient: max of the probabilities" in by_patients
    head = text(comparison_table({"x": got}))
    assert "x, by slide" in head
    assert "x, by patient" in head


def test_differences_by_patient() -> None:
    a = several()
    b = a.assign(prob_pos=a["prob_neg"], prob_neg=a["prob_pos"])
    got = paired_difference(a, b, CLASSES, bootstrap=0, patients="mean")
    each = [evaluate_predictions(t, CLASSES, bootstrap=0)["by_patient"]["test"]["auc"]["estimate"] for t in (a, b)]
    assert got["difference"] == pytest.approx(each[0] - each[1])


def test_an_unknown_rule() -> None:
    with pytest.raises(InputError, match="patients: expected one of mean, max, noisy-or, got 'median'"):
        evaluate_predictions(small(), CLASSES, patients="median")


def text(table: Any, width: int = 300) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return " ".join(captured.get().split())

"""Predictions of patients from those of their slides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from momkd.bootstrap import Floats, Ints
from momkd.errors import InputError

RULES = ("mean", "max", "noisy-or")


def check_rule(rule: str) -> str:
    """The rule. Raises InputError where it is none of `RULES`."""
    if rule not in RULES:
        raise InputError(f"patients: expected one of {', '.join(RULES)}, got {rule!r}")
    return rule


def one_slide_each(table: pd.DataFrame) -> bool:
    """Whether in every fold and part each patient has one slide: then patients are scored as their slides are."""
    return not table.duplicated(["fold", "part", "case_id"]).any()


def by_patient(table: pd.DataFrame, classes: Sequence[str], rule: str = "mean") -> pd.DataFrame:
    """Return a row a patient, fold and part from a checked table of slides.

    All predicted slides of a patient count, labelled or not. Over its slides i,

        mean        p_c = mean_i p_ic
        max         p_c = max_i p_ic
        noisy-or    p_c = 1 − Π_i (1 − p_ic)

    For two classes, max and noisy-or are of the second, the positive one: p_0 = 1 − p_1. For more classes they are
    taken of each class and then divided by their sum. With many slides noisy-or comes near to 1 for every patient.

    Args:
        table: slide_id, case_id, label (int64, -1 unknown), fold, part, prob_<class>.
        classes: the C class names.
        rule: "mean", "max" or "noisy-or".

    Returns:
        The same columns, in the order of the patients' first slides: `slide_id` is the case_id, `label` that of the
        labelled slides, -2 where they differ, -1 where there are none; and `slides`, how many there are.

    Raises:
        InputError: another rule.
    """
    check_rule(rule)
    probs = [f"prob_{name}" for name in classes]
    group = table.groupby(["fold", "part", "case_id"], sort=False, dropna=False).ngroup().to_numpy(np.int64)
    count = int(group.max(initial=-1)) + 1
    first = np.full(count, len(table), np.int64)
    np.minimum.at(first, group, np.arange(len(table)))
    patients: pd.DataFrame = table.iloc[first][["slide_id", "case_id", "label", "fold", "part"]].reset_index(drop=True)
    patients["slide_id"] = patients["case_id"]
    patients["label"] = _labels(table["label"].to_numpy(np.int64), group, count)
    patients[probs] = _joined(table[probs].to_numpy(np.float64), group, count, rule)
    patients["slides"] = np.bincount(group, minlength=count)
    return patients


def _labels(labels: Ints, group: Ints, count: int) -> Ints:
    lowest, highest = np.full(count, np.iinfo(np.int64).max), np.full(count, -1, np.int64)
    known = labels >= 0
    np.minimum.at(lowest, group[known], labels[known])
    np.maximum.at(highest, group[known], labels[known])
    return np.where(highest < 0, -1, np.where(lowest == highest, highest, -2))


def _joined(probs: Floats, group: Ints, count: int, rule: str) -> Floats:
    """Probabilities (n, C) of slides -> (count, C) of patients."""
    sums = np.zeros((count, probs.shape[1]))
    if rule == "mean":
        np.add.at(sums, group, probs)
        return sums / np.bincount(group, minlength=count)[:, None]
    if rule == "max":
        np.maximum.at(sums, group, probs)
    else:
        with np.errstate(divide="ignore"):  # of a slide that is sure
            np.add.at(sums, group, np.log1p(-probs))
        sums = -np.expm1(sums)
    if probs.shape[1] == 2:
        return np.stack([1 - sums[:, 1], sums[:, 1]], axis=1)
    return np.asarray(sums / sums.sum(axis=1, keepdims=True))

"""The table of predictions: what it must hold, the decision made from it, and its folds as arrays.

Train, evaluate and predict write one schema:

    slide_id, case_id    text
    label                name of the class, empty where unknown
    fold                 whole number; empty where the models of several folds were averaged (momkd predict)
    part                 "val", "test", "external" or, of momkd predict, "predict"
    prob_<class>         of each class, in the order of the run; of two classes the second is the positive one
    predicted            name of the class: of two the second from the fold's threshold on, of more the most probable
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from momkd.bootstrap import Floats, Ints, Rows
from momkd.data.text import read_text_table
from momkd.errors import InputError
from momkd.ties import tied

PARTS = ("val", "test", "external")
PREDICT = "predict"
_COLUMNS = ("slide_id", "case_id", "label", "fold", "part")
_SUM_TOLERANCE = 1e-3
_INTEGER = re.compile(r"[+-]?\d{1,18}")


def read_predictions(path: Path | str) -> pd.DataFrame:
    """Read a table of predictions that momkd wrote: int64 fold, float64 probabilities, everything else text.

    Ids stay text ("007" is not 7). An empty cell is NaN.

    Raises:
        InputError: naming file, line and column: the file is missing, is not a CSV table, lacks a column, or a fold or
            a probability is not a finite number. What it means is checked where it is used.
    """
    expected = "a CSV table of predictions"
    table = read_text_table(path, _COLUMNS, expected)
    probs = [column for column in table.columns if column.startswith("prob_")]
    if not probs:
        raise InputError(f"{path}: expected {expected}, got no column 'prob_<class>'; write it with momkd train")
    for column, kind in ({"fold": "a whole number"} | dict.fromkeys(probs, "a finite number")).items():
        values = [_number(text, whole=column == "fold") for text in table[column]]
        if None in values:
            row = values.index(None)
            told = str(table[column].iloc[row])[:40]
            raise InputError(f"{path}: row {row + 1}, {column}: expected {kind}, got {told!r}; predict again")
        table[column] = np.array(values, np.int64 if column == "fold" else np.float64)
    texts = [column for column in table.columns if column != "fold" and column not in probs]
    table[texts] = table[texts].where(table[texts] != "")
    return table


def is_predictions(path: Path) -> bool:
    """Whether a file begins with the header of a table that `momkd predict` writes, of slides or of patients."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header = next(csv.reader([file.readline(1 << 20)]), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    rest = [column for column in header if not column.startswith("prob_")]
    slides, patients = _COLUMNS, ("case_id", "slides", *_COLUMNS[2:])
    return len(header) >= len(rest) + 2 and rest in ([*slides, "predicted"], [*patients, "predicted"])


def _number(text: object, *, whole: bool) -> float | None:
    try:
        number = float(str(text))
    except ValueError:
        return None
    if not math.isfinite(number) or (whole and (number != round(number) or abs(number) > 2**53)):
        return None
    return number


def prediction_table(
    labels: pd.DataFrame,
    slides: Sequence[str],
    probs: Floats,
    classes: Sequence[str],
    *,
    fold: int | None,
    part: str,
    threshold: float | None = None,
) -> pd.DataFrame:
    """The table of one fold and part.

    Args:
        labels: index slide_id, columns case_id (text) and label (numbers of `classes`, -1 unknown).
        slides: n slide ids.
        probs: (n, C), in the order of `slides`.
        classes: C names.
        fold, part: of all rows; fold is None for a mean over folds.
        threshold: of two classes, for the column `predicted`; None leaves that out.
    """
    table: pd.DataFrame = labels.loc[list(slides), ["case_id", "label"]].reset_index(names="slide_id")
    table["label"] = table["label"].map(dict(enumerate(classes))).astype(object)
    table["fold"], table["part"] = pd.NA if fold is None else fold, part
    for c, name in enumerate(classes):
        table[f"prob_{name}"] = probs[:, c]
    return table if threshold is None else with_predicted(table, classes, threshold)


def with_predicted(table: pd.DataFrame, classes: Sequence[str], threshold: float) -> pd.DataFrame:
    """The table with the column `predicted`: the name of the class that is decided on."""
    probs = table[[f"prob_{name}" for name in classes]].to_numpy(np.float64)
    names = np.array([str(classes[c]) for c in decide(probs, threshold)], dtype=object)
    decided: pd.DataFrame = table.assign(predicted=names)
    return decided


def check_predictions(predictions: pd.DataFrame, classes: Sequence[str], source: str = "predictions") -> pd.DataFrame:
    """A clean copy of the table: label as int64 number of a class (-1 unknown), int64 fold, text ids, float64
    probabilities; index 0..n-1.

    Labels are names of classes; empty, NaN and -1 mean unknown. Whole numbers from 0 to C - 1 may stand for the classes
    where no class is named like a number, or each like its own.

    Raises:
        InputError: naming `source`, the column and the first wrong row.
    """
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise InputError(f"{source}: expected two or more different classes, got {tuple(classes)}")
    probs = [f"prob_{c}" for c in classes]
    if missing := [c for c in (*_COLUMNS, *probs) if c not in predictions.columns]:
        raise InputError(f"{source}: missing column {missing[0]!r}; it has {', '.join(map(str, predictions.columns))}")
    if len(predictions) == 0:
        raise InputError(f"{source}: expected a row for every slide, got an empty table; predict first")
    table: pd.DataFrame = predictions[[*_COLUMNS, *probs]].reset_index(drop=True)
    check = _Check(table.copy(), source)
    for column in ("slide_id", "case_id"):
        check.all(table[column].notna(), column, "an id", "fill it in")
        table[column] = table[column].astype(str)
    labels, known = _label_numbers(table["label"], [str(name) for name in classes])
    names = ", ".join(map(repr, classes))
    check.all(known, "label", f"one of the classes {names}, or nothing", "check the classes")
    table["label"] = labels
    numbers = pd.to_numeric(table["fold"], errors="coerce").astype(np.float64)
    whole = (numbers == numbers.round()) & numbers.between(0, 2**31)  # false for NaN
    check.all(whole, "fold", "a whole number from 0 on", "number the folds")
    table["fold"] = numbers.astype(np.int64)
    check.all(table["part"].isin(PARTS), "part", "val, test or external", "name the part")
    for column in probs:
        table[column] = pd.to_numeric(table[column], errors="coerce").astype(np.float64)
        check.all(table[column].between(0, 1), column, "a probability within 0..1", "predict again")
    total = table[probs].sum(axis=1)
    check.table["sum"] = total
    check.all((total - 1).abs() <= _SUM_TOLERANCE, "sum", "probabilities that sum to 1", "give all classes")
    check.all(~table.duplicated(["slide_id", "fold", "part"]), "slide_id", "one row a fold and part", "drop the second")
    first = table.groupby([table["part"] == "external", "slide_id"])[["case_id", "label"]].transform("first")
    for column in ("case_id", "label"):
        check.all(table[column] == first[column], column, "the same in all rows of a slide", "make them agree")
    return table


def _label_numbers(labels: pd.Series[Any], classes: Sequence[str]) -> tuple[Ints, pd.Series[bool]]:
    """The number of each label's class, -1 for none, and which of them are known so (n,)."""
    number: dict[str, int | None] = {name: c for c, name in enumerate(classes)}
    by_number = not any(map(_INTEGER.fullmatch, classes)) or list(classes) == [str(c) for c in range(len(classes))]
    texts = labels.map(_label_text)
    for text in set(texts) - number.keys():
        c = int(text) if _INTEGER.fullmatch(text) else None
        good = text == "" or c == -1 or (by_number and c is not None and 0 <= c < len(classes))
        number[text] = (-1 if text == "" else c) if good else None
    found = [number[text] for text in texts]
    return (
        np.array([-1 if c is None else c for c in found], np.int64),
        pd.Series([c is not None for c in found], index=labels.index, dtype=bool),
    )


def _label_text(label: Any) -> str:
    """How a label of a table is written as the name of a class: 1.0 as "1"."""
    if label is None or label is pd.NA or label != label:
        return ""
    if isinstance(label, float | np.floating) and float(label).is_integer():
        return str(int(label))
    return str(label)


class _Check:
    """Raises for the first row that breaks a rule."""

    def __init__(self, table: pd.DataFrame, source: str) -> None:
        self.table, self.source = table, source

    def all(self, good: pd.Series[bool], column: str, expected: str, remedy: str) -> None:
        if good.all():
            return
        row = int(np.argmin(good.to_numpy()))
        slide, fold, part, value = (self.table[c].iloc[row] for c in ("slide_id", "fold", "part", column))
        where = f"{self.source}: row {row} (slide {slide}, fold {fold}, {part}), {column}"
        raise InputError(f"{where}: expected {expected}, got {value}; {remedy}")


def check_paired(tables: Sequence[pd.DataFrame], part: str, names: tuple[str, str]) -> None:
    """Both tables predict the same slides, in the same folds, with the same labels and patients.

    Args:
        tables: two checked tables, sorted alike.
        part: whose rows are compared.
        names: what errors call them.

    Raises:
        InputError: naming the first slide that differs.
    """
    both = "; compare predictions made with the same splits and labels"
    a, b = (t[t["part"] == part].set_index(["fold", "slide_id"]) for t in tables)
    if len(a) == 0:
        raise InputError(f"{names[0]}: expected labelled rows of part {part!r}, got none{both}")
    if len(only := a.index.symmetric_difference(b.index)):
        fold, slide = only[0]
        has, lacks = names if only[0] in a.index else names[::-1]
        raise InputError(
            f"{lacks}: expected a labelled {part} row for slide {slide} of fold {fold} as in {has}, got none{both}"
        )
    for column in ("label", "case_id"):
        if (differs := (a[column] != b[column]).to_numpy()).any():
            fold, slide = a.index[differs][0]
            values = a[column][differs].iloc[0], b[column][differs].iloc[0]
            raise InputError(
                f"{names[1]}: slide {slide}: expected {column} {values[0]} as in {names[0]}, got {values[1]}{both}"
            )


def youden_threshold(labels: Ints, scores: Floats) -> float | None:
    """The threshold, halfway between two scores, with the greatest sensitivity + specificity − 1.

    Of several equally good ones it is the one nearest 0.5.

    Args:
        labels: (n,) 0 or 1.
        scores: (n,) a score ≥ the threshold means 1. Those that differ by rounding alone are not told apart.

    Returns:
        The threshold, or None where one class is absent or no threshold does better than chance.
    """
    if len(np.unique(labels)) < 2:
        return None
    from sklearn.metrics import roc_curve  # a second: only where it is used

    equal = tied(scores)
    fpr, tpr, cuts = roc_curve(labels, equal, drop_intermediate=False)  # cuts: inf, then the distinct scores, falling
    upper = cuts[1:-1]
    below = np.searchsorted(np.sort(equal), upper, side="left") - 1
    lower = np.sort(scores)[below]  # the highest score below the cut: a group of ties reaches above its value
    gain = (tpr - fpr)[1:-1]
    if gain.size == 0 or gain.max() <= 1e-12:
        return None
    middle = (upper + lower) / 2
    middle = np.where(middle > lower, middle, upper)
    best = middle[gain >= gain.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def choose_thresholds(
    table: pd.DataFrame, classes: Sequence[str], notes: list[str], prefix: str = ""
) -> dict[int, float]:
    """Threshold of every fold of a checked table; empty for more than two classes."""
    result: dict[int, float] = {}
    for fold in sorted(table["fold"].unique().tolist()) if len(classes) == 2 else ():
        val = table[(table["fold"] == fold) & (table["part"] == "val") & (table["label"] >= 0)]
        found = youden_threshold(val["label"].to_numpy(), val[f"prob_{classes[1]}"].to_numpy(np.float64))
        if found is None:
            cause = "validation slides lack a class or are ranked no better than chance"
            notes.append(f"{prefix}fold {fold}: threshold 0.5, for its {cause}")
        result[fold] = 0.5 if found is None else found
    return result


def decide(probs: Floats, threshold: float) -> Ints:
    """Probabilities (n, C) -> the n classes: of two the second from the threshold on, of more the most probable."""
    decided = probs.argmax(axis=1) if probs.shape[1] > 2 else probs[:, 1] >= threshold
    return np.asarray(decided, np.int64)


def scored_rows(table: pd.DataFrame, classes: Sequence[str], threshold: float, name: str) -> Rows:
    probs = table[[f"prob_{c}" for c in classes]].to_numpy(np.float64)
    labels = table["label"].to_numpy(np.int64)
    return Rows(name, labels, probs, decide(probs, threshold), table["case_id"].to_numpy(object).astype(str))


def fold_rows(
    labelled: pd.DataFrame, part: str, classes: Sequence[str], thresholds: Mapping[int, float]
) -> dict[int, Rows]:
    folds = labelled[labelled["part"] == part].groupby("fold")
    return {int(f): scored_rows(rows, classes, thresholds.get(int(f), 0.5), f"{part}, fold {f}") for f, rows in folds}


def pool(folds: Sequence[Rows]) -> Rows:
    """All folds as one table; each row keeps the decision by its own fold's threshold."""
    joined = (np.concatenate([getattr(r, k) for r in folds]) for k in ("labels", "probs", "predicted", "cases"))
    return Rows("pooled", *joined)


def ensemble(table: pd.DataFrame, classes: Sequence[str], source: str) -> pd.DataFrame:
    """Probabilities of the external slides of a checked table averaged over folds; fold 0 stands for all."""
    external = table[table["part"] == "external"]
    slides = external.groupby("slide_id")
    folds = external["fold"].nunique()
    if len(short := slides.size()[lambda n: n < folds]):
        raise InputError(
            f"{source}: external slide {short.index[0]}: expected a row of each of {folds} folds, got {short.iloc[0]}; "
            "predict it with every fold"
        )
    mean = slides[[f"prob_{c}" for c in classes]].mean().join(slides[["case_id", "label"]].first())
    averaged: pd.DataFrame = mean.reset_index().assign(fold=0, part="external")
    return averaged

"""The table of predictions: what it must hold, the decision made from it, and its folds as arrays.

Columns: slide_id, case_id, label (-1 unknown), fold, part ("val", "test" or "external") and prob_<class> of each class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from momkd.bootstrap import Floats, Ints, Rows
from momkd.errors import InputError

PARTS = ("val", "test", "external")
_COLUMNS = ("slide_id", "case_id", "label", "fold", "part")
_SUM_TOLERANCE = 1e-3


def read_predictions(path: Path | str) -> pd.DataFrame:
    """Reads predictions.csv; ids stay text ("007" is not 7).

    Raises:
        InputError: the file is missing or is not a CSV table. What it holds is checked where it is used.
    """
    try:
        return pd.read_csv(path, dtype={"slide_id": str, "case_id": str}, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"{path}: expected a CSV table of predictions, got {cause}; write it with momkd train"
        ) from error


def prediction_table(
    labels: pd.DataFrame, slides: Sequence[str], probs: Floats, classes: Sequence[str], *, fold: int, part: str
) -> pd.DataFrame:
    """The table of one fold and part.

    Args:
        labels: index slide_id, columns case_id and label.
        slides: n slide ids.
        probs: (n, C), in the order of `slides`.
        classes: C names.
        fold, part: of all rows.
    """
    table: pd.DataFrame = labels.loc[list(slides), ["case_id", "label"]].reset_index()
    table["fold"], table["part"] = fold, part
    for c, name in enumerate(classes):
        table[f"prob_{name}"] = probs[:, c]
    return table


def check_predictions(predictions: pd.DataFrame, classes: Sequence[str], source: str = "predictions") -> pd.DataFrame:
    """A clean copy of the table (int64 label and fold, text ids, float64 probabilities), index 0..n-1.

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
    for column in ("label", "fold"):
        numbers = pd.to_numeric(table[column], errors="coerce").astype(np.float64)
        check.all(numbers == numbers.round(), column, "an integer", "write -1 for an unknown label")  # false for NaN
        table[column] = numbers.astype(np.int64)
    check.all(table["label"].between(-1, len(classes) - 1), "label", f"-1..{len(classes) - 1}", "check the classes")
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
        scores: (n,) a score ≥ the threshold means 1.

    Returns:
        The threshold, or None where one class is absent or no threshold does better than chance.
    """
    if len(np.unique(labels)) < 2:
        return None
    fpr, tpr, cuts = roc_curve(labels, scores, drop_intermediate=False)  # cuts: inf, then the distinct scores, falling
    upper, lower = cuts[1:-1], cuts[2:]
    gain = (tpr - fpr)[1:-1]
    if gain.size == 0 or gain.max() <= 1e-12:
        return None
    middle = (upper + lower) / 2
    middle = np.where(middle > lower, middle, upper)  # neighbouring floats: the midpoint rounds onto one of them
    best = middle[gain >= gain.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def choose_thresholds(labelled: pd.DataFrame, classes: Sequence[str], notes: list[str]) -> dict[int, float]:
    """Threshold of every fold; empty for more than two classes."""
    result: dict[int, float] = {}
    for fold in sorted(labelled["fold"].unique().tolist()) if len(classes) == 2 else ():
        val = labelled[(labelled["fold"] == fold) & (labelled["part"] == "val")]
        found = youden_threshold(val["label"].to_numpy(), val[f"prob_{classes[1]}"].to_numpy(np.float64))
        if found is None:
            cause = "validation slides lack a class or are ranked no better than chance"
            notes.append(f"fold {fold}: threshold 0.5, for its {cause}")
        result[fold] = 0.5 if found is None else found
    return result


def _decide(probs: Floats, threshold: float | None) -> Ints:
    return np.argmax(probs, axis=1) if threshold is None else (probs[:, 1] >= threshold).astype(np.int64)


def _rows(table: pd.DataFrame, classes: Sequence[str], threshold: float | None, name: str) -> Rows:
    probs = table[[f"prob_{c}" for c in classes]].to_numpy(np.float64)
    labels = table["label"].to_numpy(np.int64)
    return Rows(name, labels, probs, _decide(probs, threshold), table["case_id"].to_numpy(object).astype(str))


def fold_rows(
    labelled: pd.DataFrame, part: str, classes: Sequence[str], thresholds: Mapping[int, float]
) -> dict[int, Rows]:
    folds = labelled[labelled["part"] == part].groupby("fold")
    return {int(f): _rows(rows, classes, thresholds.get(int(f)), f"{part}, fold {f}") for f, rows in folds}


def pool(folds: Sequence[Rows]) -> Rows:
    """All folds as one table; each row keeps the decision by its own fold's threshold."""
    joined = (np.concatenate([getattr(r, k) for r in folds]) for k in ("labels", "probs", "predicted", "cases"))
    return Rows("pooled", *joined)


def ensemble_rows(labelled: pd.DataFrame, classes: Sequence[str], thresholds: Mapping[int, float], source: str) -> Rows:
    """Probabilities of the external slides averaged over folds; the threshold is the mean of the folds' thresholds."""
    external = labelled[labelled["part"] == "external"]
    slides = external.groupby("slide_id")
    folds = external["fold"].nunique()
    if len(short := slides.size()[lambda n: n < folds]):
        raise InputError(
            f"{source}: external slide {short.index[0]}: expected a row of each of {folds} folds, got {short.iloc[0]}; "
            "predict it with every fold"
        )
    table = slides[[f"prob_{c}" for c in classes]].mean().join(slides[["case_id", "label"]].first())
    used = [thresholds[f] for f in external["fold"].unique() if f in thresholds]
    return _rows(table, classes, float(np.mean(used)) if used else None, "external ensemble")

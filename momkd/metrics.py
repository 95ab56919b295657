"""Metrics of slide predictions, with 95 % intervals that resample patients, not slides.

Estimates come from scikit-learn. Every interval is a percentile bootstrap over patients (`momkd.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from momkd.bootstrap import METRICS, MOST_SAMPLES, Floats, PatientBootstrap, Rows
from momkd.errors import InputError
from momkd.patients import by_patient, check_rule, one_slide_each
from momkd.predictions import (
    PARTS,
    check_paired,
    check_predictions,
    choose_thresholds,
    ensemble,
    fold_rows,
    pool,
    scored_rows,
)
from momkd.ties import tied


def evaluate_predictions(
    predictions: pd.DataFrame,
    classes: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    patients: str = "mean",
    source: str = "predictions",
) -> dict[str, Any]:
    """Everything that metrics.json holds: metrics by slide and, where a patient has several slides, by patient.

    Two classes: the second is the positive one, and f1, balanced accuracy and accuracy use the threshold of greatest
    Youden's J on the validation part of the same fold (the interval takes it as fixed). More classes: macro one-vs-rest
    AUC, macro average precision, macro F1, and the most probable class. A fold that lacks a class has only an accuracy.
    Scores that differ by rounding alone tie (`momkd.ties`).

    A patient has one prediction, see `momkd.patients.by_patient`, and the label of its slides; one whose slides differ
    in class is not scored. The threshold of patients is chosen on those of the validation part.

    Args:
        predictions: one row a slide, fold and part: slide_id, case_id, label (the name of its class; nothing where
            unknown), fold, part ("val", "test" or "external"), prob_<class> for every class. Numbers 0 to C - 1 may
            stand for the names where no class is named like a number, or each like its own.
        classes: the C class names; of two the second is the positive one.
        bootstrap: resamples of patients, up to 100,000; 0 gives no intervals.
        seed: of the resampling.
        level: of the intervals.
        patients: what a patient's prediction is: "mean", "max" or "noisy-or" of those of its slides.
        source: what errors call the table, such as its file.

    Returns:
        A dict that is JSON without NaN (undefined is None, with the reason in "notes"). "test": {metric: {"estimate",
        "low", "high"}}, the mean over folds, patients being resampled within each fold (jointly where folds share
        patients); "pooled": the same for the predictions of all folds as one table; "folds": one flat dict a fold;
        "external" and "external_folds": the same for the external part; "external_ensemble": its probabilities
        averaged over folds. A part without labelled rows has no keys.
        "by_patient": {"rule": `patients`, "one_slide_each": whether every patient has one slide} and, where not, all of
        these keys by patient.

    Raises:
        InputError: a column is missing, or a row holds what the table may not.
    """
    _check_settings(bootstrap, level)
    check_rule(patients)
    table = check_predictions(predictions, classes, source)
    mean = ensemble(table[table["label"] >= 0], classes, source)
    notes: list[str] = []
    counts: dict[str, Any] = {}
    scorer = _Scorer(tuple(classes), bootstrap, seed, level, notes)
    result = _score_level(table, mean, scorer)
    counts |= scorer.counts
    grouped: dict[str, Any] = {"rule": patients, "one_slide_each": one_slide_each(table)}
    if not grouped["one_slide_each"]:
        scorer = _Scorer(tuple(classes), bootstrap, seed, level, notes, unit="patient")
        each = by_patient(table, classes, patients)
        if differ := each.loc[each["label"] == -2, "case_id"].nunique():
            notes.append(f"by patient: left out, for their slides differ in class: {differ}")
        mean = by_patient(ensemble(table, classes, source), classes, patients)
        grouped |= _score_level(each, mean, scorer)
        grouped["bootstrap"] = scorer.counts
    result["by_patient"] = grouped
    result["classes"] = list(classes)
    result["unlabelled"] = {part: int(((table["part"] == part) & (table["label"] < 0)).sum()) for part in PARTS}
    result["bootstrap"] = {"samples": bootstrap, "unit": "patient", "level": level, "seed": seed, **counts}
    result["notes"] = notes
    return result


def _score_level(table: pd.DataFrame, mean: pd.DataFrame, scorer: _Scorer) -> dict[str, Any]:
    """Metrics of the rows of a checked table, which are slides or patients; `mean` is that of the external ones."""
    classes = scorer.classes
    labelled = table[table["label"] >= 0]
    thresholds = choose_thresholds(labelled, classes, scorer.notes, scorer.prefix)
    result: dict[str, Any] = {}
    if test := fold_rows(labelled, "test", classes, thresholds):
        result["test"], result["folds"] = scorer.score(test, "test")
        _note_repeated(labelled, scorer)
        result["pooled"], _ = scorer.score([pool(list(test.values()))], "pooled")
    if external := fold_rows(labelled, "external", classes, thresholds):
        result["external"], result["external_folds"] = scorer.score(external, "external")
        used = [thresholds[fold] for fold in external if fold in thresholds]
        threshold = float(np.mean(used)) if used else 0.5
        rows = scored_rows(mean[mean["label"] >= 0], classes, threshold, "external ensemble")
        result["external_ensemble"], _ = scorer.score([rows], "external_ensemble")
    for fold in [*result.get("folds", []), *result.get("external_folds", [])]:
        fold["threshold"] = thresholds.get(fold["fold"])
    return result


def paired_difference(
    a: pd.DataFrame,
    b: pd.DataFrame,
    classes: Sequence[str],
    metric: str = "auc",
    part: str = "test",
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    patients: str | None = None,
    names: tuple[str, str] = ("a", "b"),
) -> dict[str, float | None]:
    """Metric of a minus metric of b, the mean over folds, with an interval from resampling the same patients for both.

    Args:
        a, b: predictions of the same slides in the same folds; columns as in `evaluate_predictions`.
        classes: the C class names.
        metric: one of "auc", "auprc", "f1", "balanced_accuracy", "accuracy".
        part: "test" or "external".
        bootstrap, seed, level: as in `evaluate_predictions`.
        patients: compare patients by this rule, see `momkd.patients.by_patient`; None compares slides.
        names: what errors call the two tables.

    Returns:
        {"difference", "low", "high"}; None where no fold defines the metric.

    Raises:
        InputError: slides, folds, labels or patients differ, or a table is wrong in itself.
    """
    _check_settings(bootstrap, level)
    if metric not in METRICS or part not in PARTS[1:]:
        raise InputError(
            f"difference: expected a metric of {METRICS} and part 'test' or 'external', got {metric!r}, {part!r}"
        )
    tables = []
    for frame, name in ((a, names[0]), (b, names[1])):
        table = check_predictions(frame, classes, name)
        table = table if patients is None else by_patient(table, classes, patients)
        tables.append(table[table["label"] >= 0].sort_values(["fold", "slide_id"], ignore_index=True))
    check_paired(tables, part, names)
    folds = [list(fold_rows(t, part, classes, choose_thresholds(t, classes, [])).values()) for t in tables]
    used = [i for i, rows in enumerate(folds[0]) if metric == "accuracy" or rows.complete]
    if not used:
        return {"difference": None, "low": None, "high": None}
    estimates = np.array(
        [[_estimates(rows[i])[metric] for i in used] for rows in folds], dtype=np.float64
    )  # (2, folds)
    samples = PatientBootstrap(bootstrap, seed).metrics(folds)
    difference = np.mean([samples[0][i][metric] - samples[1][i][metric] for i in used], axis=0)
    low, high = _interval(difference, level)
    return {"difference": float(np.mean(estimates[0] - estimates[1])), "low": low, "high": high}


def calibration(predictions: pd.DataFrame, classes: Sequence[str], *, bins: int = 10) -> dict[str, float]:
    """How far probabilities are from frequencies: the mean over folds of the two usual measures.

    Args:
        predictions: labelled rows of one part of a checked table, whose labels are numbers.
        classes: the C class names.
        bins: of equal width, for the calibration error.

    Returns:
        "ece": expected calibration error of the most probable class, Σ_bins share · |accuracy − confidence|; "brier":
        mean over rows of Σ_c (p_c − 1[c = label])², halved for two classes, where it is then that of the second class.

    Source: Guo et al., ICML 2017; Brier, 1950.
    """
    each: list[tuple[float, float]] = []
    for _, rows in predictions.groupby("fold"):
        p = rows[[f"prob_{name}" for name in classes]].to_numpy(np.float64)  # (n, C)
        y = rows["label"].to_numpy(np.int64)
        confidence, right = p.max(1), p.argmax(1) == y
        place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
        gap = np.bincount(place, right - confidence, minlength=bins)  # of each bin, times its rows
        brier = float(np.square(p - np.eye(len(classes))[y]).sum(1).mean())
        each.append((float(np.abs(gap).sum() / len(rows)), brier / 2 if len(classes) == 2 else brier))
    ece, brier = np.mean(each, axis=0)
    return {"ece": float(ece), "brier": float(brier)}


def attention_auc(scores: ArrayLike, truth: ArrayLike) -> float | None:
    """How well the attention of one slide ranks its positive patches: ROC AUC.

    Args:
        scores: (N,) attention, or any score that grows with it.
        truth: (N,) 0 or 1.

    Returns:
        The AUC, or None where the slide has patches of one kind only.

    Raises:
        InputError: shapes differ, a score is not finite, or the truth is not 0 or 1.
    """
    score, true = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    if score.ndim != 1 or score.shape != true.shape:
        raise InputError(f"attention: expected scores and truth of one shape (N,), got {score.shape} and {true.shape}")
    if not np.isfinite(score).all() or not np.isin(true, (0, 1)).all():
        raise InputError("attention: expected finite scores and a truth of 0 and 1; another value came")
    return float(roc_auc_score(true, tied(score))) if len(np.unique(true)) == 2 else None


def mean_attention_auc(slides: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> dict[str, Any]:
    """`attention_auc` of every slide, and their mean.

    Args:
        slides: {slide_id: (scores (N,), truth (N,))}.

    Returns:
        {"mean": over the slides that define it, or None; "slides": {slide_id: auc or None}; "undefined": how many}.
    """
    each = {slide: attention_auc(scores, truth) for slide, (scores, truth) in slides.items()}
    defined = [auc for auc in each.values() if auc is not None]
    return {"mean": float(np.mean(defined)) if defined else None, "slides": each, "undefined": len(each) - len(defined)}


class _Scorer:
    """Scores groups of folds, and collects notes and the counts of the bootstrap."""

    def __init__(
        self, classes: tuple[str, ...], samples: int, seed: int, level: float, notes: list[str], unit: str = "slide"
    ) -> None:
        self.classes, self.samples, self.seed, self.level, self.notes = classes, samples, seed, level, notes
        self.unit, self.prefix = unit, "" if unit == "slide" else f"by {unit}: "
        self.counts: dict[str, dict[str, int]] = {"redrawn": {}, "dropped": {}}

    def score(self, rows: Mapping[int, Rows] | list[Rows], part: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Mean over folds with intervals, and every fold by itself."""
        folds = list(rows.values()) if isinstance(rows, Mapping) else rows
        estimates = [_estimates(r) for r in folds]
        several = [len(np.unique(r.cases)) > 1 for r in folds]  # one patient alone has no interval
        for r, enough in zip(folds, several, strict=True):
            self._note(r, enough)
        boot = PatientBootstrap(self.samples, self.seed)
        samples = boot.metrics([folds])[0]
        self.counts["redrawn"][part], self.counts["dropped"][part] = boot.redrawn, boot.dropped
        mean = {}
        for m in METRICS:
            used = [i for i, e in enumerate(estimates) if e[m] is not None]
            estimate = float(np.mean([estimates[i][m] for i in used])) if used else None
            draws = np.mean([samples[i][m] for i in used], axis=0) if any(several[i] for i in used) else np.zeros(0)
            low, high = _interval(draws, self.level)
            mean[m] = {"estimate": estimate, "low": low, "high": high}
        flat = []
        for i, fold in enumerate(rows if isinstance(rows, Mapping) else range(len(folds))):
            entry: dict[str, Any] = {"fold": fold, **estimates[i]}
            for m in METRICS:
                defined = several[i] and estimates[i][m] is not None
                entry[f"{m}_low"], entry[f"{m}_high"] = _interval(samples[i][m] if defined else np.zeros(0), self.level)
            entry |= {"n_slides": len(folds[i].labels)} if self.unit == "slide" else {}
            entry["n_cases"] = len(np.unique(folds[i].cases))
            entry["n_per_class"] = folds[i].counts.tolist()
            flat.append(entry)
        return mean, flat

    def _note(self, rows: Rows, several: bool) -> None:
        absent = [self.classes[c] for c in np.flatnonzero(rows.counts == 0)]
        if absent:
            undefined = "auc, auprc, f1 and balanced_accuracy are undefined and left out of the mean"
            told = f"no {self.unit} of class {', '.join(map(repr, absent))}: {undefined}"
            self.notes.append(f"{self.prefix}{rows.name}: {told}")
        if not several:
            self.notes.append(f"{self.prefix}{rows.name}: one patient only: no interval")
        if len(rows.labels) > 1 and not np.ptp(rows.scores, axis=0).any():
            self.notes.append(
                f"{self.prefix}{rows.name}: every {self.unit} has the same score: the model tells none apart"
            )


def _estimates(rows: Rows) -> dict[str, float | None]:
    """Every metric by scikit-learn; None where a class is absent and the metric needs it."""
    y, p, predicted = rows.labels, rows.scores, rows.predicted
    result: dict[str, float | None] = dict.fromkeys(METRICS)
    result["accuracy"] = float(accuracy_score(y, predicted))
    if not rows.complete:
        return result
    classes = p.shape[1]
    truth, score = (y, p[:, 1]) if classes == 2 else (np.eye(classes, dtype=np.int64)[y], p)
    average = "binary" if classes == 2 else "macro"
    result["auc"] = float(roc_auc_score(truth, score, average="macro"))
    result["auprc"] = float(average_precision_score(truth, score, average="macro"))
    result["f1"] = float(f1_score(y, predicted, average=average, zero_division=0))
    result["balanced_accuracy"] = float(balanced_accuracy_score(y, predicted))
    return result


def _interval(samples: Floats, level: float) -> tuple[float | None, float | None]:
    if samples.size == 0:
        return None, None
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _note_repeated(labelled: pd.DataFrame, scorer: _Scorer) -> None:
    repeated = int((labelled[labelled["part"] == "test"].groupby("slide_id").size() > 1).sum())
    if repeated:
        told = f"{repeated} {scorer.unit}s are tested in more than one fold and count once for each"
        scorer.notes.append(f"{scorer.prefix}pooled: {told}")


def _check_settings(bootstrap: int, level: float) -> None:
    if not 0 <= bootstrap <= MOST_SAMPLES or not 0 < level < 1:
        raise InputError(
            f"bootstrap: expected 0 to {MOST_SAMPLES} samples and a level within 0..1, got {bootstrap} and {level}"
        )

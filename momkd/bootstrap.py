"""Bootstrap over patients: a resample is a row of weights, and a metric is computed for all resamples at once.

A patient drawn m times brings all of its slides m times, so a slide's weight is the multiplicity of its patient. The
weighted metrics here equal scikit-learn's with `sample_weight`; they exist because thousands of calls of scikit-learn
take minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momkd.ties import tied

METRICS = ("auc", "auprc", "f1", "balanced_accuracy", "accuracy")

MOST_SAMPLES = 100_000  # beyond that, intervals change less than they can be read

_CHUNK_ELEMENTS = 2_000_000  # weights held at once: 16 MB
_REDRAW_ROUNDS = 100

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """n labelled predictions that are scored together: those of one fold, of all folds pooled, or of an ensemble."""

    name: str  # for notes, such as "test, fold 0"
    labels: Ints  # (n,) in 0..C-1
    probs: Floats  # (n, C)
    predicted: Ints  # (n,) the class decided on
    cases: NDArray[Any]  # (n,) patient of each slide

    @property
    def counts(self) -> Ints:
        """Slides of each class: (C,)."""
        return np.bincount(self.labels, minlength=self.probs.shape[1])

    @property
    def complete(self) -> bool:
        """Every class occurs, so that every metric is defined."""
        return bool((self.counts > 0).all())

    @cached_property
    def scores(self) -> Floats:
        """The probabilities by which rows are ranked, (n, C): those that differ by rounding alone are the same."""
        return np.stack([tied(column) for column in self.probs.T], axis=1)


def ranking_metrics(weights: Floats, positive: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
    """Area under the ROC curve and average precision of every resample; tied scores count as one threshold.

    Args:
        weights: (R, n) weight of each row in each resample.
        positive: (n,) bool.
        scores: (n,) higher means positive.

    Returns:
        AUC (R,) and average precision (R,); NaN where a resample lacks positives or, for the AUC, negatives.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # last row of each group of ties
    sorted_weights, sorted_positive = weights[:, order], positive[order]
    tp = np.cumsum(sorted_weights * sorted_positive, axis=1)[:, ends]  # (R, thresholds)
    fp = np.cumsum(sorted_weights * ~sorted_positive, axis=1)[:, ends]
    new_tp, new_fp = np.diff(tp, axis=1, prepend=0.0), np.diff(fp, axis=1, prepend=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (new_fp * (tp - new_tp / 2)).sum(axis=1) / (tp[:, -1] * fp[:, -1])
        precision = tp / np.maximum(tp + fp, 1e-300)  # nothing retrieved yet: recall has not moved either
        return auc, (new_tp * precision).sum(axis=1) / tp[:, -1]


def weighted_metrics(weights: Floats, rows: Rows) -> dict[str, Floats]:
    """Every metric of METRICS for every resample.

    Args:
        weights: (R, n) weight of each row in each resample.
        rows: the n predictions.

    Returns:
        {metric: (R,)}; NaN where a resample lacks a class that the metric needs.
    """
    classes = rows.probs.shape[1]
    scored = range(1, 2) if classes == 2 else range(classes)  # binary: the second class is the positive one
    ranked = [ranking_metrics(weights, rows.labels == c, rows.scores[:, c]) for c in scored]
    cells = np.eye(classes * classes)[rows.labels * classes + rows.predicted]  # (n, C * C)
    confusion = (weights @ cells).reshape(-1, classes, classes)  # (R, true, predicted)
    hits = np.diagonal(confusion, axis1=1, axis2=2)  # (R, C)
    true, chosen = confusion.sum(axis=2), confusion.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        f1 = 2 * hits / (true + chosen)
        return {
            "auc": np.mean([auc for auc, _ in ranked], axis=0),
            "auprc": np.mean([precision for _, precision in ranked], axis=0),
            "f1": f1[:, list(scored)].mean(axis=1),
            "balanced_accuracy": (hits / true).mean(axis=1),
            "accuracy": hits.sum(axis=1) / true.sum(axis=1),
        }


@dataclass
class PatientBootstrap:
    """Draws patients with replacement; counts what had to be drawn again.

    Args:
        samples: number of resamples R.
        seed: same seed, same resamples.
    """

    samples: int
    seed: int
    redrawn: int = 0
    dropped: int = 0

    def metrics(self, tables: Sequence[Sequence[Rows]]) -> list[list[dict[str, Floats]]]:
        """Metrics of every resample, for tables that share slides row by row (two models, say) and folds.

        Args:
            tables: per table its folds; fold f has the same slides in the same order in all tables.

        Returns:
            [table][fold]{metric: (R',)} with R' = samples − dropped.
        """
        parts: list[list[list[dict[str, Floats]]]] = [[[] for _ in table] for table in tables]
        for weights in self._weights(tables[0]):
            for table, out in zip(tables, parts, strict=True):
                for rows, fold_weights, chunks in zip(table, weights, out, strict=True):
                    chunks.append(weighted_metrics(fold_weights, rows))
        return [
            [{m: np.concatenate([np.zeros(0), *(c[m] for c in chunks)]) for m in METRICS} for chunks in out]
            for out in parts
        ]

    def _weights(self, folds: Sequence[Rows]) -> Iterator[list[Floats]]:
        """Chunks of resamples: for each fold (R', n_f)."""
        rng = np.random.default_rng(self.seed)
        groups = [_Group([folds[f] for f in members]) for members in _groups(folds)]
        chunk = max(1, _CHUNK_ELEMENTS // max(1, sum(len(rows.labels) for rows in folds)))
        for start in range(0, self.samples, chunk):
            count = min(chunk, self.samples - start)
            drawn = [self._draw(rng, group, count) for group in groups]
            kept = np.logical_and.reduce([complete for _, complete in drawn])  # (count,)
            self.dropped += int(count - kept.sum())
            yield [
                multiplicity[kept][:, c] for g, (multiplicity, _) in zip(groups, drawn, strict=True) for c in g.codes
            ]

    def _draw(self, rng: np.random.Generator, group: _Group, count: int) -> tuple[Floats, NDArray[np.bool_]]:
        """How often each patient is drawn (count, P), and which resamples hold every class (count,)."""
        multiplicity = group.draw(rng, count)
        missing = ~group.complete(multiplicity)
        for _ in range(_REDRAW_ROUNDS):
            if not missing.any():
                break
            self.redrawn += int(missing.sum())
            multiplicity[missing] = group.draw(rng, int(missing.sum()))
            missing[missing] = ~group.complete(multiplicity[missing])
        return multiplicity, ~missing


class _Group:
    """Folds whose patients are drawn together."""

    def __init__(self, folds: Sequence[Rows]) -> None:
        names, codes = np.unique(np.concatenate([rows.cases for rows in folds]), return_inverse=True)
        self.patients = len(names)
        self.codes = np.split(codes, np.cumsum([len(rows.cases) for rows in folds])[:-1])
        needed = []  # which patients bring what a resample must have: a class to a fold that has every class
        for rows, fold_codes in zip(folds, self.codes, strict=True):
            brings = np.zeros((self.patients, rows.probs.shape[1]))
            brings[fold_codes, rows.labels] = 1
            # of a fold that lacks a class, any patient: without one its accuracy is undefined
            needed.append(brings if rows.complete else (brings > 0).any(axis=1, keepdims=True).astype(np.float64))
        self.needed = np.concatenate(needed, axis=1) if needed else np.zeros((self.patients, 0))

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        drawn = rng.integers(0, self.patients, (count, self.patients)) + np.arange(count)[:, None] * self.patients
        flat = np.bincount(drawn.ravel(), minlength=count * self.patients)
        return flat.reshape(count, self.patients).astype(np.float64)

    def complete(self, multiplicity: Floats) -> NDArray[np.bool_]:
        brought: Floats = multiplicity @ self.needed  # (count, folds * C)
        return np.asarray((brought > 0).all(axis=1))


def _groups(folds: Sequence[Rows]) -> list[list[int]]:
    """Each fold by itself where folds share no patient; else all together: a patient is drawn once for all folds."""
    patients = [set(rows.cases.tolist()) for rows in folds]
    disjoint = len(set().union(*patients)) == sum(map(len, patients))
    return [[f] for f in range(len(folds))] if disjoint else [list(range(len(folds)))]

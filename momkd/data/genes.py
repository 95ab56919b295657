"""From a raw omics table to a model's input: logarithm, robust standardisation, choice of genes.

All of it is learned from the training cases of a fold and then only applied: genes that are chosen, or scaled, with the
help of test cases make the results of a fold better than they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd

from momkd.data.counts import are_counts, ranges
from momkd.data.own import Finite, fitted
from momkd.data.raw import one_line
from momkd.errors import InputError

Doubles = npt.NDArray[np.float64]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1.7e308)]

SELECT = ("importance", "variance", "all")
# Ranges between quantiles, each with its width for a normal distribution of sd 1: the first that isn't 0 is the scale.
_RANGES = ((0.25, 0.75, 1.349), (0.10, 0.90, 2.563), (0.05, 0.95, 3.290), (0.01, 0.99, 4.653), (0.0, 1.0, 6.0))
_BLOCK = 1 << 22  # values that one step looks at, to bound its memory
_CANDIDATES = 4  # trees see this many times the genes that are asked for, at least _LEAST_CANDIDATES
_LEAST_CANDIDATES = 2000
_TREES = {"n_estimators": 200, "max_depth": 3, "learning_rate": 0.1, "subsample": 0.5, "max_features": "sqrt"}


@dataclass(frozen=True)
class OmicsTransform:
    """y = clip((v − mean) / std, ±clip) of the chosen genes, where v is the raw value x, or log2(x + 1) of counts.

    Args:
        genes: G names, in the order of the table that it was fitted on.
        mean: (G,) of v, winsorised.
        std: (G,) of v, winsorised; 1 for a constant gene, which becomes zeros.
        log: whether v = log2(x + 1).
        clip: bound of the result.

    Example:
        >>> transform = OmicsTransform.fit(omics.table.loc[train], labels, genes=768)  # doctest: +SKIP
        >>> transform(omics.table.loc[test]).shape  # doctest: +SKIP
        (187, 768)
    """

    genes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    log: bool
    clip: float

    @classmethod
    def fit(
        cls,
        table: pd.DataFrame,
        labels: npt.ArrayLike | None = None,
        *,
        genes: int = 768,
        select: str = "importance",
        log: str | bool = "auto",
        clip: float = 5.0,
        seed: int = 0,
    ) -> OmicsTransform:
        """Learns genes and scales from training cases alone.

        Expression is heavy-tailed, z-scores too: amplified genes reach hundreds, and a gene silent in nearly all cases
        tens of thousands. So mean and sd are those of values winsorised at median ± clip·s, with s the interquartile
        range / 1.349; where that is 0, since most cases share one value, the next wider range between quantiles takes
        its place. This needs no unit and hardly changes a normal gene. A tail still ends up at ±clip: an
        amplification stays visible.

        Args:
            table: training cases × genes.
            labels: (cases,) class of each, -1 where unknown; needed for "importance".
            genes: how many to choose; all are kept where there are fewer.
            select: "importance": by gradient-boosted trees on the labelled cases. They see the 2,000 genes (or 4 times
                `genes`) of the highest F statistic; genes that no tree used follow by variance. Where the labels hold
                fewer than two classes it is "variance": of the winsorised v. "all": every gene.
            log: True, False, or "auto": where most columns look like counts or TPM; see `looks_like_counts`.
            clip: bound of the result and of the winsorising, in units of sd.
            seed: of the trees; the same seed gives the same genes.

        Raises:
            InputError: an option is unknown, the table is empty or holds what is no finite number, or counts are < 0.
            ValueError: labels that don't fit the table.
        """
        if select not in SELECT or log not in ("auto", True, False):
            raise InputError(
                f"omics: expected select of {', '.join(SELECT)} and log of auto, true or false, got {select!r}, {log!r}"
            )
        if genes < 1 or not 0 < clip < np.inf:
            raise InputError(f"omics: expected genes >= 1 and clip > 0, got {genes} and {clip}; change them")
        if 0 in table.shape:
            raise InputError(f"omics: expected training cases × genes, got {table.shape}; check splits and omics table")
        classes = np.full(len(table), -1) if labels is None else np.asarray(labels)
        if classes.shape != (len(table),):
            raise ValueError(f"labels: expected ({len(table)},), one a case, got {classes.shape}")
        names = _names(table)
        logged = looks_like_counts(table) if log == "auto" else bool(log)

        mean, std, score = (np.concatenate(a) for a in zip(*_statistics(table, logged, clip, classes), strict=True))
        scale = np.where(std > 0, std, 1.0)
        count = len(names) if select == "all" else min(genes, len(names))
        importance = np.zeros(len(names))
        if select == "importance" and count < len(names) and len(np.unique(classes[classes >= 0])) > 1:
            seen = np.sort(np.argsort(-score, kind="stable")[: max(_LEAST_CANDIDATES, _CANDIDATES * genes)])
            values = (_values(table[classes >= 0], seen, logged) - mean[seen]) / scale[seen]
            from sklearn.ensemble import GradientBoostingClassifier  # a second: only where it is used

            trees = GradientBoostingClassifier(**_TREES, random_state=seed)
            trees.fit(np.clip(values, -clip, clip), classes[classes >= 0])
            importance[seen] = trees.feature_importances_
        chosen = np.sort(np.lexsort((-std, -importance))[:count])
        kept = tuple(names[i] for i in chosen)
        return cls(kept, tuple(mean[chosen].tolist()), tuple(scale[chosen].tolist()), logged, float(clip))

    def __call__(self, table: pd.DataFrame) -> npt.NDArray[np.float32]:
        """Cases × genes -> (cases, G); genes that were not chosen are ignored.

        Raises:
            InputError: a gene is missing or there twice, or a value is no finite number, or a negative count.
        """
        _names(table)
        at = table.columns.get_indexer(pd.Index(self.genes, dtype=object))
        if (at < 0).any():
            missing = [gene for gene, i in zip(self.genes, at, strict=True) if i < 0]
            raise InputError(
                f"omics: expected the {len(self.genes)} genes of the model, got a table without {len(missing)} of them "
                f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}); add their columns"
            )
        values = _values(table, at, self.log)
        return np.clip((values - self.mean) / self.std, -self.clip, self.clip).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; `from_dict` gives the same transform back, to the last bit."""
        return {
            "genes": list(self.genes),
            "mean": list(self.mean),
            "std": list(self.std),
            "log": self.log,
            "clip": self.clip,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], *, source: str = "omics transform") -> OmicsTransform:
        """The transform of `to_dict`.

        Raises:
            InputError: naming `source` and the entry that is missing or malformed.
        """
        facts: _Facts = fitted(value, _Facts, source=source, remedy="train again")
        return cls(tuple(facts.genes), tuple(facts.mean), tuple(facts.std), facts.log, facts.clip)


class _Facts(msgspec.Struct, forbid_unknown_fields=True):
    """genes.json."""

    genes: Annotated[list[str], msgspec.Meta(min_length=1)]
    mean: list[Finite]
    std: list[_Positive]
    log: bool
    clip: _Positive

    def __post_init__(self) -> None:
        if len(set(self.genes)) < len(self.genes):
            raise ValueError(f"genes: expected each once, got {len(self.genes) - len(set(self.genes))} again")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != len(self.genes):
                raise ValueError(f"{name}: expected {len(self.genes)} numbers, one a gene, got {len(numbers)}")


# -- statistics ------------------------------------------------------------------------------------------------------


def _statistics(
    table: pd.DataFrame, log: bool, clip: float, classes: npt.NDArray[Any]
) -> Iterator[tuple[Doubles, Doubles, Doubles]]:
    """Of each gene: mean and sd of the winsorised values, and the share of their variance that is between classes."""
    member = (classes[:, None] == np.unique(classes[classes >= 0])).astype(np.float64)  # (cases, C)
    for at in _blocks(table):
        values = _values(table, at, log)
        low, high = _winsor_bounds(values, clip)
        values = np.clip(values, low, high)
        mean, std = values.mean(0), np.where(high > low, values.std(0), 0.0)
        standard = (values - mean) / np.where(std > 0, std, np.inf)
        yield mean, std, _between(standard[classes >= 0], member[classes >= 0])


def _winsor_bounds(values: Doubles, clip: float) -> tuple[Doubles, Doubles]:
    """median ± clip·s of each gene; equal for a constant one."""
    levels = sorted({level for low, high, _ in _RANGES for level in (low, high)} | {0.5})
    quantiles = dict(zip(levels, np.quantile(values, levels, axis=0), strict=True))
    scale = np.zeros(values.shape[1])
    for low, high, width in _RANGES:
        scale = np.where(scale > 0, scale, (quantiles[high] - quantiles[low]) / width)
    return quantiles[0.5] - clip * scale, quantiles[0.5] + clip * scale


def _between(values: Doubles, member: Doubles) -> Doubles:
    """η² = Σ_c n_c (mean_c − mean)² / Σ_i (v_i − mean)², which ranks genes as F does; 0 where a gene is constant."""
    if 0 in member.shape:
        return np.zeros(values.shape[1])
    centred = values - values.mean(0)
    sums = member.T @ centred  # (C, genes)
    between = (sums**2 / member.sum(0)[:, None]).sum(0)
    total = (centred**2).sum(0)
    share: Doubles = between / np.maximum(total, 1e-9)
    return share


def looks_like_counts(table: pd.DataFrame) -> bool:
    """Whether log2(x + 1) is to be taken, as of counts or TPM, by most columns; see `momkd.data.counts`."""
    for at in _blocks(table):
        _values(table, at, False)  # an error where a cell is no finite number
    return are_counts(ranges(table.to_numpy(dtype=np.float64)), [str(name) for name in table.columns])


def _blocks(table: pd.DataFrame) -> Iterator[npt.NDArray[np.int64]]:
    """The columns, some at a time."""
    step = max(1, _BLOCK // len(table))
    for start in range(0, table.shape[1], step):
        yield np.arange(start, min(start + step, table.shape[1]))


# -- checks ----------------------------------------------------------------------------------------------------------


def _names(table: pd.DataFrame) -> list[str]:
    if not table.columns.is_unique:
        double = table.columns[table.columns.duplicated()][0]
        raise InputError(f"omics: expected each gene once, got {double!r} again; rename or remove one")
    return [str(name) for name in table.columns]


def _values(table: pd.DataFrame, at: npt.NDArray[np.intp], log: bool) -> Doubles:
    """Columns as finite numbers in float64, logarithms where wanted."""
    part = table.iloc[:, at]
    try:
        values: Doubles = part.to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"omics: expected numbers, got {one_line(error)}; read the table with read_omics") from error
    wrong = ~np.isfinite(values) | (values < 0 if log else False)
    if wrong.any():
        row, column = divmod(int(wrong.argmax()), values.shape[1])
        wanted = "finite values >= 0, whose logarithm is taken" if log else "finite values"
        raise InputError(
            f"omics: expected {wanted}, got {values[row, column]:g} for case {part.index[row]!r} and gene "
            f"{part.columns[column]!r}; give the same kind of table throughout"
            + (", leave the column out, or set omics.log to no" if log else "")
        )
    if log:
        values = np.log2(values + 1)
    return values

"""Whether an omics table holds counts or the like, of which log2(x + 1) is taken: decided by most of its columns.

It does where some columns exceed 50 (the logarithm of any count stays below) and hardly any has a negative value, as
z-scores and other differences have. "Hardly any" and "few" are at most 3 columns, or 5 %, and less than a fifth. So
clinical columns that are none by their names (PSA, a score of hypoxia) don't decide for the genes. Where few columns
exceed 50, one of these must be seen besides, since TPM of a panel look so too:

- most columns are whole numbers, which logarithms are not;
- other columns lie between 25, which logarithms hardly reach, and 50: 2 and 0.2 % at least, and a third as many;
- at least 3 columns, and a tenth, have a maximum between 10 and 50, and half of these exceed 3 times their mean, as
  long tails do.

Mutations and copy numbers (names that end in _mut, _cnv or _cna) don't vote, and as genes they are not left out: where
one is negative no logarithm is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]

COUNTS_ABOVE = 50.0  # log2 of any count stays below
_LOGARITHMS_BELOW = 25.0  # nearly all of them
_TAIL_ABOVE, _TAIL = 10.0, 3.0  # maximum of a column, and its ratio to the mean, from which on its tail is long
_BLOCK = 1 << 22  # values that one step looks at, to bound its memory

_NO_RNA = ("_mut", "_cnv", "_cna")  # ends of names


@dataclass(frozen=True)
class Ranges:
    """Of each column, all (columns,).

    Args:
        low: minimum.
        high: maximum.
        mean: mean.
        whole: whether it holds integers alone.
    """

    low: Doubles
    high: Doubles
    mean: Doubles
    whole: Mask

    def __getitem__(self, some: Mask) -> Ranges:
        return Ranges(self.low[some], self.high[some], self.mean[some], self.whole[some])


def is_modality(name: str) -> bool:
    """Whether a column is a gene by its name, with its modality: mutations, copy numbers or RNA."""
    return name.lower().endswith((*_NO_RNA, "_rnaseq"))


def ranges(values: npt.NDArray[Any]) -> Ranges:
    """Ranges of the columns of (cases, columns)."""
    parts = [(v.min(0), v.max(0), v.mean(0, dtype=np.float64), (v == np.rint(v)).all(0)) for v in column_blocks(values)]
    low, high, mean, whole = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Ranges(low.astype(np.float64), high.astype(np.float64), mean, whole)


def are_few(odd: int, columns: int) -> bool:
    """Whether these are so few of the columns that the others decide."""
    return odd <= max(3, 0.05 * columns) and (5 * odd < columns or odd == 0)


def is_signed(found: Ranges, names: list[str]) -> bool:
    """Whether negative values are the rule, or copy numbers have some."""
    negative = found.low < 0
    votes = voting(found, names)
    return not are_few(int((negative & votes).sum()), int(votes.sum())) or any(
        names[i].lower().endswith(_NO_RNA) for i in np.flatnonzero(negative)
    )


def are_counts(found: Ranges, names: list[str]) -> bool:
    """Whether log2(x + 1) is to be taken of a table with these columns; see this module."""
    if is_signed(found, names):
        return False
    voters = found[voting(found, names)]
    voters = voters[voters.low >= 0]
    above = int((voters.high > COUNTS_ABOVE).sum())
    if not are_few(above, len(voters.high)):
        return True
    between = int(((voters.high > _LOGARITHMS_BELOW) & (voters.high <= COUNTS_ABOVE)).sum())
    usual = voters[(voters.high > _TAIL_ABOVE) & (voters.high <= COUNTS_ABOVE)]
    long = int((usual.high > _TAIL * usual.mean).sum())
    tails = len(usual.high) >= max(3, 0.1 * len(voters.high)) and 2 * long >= len(usual.high)
    whole = 2 * int(voters.whole.sum()) > len(voters.whole)
    return above > 0 and (whole or between >= max(2, above / 3, 0.002 * len(voters.high)) or tails)


def like_counts(found: Ranges) -> Mask:
    """(columns,) which of them alone would be counts."""
    return (found.low >= 0) & (found.high > COUNTS_ABOVE)


def scale_note(odd: Sequence[str], signed: bool, limit: int = 6) -> str:
    """One line on columns that look like counts in a table whose logarithm is not taken."""
    others = "negative values" if signed else "values of logarithms"
    more = f", ... ({len(odd)} in all)" if len(odd) > limit else ""
    return (
        f"log2(x + 1) is not taken: other columns hold {others}; unlike them, these hold values from 0 to above "
        f"{COUNTS_ABOVE:g}: {', '.join(odd[:limit])}{more}; remove what is no gene, or set omics.log to yes"
    )


def column_blocks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """The columns, some at a time."""
    step = max(1, _BLOCK // max(1, len(values)))
    for start in range(0, values.shape[1], step):
        yield values[:, start : start + step]


def voting(found: Ranges, names: list[str]) -> Mask:
    """Columns of RNA that are not silent; all where there is none."""
    votes = np.array([not name.lower().endswith(_NO_RNA) for name in names], bool)
    votes &= (found.low < 0) | (found.high > 0)
    return votes if votes.any() else np.ones_like(votes)

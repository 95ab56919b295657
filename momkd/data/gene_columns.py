"""Which columns of an omics table are genes: labels and clinical metadata that lie beside them are no expression.

A column is left out, by these rules in this order, unless the user keeps it:

1. Its name is a clinical one: `CLINICAL` and `_CLINICAL_PATTERN`, in any case, with any of `_`, `-`, `.` and space
   between the words. Its cells may be text or empty.
2. It holds few distinct integers (at most 100, and at most half as many as cases) where most columns hold fractions,
   as codes and years do. A column with one value in more than 80 % of the cases stays, as a
   silent gene does; so does one of mostly 0 in a table of log2(counts + 1), and all where such columns are common (over
   10 and over 5 %): that is how the assay counts.
3. Its scale is another than that of the rest: where logarithms or small values (at most 50) are the rule, a maximum
   above 50 and 4 times the usual one; where values are negative too, a median of |x| 30 times the usual one, unless
   such columns are common (over 3 and over 0.5 %). In a table of counts (`momkd.data.counts`), whose genes differ by
   orders of magnitude, all stay. What is named like a gene (ACTB, MT-CO1, ENSG00000075624, 60) stays always.
4. It has a negative value in a table of counts, whose log2(x + 1) is taken.
5. It is the label: see `label_copies`.

Rules 2 and 3 need 10 cases. Names that end in _mut, _cnv, _cna or _rnaseq, in any case, are genes by rules 1 to 3.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from momkd.data.counts import (
    COUNTS_ABOVE,
    Mask,
    Ranges,
    are_counts,
    column_blocks,
    is_modality,
    is_signed,
    ranges,
    voting,
)
from momkd.data.files import kind_of, regular_file
from momkd.data.text import READ_ERRORS, open_text, sniff, unreadable
from momkd.errors import InputError

ALL = "all"  # keeps every column
SAME = 0.98  # correlation with the label from which on a column is taken for the label
_OF_CLASS, _IN_ALL = 5, 20  # cases, so that no gene reaches that correlation by chance
LEAST_CASES = 10  # whose values can be told apart from those of metadata

_WORDS = """
    age sex gender race ethnicity menopause bmi weight height smoker smoking packyears isfemale ismale
    stage grade laterality histology histologicaltype subtype morphology diagnosis primarydiagnosis cancertype oncotree
    oncotreecode metastasis recurrence relapse progression treatment therapy radiation chemotherapy dose response
    responder outcome volume purity tumorpurity tumourpurity ploidy msi tmb hrd mutationcount aneuploidyscore
    percenttumorcells percenttumornuclei
    survival event status censor censored censorship vital death dead alive deceased followup time date year
    os ostime osevent osmonths pfs pfi dfs dfi dss rfs
    site batch center centre hospital institution cohort project study country region
    label labels target class split fold train val test istrain istest
    slide slideid sample sampleid samplename patient patientid patientname case caseid caseuuid submitterid barcode
    samplebarcode patientbarcode bcrpatientbarcode bcrsamplebarcode tcgaid uuid filename fileid
"""
CLINICAL = frozenset(_WORDS.split())
_CLINICAL_PATTERN = re.compile(
    r"(is|days|months|years)_.+|(age|year|date|time|reason|history)_(at|of|to|for)_.+"
    r"|(ajcc|figo|gleason|pathologic|pathological|clinical)_.+|tumou?r_(stage|grade|site|type|size|status)"
    r"|(tissue_source|primary|tumou?r|anatomic|hospital|collection)_site"
    r"|(overall|event_free|disease_free|disease_specific|progression_free)_survival.*"
    r"|(os|pfs|pfi|dfs|dfi|dss|rfs|survival)_.+"
    r"|.+_(days|months|years|status|stage|grade|age|censorship|censored|ihc|followup|follow_up|barcode|uuid)"
)
_SEPARATORS = str.maketrans("", "", " _.-")
_GENE_NAME = re.compile(r"(ENS[A-Z]*G\d{6,}(\.\d+)?|[A-Z][A-Z0-9]+([-.][A-Z0-9]+)*|C\d+orf\d+|\d+)([|( ].*)?")

_LIST, _LARGEST_LIST = "a list of columns, one a line", 1 << 26  # bytes

CLINICAL_NAME = "clinical names"
FEW_INTEGERS = "few distinct integers among fractions"
OTHER_SCALE = "another scale than the rest"
NEGATIVE = "negative values in a table of counts, whose log2(x + 1) is taken"
LABEL_COPY = f"correlation above {SAME} with the label"


# -- names -----------------------------------------------------------------------------------------------------------


def is_clinical(name: str) -> bool:
    """Whether a column is metadata by its name; see `CLINICAL`."""
    if is_modality(name):
        return False
    if _squeezed(name) in CLINICAL:
        return True
    if name.isalnum():  # one word, as most genes are
        return False
    return _CLINICAL_PATTERN.fullmatch(re.sub(r"[\W_]+", "_", name.casefold()).strip("_")) is not None


def _squeezed(name: str) -> str:
    """Names that differ in case and in `_`, `-`, `.` and space at most are the same here."""
    return name.translate(_SEPARATORS).casefold()


def kept_columns(value: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    """Names of columns that stay genes, as `--omics-columns` gives them.

    Args:
        value: names with commas between them, a file with one name a line, or "all"; or a sequence of names.

    Returns:
        The names; ("all",) keeps every column.
    """
    if value is None:
        return ()
    if not isinstance(value, str | Path):
        return tuple(value)
    if isinstance(value, Path) or kind_of(value) == "a file":
        path = regular_file(value, _LIST, "check --omics-columns")
        try:
            with open_text(path, sniff(path, _LIST, largest=_LARGEST_LIST)) as file:
                found = file.read().splitlines()
        except READ_ERRORS as error:
            raise unreadable(path, _LIST, error) from error
    else:
        found = value.split(",")
    names = tuple(name.strip() for name in found if name.strip())
    if not names:
        raise InputError(
            f"omics-columns: expected names, a file with one a line or {ALL}, got {str(value)!r}; name some"
        )
    return names


@dataclass(frozen=True)
class GeneRules:
    """What decides which columns are genes.

    Args:
        labels: columns of the labels.
        keep: columns that stay genes whatever else they look like; ("all",) keeps every column.
    """

    labels: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def by_name(self, source: str, corner: str, columns: Sequence[str]) -> dict[str, str]:
        """Columns that are no genes by their names, before their cells are looked at, each with the reason.

        Args:
            source: how messages name the table.
            corner: its column of ids, for messages.
            columns: its other columns.

        Raises:
            InputError: a column is named like a label, one that is to be kept is missing, or none is a gene.
        """
        if self.keep == (ALL,):
            return {}
        keep = set(self.keep)
        self._check_kept(source, columns)
        labels = {_squeezed(label): label for label in self.labels}
        left_out = {}
        for name in columns:
            if name in keep:
                continue
            if (label := labels.get(_squeezed(name))) is not None:
                raise InputError(
                    f"{source}: expected genes, got a column {name!r} named like the label {label!r}; remove it, or "
                    f"keep it as a gene on purpose with --omics-columns {name!r}"
                )
            if is_clinical(name) and name != "case_id":
                left_out[name] = CLINICAL_NAME
        if left_out and len(left_out) == len(set(columns)):
            raise no_genes(source, corner, left_out)
        return left_out

    def by_value(self, table: pd.DataFrame) -> dict[str, str]:
        """Columns that are no expression by their values, each with the reason; see the rules of this module.

        Args:
            table: cases × genes, finite.
        """
        return self._but_kept(unlike_expression(table))

    def by_label(self, table: pd.DataFrame, classes: npt.ArrayLike) -> dict[str, str]:
        """Columns that are the label in other words, each with the reason; see `label_copies`."""
        return self._but_kept(label_copies(table, classes))

    def _but_kept(self, left_out: Mapping[str, str]) -> dict[str, str]:
        keep = set(left_out) if self.keep == (ALL,) else set(self.keep)
        return {name: reason for name, reason in left_out.items() if name not in keep}

    def _check_kept(self, source: str, columns: Sequence[str]) -> None:
        for name in sorted(set(self.keep) - set(columns)):
            near = difflib.get_close_matches(name, [c for c in columns if is_clinical(c)] or columns[:1000], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "check --omics-columns"
            raise InputError(f"{source}: expected a column {name!r}, as --omics-columns names it, got none; {hint}")


def no_genes(source: str, corner: str, left_out: Mapping[str, str]) -> InputError:
    """The error of a table in which no column is a gene."""
    return InputError(
        f"{source}: expected a column for each gene, got {corner!r} and columns that are no genes "
        f"({', '.join(list(left_out)[:6])}); add genes, or keep these with --omics-columns"
    )


# -- values ----------------------------------------------------------------------------------------------------------


def unlike_expression(table: pd.DataFrame) -> dict[str, str]:
    """Columns whose values are not like those of the others: rules 2 to 4."""
    values, names = table.to_numpy(), [str(name) for name in table.columns]
    found = ranges(values)
    few = np.zeros(len(names), bool)
    if len(table) >= LEAST_CASES:
        modal = np.array([is_modality(name) for name in names], bool)
        others = values[:, ~modal] if modal.any() else values
        few[~modal] = _few_integers(others, (found.whole & (found.high > found.low))[~modal])
    left_out = dict.fromkeys(map(str, table.columns[few]), FEW_INTEGERS)
    if not few.all():
        rest = table.loc[:, ~few] if few.any() else table
        names, found = list(map(str, rest.columns)), found[~few]
        if are_counts(found, names):
            odd, reason = found.low < 0, NEGATIVE
        elif len(table) >= LEAST_CASES:
            odd, reason = _other_scale(rest, names, found), OTHER_SCALE
        else:
            return left_out
        left_out |= dict.fromkeys(map(str, rest.columns[odd]), reason)
    return left_out


def _few_integers(values: npt.NDArray[Any], integers: Mask) -> Mask:
    """Rule 2; `integers` says which columns hold several integers and nothing else."""
    few = np.zeros_like(integers)
    if 2 * integers.sum() >= len(integers) or not integers.any():
        return few
    twos = np.concatenate([np.isclose(v, np.log2(3), atol=1e-4).any(0) for v in column_blocks(values)])
    log_counts = twos.mean() > 0.05
    for i in np.flatnonzero(integers):
        found, counts = np.unique(values[:, i], return_counts=True)
        silent = counts.max() > 0.8 * len(values) or (log_counts and found[counts.argmax()] == 0)
        few[i] = len(found) <= min(100, len(values) // 2) and not silent
    return few if few.sum() <= max(10, 0.05 * len(few)) else np.zeros_like(few)


def _other_scale(table: pd.DataFrame, names: list[str], found: Ranges) -> Mask:
    """Rule 3, of a table that holds no counts."""
    signed, votes = is_signed(found, names), voting(found, names)
    if signed:
        size = np.concatenate([np.median(np.abs(part), axis=0) for part in column_blocks(table.to_numpy())])
        odd = size > 30 * np.median(size[votes])
    else:
        odd = (found.high > COUNTS_ABOVE) & (found.high > 4 * np.median(found.high[votes]))
    odd[odd] = [not (_GENE_NAME.fullmatch(names[i]) or is_modality(names[i])) for i in np.flatnonzero(odd)]
    common = signed and (odd.sum() > max(3, 0.005 * len(odd)) or 5 * odd.sum() >= len(odd))
    return np.zeros_like(odd) if common else odd


def label_copies(table: pd.DataFrame, classes: npt.ArrayLike) -> dict[str, str]:
    """Columns that are the label in other words: a correlation of more than `SAME` with it.

    Of two classes it is Pearson's |r| with 0 and 1. Of more it is η, the root of the share of a column's variance that
    is between classes, which finds the classes in any coding. Those with fewer than 5 cases don't take part;
    nothing is found without two others, and 20 cases in all.

    Args:
        table: cases × genes.
        classes: (cases,) class of each, -1 where unknown.
    """
    label = np.asarray(classes)
    found, counts = np.unique(label[label >= 0], return_counts=True)
    found = found[counts >= _OF_CLASS]
    rows = np.isin(label, found)
    if len(found) < 2 or rows.sum() < _IN_ALL:
        return {}
    member = (label[rows, None] == found).astype(np.float64)  # (cases, C)
    copies: list[Mask] = []
    for part in column_blocks(table.to_numpy()):
        centred = part[rows].astype(np.float64)
        centred -= centred.mean(0)
        between = ((member.T @ centred) ** 2 / member.sum(0)[:, None]).sum(0)
        total = (centred**2).sum(0)
        copies.append(between > SAME**2 * np.maximum(total, 1e-12))
    return dict.fromkeys(map(str, table.columns[np.concatenate(copies)]), LABEL_COPY)


# -- notes -----------------------------------------------------------------------------------------------------------


def left_out_note(left_out: Mapping[str, str], limit: int = 6) -> str:
    """One line that names the columns, by reason."""
    parts = []
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, why in left_out.items() if why == reason]
        more = f", ... ({len(names)} in all)" if len(names) > limit else ""
        parts.append(f"{', '.join(names[:limit])}{more} ({reason})")
    columns = "1 column that is no gene" if len(left_out) == 1 else f"{len(left_out)} columns that are no genes"
    return f"left out {columns}: {'; '.join(parts)}; --omics-columns keeps what is named there"

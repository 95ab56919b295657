"""Classes of a column of labels: which cells are missing, in which order the classes are, and which one is positive."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from momkd.data.text import has_decimal_comma, listed
from momkd.errors import InputError

# Cells that mean "not known": those of pandas but "None", which may be a class; and those of TCGA and GDC. "-" is one
# too, unless the column holds "+".
MISSING = (
    *("", "NA", "N/A", "NaN", "nan", "<NA>", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN"),
    *("-NaN", "-nan", "NULL", "null", "n/a", "na", ".", "--", "'--"),
    *("[Not Available]", "[Not Applicable]", "[Not Evaluated]", "[Unknown]", "[Discrepancy]"),
)
_DOUBTFUL = {"unknown", "unk", "not reported", "not available", "not known", "missing", "undetermined", "?"}
_INTEGER = re.compile(r"[+-]?\d{1,18}(\.0+)?")  # longer ones are names, which Python may refuse to read as numbers
# Words of which the first is negative, without spaces and signs: the rest of both names is the same.
_PAIRS = {
    *(("negative", "positive"), ("neg", "pos"), ("no", "yes"), ("n", "y"), ("false", "true"), ("f", "t")),
    *(("wt", "mut"), ("wt", "mt"), ("wt", "mutant"), ("wt", "mutated"), ("wildtype", "mut"), ("wildtype", "mutant")),
    *(("wildtype", "mutated"), ("wildtype", "mutation"), ("nonmutated", "mutated"), ("unmutated", "mutated")),
    *(("low", "high"), ("l", "h"), ("absent", "present"), ("absence", "presence"), ("control", "case")),
    *(("mss", "msi"), ("mss", "msih"), ("stable", "unstable"), ("unmethylated", "methylated")),
    *(("normal", "tumor"), ("normal", "tumour"), ("normal", "cancer"), ("benign", "malignant"), ("benign", "tumor")),
    *(("benign", "tumour"), ("benign", "cancer"), ("healthy", "tumor"), ("healthy", "tumour"), ("healthy", "cancer")),
    *(("alive", "dead"), ("alive", "deceased"), ("living", "dead"), ("living", "deceased"), ("-", "+")),
    *(("non", ""), ("not", ""), ("no", ""), ("without", ""), ("without", "with"), ("", "+"), ("-", "")),
}


@dataclass(frozen=True)
class LabelOptions:
    """What a user says of the labels, where the table does not say it itself.

    Args:
        classes: the classes in the order of their numbers; of two the second is positive. Each must occur, and a cell
            of another text is an error. A name of `MISSING` that is given here is a class.
        positive: of two classes the positive one; the other comes first.
        missing: cells that mean "not known", besides `MISSING`; in any case.
        case_from: the column of cases, or "tcga" for the first 12 characters of the slides' TCGA barcodes.
    """

    classes: tuple[str, ...] | None = None
    positive: str | None = None
    missing: tuple[str, ...] = ()
    case_from: str | None = None


@dataclass(frozen=True)
class Classes:
    """The classes of a column: their names in order, the name in each row (None: missing), and what to know."""

    order: tuple[str, ...]
    of_rows: list[str | None]
    guessed: bool
    notes: tuple[str, ...]


def read_classes(
    path: Path,
    column: str,
    lines: Sequence[int],
    cells: Sequence[str],
    known: Sequence[str] | None,
    options: LabelOptions,
) -> Classes:
    """Find the classes of a column of labels.

    Args:
        path, column, lines: for messages; the line of each cell.
        cells: stripped.
        known: the classes of a run, which need not all occur.
        options: of the user.

    Raises:
        InputError: fractions, fewer than two classes, or others than `known` or `options` name.
    """
    where = f"{path}: column {column!r}"
    given = _given(known, options)
    asked = {text.casefold() for text in options.missing}
    missing = {*MISSING, *options.missing, *(cell for cell in cells if cell.casefold() in asked)} - set(given or ())
    if not ("+" in cells or "-" in (given or ())):
        missing.add("-")
    names = _names(where, [None if _plain(cell) in missing or cell in missing else cell for cell in cells])
    counts = Counter(name for name in names if name is not None)
    notes = [
        f"{where}: {name!r} ({counts[name]} rows) is a class; --missing {shlex.quote(name)} takes it as missing"
        for name in counts
        if name.casefold() in _DOUBTFUL and given is None
    ]
    held = {cell.casefold() for cell in cells}
    absent = [text for text in options.missing if text.casefold() not in held]
    notes += [f"{where}: no cell is {text!r}, which --missing names" for text in absent]
    if given is not None:
        for line, name in zip(lines, names, strict=True):
            if name is not None and name not in given:
                raise InputError(
                    f"{path}: line {line}: column {column!r}: expected one of {listed(given)}, got {listed([name])}; "
                    f"mend the cell or empty it, or take such cells as missing with --missing {shlex.quote(name)}"
                )
        if known is None and (absent := [name for name in given if name not in counts]):
            raise InputError(f"{where}: --classes: expected classes that occur, got {absent[0]!r}; {_has(counts)}")
        return Classes(given, names, False, tuple(notes))
    if len(counts) < 2:
        raise InputError(
            f"{where}: expected two or more classes, got {listed(sorted(counts))}; choose another column with --label"
        )
    order, sure = class_order(counts)
    if options.positive is not None:
        order, sure = _positive_last(where, order, options.positive, counts), True
    return Classes(order, names, not sure, tuple(notes))


def class_order(names: Iterable[str]) -> tuple[tuple[str, ...], bool]:
    """The classes in order, and whether the second of two is positive beyond doubt.

    Integers go by value. Of two names with a known meaning (negative and positive, HER2- and HER2+, wt and mut, non-X
    and X, in any case) the positive one is second. All others are sorted.
    """
    found = by_name(names)
    if found == ("0", "1"):
        return found, True
    if len(found) == 2:
        first, second = map(_words, found)
        if _is_pair(first, second):
            return found, True
        if _is_pair(second, first):
            return (found[1], found[0]), True
    return found, False


def by_name(names: Iterable[str]) -> tuple[str, ...]:
    """Different names sorted, integers by value."""
    found = sorted(set(names))
    return tuple(sorted(found, key=int) if all(_INTEGER.fullmatch(name) for name in found) else found)


def _is_pair(negative: list[str], positive: list[str]) -> bool:
    negative, positive = list(negative), list(positive)
    for end in (0, -1):  # words that both share: "HER2 low" and "HER2 high"
        while negative and positive and negative[end] == positive[end]:
            del negative[end], positive[end]
    first, second = ("".join(words) if words in (["+"], ["-"]) else _letters(words) for words in (negative, positive))
    return (first, second) in _PAIRS or (first != second and first == f"non{second}")


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+|[+-]", name.casefold().replace("\u2212", "-"))


def _letters(words: list[str]) -> str:
    return "".join(word for word in words if word not in "+-")


def _plain(cell: str) -> str:
    """Integers in one way: "1", also where pandas wrote 1.0; other text as it is."""
    return str(int(cell.split(".")[0])) if _INTEGER.fullmatch(cell) else cell


def _names(where: str, names: list[str | None]) -> list[str | None]:
    """The class of each cell, integers in one way; None where missing."""
    present = [name for name in names if name is not None]
    if all(_INTEGER.fullmatch(name) for name in present):
        return [None if name is None else _plain(name) for name in names]
    if all(_is_number(name) or has_decimal_comma(name) for name in present):
        odd = next(name for name in present if not _INTEGER.fullmatch(name))
        what = "numbers with decimal commas" if has_decimal_comma(odd) else "fractions"
        raise InputError(
            f"{where}: expected classes, got {what} such as {odd}; bin the values, or choose another column with "
            "--label"
        )
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _given(known: Sequence[str] | None, options: LabelOptions) -> tuple[str, ...] | None:
    given = known if known is not None else options.classes
    if given is None:
        return None
    chosen = tuple(str(name) for name in given)
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise InputError(f"classes: expected two or more different names, got {listed(chosen)}; name each once")
    if options.positive is not None and (len(chosen) != 2 or chosen[1] != options.positive):
        raise InputError(
            f"positive: expected the second of two classes, got {options.positive!r} and the classes "
            f"{listed(chosen)}; give one of the two options"
        )
    return chosen


def _positive_last(where: str, order: tuple[str, ...], positive: str, counts: Counter[str]) -> tuple[str, ...]:
    positive = positive if positive in order else _plain(positive)
    if positive not in order:
        raise InputError(f"{where}: --positive: expected a class that occurs, got {positive!r}; {_has(counts)}")
    if len(order) != 2:
        raise InputError(
            f"{where}: --positive: expected two classes, got {len(order)}; {_has(counts)}; set the order with --classes"
        )
    return (order[0] if order[1] == positive else order[1], positive)


def _has(counts: Counter[str]) -> str:
    return f"it has {listed(sorted(counts))}"

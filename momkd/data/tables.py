"""Tables of labels: which slide belongs to which case, and which class it has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from momkd.data.text import check_length, is_unnamed, listed, read_table
from momkd.errors import InputError

MISSING = ("", "NA", "N/A", "NaN", "nan", "<NA>")  # cells that mean "not known"; "None" may be a class
_INTEGER = re.compile(r"[+-]?\d{1,18}(\.0+)?")  # longer ones are names, which Python may refuse to read as numbers


@dataclass(frozen=True, eq=False)
class Labels:
    """Slides with their cases and classes.

    Args:
        table: index `slide_id` (unique text), columns `case_id` (text) and `label` (int64, -1 where missing).
        classes: names of the classes; label c is `classes[c]`.
        name: the column of the labels.
        path: the file they came from, for messages.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    name: str = "label"
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def source(self) -> str:
        """How messages name this table."""
        return str(self.path) if self.path is not None else "labels"


def read_labels(path: Path | str, *, label: str | None = None, classes: Sequence[str] | None = None) -> Labels:
    """Reads a CSV of `slide_id, case_id, <label column>`.

    Ids are text: 007 stays 007. Without `case_id` every slide is a case of its own. Slides of one case may differ in
    class; splits keep the case together all the same. An empty cell, or NA or NaN, is a missing label (-1).

    Args:
        path: .csv, or .tsv with tabs.
        label: the column of the labels; None takes "label", or the only column besides the ids.
        classes: names in the order of their numbers; None takes the values found, sorted (integers by value).

    Raises:
        InputError: naming file, line or column.
    """
    path = Path(path)
    read = read_table(path)
    header, rows = read.header, read.rows
    if "slide_id" not in header:
        raise InputError(f"{path}: expected a column 'slide_id', got {listed(header)}; rename the column of slides")
    column = _label_column(path, header, label)
    at_slide, at_label = header.index("slide_id"), header.index(column)
    at_case = header.index("case_id") if "case_id" in header else at_slide

    lines: dict[str, int] = {}  # slide_id -> line
    for line, cells in rows:
        check_length(read, line, cells)
        slide = cells[at_slide]
        if not slide or not cells[at_case]:
            raise InputError(f"{path}: line {line}: expected a slide_id and a case_id, got an empty cell; fill it in")
        if slide in lines:
            raise InputError(
                f"{path}: line {line}: expected each slide once, got {slide!r} again (first on line {lines[slide]}); "
                "remove one"
            )
        lines[slide] = line
    if not rows:
        raise InputError(f"{path}: expected a row for each slide, got a header alone; fill in the table")

    names = _class_names(path, column, [cells[at_label] for _, cells in rows])
    chosen = _classes(path, column, names, list(lines.values()), classes)
    number = {name: c for c, name in enumerate(chosen)}
    table = pd.DataFrame(
        {
            "case_id": np.array([cells[at_case] for _, cells in rows], dtype=object),
            "label": np.array([-1 if name is None else number[name] for name in names], dtype=np.int64),
        },
        index=pd.Index(list(lines), name="slide_id", dtype=object),
    )
    return Labels(table, chosen, column, path)


def _label_column(path: Path, header: list[str], label: str | None) -> str:
    others = [name for name in header if name not in ("slide_id", "case_id") and not is_unnamed(name)]
    if label is not None:
        if label in others:
            return label
        raise InputError(f"{path}: expected a column {label!r}, got {listed(header)}; choose one with --label")
    if "label" in others:
        return "label"
    if len(others) == 1:
        return others[0]
    raise InputError(f"{path}: expected one column of labels, got {listed(others)}; choose one with --label")


def _class_names(path: Path, column: str, cells: list[str]) -> list[str | None]:
    """The class of each cell; integers in one way ("1", also where pandas wrote 1.0), None where missing."""
    names = [None if cell in MISSING else cell for cell in cells]
    present = [name for name in names if name is not None]
    if all(_INTEGER.fullmatch(name) for name in present):
        return [None if name is None else str(int(name.split(".")[0])) for name in names]
    if all(_is_number(name) for name in present):
        odd = next(name for name in present if not _INTEGER.fullmatch(name))
        raise InputError(
            f"{path}: column {column!r}: expected classes, got fractions such as {odd}; bin the values, "
            "or choose another column with --label"
        )
    return names


def _classes(
    path: Path, column: str, names: list[str | None], lines: list[int], given: Sequence[str] | None
) -> tuple[str, ...]:
    if given is not None:
        chosen = tuple(str(name) for name in given)
        if len(chosen) < 2 or len(set(chosen)) < len(chosen):
            raise InputError(f"classes: expected two or more different names, got {listed(chosen)}; name each once")
        for line, name in zip(lines, names, strict=True):
            if name is not None and name not in chosen:
                raise InputError(
                    f"{path}: line {line}: column {column!r}: expected one of {listed(chosen)}, got {name!r}; "
                    "mend the cell or empty it"
                )
        return chosen
    found = {name for name in names if name is not None}
    if len(found) < 2:
        raise InputError(
            f"{path}: column {column!r}: expected two or more classes, got {listed(sorted(found)) or 'none'}; "
            "choose another column with --label"
        )
    if all(_INTEGER.fullmatch(name) for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

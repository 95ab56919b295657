"""Tables of labels: which slide belongs to which case, and which class it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from momkd.data.classes import LabelOptions, read_classes
from momkd.data.ids import TCGA_CASE, case_column, check_printable, is_barcode, slide_column
from momkd.data.text import TextTable, check_length, is_unnamed, listed, read_table
from momkd.errors import InputError

_SHOWN = 12  # classes in a summary


@dataclass(frozen=True, eq=False)
class Labels:
    """Slides with their cases and classes.

    Args:
        table: index `slide_id` (unique text), columns `case_id` (text) and `label` (int64, -1 where missing).
        classes: names of the classes; label c is `classes[c]`. Of two the second is the positive one.
        name: the column of the labels.
        path: the file they came from, for messages.
        notes: what a user should know of the table, a line each.
        guessed: whether nothing but the alphabet says which of two classes is positive.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    name: str = "label"
    path: Path | None = None
    notes: tuple[str, ...] = ()
    guessed: bool = False

    def __len__(self) -> int:
        return len(self.table)

    @property
    def source(self) -> str:
        """How messages name this table."""
        return str(self.path) if self.path is not None else "labels"

    def cases(self) -> dict[str, str]:
        """The case of each slide."""
        return dict(zip(self.table.index, self.table["case_id"], strict=True))

    def summary(self) -> str:
        """The classes with their numbers of slides in one line, and how many slides have no label.

        Such as "label HER2: 612 negative, 98 positive (the positive class), 12 missing".
        """
        counts = np.bincount(self.table["label"].to_numpy(np.int64) + 1, minlength=len(self.classes) + 1)
        names = [f"of class {name}" if name.lstrip("+-").isdigit() else name for name in self.classes]
        told = [f"{count} {name}" for count, name in zip(counts[1:], names, strict=True)]
        if len(told) == 2:
            told[1] += " (the positive class" + (", as it sorts last; --positive changes it)" if self.guessed else ")")
        if len(told) > _SHOWN:
            told = [*told[:_SHOWN], f"... ({len(told)} classes)"]
        if counts[0]:
            told.append(f"{counts[0]} missing")
        return f"label {self.name}: {', '.join(told)}"


def read_labels(
    path: Path | str,
    *,
    label: str | None = None,
    classes: Sequence[str] | None = None,
    options: LabelOptions | None = None,
    cases: bool = True,
    remedy: str = "choose one with --label",
) -> Labels:
    """Reads a table of `slide_id, case_id, <label column>`.

    Ids are text: 007 stays 007. The columns of ids may have another usual name (slide, filename; patient,
    case_submitter_id; in any case), where one alone has such a name. Without a column of cases every slide is a case of
    its own, and a note says so. Slides of one case may differ in class; splits keep the case together all the same. An
    empty cell, or NA, null and others of `momkd.data.classes.MISSING`, is a missing label (-1).

    Args:
        path: text, see `momkd.data.text`.
        label: the column of the labels; None takes "label", or the only column besides the ids.
        classes: names in the order of their numbers, such as a run's; not all need occur. None takes the values found:
            integers by value, else sorted, but of two with a known meaning (HER2- and HER2+) the positive one last.
        options: what the user says of classes, missing cells and cases.
        cases: False looks for no column of cases: every slide is one.
        remedy: what to do where the table has no column `label`, for the message.

    Raises:
        InputError: naming file, line or column.
    """
    path = Path(path)
    options = options or LabelOptions()
    read = read_table(path)
    header = read.header
    slides = slide_column(path, header, label)
    case = case_column(path, header, slides, label, options.case_from) if cases else None
    column = _label_column(path, header, label, {slides, case}, remedy)
    check_printable(column, str(path), "a column of labels")
    lines = _slide_lines(read, header.index(slides), header.index(slides if case is None else case))
    at_label = header.index(column)
    found = read_classes(path, column, list(lines.values()), [row[at_label] for _, row in read.rows], classes, options)
    for name in found.order:
        check_printable(name, f"{path}: column {column!r}", "classes")
    number = {name: c for c, name in enumerate(found.order)}
    case_ids, notes = _cases(read, list(lines), case, options.case_from is not None) if cases else (list(lines), [])
    table = pd.DataFrame(
        {
            "case_id": np.array(case_ids, dtype=object),
            "label": np.array([-1 if name is None else number[name] for name in found.of_rows], dtype=np.int64),
        },
        index=pd.Index(list(lines), name="slide_id", dtype=object),
    )
    return Labels(table, found.order, column, path, (*read.notes, *found.notes, *notes), found.guessed)


def read_cases(path: Path | str, case_from: str | None = None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Read the case of each slide; the columns are found as `read_labels` finds them.

    Args:
        path: text, see `momkd.data.text`.
        case_from: the column of cases, or "tcga" for the first 12 characters of the slides' barcodes.

    Returns:
        {slide_id: case_id}, and what a user should know, a line each.

    Raises:
        InputError: naming file, line or column.
    """
    path = Path(path)
    read = read_table(path)
    slides = slide_column(path, read.header, None)
    cases = case_column(path, read.header, slides, None, case_from)
    lines = _slide_lines(read, read.header.index(slides), read.header.index(slides if cases is None else cases))
    ids, notes = _cases(read, list(lines), cases, case_from is not None)
    return dict(zip(lines, ids, strict=True)), (*read.notes, *notes)


def _slide_lines(read: TextTable, at_slide: int, at_case: int) -> dict[str, int]:
    """slide_id -> line, of rows that are whole and name each slide once."""
    path = read.path
    lines: dict[str, int] = {}
    for line, cells in read.rows:
        check_length(read, line, cells)
        slide = cells[at_slide]
        if not slide or not cells[at_case]:
            raise InputError(f"{path}: line {line}: expected a slide_id and a case_id, got an empty cell; fill it in")
        for text in (slide, cells[at_case]):
            check_printable(text, f"{path}: line {line}", "ids")
        if slide in lines:
            raise InputError(
                f"{path}: line {line}: expected each slide once, got {slide!r} again (first on line {lines[slide]}); "
                "remove one"
            )
        lines[slide] = line
    if not lines:
        raise InputError(f"{path}: expected a row for each slide, got a header alone; fill in the table")
    return lines


def _cases(read: TextTable, slides: list[str], column: str | None, chosen: bool) -> tuple[list[str], list[str]]:
    """The case of each slide, and notes where slides of one patient may stand in several."""
    if column is not None:
        at_case = read.header.index(column)
        cases = [cells[at_case] for _, cells in read.rows]
    elif chosen:
        if odd := [slide for slide in slides if not is_barcode(slide)]:
            raise InputError(
                f"{read.path}: --case-from tcga: expected slides named like TCGA-XX-XXXX, got {odd[0]!r}; add a column "
                "case_id"
            )
        return [slide[:TCGA_CASE].upper() for slide in slides], []
    else:
        cases = slides
    notes = []
    if column is None:
        notes.append(f"{read.path}: no column case_id: each of the {len(slides)} slides is taken as a patient")
    if all(map(is_barcode, slides)):
        patients = len({slide[:TCGA_CASE].upper() for slide in slides})
        if patients < len(set(cases)):
            told = f"the first 12 characters of the TCGA barcodes make {patients} patients, not {len(set(cases))}"
            notes.append(f"{read.path}: {told}; --case-from tcga takes those")
    return cases, notes


def _label_column(path: Path, header: list[str], label: str | None, ids: set[str | None], remedy: str) -> str:
    others = [name for name in header if name not in ids and not is_unnamed(name)]
    if label is not None:
        if label in others:
            return label
        raise InputError(f"{path}: expected a column {label!r}, got {listed(header)}; {remedy}")
    if "label" in others:
        return "label"
    if len(others) == 1:
        return others[0]
    raise InputError(f"{path}: expected one column of labels, got {listed(others)}; choose one with --label")

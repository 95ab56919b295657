"""Omics tables as text: cases × genes, with 100,000 genes too."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from momkd.data.classes import MISSING
from momkd.data.gene_columns import GeneRules
from momkd.data.text import READ_ERRORS, has_decimal_comma, is_unnamed, open_text, sniff, unreadable
from momkd.errors import InputError

Floats = npt.NDArray[np.float32]

EXPECTED = "an omics table"
_THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2}[.,]\d{3}\s*")
_WHOLE = re.compile(r"\s*[+-]?\d+\s*")


class Profiles(NamedTuple):
    """A table as it was read, not checked yet.

    Args:
        corner: name of the column of ids.
        ids: of the cases.
        genes: names of the columns that are genes by their names.
        values: (cases, genes); NaN where a cell is empty, infinite where float32 doesn't hold it.
        left_out: the other columns, each with the reason.
        remarks: what a user should know, a line each.
    """

    corner: str
    ids: Sequence[str]
    genes: Sequence[str]
    values: Floats
    left_out: Mapping[str, str] = MappingProxyType({})
    remarks: tuple[str, ...] = ()


def read_text_profiles(path: Path, rules: GeneRules) -> Profiles:
    """Read a text table a row at a time: parsers of tables spend too much on a column to read 100,000 of them.

    Raises:
        InputError: naming file and line, or case and gene.
    """
    dialect = sniff(path, EXPECTED)
    remarks = [*dialect.notes, *(["decimal commas are read as points"] if dialect.decimal == "," else [])]
    ids: list[str] = []
    rows: list[Floats] = []
    thousands = _Thousands(path, dialect.decimal)
    try:
        with open_text(path, dialect) as file:
            reader = csv.reader(file, delimiter=dialect.sep, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise InputError(f"{path}: expected a header, got an empty first line; write case_id and genes there")
            at_id = header.index("case_id") if "case_id" in header else 0
            first = 1 if at_id > 0 and is_unnamed(header[0]) else 0  # an index that pandas wrote is no gene
            columns = [i for i in range(first, len(header)) if i != at_id]
            left_out = rules.by_name(str(path), header[at_id], [header[i] for i in columns])
            columns = [i for i in columns if header[i] not in left_out]
            genes = [header[i] for i in columns]
            pick = itemgetter(*columns) if len(columns) > 1 else lambda row: [row[i] for i in columns]
            for row in reader:
                if len(row) != len(header):
                    if not any(map(str.strip, row)):
                        continue
                    raise InputError(
                        f"{path}: line {reader.line_num}: expected {len(header)} cells, got {len(row)}; mend the line"
                    )
                ids.append(row[at_id].strip())
                cells = pick(row)
                thousands.see(ids[-1], genes, cells)
                rows.append(_numbers(path, ids[-1], genes, cells, dialect.decimal))
    except READ_ERRORS as error:
        raise unreadable(path, EXPECTED, error) from error
    thousands.refuse()
    values = np.stack(rows) if rows else np.zeros((0, len(genes)), np.float32)
    return Profiles(header[at_id], ids, genes, values, left_out, tuple(remarks))


class _Thousands:
    """Looks for separators of thousands: whole numbers, and three digits behind each decimal sign there is."""

    def __init__(self, path: Path, decimal: str) -> None:
        self.path, self.decimal = path, decimal
        self.possible, self.whole = True, False  # whether a cell without the sign is a whole number
        self.first = ("", "", "")

    def see(self, case: str, genes: Sequence[str], cells: Sequence[str]) -> None:
        """Look at a row, as long as all before look so."""
        if not self.possible:
            return
        text = "\n".join(cells)
        if self.decimal not in text and self.whole and "." not in text:
            return
        for gene, cell in zip(genes, cells, strict=True):
            if self.decimal in cell:
                if not _THOUSANDS.fullmatch(cell):
                    self.possible = False
                    return
                self.first = self.first if self.first[2] else (case, gene, cell.strip())
            elif _WHOLE.fullmatch(cell):
                self.whole = True
            elif cell.strip() not in MISSING:
                self.possible = False
                return

    def refuse(self) -> None:
        """Raise where all rows look so."""
        case, gene, cell = self.first
        if self.possible and self.whole and cell:
            raise InputError(
                f"{self.path}: case {case!r}, gene {gene!r}: expected a plain number, got {cell!r} among whole "
                f"numbers, which looks like {cell.replace(self.decimal, '')} with a separator of thousands; write "
                f"numbers without such separators, or {cell}0 where it is a fraction"
            )


def _numbers(path: Path, case: str, genes: Sequence[str], cells: Sequence[str], decimal: str) -> Floats:
    """(G,) the cells of a row; NaN where one is missing."""
    if decimal != ".":
        cells = [cell.replace(decimal, ".") for cell in cells]
    try:
        if "_" in "".join(cells):  # 1_000 is a number in Python alone
            raise ValueError
        numbers = np.fromiter(map(float, cells), np.float64, len(cells))
    except ValueError:
        numbers = np.array(
            [_number(path, case, gene, cell.strip()) for gene, cell in zip(genes, cells, strict=True)], np.float64
        )
    with np.errstate(over="ignore"):  # what overflows is found by the finite check
        return numbers.astype(np.float32)


def _number(path: Path, case: str, gene: str, cell: str) -> float:
    if cell in MISSING:
        return np.nan
    try:
        if "_" not in cell:
            return float(cell)
    except ValueError:
        pass
    hint = " (a decimal comma: write a point)" if has_decimal_comma(cell) else ""
    if hint and _THOUSANDS.fullmatch(cell):
        hint = " (a separator of thousands: leave it out; or a decimal comma: write a point)"
    raise no_number(path, case, gene, f"{cell!r:.60}{hint}")


def no_number(path: Path, case: str, gene: str, came: str) -> InputError:
    """The error of a cell that holds no number."""
    return InputError(
        f"{path}: case {case.strip()!r}, gene {gene!r}: expected a number, got {came}; mend the cell, "
        "or remove the column if it is no gene"
    )

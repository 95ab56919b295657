"""Text tables as spreadsheets and people write them: their encoding, separator and decimal sign, and their rows.

Encodings: UTF-8, with a byte order mark or without; UTF-16 with one; else Windows-1252 (cp1252), told in a note.
Separators: comma, semicolon or tab, by the header and the first rows; in .tsv a tab, if there is one. Compressed: .gz.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO, cast

import pandas as pd

from momkd.data.atomic import plain_cell
from momkd.data.files import regular_file
from momkd.data.raw import one_line
from momkd.errors import InputError

# What reading a text table raises, besides InputError: catch it around what `open_text` gives.
READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeError, csv.Error)

_LARGEST = 1 << 30  # bytes of a table that is read at once
_BLOCK = 1 << 20
_ROWS = 20  # that the separator and the decimal sign are looked for in
_FOREIGN = {  # first bytes of files that are no text
    b"PK\x03\x04": "a workbook or a zip archive; save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save the sheet as CSV",
    b"PAR1": "a Parquet file; write it as CSV",
    b"\x89HDF": "an HDF5 file; give a CSV table",
    b"\x1f\x8b": "a gzip file; name it .csv.gz",
}
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d+,\d+\s*")
_DECIMAL_POINT = re.compile(r"\s*[+-]?\d*\.\d+([eE][+-]?\d+)?\s*")
_UNNAMED = re.compile(r"|index|Unnamed: \d+")  # the index column that pandas writes


@dataclass(frozen=True)
class Dialect:
    """How a text table is written.

    Args:
        encoding: as `open` takes it: "utf-8-sig", "utf-16" or "cp1252".
        sep: what separates cells: a comma, a semicolon or a tab.
        decimal: "," where numbers of the first rows have decimal commas ("1,5") and none has a point, else ".".
        notes: what a user should know, a line each, without the path.
    """

    encoding: str = "utf-8-sig"
    sep: str = ","
    decimal: str = "."
    notes: tuple[str, ...] = ()


def sniff(path: Path | str, expected: str = "a CSV table", *, largest: int | None = None) -> Dialect:
    """Find out how a text table is written. All of it is decoded once, a block at a time; no row is kept.

    Args:
        path: .csv, .tsv or any text, also .gz.
        expected: what it should be, for messages.
        largest: bytes, unpacked, that it may have.

    Raises:
        InputError: no regular file, a file of another kind (a workbook, zero bytes), too large, or no known encoding.
    """
    path = regular_file(path, expected)
    try:
        encoding = _Bytes(path, expected, largest).encoding()
        header, rows = _first_lines(path, encoding)
        sep = "\t" if _named(path, ".tsv") and "\t" in header else _separator(header, rows)
        decimal = "." if sep == "," else _decimal(rows, sep)
    except READ_ERRORS as error:
        raise unreadable(path, expected, error) from error
    notes = ("not UTF-8: read as Windows-1252 (cp1252)",) if encoding == "cp1252" else ()
    return Dialect(encoding, sep, decimal, notes)


def open_text(path: Path, dialect: Dialect) -> TextIO:
    """Open a text table, unpacked where it ends in .gz; line ends are left as they are, for `csv`."""
    return io.TextIOWrapper(_open_bytes(path), encoding=dialect.encoding, newline="")


def unreadable(path: Path | str, expected: str, error: BaseException) -> InputError:
    """The one line for an error of `READ_ERRORS`."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, gzip.BadGzipFile):
        return InputError(f"{path}: expected {expected}, got {error.strerror}; make it readable or give another")
    return InputError(f"{path}: expected {expected}, got {one_line(error)}; save it again, in UTF-8")


def has_decimal_comma(cell: str) -> bool:
    """Whether a cell looks like a number with a decimal comma: "1,5"."""
    return _DECIMAL_COMMA.fullmatch(cell) is not None


@dataclass(frozen=True, eq=False)
class TextTable:
    """A small table of text: its header, rows that are not blank as (line number, stripped cells), its dialect."""

    path: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]
    dialect: Dialect

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"{self.path}: {note}" for note in self.dialect.notes)


def read_table(path: Path | str, expected: str = "a CSV table") -> TextTable:
    """Read a small text table whole.

    Raises:
        InputError: it cannot be read, is empty or larger than 1 GiB, or has a column twice.
    """
    path = Path(path)
    dialect = sniff(path, expected, largest=_LARGEST)
    try:
        with open_text(path, dialect) as file:
            reader = csv.reader(file, delimiter=dialect.sep, strict=True)
            rows = [(reader.line_num, [plain_cell(cell.strip()) for cell in cells]) for cells in reader]
    except READ_ERRORS as error:
        raise unreadable(path, expected, error) from error
    rows = [(line, cells) for line, cells in rows if any(cells)]
    if not rows:
        raise InputError(f"{path}: expected a header and rows, got an empty file; write the table again")
    header = rows[0][1]
    seen: set[str] = set()
    for name in header:
        if name and name in seen:
            raise InputError(f"{path}: expected each column once, got {name!r} twice; rename or remove one")
        seen.add(name)
    return TextTable(path, header, rows[1:], dialect)


def read_text_table(path: Path | str, columns: Sequence[str] = (), expected: str = "a CSV table") -> pd.DataFrame:
    """Read a small table whose cells stay text, and which must have these columns."""
    table = read_table(path, expected)
    if missing := [name for name in columns if name not in table.header]:
        raise InputError(f"{path}: expected a column {missing[0]!r}, got {listed(table.header)}; name another")
    for line, cells in table.rows:
        check_length(table, line, cells)
    frame: pd.DataFrame = pd.DataFrame(
        [cells for _, cells in table.rows], columns=pd.Index(table.header, dtype=object), dtype=object
    )
    return frame


def check_length(table: TextTable, line: int, cells: Sequence[str]) -> None:
    """Raise where a row has another number of cells than the header."""
    if len(cells) == len(table.header):
        return
    remedy = "mend the line"
    if table.dialect.sep == "," and len(cells) > len(table.header):
        remedy = "quote cells that hold commas, write numbers with points, or separate cells with semicolons"
    raise InputError(f"{table.path}: line {line}: expected {len(table.header)} cells, got {len(cells)}; {remedy}")


def is_unnamed(column: str) -> bool:
    """Whether a column is the index that pandas wrote, not data."""
    return _UNNAMED.fullmatch(column) is not None


def listed(names: Sequence[str], limit: int = 12) -> str:
    """Names for a message, the first few of many."""
    shown = ", ".join(repr(name if len(name) <= 60 else name[:57] + "...") for name in names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown or "none"


# -- how a file is written -----------------------------------------------------------------------------------------


def _named(path: Path, ending: str) -> bool:
    return path.name.lower().endswith((ending, f"{ending}.gz"))


def _open_bytes(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


@dataclass(frozen=True)
class _Bytes:
    """The bytes of a table: whether they are text, and in which encoding."""

    path: Path
    expected: str
    largest: int | None

    def encoding(self) -> str:
        with _open_bytes(self.path) as file:
            start = file.read(4)
        for magic, told in _FOREIGN.items():
            if start.startswith(magic):
                raise InputError(f"{self.path}: expected {self.expected}, got {told}")
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self.decode("utf-16")
            return "utf-16"
        try:
            self.decode("utf-8-sig")
            return "utf-8-sig"
        except UnicodeDecodeError:
            pass
        try:
            self.decode("cp1252")
            return "cp1252"
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}: expected {self.expected} in UTF-8, UTF-16 or Windows-1252, got byte "
                f"{error.object[error.start]:#x}, which is none of them; save it again, in UTF-8"
            ) from error

    def decode(self, encoding: str) -> None:
        """Decode everything and keep nothing. Raises UnicodeDecodeError, and InputError for zero bytes."""
        decoder = codecs.getincrementaldecoder(encoding)()
        size = 0
        with _open_bytes(self.path) as file:
            while block := file.read(_BLOCK):
                size += len(block)
                if self.largest is not None and size > self.largest:
                    most = f"{self.largest >> 20} MiB"
                    raise InputError(f"{self.path}: expected {self.expected} of at most {most}, got more; shorten it")
                if "\0" in decoder.decode(block):
                    raise InputError(
                        f"{self.path}: expected {self.expected}, got zero bytes (no text, or UTF-16 without its byte "
                        "order mark); save it again, in UTF-8"
                    )
        decoder.decode(b"", final=True)


def _first_lines(path: Path, encoding: str) -> tuple[str, list[str]]:
    """The first line that is not blank, whole, and some of those behind it, within about a block of characters."""
    with open_text(path, Dialect(encoding)) as file:
        lines = iter(file.readline, "")
        header = next((line for line in lines if line.strip(" \t\r\n,;")), "")
        rows: list[str] = []
        left = _BLOCK
        for line in itertools.islice(lines, _ROWS):
            rows.append(line)
            left -= len(line)
            if left < 0:
                break
    return header, rows


def _separator(header: str, rows: list[str]) -> str:
    """Of the separators that the header holds, the one that fewest rows contradict; then the one that cuts it most.

    Where two do equally well it is not the comma, which numbers and names hold too.
    """
    held = [sep for sep in ("\t", ";", ",") if sep in header]
    if len(held) < 2:
        return held[0] if held else ","

    def cost(sep: str) -> tuple[int, int]:
        counts = [len(cells) for cells in _cut([header, *rows], sep) if any(cells)]
        if not counts or counts[0] < 2:  # it stands in quotes
            return len(rows) + 1, 0
        return sum(count != counts[0] for count in counts[1:]), -counts[0]

    return min(held, key=cost)


def _decimal(rows: list[str], sep: str) -> str:
    cells = [cell for row in _cut(rows, sep) for cell in row]
    commas = any(_DECIMAL_COMMA.fullmatch(cell) for cell in cells)
    return "," if commas and not any(_DECIMAL_POINT.fullmatch(cell) for cell in cells) else "."


def _cut(lines: list[str], sep: str) -> Iterator[list[str]]:
    """Rows of the lines, as far as they can be cut."""
    reader = csv.reader(lines, delimiter=sep)
    while True:
        try:
            yield next(reader)
        except (StopIteration, csv.Error):
            return

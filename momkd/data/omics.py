"""Omics tables: one profile a case, as cases × genes, or as a folder with one array a case."""

from __future__ import annotations

import csv
import gzip
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pandas as pd

from momkd.data.classes import MISSING
from momkd.data.raw import one_line, open_raw
from momkd.data.text import is_unnamed
from momkd.errors import InputError

Floats = npt.NDArray[np.float32]

_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_CHUNK = 1 << 24  # cells that are parsed at a time: wide tables in few pieces, long ones in little memory
_FRACTION = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
_RAGGED = re.compile(r"Expected (\d+) fields in line (\d+), saw (\d+)")
_GENE_COLUMN = re.compile(r"(hugo[_ ]?)?(genes?|symbols?|ensembl)([_ ]?(ids?|names?|symbols?))?", re.IGNORECASE)
_GENE_ID = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?|ACTB|B2M|BRCA1|CD8A|EGFR|ERBB2|ESR1|GAPDH|GATA3|MYC|PTEN|TP53")


@dataclass(frozen=True, eq=False)
class Omics:
    """Profiles of cases.

    Args:
        table: index `case_id` (unique text), a float32 column a gene (unique text), every value finite.
        path: the file or folder they came from, for messages.
    """

    table: pd.DataFrame
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def source(self) -> str:
        """How messages name this table."""
        return str(self.path) if self.path is not None else "omics"


def read_omics(path: Path | str) -> Omics:
    """Reads a table of cases × genes, or a folder of one .npy a case.

    Ids are text: 007 stays 007. Values become float32; a cell that is missing, infinite or no number is an error, since
    a made-up expression value would be learned from. To leave a case out, leave out its row.

    Args:
        path: .csv or .tsv (also .gz), or .parquet (needs pyarrow), with a column `case_id`; without one the ids are in
            the first column. Or a folder: CASE.npy is the profile of CASE, (G,), and the genes are gene_0, gene_1, ...

    Raises:
        InputError: naming file, case and gene.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    name = path.name.lower()
    if not path.is_file():
        raise InputError(f"{path}: expected an omics table or a folder of .npy, got nothing there; check --omics")
    if not name.endswith(_SUFFIXES):
        raise InputError(
            f"{path}: expected an omics table ({', '.join(_SUFFIXES)}) or a folder of .npy, "
            f"got {path.suffix or 'no ending'}; convert or rename it"
        )
    if not name.endswith(".parquet"):
        return _read_text(path)
    try:
        return _read_parquet(path)
    except UnicodeDecodeError as error:  # texts are decoded when they are looked at
        raise InputError(f"{path}: expected a table in UTF-8, got {one_line(error)}; write it again") from error


# -- CSV and TSV -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """A text table and what its header says: which column holds the ids, and which hold genes."""

    path: Path
    sep: str
    header: list[str]
    at_id: int
    genes: list[int]

    def rows(self, file: TextIO) -> Iterator[list[str]]:
        """Without the header."""
        return itertools.islice(csv.reader(file, delimiter=self.sep), 1, None)


def _read_text(path: Path) -> Omics:
    sep = "\t" if path.name.lower().endswith((".tsv", ".tsv.gz")) else ","
    try:
        with _open_text(path) as file:
            header = [name.strip() for name in next(csv.reader(file, delimiter=sep), [])]
            if not any(header):
                raise InputError(f"{path}: expected a header, got an empty first line; write case_id and genes there")
            at_id = header.index("case_id") if "case_id" in header else 0
            first = 1 if at_id > 0 and is_unnamed(header[0]) else 0  # an index that pandas wrote is no gene
            text = _Text(path, sep, header, at_id, [i for i in range(first, len(header)) if i != at_id])
            ids, values = _read_cells(text, file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error, pd.errors.ParserError) as error:
        raise InputError(f"{path}: expected a table in UTF-8, got {one_line(error)}; save it again") from error
    return _checked(path, header[at_id], ids, [header[i] for i in text.genes], values)


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_cells(text: _Text, file: TextIO) -> tuple[list[str], Floats]:
    """The ids and the values (cases, genes), by pandas' parser, a block of rows at a time; the header is read."""
    genes, width = text.genes, len(text.header)
    dtypes: dict[Any, Any] = {**dict.fromkeys(range(width), object), **dict.fromkeys(genes, np.float32)}
    missing: dict[Any, Any] = dict.fromkeys(genes, MISSING)  # in the values alone: a case may be named NA
    ids: list[str] = []
    blocks: list[Floats] = []
    try:
        reader = pd.read_csv(
            file,
            sep=text.sep,
            header=None,
            index_col=False,
            dtype=dtypes,
            keep_default_na=False,
            na_values=missing,
            chunksize=max(1, _CHUNK // width),
            low_memory=False,
        )
        with np.errstate(over="ignore"):  # what overflows is found by the finite check
            for block in reader:
                if block.shape[1] != width:
                    raise InputError(
                        f"{text.path}: expected {width} cells a row as in the header, got {block.shape[1]}; "
                        "mend the header or the rows"
                    )
                ids += map(str.strip, block[text.at_id])
                blocks.append(block.iloc[:, genes].to_numpy(np.float32))
        _find_text(text, 0, 1)  # the parser takes a column of nothing but True and False for numbers
    except pd.errors.EmptyDataError:
        pass
    except pd.errors.ParserError as error:
        if match := _RAGGED.search(str(error)):  # it counts without the header
            where = f"{text.path}: line {int(match[2]) + 1}"
            raise InputError(f"{where}: expected {match[1]} cells, got {match[3]}; mend the line") from error
        raise
    except ValueError as error:
        if isinstance(error, InputError | UnicodeDecodeError):
            raise
        _find_text(text, len(ids), None)
        raise InputError(f"{text.path}: expected numbers, got {one_line(error)}; write the table again") from error
    return ids, np.concatenate(blocks) if blocks else np.zeros((0, len(genes)), np.float32)


def _find_text(text: _Text, start: int, stop: int | None) -> None:
    """Raises for the first cell of these rows that is no number, since the parser does not say where it was."""
    with _open_text(text.path) as file:
        for row in itertools.islice(text.rows(file), start, stop):
            for i in text.genes:
                cell = row[i].strip() if i < len(row) else ""
                if cell not in MISSING and not _is_number(cell):
                    case = row[text.at_id] if text.at_id < len(row) else ""
                    raise _no_number(text.path, case, text.header[i], repr(cell))


# -- Parquet and folders -----------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Omics:
    try:
        frame = pd.read_parquet(path, engine="pyarrow")
    except ImportError as error:
        raise InputError(
            f"{path}: expected pyarrow, which reads Parquet, got no such package; pip install pyarrow, or write a CSV"
        ) from error
    except Exception as error:  # pyarrow's errors on a foreign or damaged file have several roots
        raise InputError(f"{path}: expected a Parquet table, got {one_line(error)}; write it again") from error
    frame.columns = pd.Index([str(name).strip() for name in frame.columns])
    if "case_id" in frame.columns[1:] and is_unnamed(frame.columns[0]):
        frame = frame.iloc[:, 1:]
    corner = str(frame.index.name or "")
    if (column := _id_column(frame)) is not None:
        corner = column
        frame = frame.set_index(column)
    if frame.index.nlevels > 1 or frame.index.inferred_type not in ("string", "integer", "categorical", "empty"):
        raise InputError(f"{path}: expected ids as text, got {frame.index.inferred_type}; name their column case_id")
    if frame.index.hasnans:
        raise InputError(f"{path}: expected a case id in each row, got an empty cell; fill it in")
    ids = [str(case).strip() for case in frame.index]
    for gene, dtype in zip(frame.columns, frame.dtypes, strict=True):
        if not pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):
            first = repr(frame[gene].iloc[0]) if len(frame) and frame.columns.is_unique else "none"
            raise _no_number(path, ids[0] if ids else "", gene, f"{first} ({dtype})")
    with np.errstate(over="ignore"):  # what overflows is found by the finite check
        values = frame.to_numpy(dtype=np.float32, na_value=np.nan)
    return _checked(path, corner, ids, list(frame.columns), values)


def _id_column(frame: pd.DataFrame) -> str | None:
    """The column of the ids, or None where they are the index already."""
    if "case_id" in frame.columns:
        return "case_id"
    unnamed = isinstance(frame.index, pd.RangeIndex) and frame.index.name is None
    return str(frame.columns[0]) if unnamed and len(frame.columns) else None


def _read_folder(folder: Path) -> Omics:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".npy" and not p.name.startswith("."))
    if not files:
        raise InputError(f"{folder}: expected CASE.npy for each case, got no .npy; check --omics")
    profiles: list[Floats] = []
    for path in files:
        with open_raw(path) as raw:
            if raw.kind not in "fiu" or len(raw.shape) != 1 or raw.shape == (0,):
                raise InputError(
                    f"{path}: expected numbers (G,), one for each gene, got {raw.dtype} {raw.shape}; write it again"
                )
            if profiles and raw.shape != profiles[0].shape:
                raise InputError(
                    f"{path}: expected {len(profiles[0])} genes as in {files[0].name}, got {raw.shape[0]}; "
                    "write all cases with the same genes"
                )
            with np.errstate(over="ignore"):
                profiles.append(raw.read_features().astype(np.float32))
    genes = [f"gene_{i}" for i in range(len(profiles[0]))]
    return _checked(folder, "case_id", [path.stem for path in files], genes, np.stack(profiles))


# -- checks ------------------------------------------------------------------------------------------------------------


def _checked(path: Path, corner: str, ids: Sequence[str], genes: Sequence[str], values: Floats) -> Omics:
    """The table, once every case and gene has one name and every value is finite."""
    if not genes:
        raise InputError(f"{path}: expected a column for each gene, got only {corner!r}; separate columns with commas")
    if "case_id" in genes:
        raise InputError(f"{path}: expected one column 'case_id', got more; rename or remove the others")
    if "" in genes:
        raise InputError(f"{path}: expected a name for each gene, got an empty one; name the column or remove it")
    if not ids:
        raise InputError(f"{path}: expected a row for each case, got a header alone; fill in the table")
    known = [case for case in ids if _GENE_ID.fullmatch(case)]
    if _GENE_COLUMN.fullmatch(corner) or len(known) >= 2:
        rows = f"genes such as {known[0]!r} in the rows" if known else f"genes in the rows (column {corner!r})"
        raise InputError(f"{path}: expected cases × genes, one row a case, got {rows}; transpose the table")
    if corner != "case_id" and all(_FRACTION.fullmatch(case) for case in ids):
        raise InputError(
            f"{path}: expected case ids in the first column, got fractions such as {ids[0]} in {corner!r}; "
            "add a column case_id"
        )
    if "" in ids:
        raise InputError(f"{path}: row {list(ids).index('') + 1}: expected a case id, got an empty cell; fill it in")
    for what, names in (("case", ids), ("gene", genes)):
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            hint = (
                "; remove the others, or transpose a table of genes × cases"
                if what == "case"
                else "; rename or remove one"
            )
            raise InputError(f"{path}: expected each {what} once, got {name!r} {count} times{hint}")
    wrong = ~np.isfinite(values)
    if count := int(wrong.sum()):
        row, column = divmod(int(wrong.argmax()), len(genes))
        kind = "missing" if np.isnan(values[row, column]) else "infinite"
        raise InputError(
            f"{path}: expected finite values, got {count} missing or infinite, the first ({kind}) for case "
            f"{ids[row]!r} and gene {genes[column]!r}; fill it in, or remove the case or the gene"
        )
    index = pd.Index(list(ids), name="case_id", dtype=object)
    return Omics(pd.DataFrame(values, index, pd.Index(list(genes), dtype=object), copy=False), path)


def _no_number(path: Path, case: str, gene: str, came: str) -> InputError:
    return InputError(
        f"{path}: case {case.strip()!r}, gene {gene!r}: expected a number, got {came}; mend the cell, "
        "or remove the column if it is no gene"
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # 1_000 is a number in Python alone

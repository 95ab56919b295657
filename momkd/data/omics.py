"""Omics tables: one profile a case, as cases × genes, or as a folder with one array a case."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from momkd.data.counts import are_counts, is_signed, like_counts, ranges, scale_note
from momkd.data.files import kind_of
from momkd.data.gene_columns import GeneRules, kept_columns, left_out_note, no_genes
from momkd.data.omics_text import EXPECTED, Floats, Profiles, no_number, read_text_profiles
from momkd.data.raw import one_line, open_raw
from momkd.data.tables import Labels
from momkd.data.text import is_unnamed
from momkd.errors import InputError

_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_FRACTION = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
_GENE_COLUMN = re.compile(r"(hugo[_ ]?)?(genes?|symbols?|ensembl)([_ ]?(ids?|names?|symbols?))?", re.IGNORECASE)
_GENE_ID = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?|ACTB|B2M|BRCA1|CD8A|EGFR|ERBB2|ESR1|GAPDH|GATA3|MYC|PTEN|TP53")
_DATE = re.compile(r"\d{1,2}-(Mar|Sep|Sept|Dec)|(Mar|Sep|Sept|Dec)-\d{1,2}", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Omics:
    """Profiles of cases.

    Args:
        table: index `case_id` (unique text), a float32 column a gene (unique text), every value finite.
        path: the file or folder they came from, for messages.
        left_out: columns of the file that are no genes, each with the reason.
        counts: whether the logarithm of the values is to be taken; None where it was not looked at.
        rules: what its genes were chosen by.
        remarks: what else a user should know of the file, a line each, without its name.
        scale: a line on genes that disagree with `counts`, or None.
    """

    table: pd.DataFrame
    path: Path | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    counts: bool | None = None
    rules: GeneRules = field(default_factory=GeneRules)
    remarks: tuple[str, ...] = ()
    scale: str | None = None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def source(self) -> str:
        """How messages name this table."""
        return str(self.path) if self.path is not None else "omics"

    @property
    def notes(self) -> list[str]:
        """What a user should know, a line each."""
        lines = [*self.remarks, *([left_out_note(self.left_out)] if self.left_out else [])]
        lines += [self.scale] if self.scale else []
        return [f"{self.source}: {line}" for line in lines]

    def without_label(self, labels: Mapping[str, int]) -> Omics:
        """Leave out the columns that are the label in other words; see `momkd.data.gene_columns.label_copies`.

        Args:
            labels: the class of each case, -1 where unknown, of all cases of a run: see `case_classes`. They decide
                together, once for all folds, and only ever take columns away, so that nothing is learned from the cases
                of a test part.
        """
        known = [case for case in labels if case in self.table.index]
        classes = np.array([labels[case] for case in known], np.int64)
        return self._without(self.rules.by_label(self.table.loc[known], classes)) if known else self

    def _without(self, left_out: Mapping[str, str]) -> Omics:
        if not left_out:
            return self
        kept = [name not in left_out for name in self.table.columns]
        everything = {**self.left_out, **left_out}
        if not any(kept):
            raise no_genes(self.source, "case_id", everything)
        table = self.table.loc[:, kept]
        return replace(self, table=table, left_out=everything)._decided()

    def _decided(self) -> Omics:
        """With `counts` and `scale`, by the genes that it has now."""
        found, names = ranges(self.table.to_numpy()), [str(name) for name in self.table.columns]
        if are_counts(found, names):
            return replace(self, counts=True, scale=None)
        odd = [names[i] for i in np.flatnonzero(like_counts(found))]
        return replace(self, counts=False, scale=scale_note(odd, is_signed(found, names)) if odd else None)


def case_classes(labels: Labels, slides: Sequence[str] | None = None) -> dict[str, int]:
    """Return the class of each labelled case, that of its first slide; of some slides, or of all."""
    table = labels.table if slides is None else labels.table.loc[list(slides)]
    known = table[table["label"] >= 0].drop_duplicates("case_id")
    return dict(zip(known["case_id"], known["label"].tolist(), strict=True))


def read_omics(
    path: Path | str, *, label: str | Sequence[str] | None = None, keep: str | Path | Sequence[str] | None = None
) -> Omics:
    """Read a table of cases × genes, or a folder of one .npy a case.

    Ids are text: 007 stays 007. Values become float32; a cell that is missing, infinite or no number is an error, since
    a made-up expression value would be learned from. To leave a case out, leave out its row. Columns that are no genes
    are left out, by the rules of `momkd.data.gene_columns`: `Omics.left_out` names them, with the reasons.

    Args:
        path: .csv or .tsv (also .gz), separated by commas, semicolons or tabs, or .parquet (needs pyarrow), with a
            column `case_id`; without one the ids are in the first column. Or a folder: CASE.npy is the profile of CASE,
            (G,), and the genes are gene_0, gene_1, ...
        label: the column, or columns, of the labels: a column that is named so is an error.
        keep: columns that stay genes all the same, as `--omics-columns` gives them: names with commas between them, a
            file with one a line, "all", or a sequence of names.

    Raises:
        InputError: naming file, case and gene.
    """
    path = Path(path)
    labels = () if label is None else (label,) if isinstance(label, str) else tuple(label)
    rules = GeneRules(labels, kept_columns(keep))
    came = kind_of(path)
    if came == "a folder":
        return _checked(path, _read_folder(path, rules), rules)
    if came != "a file":
        raise InputError(f"{path}: expected {EXPECTED} or a folder of .npy, got {came}; check --omics")
    name = path.name.lower()
    if not name.endswith(_SUFFIXES):
        raise InputError(
            f"{path}: expected an omics table ({', '.join(_SUFFIXES)}) or a folder of .npy, "
            f"got {path.suffix or 'no ending'}; convert or rename it"
        )
    if not name.endswith(".parquet"):
        return _checked(path, read_text_profiles(path, rules), rules)
    try:
        return _checked(path, _read_parquet(path, rules), rules)
    except UnicodeDecodeError as error:  # texts are decoded when they are looked at
        raise InputError(f"{path}: expected a table in UTF-8, got {one_line(error)}; write it again") from error


# -- Parquet and folders -----------------------------------------------------------------------------------------------


def _read_parquet(path: Path, rules: GeneRules) -> Profiles:
    try:
        from pyarrow.parquet import ParquetFile  # pandas' way takes 100 kB a column where there is one thread

        with ParquetFile(path) as file:
            frame = file.read().to_pandas()
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
    left_out = rules.by_name(str(path), corner, list(frame.columns))
    if left_out:
        frame = frame.loc[:, [name not in left_out for name in frame.columns]]
    for gene, dtype in zip(frame.columns, frame.dtypes, strict=True):
        if not pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):
            first = repr(frame[gene].iloc[0]) if len(frame) and frame.columns.is_unique else "none"
            raise no_number(path, ids[0] if ids else "", gene, f"{first} ({dtype})")
    with np.errstate(over="ignore"):  # what overflows is found by the finite check
        values = frame.to_numpy(dtype=np.float32, na_value=np.nan)
    return Profiles(corner, ids, list(frame.columns), values, left_out)


def _id_column(frame: pd.DataFrame) -> str | None:
    """The column of the ids, or None where they are the index already."""
    if "case_id" in frame.columns:
        return "case_id"
    unnamed = isinstance(frame.index, pd.RangeIndex) and frame.index.name is None
    return str(frame.columns[0]) if unnamed and len(frame.columns) else None


def _read_folder(folder: Path, rules: GeneRules) -> Profiles:
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
    left_out = rules.by_name(str(folder), "case_id", genes)  # none, but it checks what is to be kept
    return Profiles("case_id", [path.stem for path in files], genes, np.stack(profiles), left_out)


# -- checks ------------------------------------------------------------------------------------------------------------


def _checked(path: Path, read: Profiles, rules: GeneRules) -> Omics:
    """The genes of the table, once every case and gene has one name and every value is finite."""
    corner, ids, genes, values = read.corner, read.ids, read.genes, read.values
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
    table = pd.DataFrame(values, index, pd.Index(list(genes), dtype=object), copy=False)
    remarks = read.remarks
    if dates := [gene for gene in genes if _DATE.fullmatch(gene)]:
        told = f"genes such as {dates[0]!r} are dates that a spreadsheet made of names like MARCH1 or SEPT2"
        remarks = (*remarks, f"{told} ({len(dates)} in all); rename them")
    omics = Omics(table, path, read.left_out, rules=rules, remarks=remarks)
    return omics._without(left_out) if (left_out := rules.by_value(table)) else omics._decided()

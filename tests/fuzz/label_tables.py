"""Tables of labels cell by cell: hostile ids and classes, usual markers, names of columns, separators and encodings.

What is read must be what was written: ids come back from splits, no marker is a class, and notes are one line.
"""

from __future__ import annotations

import csv
import io
import os
import random
import unicodedata
import zlib
from pathlib import Path

from momkd.data import LabelOptions, check_splits, make_splits, read_labels, read_splits, write_splits
from momkd.data.classes import MISSING
from momkd.data.splits import match_splits
from tests.fuzz.kinds import WORK, Kind

_IDS = (
    *(
        "=cmd|' /C calc'!A0",
        "@x",
        "+1",
        "-2",
        "'=1",
        "[/b]",
        "[link=x]",
        "NA",
        "nan",
        "007",
        "1.0",
        "9" * 18,
        "a.svs",
        "a",
    ),
    *("a\rb", "a\nb", "a\x00b", "a\x1b[31m", "a\u2028b", "\u202eb", "ü", "a,b", "a;b", "a\tb", 'a"b', "../x", "/etc/x"),
    *("TCGA-A1-A0SB-01Z-00-DX1.x", "tcga-a1-a0sb-02", "x" * 300, "", " ", "#N/A", "\ud7ff", "\ufeffa", "1e5", "NULL"),
)
_CLASSES = (
    *("0", "1", "1.0", "-1", "01", "0,5", "0.5", "1e39", "inf", "HER2+", "HER2-", "+", "-", "pos", "neg", "Yes", "no"),
    *(
        "None",
        "Unknown",
        "unknown",
        "[Unknown]",
        "[/b]",
        "=1+1",
        "a\rb",
        "x" * 300,
        "9" * 5000,
        "wt",
        "mut",
        "non-x",
        "x",
    ),
    *MISSING,
)
_HEADERS = (
    *("slide_id", "slide", "Slide ID", "FILENAME", "case_id", "Case_ID", "patient", "PATIENT", "submitter_id", "label"),
    *("HER2", "", "Unnamed: 0", "a\rb", "../x", "x" * 300),
)
_OPTIONS = (
    *[LabelOptions()] * 20,
    LabelOptions(missing=("Unknown", "-1", "")),
    LabelOptions(classes=("neg", "pos")),
    LabelOptions(classes=("0", "1"), positive="1"),
    LabelOptions(positive="0"),
    LabelOptions(case_from="tcga"),
    LabelOptions(case_from="patient"),
)


def table_files(folder: Path) -> None:
    ids = [f"s{i}" for i in range(32)]
    for name, header, classes in (
        ("plain.csv", ["slide_id", "case_id", "label"], ("0", "1")),
        ("words.csv", ["Patient", "FILENAME", "HER2"], ("HER2-", "HER2+")),
        ("three.tsv", ["slide_id", "stage"], ("I", "II", "III")),
    ):
        rows = [header] + [
            [*[f"c{i // 2}" if "atient" in column or "case" in column else slide for column in header[:-1]],
             classes[i // 2 % len(classes)]]
            for i, slide in enumerate(ids)
        ]  # fmt: skip
        sep = "\t" if name.endswith("tsv") else ","
        (folder / name).write_text("\n".join(sep.join(row) for row in rows) + "\n")


def rewritten(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """The table with other cells, another separator and another encoding."""
    sep = "\t" if path.suffix == ".tsv" else ","
    rows = [line.split(sep) for line in path.read_text().splitlines()]
    for _ in range(rng.choice((0, 1, 1, 2, 6))):
        row = rng.randrange(len(rows))
        at = rng.randrange(len(rows[row]))
        last = at == len(rows[0]) - 1
        rows[row][at] = rng.choice(_HEADERS if row == 0 else _CLASSES if last else _IDS)
    if rng.random() < 0.1:
        rows[rng.randrange(len(rows))].append("x")
    if rng.random() < 0.05:
        rows = [[*row, *row] for row in rows]
    text = io.StringIO()
    sep = sep if path.suffix == ".tsv" else rng.choice((",", ",", ";", "\t"))
    csv.writer(text, delimiter=sep, lineterminator=rng.choice(("\n", "\r\n"))).writerows(rows)
    encoding = rng.choice(
        (*["utf-8"] * 20, "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "cp1252", "cp1252", "utf-32")
    )
    return text.getvalue().encode(encoding, errors="replace")


def use_table(path: Path) -> None:
    options = _OPTIONS[zlib.crc32(path.read_bytes()) % len(_OPTIONS)]
    labels = read_labels(path, options=options)
    for line in (labels.summary(), *labels.notes):
        assert len(line.splitlines()) == 1
        assert not {unicodedata.category(sign) for sign in line} & {"Cc", "Cs", "Zl", "Zp"}, line
    named = options.classes or ()
    assert not {name for name in labels.classes if name in MISSING and name not in named}
    assert len(labels.classes) == len(set(labels.classes)) >= 2
    assert labels.table["label"].between(-1, len(labels.classes) - 1).all()
    if labels.table.groupby("label")["case_id"].nunique().min() < 5:  # too few to split
        return
    folder = path.parent / WORK / f"{os.getpid()}-splits"
    folder.parent.mkdir(exist_ok=True)
    made = make_splits(labels, 2)
    write_splits(folder, made)
    back, told = match_splits(read_splits(folder, labels.table.index), labels)
    assert (back, told) == (made, [])
    check_splits(back, labels)


KINDS = {"label tables": Kind(table_files, use_table, 400, rewritten)}

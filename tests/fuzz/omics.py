"""Omics tables in which labels and clinical metadata lie beside the genes, as spreadsheets and people write them."""

from __future__ import annotations

import codecs
import gzip
import random
from pathlib import Path

import numpy as np

from momkd.data import read_omics
from tests.fuzz.kinds import Kind, mutated

CASES = 24
LABEL = "HER2_status"
KEPT = ["grade"]
NO_GENES = {"her2status", "stage", "os", "daystodeath", "isfemale", "site", "tumorgrade", "age", "vitalstatus"}
NAMES = (
    *("copy", "x", "HER2 Status", "her2.status", "HER2", "MT-CO1", "Stage", "OS", "days to death", "is-female", "site"),
    *("Sept-2", "2-Sep", "7157", "ACTB|60", "", "Grade", "case_id", "survival months (overall)", "slide_id", "index"),
    *("PSA", "OS_mut", "x_CNV", "stage_rnaseq"),
)


def rows(sep: str = ",", decimal: str = ".", label: str = "copy", dead: str = "dead") -> str:
    genes = [f"g{i}" for i in range(12)]
    header = ["case_id", "ACTB", *genes, "Tumor Grade", "age", "vital_status", "code", "dose", label]
    lines = [sep.join([*header, "grade"])]
    for i in range(CASES):
        genes = [f"{(i * 37 + gene * 11) % 97 / 10:.2f}" for gene in range(13)]
        clinical = [str(i % 3), f"{i / 7 + 1:.2f}", dead if i % 4 else "", str(i % 5), f"{700 + 13.5 * i}"]
        clinical += [str(i % 2) if label == "copy" else f"{i * 7 % 24 / 10}", "2.5"]
        cells = [f"Müller-{i}", *genes, *clinical]
        lines.append(sep.join(cell.replace(".", decimal) for cell in cells))
    return "\n".join(lines) + "\n"


def beside_files(folder: Path) -> None:
    (folder / "comma.csv").write_text(rows(), encoding="utf-8")
    (folder / "semicolon.csv").write_text(rows(";", ","), encoding="cp1252")
    (folder / "tab.tsv").write_text(rows("\t"), encoding="utf-16")
    (folder / "big.csv").write_bytes(codecs.BOM_UTF16_BE + rows(";").encode("utf-16-be"))
    (folder / "points.csv").write_text(rows(";").replace("0.50", "0,50"), encoding="utf-8-sig")
    (folder / "numbers.csv").write_text(rows(label="Stage", dead="1").replace(",,", ",0,"))
    (folder / "label.csv").write_text(rows(label="her2 STATUS", dead="1").replace(",,", ",0,"), encoding="utf-8")
    (folder / "dates.csv.gz").write_bytes(gzip.compress(rows().replace("g3", "1-Mar").encode()))
    genes = ",".join(["case_id", *(f"g{i}" for i in range(100_000)), "grade"])
    (folder / "wide.csv.gz").write_bytes(gzip.compress(f"{genes}\na,{'1.5,' * 100_000}2\n".encode(), 1))


def beside(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """Mostly another table that is whole: other names, separators and encodings."""
    if rng.random() < 0.4:
        return mutated(path, rng, others)
    sep, decimal = ("\t", ".") if ".tsv" in path.name else rng.choice(((",", "."), (";", ","), ("\t", "."), (";", ".")))
    text = rows(sep, decimal, rng.choice(("copy", "copy", *NAMES)))
    for old in rng.sample(["Tumor Grade", "age", "vital_status", "code", "dose", "g3", "g7"], 1):
        text = text.replace(f"{sep}{old}{sep}", f"{sep}{rng.choice(NAMES)}{rng.choice(('', '', '', '_', ' '))}{sep}", 1)
    data = text.encode(rng.choice(("utf-8", "utf-8-sig", "utf-16", "cp1252")))
    return gzip.compress(data, 1) if path.suffix == ".gz" else data


def use_beside(path: Path) -> None:
    omics = read_omics(path, label=LABEL, keep=KEPT)
    labels = {case: int(i % 2) for i, case in enumerate(omics.table.index)}
    told = omics.without_label(labels)
    assert np.isfinite(told.table.to_numpy()).all()
    assert told.table.index.is_unique
    words = {
        "".join(filter(str.isalnum, name.casefold()))
        for name in told.table
        if name not in KEPT and not name.lower().endswith(("_mut", "_cnv", "_rnaseq"))
    }
    assert words.isdisjoint(NO_GENES)
    assert len(told.left_out) < 12
    assert set(told.left_out).isdisjoint(told.table.columns)
    assert all(len(note.splitlines()) == 1 for note in told.notes)
    assert not told.counts or (told.table.to_numpy().min() >= 0 and told.table.to_numpy().max() > 50)


KINDS = {"omics_beside": Kind(beside_files, use_beside, 160, beside)}

"""Tables of labels, splits and omics."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np

from momkd.data import read_labels, read_omics, read_splits
from tests.fuzz.kinds import WORK, Kind


def label_files(folder: Path) -> None:
    (folder / "a.csv").write_text("slide_id,case_id,label\ns1,c1,0\ns2,c2,1\n../../x,c3,\n/etc/y,c4,1.0\n")
    (folder / "b.tsv").write_text("\ufeffslide_id\tsubtype\n" + "".join(f"s{i}\tt{i % 3}\n" for i in range(9)))
    (folder / "digits.csv").write_text("slide_id,label\ns1,1\ns2," + "9" * 9000 + "\n")
    (folder / "quote.csv").write_text('slide_id,label\n"s,""1",0\ns2,"1\n')


def split_files(folder: Path) -> None:
    (folder / "a.csv").write_text(",train,val,test\n0,a,b,c\n1,d,,e\n2,../../x,,\n")
    (folder / "b.csv").write_text("train,val,test\n1.0,2.0,3.0\n4.0,,\n")


def omics_files(folder: Path) -> None:
    text = "case_id,ACTB,B,C\n" + "".join(f"p{i},{i}.5,{i}e3,-1\n" for i in range(9))
    (folder / "a.csv").write_text(text)
    (folder / "b.tsv").write_text("\t".join(("", "A", "B")) + "\nx\t1\t2\ny\t3\t4\n")
    (folder / "c.csv.gz").write_bytes(gzip.compress(text.encode()))
    import pandas as pd

    pd.DataFrame({"case_id": ["x", "y"], "A": [1.0, 2], "B": [3, 4]}).to_parquet(folder / "d.parquet")


def use_labels(path: Path) -> None:
    labels = read_labels(path)
    assert labels.table.index.is_unique
    assert labels.table["label"].between(-1, len(labels.classes) - 1).all()


def use_splits(path: Path) -> None:
    folder = path.parent / WORK
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / "splits_0.csv")
    (split,) = read_splits(folder)
    every = [slide for part in split.parts().values() for slide in part]
    assert len(every) == len(set(every)) > 0


def use_omics(path: Path) -> None:
    table = read_omics(path).table
    assert np.isfinite(table.to_numpy()).all()
    assert table.index.is_unique


KINDS = {
    "labels": Kind(label_files, use_labels, 800),
    "splits": Kind(split_files, use_splits, 500),
    "omics": Kind(omics_files, use_omics, 800),
}

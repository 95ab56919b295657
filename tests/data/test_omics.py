"""Omics tables: what reads, what is refused, and a transform that learns from training cases alone."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from momkd.data import Omics, OmicsTransform, read_omics
from momkd.data import genes as genes_module
from tests.data.conftest import refused

TEXT = "case_id,ERBB2,TP53\n007,1,-2.5\nNA,3e-1,0\n"


def write(folder: Path, text: str | bytes, name: str = "omics.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def check_text(got: Omics) -> None:
    """The content of TEXT."""
    assert got.table.index.tolist() == ["007", "NA"]
    assert got.table.index.name == "case_id"
    assert got.table.columns.tolist() == ["ERBB2", "TP53"]
    assert set(got.table.dtypes) == {np.dtype(np.float32)}
    np.testing.assert_array_equal(got.table.to_numpy(), np.array([[1, -2.5], [0.3, 0]], np.float32))


# Reading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", TEXT),
        ("a.CSV", "\ufeff" + TEXT.replace("\n", "\r\n") + "\r\n\r\n"),
        ("a.tsv", TEXT.replace(",", "\t")),
        ("a.csv.gz", gzip.compress(TEXT.encode(), mtime=0)),
        ("a.tsv.gz", gzip.compress(TEXT.replace(",", "\t").encode(), mtime=0)),
        ("a.csv", TEXT.replace("case_id", "")),  # an index without a name
        ("a.csv", TEXT.replace("case_id", "patient")),  # the first column, whatever it is called
        ("a.csv", "ERBB2,case_id,TP53\n1,007,-2.5\n.3, NA ,0\n"),
        ("a.csv", ',case_id,ERBB2,TP53\n0,"007",1,-2.5\n1,NA,"0.3",0\n'),  # an index that pandas wrote
    ],
)
def test_text_tables(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = write(tmp_path, content, name)
    got = read_omics(path)
    check_text(got)
    assert (len(got), got.path, got.source, Omics(got.table).source) == (2, path, str(path), "omics")


def test_parquet_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    table = pd.DataFrame({"ERBB2": [1, 0.3], "TP53": [-2.5, 0]}, index=["007", "NA"])
    ids = pd.Series(["007", "NA"])
    for frame in (
        table,
        table.rename_axis("patient"),
        table.reset_index(names="case_id"),
        table.reset_index(names="patient"),
        table.assign(case_id=["007", "NA"]).reset_index(names="index"),
        table.reset_index(drop=True).assign(case_id=ids.astype("category")),
        table.convert_dtypes(),
        table.astype(np.float32),
    ):
        frame.to_parquet(path)
        check_text(read_omics(path))
    pd.DataFrame({"case_id": [7, 8], "A": [1, 2]}).to_parquet(path)
    assert read_omics(path).table.index.tolist() == ["7", "8"]


def test_a_folder_of_one_array_a_case(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", np.array([1, 2, 3]))
    np.save(tmp_path / "007.npy", np.array([0.5, -1, 0]))
    (tmp_path / "notes.txt").touch()
    np.save(tmp_path / ".hidden.npy", np.zeros(9))
    got = read_omics(tmp_path)
    assert got.table.index.tolist() == ["007", "b"]
    assert got.table.columns.tolist() == ["gene_0", "gene_1", "gene_2"]
    np.testing.assert_array_equal(got.table.to_numpy(), np.array([[0.5, -1, 0], [1, 2, 3]], np.float32))


ids = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=6)
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), cases=st.lists(ids, min_size=1, max_size=5, unique=True), count=st.integers(1, 4))
@pytest.mark.parametrize("ending", ["csv", "tsv.gz", "parquet"])
def test_any_table_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, ending: str, data: st.DataObject, cases: list[str], count: int
) -> None:
    names = [f"gene {i}" for i in range(count)]
    values = data.draw(hnp.arrays(np.float32, (len(cases), count), elements=numbers))
    table = pd.DataFrame(values, index=pd.Index(cases, name="case_id", dtype=object), columns=names)
    path = tmp_path_factory.mktemp("any") / f"a.{ending}"
    if ending == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if ending.startswith("tsv") else ",")
    got = read_omics(path).table
    assert got.index.tolist() == cases
    np.testing.assert_array_equal(got.to_numpy(), values)


@pytest.mark.parametrize(("genes", "cases"), [(10_000, 60), (100_000, 1), (100_000, 8)])
def test_wide_tables_take_time_by_their_cells(tmp_path: Path, genes: int, cases: int) -> None:
    values = np.random.default_rng(0).integers(0, 1000, (cases, genes))
    header = ",".join(["case_id", *(f"g{i}" for i in range(genes))])
    rows = (f"c{i}," + ",".join(map(str, row)) for i, row in enumerate(values.tolist()))
    path = write(tmp_path, "\n".join([header, *rows]))
    start = time.process_time()
    got = read_omics(path)
    assert time.process_time() - start < 10
    np.testing.assert_array_equal(got.table.to_numpy(), values)


# What is refused


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("expected a header, got an empty first line",)),
        ("\n" + TEXT, ("expected a header, got an empty first line",)),
        ("case_id,A\n", ("expected a row for each case, got a header alone",)),
        ("case_id\na\n", ("expected a column for each gene, got only 'case_id'",)),
        ("case_id|A|B\na|1|2\n", ("got only 'case_id|A|B'; separate columns with commas",)),
        # names
        ("case_id,A\na,1\nb,2\na,3\n", ("expected each case once, got 'a' 2 times; remove the others",)),
        ("case_id,A,B,A\na,1,2,3\n", ("expected each gene once, got 'A' 2 times; rename or remove one",)),
        ("case_id,A, A\na,1,2\n", ("expected each gene once, got 'A' 2 times",)),
        ("case_id,A,case_id\na,1,2\n", ("expected one column 'case_id', got more",)),
        ("case_id,A\n ,1\n", ("row 1: expected a case id, got an empty cell",)),
        ("case_id,A,\na,1,\n", ("expected a name for each gene, got an empty one",)),
        ("A,B\n1.5,2\n-.5e-3,2\n", ("expected case ids in the first column, got fractions such as 1.5 in 'A'",)),
        # cells
        ("case_id,A,B\na,1,2\nb,1,high\n", ("case 'b', gene 'B': expected a number, got 'high'; mend the cell",)),
        ("case_id,A,B\na,,2\nb,1,high\n", ("case 'b', gene 'B': expected a number, got 'high'",)),
        ("case_id,A,B\na,1,None\n", ("case 'a', gene 'B': expected a number, got 'None'",)),
        ("case_id,A,B\na,1,True\nb,1,False\n", ("case 'a', gene 'B': expected a number, got 'True'",)),
        (
            'case_id,A\na,"1,5"\n',
            ("case 'a', gene 'A': expected a number, got '1,5' (a decimal comma: write a point)",),
        ),
        ("case_id;A;B\na;1,5;2.5\n", ("got '1,5' (a decimal comma: write a point)",)),
        ("case_id,A\na,1_000\n", ("case 'a', gene 'A': expected a number, got '1_000'",)),
        ("case_id,A\na,0x10\n", ("expected a number, got '0x10'",)),
        (
            "case_id,A,B\na,1,\nb,NA,nan\n",
            ("got 3 missing or infinite, the first (missing) for case 'a' and gene 'B'",),
        ),
        ("case_id,A,B\na,1,2\nb,3,-inf\n", ("got 1 missing or infinite, the first (infinite) for case 'b'",)),
        ("case_id,A\na,1e39\n", ("the first (infinite) for case 'a' and gene 'A'",)),  # more than float32 holds
        # rows
        ("case_id,A,B\na,1,2\nb,1\n", ("line 3: expected 3 cells, got 2; mend the line",)),
        ("case_id,A,B\na,1,2\nb,1,2,3\n", ("line 3: expected 3 cells, got 4; mend the line",)),
        ("case_id,A,B\na,1\nb,1\n", ("line 2: expected 3 cells, got 2; mend the line",)),
        ("A,B\na,1,2\nb,1,2\n", ("line 2: expected 2 cells, got 3; mend the line",)),
        ('case_id,A\n"a,1\n', ("expected an omics table, got unexpected end of data; save it again",)),
        (b"case_id,A\n\x81\xfe,1\n", ("in UTF-8, UTF-16 or Windows-1252, got byte 0x81",)),
        (b"case_id,A\na\0,1\n", ("expected an omics table, got zero bytes",)),
        # genes × cases
        (
            ",p1,p2\nTP53,1,2\nGAPDH,1,2\n",
            (
                "expected cases × genes",
                "got genes such as 'TP53' in the rows; transpose",
            ),
        ),
        ("id,p1\nENSG00000141510.11,1\nENSG00000141736,1\n", ("got genes such as 'ENSG00000141510.11' in the rows",)),
        ("Hugo_Symbol,p1\nA1BG,1\n", ("got genes in the rows (column 'Hugo_Symbol'); transpose the table",)),
        ("gene_id,p1\nx,1\n", ("got genes in the rows (column 'gene_id')",)),
    ],
)
def test_one_line_names_the_file_and_the_place(tmp_path: Path, text: str | bytes, parts: tuple[str, ...]) -> None:
    path = write(tmp_path, text)
    with refused(f"{path}: ", *parts):
        read_omics(path)


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    with refused(f"{tmp_path / 'none.csv'}: expected an omics table or a folder of .npy, got nothing there"):
        read_omics(tmp_path / "none.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    for path, came in ((tmp_path / "pipe.csv", "a named pipe"), ("/dev/zero", "a device"), ("x" * 300, "too long")):
        with refused(f"{path}: expected an omics table or a folder of .npy, got", came):
            read_omics(path)
    with refused("expected an omics table (.csv, .csv.gz, .tsv, .tsv.gz, .parquet)", "got .xlsx; convert or rename it"):
        read_omics(write(tmp_path, "x", "a.xlsx"))
    with refused("expected an omics table, got Not a gzipped file"):
        read_omics(write(tmp_path, TEXT, "a.csv.gz"))
    with refused("expected an omics table, got Compressed file ended"):
        read_omics(write(tmp_path, gzip.compress(TEXT.encode(), mtime=0)[:-12], "a.csv.gz"))


@pytest.mark.parametrize(
    ("frame", "parts"),
    [
        ({"case_id": ["a"], "A": ["high"]}, ("case 'a', gene 'A': expected a number, got 'high'",)),
        ({"case_id": ["a"], "A": [True]}, ("case 'a', gene 'A': expected a number, got", "(bool)")),
        ({"case_id": ["a", "b"], "A": [1, None]}, ("the first (missing) for case 'b' and gene 'A'",)),
        ({"case_id": ["a", "b"], "A": [1, 1e300]}, ("the first (infinite) for case 'b' and gene 'A'",)),
        ({"case_id": ["a", None], "A": [1, 2]}, ("expected a case id in each row, got an empty cell",)),
        ({"case_id": ["a", "a"], "A": [1, 2]}, ("expected each case once, got 'a' 2 times",)),
        ({"A": [1.5, 2.5], "B": [1, 2]}, ("expected ids as text, got floating; name their column case_id",)),
        ({"gene": ["a"], "A": [1]}, ("got genes in the rows (column 'gene')",)),
        ({"case_id": ["a"]}, ("expected a column for each gene",)),
        ({"case_id": pd.Series([], dtype=object), "A": []}, ("expected a row for each case",)),
    ],
)
def test_parquet_that_is_refused(tmp_path: Path, frame: dict[str, Any], parts: tuple[str, ...]) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    pd.DataFrame(frame).to_parquet(path)
    with refused(f"{path}: ", *parts):
        read_omics(path)


def test_parquet_that_is_broken_or_cannot_be_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    path = write(tmp_path, b"PAR1 and no more", "a.parquet")
    with refused(path, "expected a Parquet table, got", "write it again"):
        read_omics(path)
    really_import = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError("No module named 'pyarrow'", name=name)
        return really_import(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with refused(path, "expected pyarrow, which reads Parquet", "pip install pyarrow, or write a CSV"):
        read_omics(path)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_arrays_that_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    with refused(f"{folder}: expected CASE.npy for each case, got no .npy"):
        read_omics(folder)
    np.save(folder / "a.npy", np.zeros(3))
    bad = folder / "b.npy"
    for value, parts in (
        (np.zeros(4), ("expected 3 genes as in a.npy, got 4",)),
        (np.zeros((1, 3)), ("expected numbers (G,), one for each gene, got float64 (1, 3)",)),
        (np.array(["x"] * 3), ("expected numbers (G,), one for each gene, got <U1 (3,)",)),
        (np.zeros(3, bool), ("got bool (3,)",)),
        (np.zeros(0), ("got float64 (0,)",)),
    ):
        np.save(bad, value)
        with refused(f"{bad}: ", *parts):
            read_omics(folder)
    np.save(bad, np.array([0, np.nan, np.inf]))
    with refused(f"{folder}: ", "got 2 missing or infinite, the first (missing) for case 'b' and gene 'gene_1'"):
        read_omics(folder)
    np.save(bad, np.array([Bomb(tmp_path / "executed")] * 3, dtype=object), allow_pickle=True)
    with refused(bad, "expected an array of numbers, got one of shape (3,) of Python objects"):
        read_omics(folder)
    assert not (tmp_path / "executed").exists()


# Transform


def table_of(values: Any, prefix: str = "c") -> pd.DataFrame:
    values = np.asarray(values, dtype=np.float32)
    names = [f"g{i}" for i in range(values.shape[1])]
    return pd.DataFrame(values, index=[f"{prefix}{i}" for i in range(len(values))], columns=names)


def informative(n: int = 120, genes: int = 60, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray[Any, Any]]:
    """z-scores; g0, g1 and g2 differ between the classes, and g3 varies most of all."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    values = rng.normal(size=(n, genes))
    values[:, :3] += 1.5 * labels[:, None]
    values[:, 3] *= 3
    return table_of(values), labels


def test_standardised_by_hand() -> None:
    table = table_of([[1, 7, -1], [2, 7, 0], [3, 7, 1]])
    got = OmicsTransform.fit(table, select="all")
    assert got.genes == ("g0", "g1", "g2")
    assert (got.log, got.clip) == (False, 5.0)
    assert got.mean == pytest.approx([2, 7, 0])
    assert got.std == pytest.approx([np.sqrt(2 / 3), 1, np.sqrt(2 / 3)])  # a constant gene has 1
    z = np.sqrt(3 / 2)
    result = got(table)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [[-z, 0, -z], [0, 0, 0], [z, 0, z]], rtol=1e-6)
    np.testing.assert_array_equal(got(table_of([[1e6, 9, -1e6]])), [[5, 2, -5]])  # clipped


def test_normal_genes_get_mean_zero_and_sd_one_in_any_unit() -> None:
    values = np.random.default_rng(0).normal(size=(400, 5))
    plain = OmicsTransform.fit(table_of(values), select="all")(table_of(values))
    np.testing.assert_allclose(plain.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(plain.std(0), 1, atol=1e-3)
    scaled = table_of(values * 1000 - 77)
    np.testing.assert_allclose(OmicsTransform.fit(scaled, select="all")(scaled), plain, atol=1e-4)


def test_one_enormous_value_hardly_changes_a_gene() -> None:
    values = np.random.default_rng(0).normal(size=(200, 2))
    values[7, 1] = values[7, 0]
    values[:, 1] = values[:, 0]
    values[7, 1] = 36_893
    got = OmicsTransform.fit(table_of(values), select="all")
    assert got.std[1] == pytest.approx(got.std[0], rel=0.1)  # 2,600 times as large without care
    result = got(table_of(values))
    assert result[7, 1] == 5
    others = np.arange(200) != 7
    np.testing.assert_allclose(result[others, 1], result[others, 0], atol=0.2)


@pytest.mark.parametrize("share", [0.02, 0.06, 0.2, 0.4])
def test_a_gene_silent_in_most_cases_is_scaled_by_the_others(share: float) -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random((300, 1)) < share, rng.lognormal(3, 2, (300, 1)), -0.14)
    table = table_of(values)
    result = OmicsTransform.fit(table, select="all")(table)
    silent = values[:, 0] < 0
    assert np.isfinite(result).all()
    assert 0.2 < result.std() < 2.5
    for unit in (1e-3, 1e3):  # what is scaled has no unit any more
        scaled = OmicsTransform.fit(table * np.float32(unit), select="all", log=False)
        np.testing.assert_allclose(scaled(table * np.float32(unit)), result, atol=1e-4)
    assert result[~silent].mean() > result[silent].max() + 1
    assert len(np.unique(result[silent])) == 1


@pytest.mark.parametrize(
    ("values", "log", "want"),
    [
        ([[0, 10], [3, 1000]], "auto", True),  # counts
        ([[0, 10], [3, 50]], "auto", False),  # logarithms already
        ([[-0.1, 10], [3, 1000]], "auto", False),  # z-scores with a heavy tail
        ([[0, 10], [3, 1000]], False, False),
        ([[0, 1], [3, 2]], True, True),
    ],
)
def test_counts_are_told_from_z_scores(values: list[list[float]], log: str | bool, want: bool) -> None:
    table = table_of(values)
    got = OmicsTransform.fit(table, select="all", log=log)
    assert got.log is want
    used = np.log2(table.to_numpy(np.float64) + 1) if want else table.to_numpy(np.float64)
    assert got.mean == pytest.approx(used.mean(0))
    np.testing.assert_allclose(got(table), (used - got.mean) / got.std, rtol=1e-6)


def test_only_the_training_cases_matter() -> None:
    """The same training rows give the same transform, whatever lies in the rest of the table."""
    table, labels = informative()
    train = np.arange(120) % 3 > 0
    before = OmicsTransform.fit(table[train], labels[train], genes=10)
    other, other_labels = table.copy(), labels.copy()
    other.loc[~train] = 1e6
    other_labels[~train] = 1 - labels[~train]
    assert OmicsTransform.fit(other[train], other_labels[train], genes=10) == before
    assert OmicsTransform.fit(other, other_labels, genes=10) != before  # the test can fail


def test_noise_that_predicts_test_labels_is_not_chosen() -> None:
    """Gene selection on all cases finds genes that separate the test cases by chance; on training cases it can't."""
    rng = np.random.default_rng(0)
    table, labels = table_of(rng.normal(size=(60, 3000))), np.arange(60) % 2
    train = np.arange(60) < 40

    def separation(transform: OmicsTransform) -> float:
        test = transform(table[~train])
        return float(np.abs(test[labels[~train] == 1].mean(0) - test[labels[~train] == 0].mean(0)).mean())

    honest = separation(OmicsTransform.fit(table[train], labels[train], genes=30))
    leaky = separation(OmicsTransform.fit(table, labels, genes=30))
    chance = separation(OmicsTransform.fit(table[train], select="all"))
    assert honest == pytest.approx(chance, rel=0.25)
    assert leaky > 1.2 * chance


def test_unlabelled_cases_shape_the_scale_but_not_the_choice() -> None:
    table, labels = informative()
    half = np.where(np.arange(120) < 60, labels, -1)
    got = OmicsTransform.fit(table, half, genes=3)
    assert got.genes == ("g0", "g1", "g2")
    everything = OmicsTransform.fit(table, select="all")
    assert got.mean == everything.mean[:3]
    shuffled = OmicsTransform.fit(table, np.where(half < 0, -7, half), genes=3)
    assert shuffled == got  # any negative label is none


def test_importance_finds_the_genes_that_tell_classes_apart() -> None:
    table, labels = informative()
    assert OmicsTransform.fit(table, labels, genes=3).genes == ("g0", "g1", "g2")
    three = labels + (np.arange(120) % 3 == 0)  # more than two classes
    assert len(OmicsTransform.fit(table, three, genes=3).genes) == 3


def test_importance_finds_what_no_gene_tells_alone() -> None:
    """Exclusive or: univariate scores are blind to it, trees are not."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 12))
    labels = ((values[:, 4] > 0) ^ (values[:, 9] > 0)).astype(int)
    assert OmicsTransform.fit(table_of(values), labels, genes=2).genes == ("g4", "g9")


def test_importance_of_counts_is_that_of_their_logarithms() -> None:
    table, labels = informative()
    counts = np.exp2(table + 8).round()
    got = OmicsTransform.fit(counts, labels, genes=3)
    assert got.log
    assert got.genes == ("g0", "g1", "g2")


def test_trees_see_the_best_candidates_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genes_module, "_LEAST_CANDIDATES", 8)
    seen: list[int] = []
    real = GradientBoostingClassifier.fit

    def fit(self: Any, values: Any, labels: Any) -> Any:
        seen.append(values.shape[1])
        return real(self, values, labels)

    monkeypatch.setattr(GradientBoostingClassifier, "fit", fit)
    table, labels = informative()
    assert OmicsTransform.fit(table, labels, genes=1).genes[0] in ("g0", "g1", "g2")
    OmicsTransform.fit(table, labels, genes=3)
    assert seen == [8, 12]


def test_genes_that_no_tree_used_follow_by_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(genes_module._TREES, "n_estimators", 1)
    monkeypatch.setitem(genes_module._TREES, "max_depth", 1)  # one gene has any importance
    monkeypatch.setitem(genes_module._TREES, "max_features", None)
    table, labels = informative()
    table["g50"] *= 2
    got = OmicsTransform.fit(table, labels, genes=3).genes
    assert "g3" in got
    assert "g50" in got
    assert len({"g0", "g1", "g2"} & set(got)) == 1


def test_variance_is_that_of_winsorised_values() -> None:
    table, _ = informative()
    table.iloc[0, 40] = 1e6  # one value does not make a gene vary
    assert OmicsTransform.fit(table, select="variance", genes=1).genes == ("g3",)
    got = OmicsTransform.fit(table, select="variance", genes=20)
    order = np.argsort([-s for s in OmicsTransform.fit(table, select="all").std])
    assert set(got.genes) == {f"g{i}" for i in order[:20]}
    assert list(got.genes) == sorted(got.genes, key=lambda g: int(g[1:]))  # in the order of the table


@pytest.mark.parametrize("labels", [None, np.full(120, -1), np.zeros(120, int), np.where(np.arange(120) < 60, 1, -1)])
def test_without_two_classes_importance_is_variance(labels: Any) -> None:
    table, _ = informative()
    assert OmicsTransform.fit(table, labels, genes=5) == OmicsTransform.fit(table, select="variance", genes=5)


def test_fewer_genes_than_asked_for_are_all_kept() -> None:
    table, labels = informative()
    names = tuple(table.columns)
    assert OmicsTransform.fit(table, labels, genes=60).genes == names
    assert OmicsTransform.fit(table, labels, genes=1000).genes == names
    assert OmicsTransform.fit(table, labels, genes=2, select="all").genes == names


def test_the_seed_decides() -> None:
    table, labels = informative(genes=200)
    one, two, other = (OmicsTransform.fit(table, labels, genes=40, seed=s) for s in (1, 1, 2))
    assert one == two
    assert one.genes != other.genes


def test_constant_genes_are_never_preferred() -> None:
    table, labels = informative()
    table["g10"] = np.float32(0.1)
    table["g11"] = np.where(labels == 1, np.float32(0.1), np.float32(0.1))
    for select in ("importance", "variance"):
        got = OmicsTransform.fit(table, labels, genes=58, select=select)
        assert not {"g10", "g11"} & set(got.genes)
    everything = OmicsTransform.fit(table, select="all")
    assert (everything(table)[:, 10] == 0).all()
    assert everything.std[10] == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_few_cases(n: int) -> None:
    table, labels = informative(n)
    got = OmicsTransform.fit(table, labels, genes=5)
    assert len(got.genes) == 5
    assert np.isfinite(got(table)).all()


def test_extra_genes_and_the_order_of_columns_do_not_matter() -> None:
    table, labels = informative()
    got = OmicsTransform.fit(table, labels, genes=7)
    want = got(table)
    shuffled = table.iloc[:, np.random.default_rng(0).permutation(60)].assign(extra="text", more=np.nan)
    np.testing.assert_array_equal(got(shuffled), want)
    np.testing.assert_array_equal(got(table.iloc[[5, 5, 2]]), want[[5, 5, 2]])  # rows one by one
    assert got(table.iloc[:0]).shape == (0, 7)


@pytest.mark.parametrize("log", [False, True])
def test_blocks_of_genes_give_the_same(monkeypatch: pytest.MonkeyPatch, log: bool) -> None:
    table, labels = informative()
    table = table.abs() * 100 if log else table
    want = OmicsTransform.fit(table, labels, genes=9)
    assert want.log is log
    monkeypatch.setattr(genes_module, "_BLOCK", 7 * len(table))
    got = OmicsTransform.fit(table, labels, genes=9)
    assert got.genes == want.genes
    assert got.mean == pytest.approx(want.mean, rel=1e-12)
    assert got.std == pytest.approx(want.std, rel=1e-12)


def test_missing_genes_and_other_units_are_refused() -> None:
    table, labels = informative()
    got = OmicsTransform.fit(table, labels, genes=60)
    with refused("omics: expected the 60 genes of the model, got a table without 1 of them (g4); add their columns"):
        got(table.drop(columns="g4"))
    with refused("got a table without 60 of them (g0, g1, g2, g3, g4, ...)"):
        got(table.add_prefix("ENSG"))
    broken = table.copy()
    broken.loc["c7", "g5"] = np.nan
    with refused("omics: expected finite values, got nan for case 'c7' and gene 'g5'"):
        got(broken)
    with refused("omics: expected finite values, got nan for case 'c7' and gene 'g5'"):
        OmicsTransform.fit(broken)
    with refused("omics: expected each gene once, got 'g0' again"):
        got(table.rename(columns={"g1": "g0"}))
    with refused("omics: expected numbers, got"):
        got(table.astype({"g3": object}).replace({"g3": table.loc["c3", "g3"]}, "high"))
    counts = OmicsTransform.fit(table.abs() * 100, labels)
    with refused("expected finite values >= 0, whose logarithm is taken, got -", "the same kind of table"):
        counts(table)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (
            {"select": "boruta"},
            "expected select of importance, variance, all and log of auto, true or false, got 'boruta'",
        ),
        ({"log": "log10"}, "got 'importance', 'log10'"),
        ({"genes": 0}, "expected genes >= 1 and clip > 0, got 0 and 5.0"),
        ({"clip": 0.0}, "expected genes >= 1 and clip > 0, got 768 and 0.0"),
        ({"clip": float("nan")}, "got 768 and nan"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], part: str) -> None:
    with refused("omics: ", part):
        OmicsTransform.fit(informative()[0], **options)


def test_no_cases_no_genes_and_labels_that_do_not_fit() -> None:
    table, labels = informative()
    with refused("omics: expected training cases × genes, got (0, 60)"):
        OmicsTransform.fit(table.iloc[:0])
    with refused("got (120, 0)"):
        OmicsTransform.fit(table.iloc[:, :0])
    with pytest.raises(ValueError, match=r"labels: expected \(120,\), one a case, got \(119,\)"):
        OmicsTransform.fit(table, labels[1:])
    with refused("expected finite values >= 0"):
        OmicsTransform.fit(table, log=True)


# Storage


@settings(max_examples=30, deadline=None)
@given(values=hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=numbers))
def test_a_transform_comes_back_from_json_to_the_last_bit(values: np.ndarray[Any, Any]) -> None:
    table = table_of(values)
    got = OmicsTransform.fit(table)
    back = OmicsTransform.from_dict(json.loads(json.dumps(got.to_dict(), allow_nan=False)))
    assert back == got
    result = got(table)
    assert np.isfinite(result).all()
    assert np.abs(result).max() <= 5
    assert back(table).tobytes() == result.tobytes()


GOOD: dict[str, Any] = {"genes": ["a", "b"], "mean": [0.0, 1.0], "std": [1.0, 2.0], "log": False, "clip": 5.0}


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in GOOD.items() if k != key}


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (None, "expected names with values, got None"),
        ([GOOD], "expected names with values, got a list of 1"),
        ({}, "expected 'genes' in it, got none"),
        (without("std"), "expected 'std' in it, got none"),
        ({**GOOD, "scale": 1}, "expected no 'scale' in it, got one"),
        ({**GOOD, "genes": []}, "genes: expected a list of length >= 1, got []"),
        ({**GOOD, "genes": "ab"}, "genes: expected a list, got 'ab'"),
        ({**GOOD, "genes": ["a", 1]}, "genes[1]: expected str, got 1"),
        ({**GOOD, "genes": ["a", "a"]}, "genes: expected each once, got 1 again"),
        ({**GOOD, "mean": [0.0]}, "mean: expected 2 numbers, one a gene, got 1"),
        ({**GOOD, "mean": [0.0, float("nan")]}, "mean[1]: expected finite number, got nan"),
        ({**GOOD, "mean": [0.0, "1"]}, "mean[1]: expected float, got '1'"),
        ({**GOOD, "mean": [0.0, True]}, "mean[1]: expected float, got True"),
        ({**GOOD, "mean": [0.0, 10**400]}, "out of range; train again"),
        ({**GOOD, "std": [1.0, 0.0]}, "std[1]: expected float > 0.0, got 0.0"),
        ({**GOOD, "std": None}, "std: expected a list, got None"),
        ({**GOOD, "log": "auto"}, "log: expected bool, got 'auto'"),
        ({**GOOD, "clip": 0}, "clip: expected float > 0.0, got 0"),
        ({**GOOD, "clip": float("inf")}, "clip: expected finite number, got inf"),
    ],
)
def test_a_malformed_transform_is_refused(value: Any, part: str) -> None:
    assert OmicsTransform.from_dict(GOOD).genes == ("a", "b")
    with refused("genes.json: ", part):
        OmicsTransform.from_dict(value, source="genes.json")


# The real table


@pytest.fixture(scope="module")
def tcga(shared_data: Path) -> Omics:
    return read_omics(shared_data / "tcga_brca" / "expression.csv.gz")


def test_the_real_table(tcga: Omics) -> None:
    assert tcga.table.shape == (937, 1558)
    assert tcga.table.index[0] == "TCGA-3C-AALI"
    assert float(tcga.table["FGF4"].max()) == pytest.approx(36_890, rel=1e-3)


def test_heavy_tails_of_the_real_table_are_tamed(tcga: Omics) -> None:
    got = OmicsTransform.fit(tcga.table, select="all")
    assert not got.log
    result = got(tcga.table)
    assert np.isfinite(result).all()
    assert (result.std(0) < 2.2).all()
    assert (result.std(0) > 0.1).all()
    assert np.abs(result.mean(0)).max() < 1
    # ERBB2 is amplified in a seventh of the cases, to 113: they stay apart from the others.
    amplified = tcga.table["ERBB2"].to_numpy() > 10
    column = result[:, got.genes.index("ERBB2")]
    assert column[amplified].min() > np.quantile(column[~amplified], 0.9)


def test_the_real_table_predicts_her2_with_genes_chosen_in_training(tcga: Omics, shared_data: Path) -> None:
    labels = pd.read_csv(shared_data / "tcga_brca" / "labels.csv", index_col="case_id")["HER2"]
    known = labels.notna().to_numpy()
    table, y = tcga.table[known], labels[known].to_numpy(np.int64)
    scores, start = [], time.perf_counter()
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(y, y):
        transform = OmicsTransform.fit(table.iloc[train], y[train], genes=768)
        assert "ERBB2" in transform.genes
        model = LogisticRegression(C=1e-3, max_iter=1000).fit(transform(table.iloc[train]), y[train])
        scores.append(roc_auc_score(y[test], model.decision_function(transform(table.iloc[test]))))
    assert np.mean(scores) > 0.895  # 0.905 with all genes and care for their tails
    assert time.perf_counter() - start < 50  # ten seconds a fold are too many

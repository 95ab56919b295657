"""Which columns of an omics table are taken for genes, and which are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from momkd.data import read_omics
from momkd.data.gene_columns import is_clinical, kept_columns, label_copies, unlike_expression
from momkd.data.genes import OmicsTransform
from momkd.errors import InputError

CASES = 40
RNG = np.random.default_rng(0)
LABEL = np.arange(CASES) % 2


def log_table(genes: int = 30) -> pd.DataFrame:
    """log2(TPM + 1) of genes with names that say nothing."""
    values = np.log2(RNG.lognormal(2, 1.5, (CASES, genes)) + 1).clip(0, 20)
    return named(values, [f"g{i}" for i in range(genes)])


def named(values: np.ndarray, names: list[str]) -> pd.DataFrame:
    return pd.DataFrame(values.astype(np.float32), [f"c{i}" for i in range(len(values))], names)


def saved(folder: Path, table: pd.DataFrame, **columns: object) -> Path:
    path = folder / "omics.csv"
    beside = pd.DataFrame({name.replace("__", " "): value for name, value in columns.items()}, table.index)
    pd.concat([table.drop(columns=beside.columns, errors="ignore"), beside], axis=1).to_csv(path, index_label="case_id")
    return path


_CLINICAL = """
    survival_months OS.months os_months age Age AGE age_at_diagnosis age_at_initial_pathologic_diagnosis stage grade
    ajcc_pathologic_tumor_stage pathologic_stage gender Sex race censorship oncotree_code is_female site is_train
    vital_status days_to_death days_to_last_followup er_status_by_ihc slide_id Patient_ID OS PFI.time overall_survival
    tumor_grade Overall%Survival%(Months) Tumor%Purity year_of_birth label
"""
_GENES = """
    ACTB TP53 MET SET REST KIT BCR FGA MT-CO1 HLA-A HLA-DRB1 C1orf112 ENSG00000141510.11 AGER AGE1 STAG2 SEXO RACE1 OSM
    OSMR SITEX GRADD TIMELESS DEAF1 CLASP1 MSI1 60 ACTB|60 gene_0 hsa-let-7a-1 cg00000029 TP53_mut ERBB2_cnv AGER_rnaseq
    HALLMARK_INTERFERON_GAMMA_RESPONSE DSS1 PFN1 YEATS2 PLOD1 BATF WEE1 TARDBP SLIT2 CASE1 CENPA SAMPLER EVENTX
"""


def test_clinical_names_and_no_gene_is_one() -> None:
    assert [name for name in _CLINICAL.split() if not is_clinical(name.replace("%", " "))] == []
    assert [name for name in _GENES.split() if is_clinical(name)] == []


@pytest.mark.parametrize("column", ["HER2 status", "her2_status", "HER2.Status", "HER2-STATUS", "her2status"])
def test_a_column_named_like_the_label_is_an_error(tmp_path: Path, column: str) -> None:
    path = tmp_path / "omics.csv"
    log_table().assign(**{column: ["pos", "neg"] * (CASES // 2)}).to_csv(path, index_label="case_id")
    with pytest.raises(InputError, match="named like the label 'HER2_status'; remove it, or keep it as a gene"):
        read_omics(path, label="HER2_status")
    with pytest.raises(InputError, match=rf"omics.csv: expected genes, got a column {column!r}"):
        read_omics(path, label=["other", "HER2_status"])


def test_a_label_that_is_kept_is_a_gene(tmp_path: Path) -> None:
    path = saved(tmp_path, log_table(), Response=LABEL)
    assert "Response" in read_omics(path, label="response", keep="Response").table
    assert "Response" in read_omics(path, label="response", keep="all").table
    assert "Response" not in read_omics(path).table


def test_clinical_columns_may_be_text_or_empty_and_are_named(tmp_path: Path) -> None:
    table = log_table()
    path = saved(tmp_path, table, age=61.5, stage="IIA", days_to_death="", Tumor__Purity=[None, 0.5] * (CASES // 2))
    got = read_omics(path)
    pd.testing.assert_frame_equal(got.table, table, check_names=False, check_column_type=False, check_index_type=False)
    assert got.notes == [
        f"{path}: left out 4 columns that are no genes: age, stage, days_to_death, Tumor Purity (clinical names); "
        "--omics-columns keeps what is named there"
    ]
    assert read_omics(path, keep="age").table.shape[1] == 31
    with pytest.raises(InputError, match="case 'c0', gene 'stage': expected a number, got 'IIA'"):
        read_omics(path, keep="stage")
    with pytest.raises(InputError, match="gene 'ward': expected a number, got 'B'"):
        read_omics(saved(tmp_path, table, ward="B"))
    pytest.importorskip("pyarrow")
    table.assign(stage="IIA", age=[None, *[50] * (CASES - 1)]).rename_axis("case_id").to_parquet(tmp_path / "a.parquet")
    assert list(read_omics(tmp_path / "a.parquet").left_out) == ["stage", "age"]


def test_logarithms_are_decided_by_genes_alone(tmp_path: Path) -> None:
    table = log_table()
    for name, value in (("survival_months", 90.5), ("mystery", RNG.uniform(20, 90, CASES)), ("code", 60 + LABEL)):
        got = read_omics(saved(tmp_path, table, **{name: value}))
        assert list(got.left_out) == [name]
        assert got.counts is False
    assert read_omics(saved(tmp_path, table, age=90), keep=["age"]).counts is False
    assert read_omics(saved(tmp_path, np.exp2(table) - 1)).counts is True


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["counts", "tpm", "panel", "log_counts", "z", "rsem", "rounded", "one case", "copies"])
def test_no_gene_is_left_out(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases = 1 if kind == "one case" else 80
    level = rng.normal(2, 3, 400)  # natural logarithms: silent genes, and some in the hundred thousands
    level[:4] = (12, 11.5, 9, 10)
    tpm = np.exp(level + rng.normal(0, 0.7, (cases, 400)))
    counts = rng.poisson(tpm).astype(float)
    values = {
        "counts": counts,
        "tpm": tpm,
        "one case": tpm,
        "panel": np.c_[tpm[:, [0, 2]], tpm[:, 20:40].clip(0, 40)],  # two that are large: B2M among genes of immunity
        "log_counts": np.log2(counts + 1),
        "z": (tpm - tpm.mean(0)) / np.median(tpm, 0) * np.exp(rng.normal(0, 1, 400)),
        "rsem": np.where(rng.random(400) < 0.6, counts, tpm),
        "rounded": tpm.round(3 - np.ceil(np.log10(tpm.mean(0))).clip(0, 3).astype(int)[0]),
        "copies": rng.choice([-2, -1, 0, 1, 2], (cases, 400), p=[0.1, 0.2, 0.4, 0.2, 0.1]).astype(float),
    }[kind]
    names = ["MT-CO1", "ACTB", "B2M", "ALB", *(f"gene{i}" for i in range(values.shape[1] - 4))]
    if kind == "panel":
        names = ["B2M", "HLA-A", *names[4:], "gene18", "gene19"][: values.shape[1]]
    assert unlike_expression(named(values, names[: values.shape[1]])) == {}


def test_columns_of_another_kind_are_left_out() -> None:
    table = log_table().assign(
        code=RNG.integers(1, 5, CASES), flag=LABEL, days=RNG.uniform(100, 4000, CASES), silent=0, rare=np.eye(CASES)[0]
    )
    got = unlike_expression(table)
    assert {name: reason.split()[0] for name, reason in got.items()} == {
        "code": "few",
        "flag": "few",
        "days": "another",
    }
    z = named(RNG.normal(0, 1, (CASES, 30)), [f"g{i}" for i in range(30)]).assign(when=RNG.uniform(40, 90, CASES))
    assert list(unlike_expression(z)) == ["when"]


def test_copies_of_the_label() -> None:
    table = log_table()
    noisy = LABEL + RNG.normal(0, 0.05, CASES)  # |r| = 0.995
    marker = LABEL + RNG.normal(0, 0.2, CASES)  # 0.93, as good as a gene gets
    given = table.assign(noisy=noisy, reverse=-3 * LABEL, marker=marker, flat=1.0)
    assert list(label_copies(given, LABEL)) == ["noisy", "reverse"]
    unknown = np.where(np.arange(CASES) < 4, -1, LABEL)  # it may be anything there
    assert list(label_copies(given.assign(noisy=np.where(unknown < 0, 99, noisy)), unknown)) == ["noisy", "reverse"]
    assert label_copies(given.iloc[:18], LABEL[:18]) == {}  # too few cases of a class
    assert label_copies(given, np.zeros(CASES, int)) == {}
    three = np.arange(CASES) % 3
    coded = table.assign(coded=np.array([7.0, 1.0, 3.0])[three], one=three == 1)
    assert list(label_copies(coded, three)) == ["coded", "one"]


def test_kept_columns(tmp_path: Path) -> None:
    listed = tmp_path / "names"
    listed.write_text("age\n\n stage, of the tumour \r\n")
    assert kept_columns(None) == ()
    assert kept_columns("age, stage,") == ("age", "stage")
    assert kept_columns(["a,b"]) == ("a,b",)
    assert kept_columns(str(listed)) == ("age", "stage, of the tumour")
    assert kept_columns("HLA-A/B") == ("HLA-A/B",)
    for wrong, part in ((" , ", "expected names"), (tmp_path / "no", "got nothing there"), (tmp_path, "got a folder")):
        with pytest.raises(InputError, match=part):
            kept_columns(wrong)
    path = saved(tmp_path, log_table(), age=1)
    with pytest.raises(InputError, match="'agee', as --omics-columns names it, got none; did you mean 'age'"):
        read_omics(path, keep="agee")
    with pytest.raises(InputError, match="got 'case_id' and columns that are no genes \\(age, stage\\); add genes"):
        read_omics(saved(tmp_path, pd.DataFrame({"age": [1], "stage": [2]}, ["a"])))


@pytest.mark.parametrize(
    ("encoding", "sep", "decimal", "remark"),
    [
        ("utf-8", ";", ",", "decimal commas are read as points"),
        ("utf-16", "\t", ".", None),
        ("cp1252", ",", ".", "not UTF-8: read as Windows-1252 (cp1252)"),
        ("cp1252", ";", ",", "decimal commas are read as points"),
    ],
)
def test_tables_as_spreadsheets_write_them(
    tmp_path: Path, encoding: str, sep: str, decimal: str, remark: str | None
) -> None:
    table = log_table(5).rename({"c0": "Müller"})
    path = tmp_path / "omics.csv"
    table.to_csv(path, index_label="case_id", encoding=encoding, sep=sep, decimal=decimal)
    got = read_omics(path)
    np.testing.assert_array_equal(got.table.to_numpy(), table.to_numpy())
    assert got.table.index[0] == "Müller"
    assert remark is None or f"{path}: {remark}" in got.notes


def test_genes_that_a_spreadsheet_took_for_dates_are_named(tmp_path: Path) -> None:
    table = log_table(5).rename(columns={"g0": "1-Mar", "g3": "Sep-02"})
    (note,) = read_omics(saved(tmp_path, table)).notes
    assert "genes such as '1-Mar' are dates" in note
    assert "(2 in all)" in note


def expression(kind: str, genes: int = 500) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    tpm = np.exp(rng.normal(2, 2.5, genes) + rng.normal(0, 0.6, (CASES, genes)))
    values = {
        "log": np.log2(tpm + 1),
        "log_counts": np.log2(rng.poisson(tpm * 30) + 1),
        "counts": rng.poisson(tpm),
        "tpm": tpm,
        "rsem": np.where(rng.random(genes) < 0.6, rng.poisson(tpm), tpm),
        "fpkm": tpm / 30,  # 4 % of the genes exceed 50
        "sparse": rng.poisson(tpm / 30),
        "z": (tpm - tpm.mean(0)) / tpm.std(0) * np.where(rng.random(genes) < 0.05, 30, 1),
        "copies": rng.integers(-2, 3, (CASES, genes)),
    }[kind]
    return named(values, [f"g{i}" for i in range(genes)])


@pytest.mark.parametrize("genes", [24, 500])
@pytest.mark.parametrize(
    "kind", ["log", "log_counts", "counts", "tpm", "rsem", "fpkm", "sparse", "z", "copies", "small", "one case"]
)
def test_the_logarithm_is_decided_by_most_columns(tmp_path: Path, kind: str, genes: int) -> None:
    table = expression("tpm" if kind in ("small", "one case") else kind, genes)
    if kind == "small":  # a panel of which two exceed 50
        table = table.iloc[:, :20].clip(0, 40).assign(**{"HLA-A": 90, "B2M": table.iloc[:, 0] * 100})
    table = table.head(1) if kind == "one case" else table
    want = kind not in ("log", "log_counts", "z", "copies")
    want = want and not (kind in ("fpkm", "sparse") and table.to_numpy().max() <= 50)
    got = read_omics(saved(tmp_path, table))
    assert got.counts is want
    assert got.left_out == {}
    assert got.notes == []


@pytest.mark.parametrize("genes", [24, 500])
def test_clinical_columns_named_like_genes_switch_no_logarithm_on(tmp_path: Path, genes: int) -> None:
    for name in ("PSA", "LDH", "CEA", "CA125", "HGB"):
        path = saved(tmp_path, expression("log", genes), **{name: RNG.normal(500, 100, CASES)})
        got = read_omics(path)
        assert got.counts is False
        assert name in got.table
        (note,) = got.notes
        assert note.startswith(f"{path}: log2(x + 1) is not taken: other columns hold values of logarithms; unlike")
        assert f"values from 0 to above 50: {name};" in note
    assert read_omics(saved(tmp_path, expression("log", genes)), keep="all").notes == []


@pytest.mark.parametrize("number", [1, 3, 4, 6, 20])
def test_columns_of_another_scale_are_left_out_whatever_their_number(tmp_path: Path, number: int) -> None:
    odd = {f"Lab{i}": RNG.normal(300, 50, CASES) for i in range(number)}
    path = saved(tmp_path, expression("log"), **odd)
    got = read_omics(path)
    assert list(got.left_out) == list(odd)
    assert got.counts is False
    kept = read_omics(path, keep=",".join(odd))
    assert kept.counts is False
    assert ("(20 in all)" in kept.notes[0]) == (number == 20)


@pytest.mark.parametrize("kind", ["counts", "tpm", "rsem", "fpkm"])
@pytest.mark.parametrize("genes", [24, 500])
def test_negative_columns_switch_no_logarithm_off(tmp_path: Path, kind: str, genes: int) -> None:
    table = expression(kind, genes) * (30 if genes == 24 else 1)
    path = saved(tmp_path, table, HYPOXIA=RNG.integers(-50, 50, CASES), PC1=RNG.normal(0, 1, CASES))
    got = read_omics(path)
    assert got.counts is True
    assert list(got.left_out) == ["HYPOXIA", "PC1"]
    assert "HYPOXIA, PC1 (negative values in a table of counts, whose log2(x + 1) is taken)" in got.notes[0]
    kept = read_omics(path, keep="PC1")
    assert kept.counts is True
    with pytest.raises(
        InputError, match=r"values >= 0, whose .* gene 'PC1'; .* leave the column out, or set omics.log"
    ):
        OmicsTransform.fit(kept.table, select="all", log=True)


@pytest.mark.parametrize("kind", ["z", "log", "counts"])
@pytest.mark.parametrize("number", [1, 8, 24, 100])
def test_mutations_and_copy_numbers_are_genes(tmp_path: Path, kind: str, number: int) -> None:
    table = expression(kind)
    more = {f"OS{i}_MUT" if i % 2 else f"os_{i}_mut": RNG.integers(0, 2, CASES) for i in range(number)}
    got = read_omics(saved(tmp_path, table, **more))
    assert (got.left_out, got.counts, got.notes) == ({}, kind == "counts", [])
    more |= {f"TP{i}_cnv": RNG.integers(-2, 3, CASES) for i in range(number)} | {"A_cna": -LABEL, "B_RNAseq": LABEL}
    got = read_omics(saved(tmp_path, table, **more))
    assert (got.left_out, got.counts) == ({}, False)
    if kind == "counts":
        assert "log2(x + 1) is not taken: other columns hold negative values; unlike them" in got.notes[0]


@pytest.mark.parametrize(("sep", "sign"), [(";", ","), (";", "."), (",", "."), ("\t", ",")])
def test_separators_of_thousands_are_no_decimal_signs(tmp_path: Path, sep: str, sign: str) -> None:
    path = tmp_path / "omics.csv"
    rows = [[f"c{i}", "12", "980", "7"] for i in range(12)]

    def write(*cells: str) -> Path:
        some = [["case_id", "A", "B", "C"], [*rows[0][:2], cells[0], "3"], *rows[1:]]
        some[-1][1:] = ["12", *cells[1:]] if len(cells) == 3 else some[-1][1:]
        path.write_text("\n".join(sep.join(row) for row in some) + "\n")
        return path

    cell = f"1{sign}234"
    with pytest.raises(InputError, match=f"case 'c0', gene 'B': expected a plain number, got '{cell}' among whole.*"):
        read_omics(write(cell))
    for cells in ((f"0{sign}234",), (f"1{sign}2340",), (cell, f"2{sign}5", "3"), ("1e3",), ("1234",)):
        assert read_omics(write(*cells)).table.shape == (12, 3)
    late = "\n".join(
        sep.join(row)
        for row in [
            ["case_id", "A", "B", "C"],
            *([f"p{i}", "5", "6", "7"] for i in range(24)),
            ["z", "1", '"1,234"', "2"],
        ]
    )
    path.write_text(late)
    with pytest.raises(InputError, match="got '1,234' \\(a separator of thousands: leave it out; or a decimal comma"):
        read_omics(path)
    path.write_text(f"case_id{sep}A{sep}B\na{sep}1{sign}234{sep}2{sign}500\nb{sep}3{sign}125{sep}7{sign}250\n")
    assert read_omics(path).table.iloc[0, 0] == np.float32(1.234)  # all with three digits: fractions

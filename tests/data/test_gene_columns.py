"""Which columns of an omics table are taken for genes, and which are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from momkd.data import read_omics
from momkd.data.gene_columns import is_clinical, kept_columns, label_copies, unlike_expression
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
    table.assign(**{name.replace("__", " "): value for name, value in columns.items()}).to_csv(
        path, index_label="case_id"
    )
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
    assert read_omics(saved(tmp_path, table, age=90), keep=["age"]).counts is True
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

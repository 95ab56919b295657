"""Tables of labels: ids stay text, classes are numbered in one way, and a wrong cell is named by its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from momkd.data import LabelOptions, Labels, read_labels
from momkd.data.atomic import spreadsheet_cell
from tests.data.conftest import refused


def table(folder: Path, text: str, name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_ids_are_text_and_missing_labels_are_minus_one(tmp_path: Path) -> None:
    path = table(tmp_path, "slide_id,case_id,label\n007,01,1\n1e3,01,0\nTCGA-A.DX1,NA,\nNA,2,NA\nb,3,NaN\n")
    got = read_labels(path)
    assert got.table.index.tolist() == ["007", "1e3", "TCGA-A.DX1", "NA", "b"]
    assert got.table.index.name == "slide_id"
    assert got.table["case_id"].tolist() == ["01", "01", "NA", "2", "3"]
    assert got.table["label"].tolist() == [1, 0, -1, -1, -1]
    assert got.table["label"].dtype == np.int64
    assert (got.classes, got.name, got.path, got.source, len(got)) == (("0", "1"), "label", path, str(path), 5)
    assert Labels(got.table, got.classes).source == "labels"


def test_without_cases_every_slide_is_its_own(tmp_path: Path) -> None:
    got = read_labels(table(tmp_path, "grade,slide_id\nhigh,a\nlow,b\n"))
    assert got.table["case_id"].tolist() == ["a", "b"]
    assert (got.name, got.classes) == ("grade", ("low", "high"))
    assert got.notes == (f"{got.path}: no column case_id: each of the 2 slides is taken as a patient",)


def test_slides_of_a_case_may_differ_in_class(tmp_path: Path) -> None:
    got = read_labels(table(tmp_path, "slide_id,case_id,label\na,x,0\nb,x,1\n"))
    assert got.summary() == "label label: 1 of class 0, 1 of class 1 (the positive class)"
    assert got.table["label"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("cells", "classes", "labels"),
    [
        (["10", "9", "10"], ("9", "10"), [1, 0, 1]),  # integers by value
        (["1.0", "0.0", ""], ("0", "1"), [1, 0, -1]),  # as pandas writes integers with gaps
        (["01", "+1", "-1"], ("-1", "1"), [1, 1, 0]),
        (["b", "a", "10"], ("10", "a", "b"), [2, 1, 0]),
        (["None", "some", "NA"], ("None", "some"), [0, 1, -1]),  # None may be a class
        (["Yes", "yes", "N/A"], ("Yes", "yes"), [0, 1, -1]),
        ([" pos ", "neg", "pos"], ("neg", "pos"), [1, 0, 1]),
    ],
)
def test_classes_are_the_sorted_values(
    tmp_path: Path, cells: list[str], classes: tuple[str, ...], labels: list[int]
) -> None:
    rows = "".join(f"s{i},{cell}\n" for i, cell in enumerate(cells))
    got = read_labels(table(tmp_path, f"slide_id,label\n{rows}"))
    assert (got.classes, got.table["label"].tolist()) == (classes, labels)


def test_classes_may_be_given_with_their_order(tmp_path: Path) -> None:
    path = table(tmp_path, "slide_id,label\na,pos\nb,neg\nc,\n")
    assert read_labels(path, classes=("pos", "neg", "odd")).table["label"].tolist() == [0, 1, -1]
    one = table(tmp_path, "slide_id,label\na,1.0\n", "one.csv")
    assert read_labels(one, classes=("0", "1")).table["label"].tolist() == [1]  # a part may lack a class
    with refused(path, "line 3: column 'label': expected one of 'pos', 'odd', got 'neg'; mend the cell or empty it"):
        read_labels(path, classes=("pos", "odd"))
    for wrong in (("pos",), ("pos", "pos"), ()):
        with refused("classes: expected two or more different names"):
            read_labels(path, classes=wrong)


def test_the_column_is_label_or_the_only_one_or_named(tmp_path: Path) -> None:
    path = table(tmp_path, ",slide_id,case_id,label,grade\n0,a,x,0,low\n1,b,y,1,high\n")
    assert read_labels(path).name == "label"
    got = read_labels(path, label="grade")
    assert (got.name, got.classes, got.table["label"].tolist()) == ("grade", ("low", "high"), [0, 1])
    with refused(path, "expected a column 'stage', got '', 'slide_id'", "choose one with --label"):
        read_labels(path, label="stage")
    with refused("expected a column 'slide_id'"):
        read_labels(path, label="slide_id")  # ids are no classes
    two = table(tmp_path, "slide_id,er,pr\na,0,1\n")
    with refused(two, "expected one column of labels, got 'er', 'pr'; choose one with --label"):
        read_labels(two)
    none = table(tmp_path, "slide_id,case_id\na,x\n")
    with refused(none, "expected one column of labels, got none"):
        read_labels(none)


MARKERS = (
    *("NULL", "null", "#N/A", "N/A", "na", "n/a", ".", "-", "nan", "NaN", "-nan", "-NaN", "<NA>", "NA", "#NA"),
    *("1.#IND", "-1.#QNAN", "--", "'--", "[Unknown]", "#N/A N/A", "[Not Available]", ""),
)


def test_usual_markers_are_missing_and_counted(tmp_path: Path) -> None:
    cells = ["neg", "pos", "neg", *MARKERS]
    got = read_labels(
        table(tmp_path, "slide_id,case_id,HER2\n" + "".join(f"s{i},{i},{c}\n" for i, c in enumerate(cells)))
    )
    assert (got.classes, got.notes) == (("neg", "pos"), ())
    assert got.table["label"].tolist() == [0, 1, 0] + [-1] * (len(cells) - 3)
    assert got.summary() == f"label HER2: 2 neg, 1 pos (the positive class), {len(cells) - 3} missing"


def test_a_minus_is_a_class_beside_a_plus(tmp_path: Path) -> None:
    got = read_labels(table(tmp_path, "slide_id,case_id,er\na,a,+\nb,b,-\nc,c,na\n"))
    assert (got.classes, got.table["label"].tolist()) == (("-", "+"), [1, 0, -1])


def test_what_is_missing_can_be_said(tmp_path: Path) -> None:
    path = table(tmp_path, "slide_id,case_id,er\na,a,pos\nb,b,neg\nc,c,Unknown\nd,d,NA\n")
    got = read_labels(path)
    assert got.classes == ("Unknown", "neg", "pos")
    assert got.notes == (f"{path}: column 'er': 'Unknown' (1 rows) is a class; --missing Unknown takes it as missing",)
    assert got.summary() == "label er: 1 Unknown, 1 neg, 1 pos, 1 missing"
    told = LabelOptions(missing=("Unknown", "9"))
    got = read_labels(path, options=told)
    assert (got.classes, got.table["label"].tolist()) == (("neg", "pos"), [1, 0, -1, -1])
    assert got.notes == (f"{path}: column 'er': no cell is '9', which --missing names",)
    assert read_labels(path, classes=("pos", "neg"), options=told).table["label"].tolist() == [0, 1, -1, -1]
    with refused(path, "line 4: column 'er': expected one of 'neg', 'pos', got 'Unknown'", "with --missing Unknown"):
        read_labels(path, classes=("neg", "pos"))
    named = LabelOptions(classes=("neg", "pos", "NA", "Unknown"))  # a marker that is named is a class
    assert read_labels(path, options=named).table["label"].tolist() == [1, 0, 3, 2]
    codes = table(tmp_path, "slide_id,case_id,er\na,a,1.0\nb,b,0.0\nc,c,-1.0\n", "codes.csv")
    assert read_labels(codes, options=LabelOptions(missing=("-1",))).table["label"].tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("negative", "positive"),
    [
        *(
            ("HER2-", "HER2+"),
            ("negative", "positive"),
            ("NEG", "Pos"),
            ("No", "Yes"),
            ("wt", "mut"),
            ("WT", "mutated"),
        ),
        *(("Wild-type", "Mutant"), ("low", "High"), ("absent", "present"), ("non-TNBC", "TNBC"), ("nonMSIH", "MSIH")),
        *(("FALSE", "True"), ("MSS", "MSI-H"), ("TP53 wt", "TP53 mut"), ("HER2 negative", "HER2 positive"), ("-", "+")),
        *(("ER+/HER2-", "ER+/HER2+"), ("normal", "Tumour"), ("benign", "malignant"), ("Alive", "Dead"), ("0", "1")),
        *(
            ("no metastasis", "metastasis"),
            ("Non-Responder", "Responder"),
            ("HER2", "HER2+"),
            ("unmethylated", "methylated"),
        ),
    ],
)
def test_of_a_known_pair_the_positive_class_is_second(tmp_path: Path, negative: str, positive: str) -> None:
    for first, second in ((negative, positive), (positive, negative)):
        got = read_labels(table(tmp_path, f"slide_id,case_id,x\na,a,{first}\nb,b,{second}\n"))
        assert (got.classes, got.guessed) == ((negative, positive), False)
        if not positive.isdigit():
            assert got.summary() == f"label x: 1 {negative}, 1 {positive} (the positive class)"


@pytest.mark.parametrize("pair", [("LUAD", "LUSC"), ("1", "2"), ("A", "B"), ("Yes", "yes"), ("stage-1", "stage-2")])
def test_of_an_unknown_pair_the_line_says_how_to_choose(tmp_path: Path, pair: tuple[str, str]) -> None:
    path = table(tmp_path, f"slide_id,case_id,x\na,a,{pair[1]}\nb,b,{pair[0]}\n")
    got = read_labels(path)
    assert got.classes == pair
    assert got.summary().endswith(f" {pair[1]} (the positive class, as it sorts last; --positive changes it)")
    turned = read_labels(path, options=LabelOptions(positive=pair[0]))
    assert (turned.classes, turned.guessed) == ((pair[1], pair[0]), False)
    assert read_labels(path, options=LabelOptions(classes=pair[::-1])).classes == pair[::-1]


def test_classes_that_do_not_occur_are_told_with_those_that_do(tmp_path: Path) -> None:
    two = table(tmp_path, "slide_id,label\na,x\nb,y\n")
    three = table(tmp_path, "slide_id,label\na,x\nb,y\nc,z\n", "three.csv")
    for path, options, told in (
        (two, LabelOptions(positive="z"), "--positive: expected a class that occurs, got 'z'; it has 'x', 'y'"),
        (three, LabelOptions(positive="z"), "--positive: expected two classes, got 3; it has 'x', 'y', 'z'; set the"),
        (
            two,
            LabelOptions(classes=("x", "y", "z")),
            "--classes: expected classes that occur, got 'z'; it has 'x', 'y'",
        ),
        (three, LabelOptions(classes=("x", "y")), "line 4: column 'label': expected one of 'x', 'y', got 'z'"),
        (two, LabelOptions(classes=("x", "y"), positive="x"), "positive: expected the second of two classes, got 'x'"),
        (two, LabelOptions(classes=("x",)), "classes: expected two or more different names, got 'x'"),
    ):
        with refused(told):
            read_labels(path, options=options)
    assert read_labels(three, options=LabelOptions(classes=("z", "x", "y"))).table["label"].tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "name",
    ["case_id", "case", "Case_ID", "PATIENT", "patient id", "bcr_patient_barcode", "case_submitter_id", "submitter_id"],
)
@pytest.mark.parametrize("slide", ["slide_id", "slide", "FILENAME", "Slide ID"])
def test_columns_of_ids_by_their_usual_names(tmp_path: Path, slide: str, name: str) -> None:
    got = read_labels(table(tmp_path, f"{name},{slide},er\np,a,0\np,b,1\n"))
    assert (got.table.index.tolist(), got.table["case_id"].tolist(), got.name) == (["a", "b"], ["p", "p"], "er")
    assert got.notes == ()


def test_the_exact_names_win_and_a_label_may_be_named_like_an_id(tmp_path: Path) -> None:
    path = table(tmp_path, "slide_id,filename,case_id,Patient,case\na,1,p,q,0\nb,2,p,r,1\n")
    got = read_labels(path, label="case")
    assert (got.table.index.tolist(), got.table["case_id"].tolist(), got.name) == (["a", "b"], ["p", "p"], "case")
    assert read_labels(path, label="case", options=LabelOptions(case_from="Patient")).table["case_id"].tolist() == [
        "q",
        "r",
    ]
    with refused(path, "--case-from: expected a column or tcga, got 'x'; it has 'slide_id'"):
        read_labels(path, label="case", options=LabelOptions(case_from="x"))


def test_tcga_barcodes_offer_their_patients(tmp_path: Path) -> None:
    slides = ["TCGA-A1-A0SB-01Z-00-DX1.x", "TCGA-A1-A0SB-01Z-00-DX2.y", "TCGA-A1-A0SD-01Z"]
    path = table(tmp_path, "slide_id,label\n" + "".join(f"{slide},{i % 2}\n" for i, slide in enumerate(slides)))
    got = read_labels(path)
    assert got.table["case_id"].tolist() == slides
    offer = "the first 12 characters of the TCGA barcodes make 2 patients, not 3; --case-from tcga takes those"
    assert got.notes == (f"{path}: no column case_id: each of the 3 slides is taken as a patient", f"{path}: {offer}")
    taken = read_labels(path, options=LabelOptions(case_from="tcga"))
    assert (taken.table["case_id"].tolist(), taken.notes) == (["TCGA-A1-A0SB"] * 2 + ["TCGA-A1-A0SD"], ())
    copied = table(tmp_path, "slide_id,case_id,label\n" + "".join(f"{s},{s},{i % 2}\n" for i, s in enumerate(slides)))
    assert read_labels(copied).notes == (f"{copied}: {offer}",)
    other = table(tmp_path, "slide_id,label\na,1\nb,0\n")
    with refused(other, "--case-from tcga: expected slides named like TCGA-XX-XXXX, got 'a'; add a column case_id"):
        read_labels(other, options=LabelOptions(case_from="tcga"))


def test_tabs_quotes_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    text = '\ufeffslide_id,case_id,label\r\n\r\n"a, b",x,0\r\n,,\r\n c ,y,1\r\n\r\n'
    assert read_labels(table(tmp_path, text)).table.index.tolist() == ["a, b", "c"]
    tabs = table(tmp_path, "slide_id\tlabel\na,b\t0\nc\t1\n", "labels.tsv")
    assert read_labels(tabs).table.index.tolist() == ["a,b", "c"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("expected a header and rows, got an empty file",)),
        ("\n\n,,\n", ("expected a header and rows, got an empty file",)),
        ("slide_id,label\n", ("expected a row for each slide, got a header alone",)),
        ("name,label\na,1\n", ("expected a column 'slide_id', got 'name', 'label'",)),
        ("slide,wsi,label\na,b,1\n", ("expected a column 'slide_id', got 'slide', 'wsi'; name the one that counts",)),
        ("slide_id,case,Patient,label\na,b,c,1\n", ("got 'case', 'Patient'; choose one with --case-from",)),
        ('slide_id,label\n"a\rb",1\n', ("line 3: expected ids without control characters, got 'a\\rb'; rename it",)),
        ("slide_id,case_id,label\na,x\x7f,1\n", ("line 2: expected ids without control", "'x\\x7f'")),
        ("slide_id,label\na,x\u2028y\nb,z\n", ("column 'label': expected classes without control", "'x\\u2028y'")),
        ("slide_id;label\na;0,5\nb;1,5\n", ("expected classes, got numbers with decimal commas such as 0,5",)),
        ("slide_id|label\na|1\n", ("expected a column 'slide_id', got 'slide_id|label'",)),
        ("slide_id,label,label\na,1,0\n", ("expected each column once, got 'label' twice",)),
        ("slide_id,label\na,1\n\nb,0\na,0\n", ("line 5: expected each slide once, got 'a' again (first on line 2)",)),
        ("slide_id,label\na,1\nb\n", ("line 3: expected 2 cells, got 1; mend the line",)),
        ("slide_id,label\na,1\nb,0,2\n", ("line 3: expected 2 cells, got 3",)),
        ("slide_id,label\na,1\n ,0\n", ("line 3: expected a slide_id and a case_id, got an empty cell",)),
        ("slide_id,case_id,label\na,,1\n", ("line 2: expected a slide_id and a case_id",)),
        ("slide_id,label\na,1\nb,1\n", ("column 'label': expected two or more classes, got '1'",)),
        ("slide_id,label\na,\nb,NA\n", ("expected two or more classes, got none",)),
        ("slide_id,label\na,0.5\nb,1\n", ("expected classes, got fractions such as 0.5; bin the values",)),
        ("slide_id,label\na,1e-3\nb,inf\n", ("got fractions such as 1e-3",)),
        ('slide_id,label\n"a,1\n', ("expected a CSV table, got unexpected end of data",)),
    ],
)
def test_one_line_names_the_file_and_the_line(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = table(tmp_path, text)
    with refused(f"{path}: ", *parts):
        read_labels(path)


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    with refused(f"{tmp_path / 'none.csv'}: expected a CSV table, got nothing there; check the path"):
        read_labels(tmp_path / "none.csv")
    with refused(f"{tmp_path}: expected a CSV table, got a folder"):
        read_labels(tmp_path)


def test_a_long_list_of_columns_or_classes_is_cut(tmp_path: Path) -> None:
    path = table(tmp_path, ",".join(f"column{i}" for i in range(500)) + "\n1\n")
    with refused("... (500 in all)"):
        read_labels(path)


ids = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(rows=st.dictionaries(ids, st.tuples(ids, st.sampled_from(["0", "1", "", "2"])), min_size=1, max_size=8))
def test_any_ids_come_back(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, tuple[str, str]]) -> None:
    def quoted(cell: str) -> str:
        return '"' + spreadsheet_cell(cell).replace('"', '""') + '"'

    lines = [",".join(map(quoted, (slide, case, label))) for slide, (case, label) in rows.items()]
    path = table(tmp_path_factory.mktemp("any"), "slide_id,case_id,label\n" + "\n".join(lines))
    got = read_labels(path, classes=("0", "1", "2")).table
    assert got.index.tolist() == list(rows)
    assert got["case_id"].tolist() == [case for case, _ in rows.values()]
    assert got["label"].tolist() == [int(label or -1) for _, label in rows.values()]


def test_real_labels(shared_data: Path) -> None:
    got = read_labels(shared_data / "colon" / "labels.csv")
    assert (len(got), got.classes, got.table["case_id"].nunique()) == (100, ("0", "1"), 40)
    assert got.table["label"].value_counts().to_dict() == {1: 51, 0: 49}


@pytest.mark.parametrize(
    "text", ["slide_id|label\na|0\n", "sep=;\nslide_id;label\na;0\n", "# a comment\nslide_id,label\na,0\n"]
)
def test_a_header_of_one_column_is_told_what_separates_columns(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with refused(path, "begin with the names of columns, and separate them with commas"):
        read_labels(path)

"""Splits: no patient on two sides, every labelled case tested once, and files as CLAM writes them."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from momkd.data import Labels, Split, check_splits, make_splits, read_labels, read_splits, write_splits
from momkd.data.folders import LIST
from momkd.data.splits import check_parts, match_splits
from momkd.errors import InputError
from tests.data.conftest import refused


def labels_of(rows: Sequence[tuple[str, str, int]], classes: tuple[str, ...] = ("neg", "pos")) -> Labels:
    """(slide, case, label) each."""
    index = pd.Index([row[0] for row in rows], name="slide_id", dtype=object)
    cases = np.array([row[1] for row in rows], dtype=object)
    table = pd.DataFrame({"case_id": cases, "label": np.array([row[2] for row in rows], np.int64)}, index=index)
    return Labels(table, classes)


def cohort(*cases: int, slides: Sequence[int] = (1,), unlabelled: int = 0) -> Labels:
    """cases[c] cases of class c; their numbers of slides repeat `slides`. Slides of different cases are interleaved."""
    rows, number = [], 0
    for label, count in [*enumerate(cases), (-1, unlabelled)]:
        for _ in range(count):
            rows += [(f"c{number}-{k}", f"c{number}", label) for k in range(slides[number % len(slides)])]
            number += 1
    order = np.random.default_rng(0).permutation(len(rows))
    return labels_of([rows[i] for i in order], tuple(f"class{c}" for c in range(len(cases))))


def cases_in(labels: Labels, slides: Sequence[str]) -> set[str]:
    return set(labels.table.loc[list(slides), "case_id"])


def split_file(folder: Path, text: str, fold: int = 0) -> Path:
    path = folder / f"splits_{fold}.csv"
    path.write_bytes(text.encode())
    return path


# Making


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_every_labelled_case_is_tested_in_exactly_one_fold(folds: int) -> None:
    labels = cohort(23, 41, 11, slides=(1, 3, 2), unlabelled=4)
    splits = make_splits(labels, folds)
    assert len(splits) == folds
    tested = Counter(case for split in splits for case in cases_in(labels, split.test))
    labelled = set(labels.table.loc[labels.table["label"] >= 0, "case_id"])
    assert tested == dict.fromkeys(labelled, 1)


def test_every_slide_is_in_one_part_and_every_case_too() -> None:
    labels = cohort(23, 41, slides=(1, 4, 2), unlabelled=5)
    for split in make_splits(labels, 4, val_fraction=0.3):
        assert sorted(split.train + split.val + split.test) == sorted(labels.table.index)
        train, val, test = (cases_in(labels, part) for part in (split.train, split.val, split.test))
        assert len(train) + len(val) + len(test) == labels.table["case_id"].nunique()
    check_splits(make_splits(labels, 4), labels)


def test_classes_share_out_evenly_by_cases() -> None:
    labels = cohort(23, 41, slides=(5, 1))
    case_label = labels.table.drop_duplicates("case_id").set_index("case_id")["label"]
    for split in make_splits(labels, 5, val_fraction=0.25):
        counts = {part: case_label[list(cases_in(labels, slides))] for part, slides in split.parts().items()}
        assert (counts["test"] == 0).sum() in (4, 5)
        assert (counts["test"] == 1).sum() in (8, 9)
        for c in (0, 1):
            outside = (counts["val"] == c).sum() + (counts["train"] == c).sum()
            assert (counts["val"] == c).sum() == round(0.25 * outside)


@pytest.mark.parametrize("seed", range(5))
def test_slides_share_out_evenly_too(seed: int) -> None:
    labels = cohort(23, 18, slides=(1, 9, 2, 4, 7, 1, 1))
    sizes = [len(split.test) for split in make_splits(labels, 5, seed)]
    assert sum(sizes) == len(labels)
    assert max(sizes) - min(sizes) <= 1  # 7 where small cases go first, up to 9 where cases are dealt at random


def test_a_case_of_two_classes_counts_for_the_rarest() -> None:
    rows = [(f"n{i}", f"n{i}", 0) for i in range(20)] + [(f"p{i}", f"p{i}", 1) for i in range(3)]
    mixed = [("m-neg", "m", 0), ("m-neg2", "m", 0), ("m-pos", "m", 1)]
    labels = labels_of(rows + mixed)
    for split in make_splits(labels, 4, val_fraction=0):  # four positive cases only with m among them
        assert sum(case == "m" or case.startswith("p") for case in cases_in(labels, split.test)) == 1
        assert len({part for part, slides in split.parts().items() for s in slides if s.startswith("m-")}) == 1


def test_cases_without_any_label_are_in_train_throughout() -> None:
    labels = cohort(6, 6, slides=(2,), unlabelled=3)
    labels.table.loc["c0-1", "label"] = -1  # the other slide of its case has a label: both are tested
    splits = make_splits(labels, 3)
    for split in splits:
        assert {"c12", "c13", "c14"} <= cases_in(labels, split.train)
    assert sum({"c0-0", "c0-1"} <= set(split.test) for split in splits) == 1


def test_one_fold_tests_on_a_fifth() -> None:
    (split,) = make_splits(cohort(50, 50), 1)
    assert len(split.test) == 20
    assert len(split.val) == 12  # 15 % of each 40


@pytest.mark.parametrize(("fraction", "size"), [(0.0, 0), (0.001, 2), (0.15, 2), (0.5, 8), (0.99, 14)])
def test_validation_has_a_case_of_each_class_and_train_too(fraction: float, size: int) -> None:
    labels = cohort(10, 10)
    for split in make_splits(labels, 5, val_fraction=fraction):
        assert len(split.val) == size
        for part in (split.train, *([split.val] if size else [])):
            assert set(labels.table.loc[list(part), "label"]) == {0, 1}


def test_the_seed_decides_and_the_order_of_slides_is_that_of_the_table() -> None:
    labels = cohort(20, 20, slides=(2, 1))
    assert make_splits(labels, seed=3) == make_splits(labels, seed=3)
    for part in ("val", "test"):
        one, two = ([split.parts()[part] for split in make_splits(labels, seed=seed)] for seed in (3, 4))
        assert one != two
    position = {slide: i for i, slide in enumerate(labels.table.index)}
    for split in make_splits(labels):
        for slides in split.parts().values():
            assert [position[s] for s in slides] == sorted(position[s] for s in slides)


@settings(max_examples=60, deadline=None)
@given(
    extra=st.lists(st.tuples(st.integers(0, 30), st.integers(-1, 2)), max_size=60),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    folds=st.integers(1, 6),
    seed=st.integers(0, 99),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
def test_any_cohort_is_split_without_leak(
    extra: list[tuple[int, int]], more: tuple[int, int, int], folds: int, seed: int, fraction: float
) -> None:
    """Enough cases of each class, and cases of any number of slides with any labels."""
    groups = 5 if folds == 1 else folds
    sure = [(f"sure{c}-{i}", c) for c in range(3) for i in range(max(groups, 4) + more[c])]
    rows = [*sure, *((f"extra{case}", label) for case, label in extra)]
    labels = labels_of([(f"s{i}", case, label) for i, (case, label) in enumerate(rows)], ("a", "b", "c"))
    splits = make_splits(labels, folds, seed, fraction)
    check_splits(splits, labels)
    labelled = set(labels.table.loc[labels.table["label"] >= 0, "case_id"])
    tested = Counter(case for split in splits for case in cases_in(labels, split.test))
    assert set(tested.values()) == {1}
    assert folds == 1 or set(tested) == labelled
    for split in splits:
        assert sorted(split.train + split.val + split.test) == sorted(labels.table.index)
        assert bool(split.val) == (fraction > 0)
        assert set(labels.table.loc[list(split.train), "label"]) >= {0, 1, 2}


def test_too_few_cases_are_refused_by_class() -> None:
    with refused("labels: class 'class1': expected a case for every part of 5 folds, got 4 cases; use fewer folds"):
        make_splits(cohort(20, 4), 5)
    make_splits(cohort(20, 5), 5)
    with refused("labels: class 'class0': expected a case for every part of 2 folds, got 2 cases"):
        make_splits(cohort(2, 9), 2)  # one tested and one for val leave none to learn from
    make_splits(cohort(2, 9), 2, val_fraction=0)
    many_slides_of_few_cases = cohort(3, 20, slides=(30, 1))
    with refused("got 3 cases"):
        make_splits(many_slides_of_few_cases, 5)
    for wrong in ({"folds": 0}, {"val_fraction": 1.0}, {"val_fraction": -0.1}):
        with refused("splits: expected folds >= 1 and 0 <= val_fraction < 1"):
            make_splits(cohort(9, 9), **wrong)  # type: ignore[arg-type]


# Checking


def test_a_case_in_two_parts_is_a_leak() -> None:
    labels = labels_of([("a1", "a", 0), ("a2", "a", 0), ("b1", "b", 1)])
    good = Split(("a1", "a2"), (), ("b1",))
    leak = Split(("a1",), ("b1",), ("a2",))
    check_splits([good], labels)
    with refused("dir: splits_1.csv: expected each case in one part, got 'a' in train (a1) and test (a2)"):
        check_splits([good, leak], labels, source="dir")
    check_splits([good, leak], labels, leaks=True)
    check_splits([Split(("a1",), (), ("b1",)), Split(("b1",), (), ("a2",))], labels)  # folds may share cases


def test_a_slide_without_a_row_in_the_table_is_refused() -> None:
    labels = labels_of([("007", "a", 0)])
    for leaks in (False, True):
        with refused("splits: splits_0.csv: val: expected slides of labels, got '7'; its ids look like '007'"):
            check_splits([Split(("007",), ("7",), ())], labels, leaks=leaks)


# Files


def test_splits_come_back_from_files(tmp_path: Path) -> None:
    labels = cohort(11, 13, slides=(1, 2), unlabelled=2)
    for splits in (make_splits(labels, 3), make_splits(labels, 1, val_fraction=0)):
        folder = tmp_path / "new" / str(len(splits))
        write_splits(folder, splits)
        assert read_splits(folder) == splits
        assert sorted(p.name for p in folder.glob("*.csv")) == [f"splits_{k}.csv" for k in range(len(splits))]


def test_files_are_as_clam_writes_them(tmp_path: Path) -> None:
    write_splits(tmp_path, [Split(("a", "b", "c"), ("d",), ())])
    assert (tmp_path / "splits_0.csv").read_text() == ",train,val,test\n0,a,d,\n1,b,,\n2,c,,\n"


def test_ids_of_digits_survive_what_pandas_does_to_them(tmp_path: Path) -> None:
    # pandas turns a padded column of integers into floats: 101, 102 and two empty cells.
    split_file(tmp_path, ",train,val,test\n0,7,101.0,1.0\n1,8,102.0,x\n2,9,,\n3,10,,\n")
    assert read_splits(tmp_path) == [Split(("7", "8", "9", "10"), ("101", "102"), ("1.0", "x"))]
    split_file(tmp_path, "train,val,test\n1.0,a,b\n2.0,c,d\n")  # a full column is taken at its word
    assert read_splits(tmp_path)[0].train == ("1.0", "2.0")
    write_splits(tmp_path / "own", [Split(("007", "8"), ("9",), ("010",))])
    assert read_splits(tmp_path / "own") == [Split(("007", "8"), ("9",), ("010",))]


def test_folds_are_ordered_by_number_and_other_files_left_alone(tmp_path: Path) -> None:
    for fold in range(11):
        split_file(tmp_path, f"train,val,test\ns{fold},,\n", fold)
    for name in ("splits_0_bool.csv", "splits_0_descriptor.csv", "notes.txt"):
        (tmp_path / name).write_text("x")
    assert [split.train for split in read_splits(tmp_path)] == [(f"s{fold}",) for fold in range(11)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train,val\na,b\n", ("expected columns train, val and test, got no 'test'; add it",)),
        ("train,val,test,fold\na,b,c,0\n", ("got also 'fold'; remove it",)),
        ("train,val,test\na,b,c,d\n", ("line 2: expected at most 3 cells, got 4",)),
        ("train,val,test\na,b,a\n", ("expected each slide once, got 'a' in train and test; remove one",)),
        ("train,val,test\na,b,c\na,,\n", ("expected each slide once, got 'a' twice in train",)),
        ("train,val,test\n,b,c\n", ("expected slides in train, got none",)),
        ("train,val,test\n", ("expected slides in train, got none",)),
        ("train,train,val,test\na,b,c,d\n", ("expected each column once, got 'train' twice",)),
        ("", ("expected a header and rows, got an empty file",)),
    ],
)
def test_one_line_names_the_file(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = split_file(tmp_path, text)
    with refused(f"{path}: ", *parts):
        read_splits(tmp_path)


def test_a_folder_without_or_with_a_gap_in_its_files(tmp_path: Path) -> None:
    with refused(f"{tmp_path}: expected splits_0.csv, got no such file; make it with momkd splits"):
        read_splits(tmp_path)
    with refused(f"{tmp_path / 'none'}: expected a folder with splits_0.csv, got nothing there"):
        read_splits(tmp_path / "none")
    path = split_file(tmp_path, "train,val,test\na,b,c\n", 1)
    with refused(f"{path}: expected a folder with splits_0.csv, got a file"):
        read_splits(path)
    with refused(f"{tmp_path}: expected splits_0.csv, got splits_1.csv next; number the files from 0"):
        read_splits(tmp_path)
    split_file(tmp_path, "train,val,test\na,b,c\n", 0)
    split_file(tmp_path, "train,val,test\na,b,c\n", 3)
    with refused("expected splits_2.csv, got splits_3.csv next"):
        read_splits(tmp_path)


def test_older_folds_are_not_left_to_be_read_along(tmp_path: Path) -> None:
    split = Split(("a",), ("b",), ("c",))
    write_splits(tmp_path, [split] * 3)
    with refused(f"{tmp_path}: expected no more than 2 folds, got an older splits_2.csv; remove it first"):
        write_splits(tmp_path, [Split(("x",), (), ())] * 2)
    assert read_splits(tmp_path) == [split] * 3  # and nothing was written before
    write_splits(tmp_path, [Split(("x",), (), ())] * 4)
    assert len(read_splits(tmp_path)) == 4
    (tmp_path / "file").touch()
    with refused(tmp_path / "file", "cannot make the folder"):
        write_splits(tmp_path / "file", [split])


class Killed(BaseException):
    """As a signal: nothing catches it."""


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
@pytest.mark.parametrize("old", [0, 1, 2])
def test_a_set_is_written_whole_or_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: int, error: BaseException
) -> None:
    before, after = ([Split((f"{name}{k}",), (), ()) for k in range(2)] for name in ("old", "new"))
    calls = 0

    def failing(call: Callable[..., Any], at: int) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            return call(*args, **options)

        return counted

    for at in range(1, 40):
        folder = tmp_path / str(at)
        if old:
            write_splits(folder, before[:old])
        calls = 0
        with monkeypatch.context() as patched:
            for name in ("fsync", "replace", "unlink"):
                patched.setattr(os, name, failing(getattr(os, name), at))
            told = str(folder)
            try:
                write_splits(folder, after)
            except (InputError, Killed) as caught:
                told = str(caught)
        assert told.startswith(str(folder)) or isinstance(error, Killed)
        assert ".tmp" not in told
        try:
            found = read_splits(folder)
        except InputError:
            assert calls >= at
        else:
            assert found in (before[:old], after)
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] in ([], [LIST])
        if calls < at:
            assert found == after
            break
        write_splits(folder, after)  # once more over what was left
        assert read_splits(folder) == after
    assert 6 < at < 39


@pytest.mark.parametrize("change", ["made by hand", "same size", "longer", "a folder", "another list"])
def test_splits_of_others_are_not_replaced(tmp_path: Path, change: str) -> None:
    split = Split(("a", "b"), ("c",), ())
    write_splits(tmp_path, [split] * 2)
    mine, kept = tmp_path / "splits_1.csv", tmp_path / LIST
    if change == "made by hand":
        kept.unlink()
    elif change == "same size":  # a slide in another part
        mine.write_text(mine.read_text().replace("a", "c", 1).replace(",c", ",a", 1))
    elif change == "longer":
        mine.write_text(mine.read_text() + "9,z,,\n")
    elif change == "a folder":
        mine.unlink()
        mine.mkdir()
    else:
        kept.write_text('{"digests": [1]}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with refused(tmp_path, "splits that momkd made to replace, got a", "; choose another --out, or remove them"):
        write_splits(tmp_path, [Split(("x",), ("y",), ())] * 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_slide_named_like_padding_is_kept_where_it_is_known(tmp_path: Path) -> None:
    split_file(tmp_path, "train,val,test\na,b,NA\nNaN,nan,\n")
    assert read_splits(tmp_path) == [Split(("a",), ("b",), ())]
    assert read_splits(tmp_path, {"NA", "NaN"}) == [Split(("a", "NaN"), ("b",), ("NA",))]


@pytest.mark.parametrize("slide", ["=cmd|' /C calc'!A0", "@x", "+1", "-2", "'=1", "\tx".strip()])
def test_ids_that_spreadsheets_would_run_read_back(tmp_path: Path, slide: str) -> None:
    split = Split((slide, "a"), ("b",), ())
    write_splits(tmp_path, [split])
    assert read_splits(tmp_path) == [split]


def test_ids_match_the_labels_without_endings(tmp_path: Path) -> None:
    labels = labels_of([("a.svs", "x", 0), ("b", "y", 1), ("c.dx1", "z", 1), ("d.svs", "u", 0), ("d.tif", "v", 1)])
    split_file(tmp_path, "train,val,test\na,b.h5,c.dx1.ndpi\n")
    splits = read_splits(tmp_path)
    matched, notes = match_splits(splits, labels, str(tmp_path))
    assert matched == [Split(("a.svs",), ("b",), ("c.dx1",))]
    assert notes == [f"{tmp_path}: 3 ids such as 'a' matched those of labels without endings such as .svs"]
    check_splits(matched, labels)
    exact = [Split(("a.svs",), ("b",), ())]
    assert match_splits(exact, labels) == (exact, [])
    for unclear in (Split(("d",), ("a.svs",), ()), Split(("a.h5", "a.tif"), (), ()), Split(("b", "b.svs"), (), ())):
        assert match_splits([unclear], labels) == ([unclear], [])


def test_parts_that_cannot_be_learned_or_scored_are_told_before() -> None:
    labels = labels_of(
        [("a", "a", 0), ("b", "b", 1), ("c", "c", 0), ("d", "d", -1), ("e", "e", 2)], ("neg", "pos", "odd")
    )
    every = set("abcde")
    for split, usable, told in (
        (
            Split(("a", "c"), (), ("b",)),
            every,
            "splits_3.csv: expected two or more classes in train, got only 'neg'",
        ),
        (Split(("a", "b"), (), ("c",)), {"a", "c"}, "got only 'neg' (1 slides)"),
        (
            Split(("d",), ("b",), ("c",)),
            every,
            "expected slides with a label in train, got none of 1; fill in",
        ),
        (Split(("a", "b"), ("c",), ()), {"c"}, "expected slides in train, got none that can be used"),
        (Split(("a", "b"), ("c",), ()), {"a", "b"}, "expected slides in val or test to score, got none"),
    ):
        with refused(told):
            check_parts(3, split, labels, usable)
    assert check_parts(3, Split(("a", "b", "e"), (), ("c",)), labels, every) == []
    assert check_parts(0, Split(("a", "b"), ("c",), ("d",)), labels, every, "s") == [
        "s: splits_0.csv: train has no slide of class 'odd'",
        "s: splits_0.csv: test has no slide that has a label; the fold has no metrics of test slides",
    ]
    (note,) = check_parts(0, Split(("a", "b", "e"), ("c",), ()), labels, every)
    assert note == "splits: splits_0.csv: test has no slide; the fold has no metrics of test slides"


def test_which_class_is_positive_changes_no_split() -> None:
    labels = cohort(9, 12, 7, slides=(1, 2), unlabelled=3)
    turned = np.array([2, 0, 1, -1])
    table = labels.table.assign(label=turned[labels.table["label"].to_numpy()])
    other = replace(labels, table=table, classes=tuple(labels.classes[c] for c in (1, 2, 0)))
    assert make_splits(labels, 3) == make_splits(other, 3)


@pytest.mark.parametrize("slide", ["NA", "nan", "", " a", "7.0", "a\rb", "a\nb"])
def test_an_id_that_would_not_read_back_is_not_written(tmp_path: Path, slide: str) -> None:
    with refused(tmp_path, f"got {slide!r}"):
        write_splits(tmp_path, [Split(("a", "b"), (slide,), ())])
    assert list(tmp_path.iterdir()) == []


ids = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(slides=st.lists(ids, min_size=1, max_size=9, unique=True), cuts=st.tuples(st.integers(1, 9), st.integers(0, 9)))
def test_any_ids_come_back_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, slides: list[str], cuts: tuple[int, int]
) -> None:
    first, second = cuts[0], cuts[0] + cuts[1]
    split = Split(tuple(slides[:first]), tuple(slides[first:second]), tuple(slides[second:]))
    folder = tmp_path_factory.mktemp("any")
    try:
        write_splits(folder, [split])
    except InputError:
        return
    assert read_splits(folder) == [split]


def test_real_splits(shared_data: Path) -> None:
    labels = read_labels(shared_data / "colon" / "labels.csv")
    splits = read_splits(shared_data / "colon")
    assert [tuple(map(len, split.parts().values())) for split in splits] == [(68, 12, 20)] * 5
    check_splits(splits, labels, source=str(shared_data / "colon"))
    check_splits(make_splits(labels, 5), labels)

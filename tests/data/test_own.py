"""momkd's own files, changed by hand or damaged: one line that names file, field, what was expected and what came."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from momkd.config import Config, read_config
from momkd.data import own
from momkd.data.own import read_json, read_rows
from momkd.errors import InputError
from momkd.runs import RunInfo, RunMetrics
from momkd.state import read_log
from momkd.study.attention import read_attention

INFO = (
    '{"classes":["a","b"],"label":"x","in_features":5,"folds":[0],"num_splits":1,"data":{},"versions":{},"skipped":{}}'
)


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        read()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"a","b"', '"a"', "classes: expected a list of length >= 2, got ['a']; train again"),
        ('"a","b"', '"a","a"', "classes: expected different names, got ['a', 'a'] with one twice; train again"),
        ('"label":"x",', "", "expected 'label' in it, got none"),
        ('"x"', "null", "label: expected str, got None"),
        ("5", "-1", "in_features: expected int >= 0, got -1"),
        ("5", "5.5", "in_features: expected int, got 5.5"),
        ("5", "true", "in_features: expected int, got True"),
        ("5", "9" * 50, "in_features: expected int <= 2147483647, got a number of more than 40 digits"),
        ("5", "9" * 5000, "got no such JSON (a number of thousands of digits)"),
        ("5", "1e999", "got no such JSON (Number out of range"),
        ("5", "NaN", "got no such JSON (JSON is malformed"),
        ("[0]", "[]", "folds: expected a list of length >= 1, got []; train again"),
        ("[0]", "[1,1]", "folds: expected different numbers, got [1, 1] with one twice"),
        ("[0]", "[0,-3]", "folds[1]: expected int >= 0, got -3"),
        ("[0]", '{"a":1}', "folds: expected a list, got names with 1 values"),
        ('"data":{}', '"data":{"a":3}', "data[...]: expected str | nothing, got int"),
        ('"data":{}', '"data":{"a":"b","a":"c"}', "'a' stands twice in it"),
        ('"data":{}', '"data":' + "[" * 10**5, "recursion"),
        ('"data":{}', '"data":{"\\ud800":null}', "got no such JSON"),
        (INFO, "[]", "expected names with values, got []"),
        (INFO, "", "got no such JSON (Expecting value"),
    ],
)
def test_the_description_of_a_run(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(INFO.replace(old, new, 1))
    said = refusal(lambda: read_json(path, RunInfo, what="the description of a run", remedy="train again"))
    assert said.startswith(f"{path}: ")
    assert message in said


def test_what_a_later_version_adds_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(INFO.replace("{", '{"new":[1,{}],', 1))
    info = read_json(path, RunInfo, what="the description of a run", remedy="train again")
    assert info == RunInfo(["a", "b"], "x", 5, [0], 1, {}, {}, {})
    path.write_text('{"test": {"auc": null}, "folds": [{"fold": 3, "auc": 0.5}, {"fold": 1, "threshold": 0.25}]}')
    folds = read_json(path, RunMetrics, what="metrics", remedy="evaluate").folds
    assert [(fold.fold, fold.threshold) for fold in folds] == [(3, None), (1, 0.25)]


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, folder, text = tmp_path / "pipe", tmp_path / "folder", tmp_path / "latin"
    os.mkfifo(pipe)
    folder.mkdir()
    text.write_bytes("[model]\n# Größe\n".encode("latin-1"))
    readers = (
        lambda path: read_config(path),
        lambda path: read_json(path, RunInfo, what="a run", remedy="train"),
        lambda path: read_log(path),
    )
    for read in readers:
        for path, message in (
            (pipe, "got a named pipe"),
            (folder, "got a folder"),
            (tmp_path / "none", "got nothing there"),
            (tmp_path / ("x" * 300), "File name too long"),
            (text, "codec can't decode byte"),
        ):
            assert message in refusal(lambda read=read, path=path: read(path)), path
    monkeypatch.setattr(own, "LARGEST", 10)
    for read in readers:
        assert "of at most 10 bytes, got 16" in refusal(lambda read=read: read(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a row for each epoch, got none"),
        ("epoch,auc\n", "expected a row for each epoch, got none"),
        ("epoch,auc\n0,0.5\n1,high\n", "[1][...]: expected float, got str"),
        ("epoch,auc\n0,0.5,7\n", "got unnamed columns"),
        ("epoch,auc\n0\n", "expected float, got nothing"),
        ("auc,loss\n1,0.5\n", "expected a column 'epoch', got auc, loss"),
        ('epoch,auc\n0,"0.5\n', "got no such table"),
        ("epoch,auc\n0," + "9" * 200_000 + "\n", "got no such table (field larger than field limit"),
    ],
)
def test_a_log(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    assert message in refusal(lambda: read_log(path))


def test_a_log_that_is_one(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("epoch,val_auc\n0,\n1,0.75\n")
    assert read_rows(path, dict[str, float], what="a log", remedy="train")[1] == {"epoch": 1.0, "val_auc": 0.75}
    assert read_log(path)["val_auc"].isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.seed=4294967296", "train.seed: expected a whole number from 0 to 4.29497e+09, got 4294967296"),
        ("train.plateau_factor=1", "train.plateau_factor: expected a number from 0.001 to 0.999, got 1"),
        ("loss.memory=1e39", "loss.memory: expected a number from 0 to 1000, got 1e+39"),
        ("loss.memory=1" + "0" * 400, "loss.memory: expected a number from 0 to 1000, got a number of more than 40"),
        ("loss.memory=1" + "0" * 5000, "loss.memory: expected a number from 0 to 1000, got '1000"),
        ("loss.memory=inf", "got inf"),
        ("model.kind=" + "[" * 2000, "model.kind: expected"),
        ("model.kind=" + "x" * 10**5, "model.kind: expected"),
        ("train.epochs=2026-01-01", "train.epochs: expected a whole number"),
    ],
)
def test_numbers_that_a_library_below_would_refuse(tmp_path: Path, setting: str, message: str) -> None:
    said = refusal(lambda: Config().with_settings([setting]))
    assert message in said
    assert len(said) < 400
    section, _, rest = setting.partition(".")
    path = tmp_path / "own.toml"
    path.write_text(f"[{section}]\n{rest}\n")
    assert len(refusal(lambda: read_config(path))) < 400 + len(str(path))


def test_odd_names_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    for text in ('"a\\nb" = 3', '["x\\n\\u001b[31m"]\na = 1', '[train]\n"a\\nb" = 3', "a = " + "[" * 10**5, "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        assert "\x1b" not in refusal(lambda: read_config(path))


def test_a_table_of_attention(tmp_path: Path) -> None:
    path = tmp_path / "attention.csv"
    path.write_text("fold,slide_id,attention_auc\n0,007,0.5\n")
    (row,) = read_attention(path)
    assert (row.fold, row.slide_id, row.attention_auc) == (0, "007", 0.5)
    path.write_text("fold,slide_id,attention_auc\n")
    assert read_attention(path) == []
    for text, message in (
        ("fold,slide_id\n0,a\n", "[0]: expected 'attention_auc' in it, got none"),
        ("fold,slide_id,attention_auc\n0,a,1e39\n", "[0].attention_auc: expected float <= 1.0, got '1e39'"),
        ("fold,slide_id,attention_auc\n-1,a,0.5\n", "[0].fold: expected int >= 0, got '-1'"),
        ("fold,slide_id,attention_auc\n0,a,\n", "attention_auc"),
    ):
        path.write_text(text)
        assert message in refusal(lambda: read_attention(path))

"""Text tables however they are written: encodings, separators, compressed or not; and what is no text table."""

from __future__ import annotations

import gzip
import os
import socket
from pathlib import Path

import pytest

from momkd.data import text
from momkd.data.files import existing_folder, kind_of, regular_file
from momkd.data.text import Dialect, has_decimal_comma, open_text, read_table, read_text_table, sniff
from tests.data.conftest import refused

ROWS = "slide_id,case_id,Größe\na,x,groß\nb,y,klein\n"


@pytest.mark.parametrize("sep", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_every_encoding_and_separator_reads_the_same(tmp_path: Path, encoding: str, name: str, sep: str) -> None:
    path = tmp_path / name
    written = ROWS.replace(",", sep).replace("\n", "\r\n").encode(encoding)
    path.write_bytes(gzip.compress(written) if name.endswith(".gz") else written)
    table = read_table(path)
    assert table.header == ["slide_id", "case_id", "Größe"]
    assert table.rows == [(2, ["a", "x", "groß"]), (3, ["b", "y", "klein"])]
    told = (f"{path}: not UTF-8: read as Windows-1252 (cp1252)",) if encoding == "cp1252" else ()
    assert table.notes == told
    with open_text(path, table.dialect) as file:
        assert file.read() == ROWS.replace(",", sep).replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("lines", "sep"),
    [
        (["slide_id", "a"], ","),
        (["slide_id,note", "a,x; y", "b,z; w; v"], ","),
        (["slide_id;er, pr", "a;1", "b;0, 1"], ";"),
        (["slide_id;er, pr;grade, who", "a;1,5;2,0", "b;0,1;3,0"], ";"),
        (['"a,b";c', "1;2"], ";"),
        (["", ",,", "a\tb,c\td", "1\t2,3\t4"], "\t"),
        (["a,b;c", "1,2", "3,4"], ","),
        (["a;b,c", "1;2", "3;4"], ";"),
    ],
)
def test_the_separator_is_the_one_that_fits_the_rows(tmp_path: Path, lines: list[str], sep: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines))
    assert sniff(path).sep == sep


def test_tsv_is_tabs_whatever_else_the_header_holds(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a,b,c\td\n1,2,3\t4\n")
    assert sniff(path).sep == "\t"


def test_decimal_commas_are_seen_beside_semicolons_and_tabs_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for written, decimal in (
        ("id;x\na;1,5\nb;2\n", ","),
        ("id;x\na;1,5\nb;2.5\n", "."),
        ("id;x\na;1\n", "."),
        ('id,x\na,"1,5"\n', "."),
        ("id\tx\na\t-0,25\n", ","),
    ):
        path.write_text(written)
        assert sniff(path).decimal == decimal, written
    assert [has_decimal_comma(cell) for cell in ("1,5", " +0,25 ", "1", "1.5", "a,b", "1,5,2", ",5")] == [True] * 2 + [
        False
    ] * 5


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        (b"", ("got an empty file",)),
        (b"slide_id,label\na\0,1\n", ("got zero bytes (no text, or UTF-16 without its byte order mark)",)),
        ("slide_id,label\na,1\n".encode("utf-16-le"), ("got zero bytes",)),
        (b"\xff\xfe", ("got an empty file",)),
        (b"\xff\xfes\0l\0\n\0a", ("save it again, in UTF-8",)),
        (b"a,b\nGr\x81n,1\n", ("in UTF-8, UTF-16 or Windows-1252, got byte 0x81",)),
        (b"PK\x03\x04" + bytes(9), ("got a workbook or a zip archive; save the sheet as CSV",)),
        (b"\x1f\x8b\x08", ("got a gzip file; name it .csv.gz",)),
        (b'a,b\n"1,2\n', ("unexpected end of data",)),
        (b"a,b\n" + b"x" * 200_000 + b",1\n", ("field larger than field limit",)),
        (b"a,b,a\n1,2,3\n", ("expected each column once, got 'a' twice",)),
    ],
)
def test_what_is_no_text_table_is_one_line(tmp_path: Path, written: bytes, parts: tuple[str, ...]) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(written)
    with refused(f"{path}: expected ", *parts):
        read_table(path)


def test_a_damaged_gzip_file_and_one_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv.gz"
    packed = gzip.compress(b"a,b\n" + bytes(range(65, 91)) * 100)
    for broken in (b"a,b\n1,2\n", packed[:-20], packed[:12] + b"\xff" * 9 + packed[21:]):
        path.write_bytes(broken)
        with refused(path, "expected a CSV table, got"):
            read_table(path)
    monkeypatch.setattr(text, "_LARGEST", 1 << 20)
    path.write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * (1 << 18)))
    with refused(path, "of at most 1 MiB, got more"):
        read_table(path)
    sniff(path)  # a reader that streams sets no limit


def test_long_rows_name_the_likely_cause(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("slide_id,age\na,1,5\n")
    with refused(path, "line 2: expected 2 cells, got 3; quote cells that hold commas, write numbers with points"):
        read_text_table(path)


def test_a_hundred_thousand_columns_are_read_in_moments(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    names = [f"c{i}" for i in range(100_000)]
    path.write_text("\n".join([",".join(names), ",".join("1" for _ in names)]))
    assert read_table(path).header == names


def test_nothing_but_regular_files_is_opened(tmp_path: Path) -> None:
    pipe, unix = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(unix))
        link = tmp_path / "link"
        link.symlink_to(pipe)
        file = tmp_path / "file"
        file.touch()
        for path, came in (
            (pipe, "a named pipe"),
            (link, "a named pipe"),
            (unix, "a socket"),
            ("/dev/null", "a device"),
            (tmp_path, "a folder"),
            (tmp_path / "none", "nothing there"),
            (file / "under", "nothing there"),
            (tmp_path / ("x" * 256), "File name too long"),
            (f"{tmp_path}/a\0b", "embedded null byte"),
            (f"{tmp_path}/\ud800", "surrogates not allowed"),
        ):
            assert came in kind_of(path)
            with refused("expected a CSV table, got"):
                raise_for(path)
        assert regular_file(str(file), "a table") == file
        assert existing_folder(tmp_path, "a folder of splits") == tmp_path
        with refused(f"{file}: expected a folder of splits, got a file; check the path"):
            existing_folder(file, "a folder of splits")


def raise_for(path: Path | str) -> None:
    try:
        read_table(path)
    except ValueError as error:
        raise type(error)(ascii(str(error))) from error


def test_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("momkd.data.files.os.stat", refuse)
    with refused("expected a CSV table, got Permission denied; check the path"):
        read_table("labels.csv")


def test_the_default_dialect_is_plain_csv() -> None:
    assert Dialect() == Dialect("utf-8-sig", ",", ".", ())


@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_a_tsv_is_read_by_what_separates_its_columns(tmp_path: Path, sep: str) -> None:
    path = tmp_path / "labels.tsv"
    path.write_text("\n".join(sep.join(row) for row in (("slide_id", "label, told"), ("a", "0"), ("b", "1"))) + "\n")
    assert sniff(path).sep == sep

"""Options of the smoke test of a GPU, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu import smoke


def test_dtypes_limit_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smoke, "OPS", {"attention_pool": smoke.OPS["attention_pool"]})
    monkeypatch.setattr(smoke, "check_ema", lambda given, report: None)
    out = tmp_path / "smoke.json"
    common = ["--tiny", "--device", "cpu", "--out", str(out)]
    for options, wanted in (
        (["--dtypes", "float32,bfloat16"], ["float32", "bfloat16"]),
        ([], ["float32", "bfloat16", "float16"]),
    ):
        assert smoke.main([*common, *options]) == 0, capsys.readouterr().out
        rows = json.loads(out.read_text())["results"]
        assert list(dict.fromkeys(row["dtype"] for row in rows)) == wanted


def test_an_unknown_dtype_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        smoke.main(["--dtypes", "float32,float8"])
    assert "expected some of float32,bfloat16,float16, got 'float8'" in capsys.readouterr().err

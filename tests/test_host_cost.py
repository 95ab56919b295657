"""What a call of a Triton op asks the host for: nothing twice, and nothing slow. Launches are stubbed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import momkd
from benchmarks import bench_host_cost as bench
from momkd import dispatch, gpu

triton = pytest.importorskip("triton")
tuning = pytest.importorskip("momkd.kernels._tuning")
OPS = [op for op in bench.cases("cpu") if "triton" in dispatch.OPS[op]]


@pytest.fixture(autouse=True)
def stubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MOMKD_BACKEND", "MOMKD_TUNE", "MOMKD_GATE_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOMKD_CACHE_DIR", str(tmp_path))
    with bench.stubbed("cpu"):
        yield
    tuning.STORE.configure(None, None)


def step(op: str) -> None:
    """A forward and a backward."""
    list(bench.steps(bench.cases("cpu")[op]).values())[-1]()


def questions(monkeypatch: pytest.MonkeyPatch, op: str) -> int:
    """How often a step asks whether Triton can run it."""
    asked: list[str] = []
    can_run = gpu.can_run
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "can_run", lambda op, args=(): (asked.append(op), can_run(op, args))[1])
        case = bench.cases("cpu")[op]
        out = case.call()
        torch.autograd.backward(out, torch.ones_like(out))
    return len(asked)


@pytest.mark.parametrize("op", OPS)
def test_each_pass_chooses_its_backend_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with momkd.gate_memory(0):
        assert questions(monkeypatch, op) == 2


def test_what_triton_kept_is_not_asked_about_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with momkd.gate_memory(1 << 30):
        assert questions(monkeypatch, "gated_attention_pool") == 1


@pytest.mark.parametrize("op", OPS)
def test_no_host_arithmetic_goes_through_triton(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cdiv", "next_power_of_2"):  # microseconds a call
        monkeypatch.setattr(triton, name, None)
    step(op)


@pytest.mark.parametrize("op", OPS)
def test_no_key_is_made_where_no_tiles_were_chosen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "key_of", None)
    step(op)


def test_the_first_call_finds_what_was_chosen_before(tmp_path: Path) -> None:
    x, sizes = torch.empty(32, 64), (64, 1, 16)
    first, second, *_ = tuning.POOL_ONE_HEAD.fitted(x, *sizes)
    for name, held in (("empty", {}), ("tuned", {tuning.key_of("op", x, sizes): list(second)})):
        (tmp_path / name).mkdir()
        text = json.dumps({"format": tuning.FORMAT, "tiles": held})
        (tmp_path / name / tuning.FILE).write_text(text)
    chosen = {}
    for name in ("empty", "tuned"):
        tuning.STORE.configure(tmp_path / name, None)
        chosen[name] = tuning.POOL_ONE_HEAD.choose("op", x, *sizes, run=print)
    assert chosen == {"empty": first, "tuned": second}
    timed: list[object] = []
    tuning.STORE.configure(tmp_path / "empty", lambda call: (timed.append(call), float(len(timed)))[1])
    assert tuning.POOL_ONE_HEAD.choose("op", x, *sizes, run=lambda tiles: None) == first
    assert len(timed) == len(tuning.POOL_ONE_HEAD.fitted(x, *sizes)), "asked for, all are timed"

"""How benchmarks measure: nothing on a GPU is timed before it has finished, and a wrong result is not timed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_training_step, cases, measure
from benchmarks.profile_step import Activity, summary

HOST_ONLY = {"bench_host_cost"}  # times the host on purpose
BENCHMARKS = [p for p in sorted(Path(measure.__file__).parent.glob("bench_*.py")) if p.stem not in HOST_ONLY]


class FakeDevice:
    """Stands in for torch.cuda: kernels that were launched take time only when they are waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []
        pending = [0.0]  # seconds of kernels that were launched
        self.log, self.pending = log, pending

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("event")

            def elapsed_time(self, end: Event) -> float:
                return 3.0

        def synchronize() -> None:
            log.append("synchronize")
            time.sleep(pending[0])
            pending[0] = 0.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"), raising=False)

    def launch(self) -> None:
        self.log.append("call")
        self.pending[0] += 0.02


class Benchmark:
    """pytest-benchmark's fixture, as far as `record` uses it."""

    seconds = 0.0

    def pedantic(self, call: Any, rounds: int) -> None:
        began = time.perf_counter()
        call()
        self.seconds = time.perf_counter() - began


def test_what_pytest_benchmark_times_ends_in_a_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    device, benchmark = FakeDevice(monkeypatch), Benchmark()
    measure.record(benchmark, device.launch, "cuda")
    assert device.log == ["call", "synchronize"]
    assert benchmark.seconds >= 0.02
    measure.record(benchmark, lambda: None, "cpu")
    assert device.log == ["call", "synchronize"]


def test_device_wall_and_host_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    timing = measure.timings({"call": device.launch}, "cuda", rounds=1, warmup=0)["call"]
    queued = ["synchronize", "call", "synchronize", "sleep", "event", "call", "event", "synchronize"]
    assert device.log == queued
    assert timing.device == pytest.approx(3e-3)
    assert timing.host < 0.02 <= timing.wall


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_that_may_use_a_gpu_end_in_record(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if '"cuda"' in text or "on_each_device" in text:
        assert "benchmark.pedantic(" not in text, "use benchmarks.measure.record, which waits for the device"
        assert "benchmark(" not in text.replace("pytest_benchmark(", "")


def test_rotating_takes_the_next_call_each_time() -> None:
    seen: list[int] = []
    call = measure.rotating([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(4):
        call()
    assert seen == [0, 1, 2, 0]


def case_of(scale: float = 1.0, *, half: bool = False, gradient: float = 1.0) -> cases.Case:
    """x², wrong by `scale`, with a gradient that is wrong by `gradient`."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if half else torch.float32
    x = torch.randn(1000).to(dtype).requires_grad_()

    def form() -> Tensor:
        y = (x * x * scale) * gradient
        return y + ((1 / gradient - 1) * y).detach() if gradient != 1 else y

    plain = (lambda: x * x) if half else None
    return cases.Case({"momkd": form}, (x,), lambda x: x * x, (1, 1), dtype, plain)


@pytest.mark.parametrize("half", [False, True])
def test_a_right_result_passes_and_a_wrong_one_is_refused(half: bool) -> None:
    assert cases.check(case_of(half=half)) < (1e-2 if half else 1e-6)
    with pytest.raises(AssertionError, match=r"the result is wrong by .*: no time is reported"):
        cases.check(case_of(1.02, half=half))
    with pytest.raises(AssertionError, match=r"gradient 1 is wrong by .*: no time is reported"):
        cases.check(case_of(half=half, gradient=1.02))


def test_busy_time_of_a_profile_counts_overlaps_once() -> None:
    done = [Activity("b", 2_000_000, 4_000_000), Activity("a", 0, 3_000_000), Activity("Memcpy", 8_000_000, 10_000_000)]
    got = summary(done, steps=2)
    assert got == {"launches a step": 1.0, "device ms a step": 3.0, "device busy share, profiled": 0.6}


def test_the_plain_codebook_computes_the_losses_of_vector_quantize_pytorch() -> None:
    pytest.importorskip("torch_geometric", reason="the peer needs PyG: pip install -e '.[peers]'")
    pytest.importorskip("vector_quantize_pytorch", reason="compared with vector-quantize-pytorch: '.[peers]'")
    from benchmarks.eager_momkd import PlainCodebook, released_codebook

    torch.manual_seed(0)
    theirs, ours = released_codebook(8, 5), PlainCodebook(8, 5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    z = torch.randn(40, 8)
    got, want = [], []
    for codebook, kept in ((ours, got), (theirs, want)):
        leaf = z.clone().requires_grad_()
        loss = codebook(leaf)
        loss.sum().backward()
        kept += [loss.detach().reshape(()), leaf.grad, codebook._codebook.embed.grad]
    for mine, other in zip(got, want, strict=True):
        assert cases.relative(mine, other) < 1e-6


def test_peak_memory_of_a_step_counts_its_gradients_every_time() -> None:
    x = torch.randn(10_000, 1000, requires_grad=True)
    step = measure.forward_and_backward(x.exp, (x,))
    peaks = [measure.peak_bytes(step) for _ in range(3)]
    assert min(peaks) >= 2 * x.nbytes  # the result, which backward needs, and the gradient
    assert len(set(peaks)) == 1


def test_a_training_step_has_a_peer_without_vector_quantize_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_geometric", reason="the peer needs PyG: pip install -e '.[peers]'")
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)  # an import of it fails
    monkeypatch.setattr(bench_training_step, "own_codebook", lambda: True)
    calls = bench_training_step.step_calls("cpu", [20, 30], width=32, genes=20)  # compares the losses
    assert list(calls) == ["momkd", "eager, own codebook"]
    for call in calls.values():
        call()

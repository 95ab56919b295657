"""How often Triton compiles a kernel: once for a model, whatever the batch. It compiles 1 and multiples of 16 apart."""

from __future__ import annotations

import pytest
import torch

from momkd import gpu
from tests import aot, aot_cases
from tests.aot import Job
from tests.aot_cases import CASES, Case

if reason := aot.unavailable():
    pytest.skip(reason, allow_module_level=True)

# Lengths of bags: neither rows nor bags 1 or a multiple of 16, both multiples, and one row in one bag.
BATCHES = [(0, 7, 70), (10,) * 16, (5, 0), (1,), (96, 0, 64), (16,)]


def batches(case: Case, monkeypatch: pytest.MonkeyPatch, lengths: list[tuple[int, ...]]) -> list[Job]:
    """The distinct compilations that these batches ask for."""
    launches = []
    for bags in lengths:
        monkeypatch.setattr(aot_cases, "LENGTHS", bags)
        monkeypatch.setattr(aot_cases, "ROWS", sum(bags))
        launches += [(case, launch) for launch in aot.record(case, "sm_90")]
    return aot.distinct(launches, ["sm_90"])


def arguments(jobs: list[Job]) -> dict[str, set[str]]:
    """By kernel, the arguments that its compilations differ in."""
    found: dict[str, set[str]] = {}
    for job in jobs:
        others = [other for other in jobs if other.fn is job.fn]
        names = job.fn.arg_names
        for i, name in enumerate(names):
            if len({f"{j.signature.get(name)} {j.constants.get((i,))} {j.attributes.get((i,))}" for j in others}) > 1:
                found.setdefault(job.fn.__name__, set()).add(name)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batches_of_other_sizes_share_their_kernels(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    one = batches(case, monkeypatch, BATCHES[:1])
    every = batches(case, monkeypatch, BATCHES)
    assert len(every) == len(one), arguments(every)


def test_chunks_of_rows_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate goes over rows in chunks where it keeps no products, the last of which is of any length."""
    case = next(case for case in CASES if case.op == "gated_attention_pool")
    one = batches(case, monkeypatch, BATCHES[:1])
    monkeypatch.setattr(gpu.kernels("gated_attention_pool"), "WORKSPACE", 1)
    chunks = batches(case, monkeypatch, [(1500, 629)])
    assert len(chunks) == len(one), arguments(chunks)


@pytest.mark.parametrize("op", ["gated_attention_pool", "graph_attention"])
def test_rates_of_dropout_share_their_kernels(op: str) -> None:
    case = next(case for case in CASES if case.op == op and case.sizes.get("dropout"))
    launches = aot.record(case, "sm_90")
    others = list(launches)
    for threshold in (1, 16384, 19661):
        for launch in launches:
            given = zip(launch.kernel.arg_names, launch.args, strict=False)
            others.append(launch._replace(args=tuple(threshold if name == "threshold" else a for name, a in given)))
    one, every = (aot.distinct([(case, launch) for launch in some], ["sm_90"]) for some in (launches, others))
    assert len(every) == len(one), arguments(every)


def test_a_kernel_of_other_widths_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above count does change where something is specialised."""
    wide, narrow = (Case("attention_pool", torch.bfloat16, {"L": width, "H": 1}) for width in (1024, 1025))
    jobs = batches(wide, monkeypatch, BATCHES[:1]) + batches(narrow, monkeypatch, BATCHES[:1])
    assert "L" in arguments(jobs)["attention_pool_one_head_kernel"]

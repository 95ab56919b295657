"""The kernels' machine code, compiled ahead of time: nothing spills, products use tensor cores, rows are read wide.

`python -m tests.aot` shows the numbers that these tests judge.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from momkd import gpu
from tests import aot
from tests.aot import Report
from tests.aot_cases import CASES, HALF, OPS, SINGLE, Case

if reason := aot.unavailable():
    pytest.skip(reason, allow_module_level=True)

# Kernels that hold a product in every case of an op, and those that don't with a single head, which is summed.
PRODUCTS = {
    "attention_pool": (),
    "gated_attention_pool": (),  # the gate's products are the library's
    "memory_similarity": ("memory_similarity_fwd_kernel",),
    "memory_guided_pool": (),
    "soft_angle_loss": ("soft_angle_loss_fwd_kernel", "soft_angle_loss_bwd_kernel"),
    "graph_attention": (),
}
POOLING = ("attention_pool_fwd_kernel", "pool_backward_kernel")
PRODUCTS_OF_HEADS = {"attention_pool": POOLING, "gated_attention_pool": POOLING}
GATE = ("gate_scores_kernel", "gate_gradient_kernel")
# Kernels that read the rows of a bag, or their products with the gate, from end to end.
STREAMS = {
    "attention_pool": (*POOLING, "attention_pool_one_head_kernel"),
    "gated_attention_pool": (*POOLING, "attention_pool_one_head_kernel", *GATE),
    "memory_guided_pool": ("pool_backward_kernel",),
    "graph_attention": (
        "graph_attention_fwd_kernel",
        "graph_attention_bwd_target_kernel",
        "graph_attention_bwd_source_kernel",
    ),
}
KNOWN: dict[tuple[str, ...], Report] = {}  # of these kernels as they are; those that are cut badly don't come here
SOME_OR_ALL = [pytest.param(False, id="default"), pytest.param(True, id="all", marks=pytest.mark.slow)]


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if aot.present([case for case in CASES if case.op == name])[1]:
        pytest.skip(f"there is no momkd.kernels.{name} yet")
    return name


@pytest.fixture(params=aot.CHIPS)
def arch(request: pytest.FixtureRequest) -> str:
    chip: str = request.param
    if reason := aot.left_out(chip):
        pytest.skip(reason)
    return chip


@cache
def compiled(op: str, arch: str, every: bool, candidates: int = 1) -> tuple[Report, ...]:
    cases = [case for case in CASES if case.op == op and (every or case.default)]
    return tuple(aot.compile_all(cases, [arch], candidates=candidates, known=KNOWN))


def name(report: Report) -> str:
    return f"{report.kernel} ({report.case}, {report.arch})"


def unfit(reports: Iterable[Report]) -> list[str]:
    """Kernels that could not be compiled or could not be started."""
    return [f"{name(r)}: {aot.problem(r)}" for r in reports if aot.problem(r)]


def spilled(reports: Iterable[Report]) -> list[str]:
    return [f"{name(r)}: {r.spills} bytes spilled, a stack of {r.stack}" for r in reports if r.spills or r.stack]


def off_tensor_cores(reports: Iterable[Report]) -> list[str]:
    """Products of 16-bit values on sm_90: 64 rows or more are HGMMA's, fewer at least HMMA's."""
    found = []
    for r in reports:
        rows = [m for m, _, _, dtype in r.dots if dtype in ("bf16", "f16")]
        families = r.tensor_families()
        if rows and not families:
            found.append(f"{name(r)}: a product of {max(rows)} rows and no tensor-core instruction")
        elif rows and max(rows) >= 64 and "HGMMA" not in families:
            found.append(f"{name(r)}: a product of {max(rows)} rows and no HGMMA, only {families}")
    return found


def narrow(report: Report) -> str:
    """What is wrong where fewer 128-bit loads were found than one tile of rows takes of each thread."""
    case, constants = report.cases[0], report.constants
    if report.kernel in GATE:
        columns = constants["GATE"] * (1 + constants["GATED"])
    else:
        columns = constants["COLUMNS"]
    tile = constants.get("STEP", constants["BLOCK"]) * columns * case.dtype.itemsize
    needed = max(1, tile // (32 * report.warps * 16))
    wide = sum(count for bits, count in report.loads.items() if bits >= 128)
    return "" if wide >= needed else f"{name(report)}: a tile takes {needed} loads of 128 bits, found {report.loads}"


def aligned(report: Report) -> bool:
    return report.cases[0].sizes["D" if report.kernel in GATE else "L"] % 16 == 0


@pytest.mark.parametrize("every", SOME_OR_ALL)
def test_compiles_and_fits(op: str, arch: str, every: bool) -> None:
    reports = compiled(op, arch, every)
    assert reports
    assert unfit(reports) == []


@pytest.mark.parametrize("every", SOME_OR_ALL)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_no_default_spills(op: str, arch: str, every: bool) -> None:
    assert spilled(compiled(op, arch, every)) == []


@pytest.mark.slow
@pytest.mark.parametrize("every", SOME_OR_ALL)
def test_no_candidate_of_tuning_spills_or_fails(op: str, every: bool) -> None:
    most = most_candidates()
    if op == "graph_attention":
        pytest.skip("graph_attention is cut in one way: there is nothing to tune")
    reports = compiled(op, "sm_90", every, candidates=most)
    assert len(reports) > len(compiled(op, "sm_90", every))
    assert unfit(reports) == []
    assert spilled(reports) == []


def most_candidates() -> int:
    from momkd.kernels import _tuning

    tables = [table for table in vars(_tuning).values() if isinstance(table, _tuning.Candidates)]
    assert len(tables) == 8
    return max(len(given) for table in tables for given in table)


@pytest.mark.parametrize("every", SOME_OR_ALL)
def test_products_use_tensor_cores(op: str, every: bool) -> None:
    reports = compiled(op, "sm_90", every)
    assert off_tensor_cores(reports) == []
    # Names hold the shape of the product, rows × columns × depth.
    names = [name for r in reports for name in r.tensor if name.startswith("HGMMA")]
    assert [name for name in names if not re.fullmatch(r"HGMMA\.64x\d+x(8|16|32)\..+", name)] == []
    half = [r for r in reports if r.cases[0].dtype != SINGLE]
    expected = PRODUCTS[op]
    if several := [r for r in half if r.cases[0].sizes.get("H", 1) > 1]:
        expected += PRODUCTS_OF_HEADS.get(op, ())
    for kernel in expected:
        of_kernel = [r for r in (several if kernel in PRODUCTS_OF_HEADS.get(op, ()) else half) if r.kernel == kernel]
        assert of_kernel, f"{kernel} was not compiled"
        assert [name(r) for r in of_kernel if not r.tensor] == []


@pytest.mark.parametrize("every", SOME_OR_ALL)
def test_rows_are_read_128_bits_at_a_time(op: str, every: bool) -> None:
    reports = [r for r in compiled(op, "sm_90", every) if r.kernel in STREAMS.get(op, ())]
    # Where only the gradient of the values is asked for, they are not read.
    reports = [r for r in reports if aligned(r) and r.constants.get("NEED_SCORES", True)]
    assert {r.kernel for r in reports} == set(STREAMS.get(op, ()))
    assert [trouble for r in reports if (trouble := narrow(r))] == []


def widest(reports: Iterable[Report], kernel: str) -> int:
    return min(max(r.loads) for r in reports if r.kernel == kernel)


@pytest.mark.parametrize(("dtype", "bits"), [(HALF, 64), (SINGLE, 128)])
def test_rows_of_500_columns_are_read_four_at_a_time(dtype: torch.dtype, bits: int) -> None:
    """500 is no multiple of 16, of which alone Triton knows, but one of 4."""
    case = Case("attention_pool", dtype, {"L": 500, "H": 4})
    for arch in ("sm_80", "sm_90"):
        reports = aot.compile_all([case], [arch])
        for kernel in POOLING:
            assert widest(reports, kernel) >= bits
            (r,) = (r for r in reports if r.kernel == kernel)
            assert r.loads.get(16, 0) == 0
            assert r.loads[bits] * bits * 32 * r.warps >= r.constants["BLOCK"] * r.constants["COLUMNS"] * 8


def test_every_switch_of_torch_for_tf32_is_followed(
    tf32_switches: dict[str, Callable[[bool], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the newer one was set, torch raises where the older one is read."""
    precision = gpu.kernels("_common").precision
    assert len(tf32_switches) in (2, 4)
    for switch in tf32_switches.values():
        for allowed, expected in ((False, "ieee"), (True, "tf32"), (False, "ieee")):
            switch(allowed)
            assert precision(SINGLE) == expected
            assert precision(HALF) == "tf32"
    for allowed, expected in ((False, "ieee"), (True, "tf32")):  # a torch without the newer switch
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert precision(SINGLE) == expected


def test_tf32_is_done_by_tensor_cores_and_ieee_is_not(tf32_switches: dict[str, Callable[[bool], None]]) -> None:
    case = Case("attention_pool", SINGLE, {"L": 1024, "H": 4})
    for allowed in (False, True):
        tf32_switches["older"](allowed)
        reports = aot.compile_all([case], ["sm_90"])
        for kernel in POOLING:
            assert [bool(r.tensor) for r in reports if r.kernel == kernel] == [allowed]


# --- what the tests above judge shows in kernels that are cut badly on purpose

BAD = Case("attention_pool", HALF, {"L": 1024, "H": 4})
SIMILARITY = Case("memory_similarity", HALF, {"C": 4, "K": 256, "S": 512, "reduce": "lse"})  # products of 64 rows


def test_tiles_too_large_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from momkd.kernels._tuning import Candidates, Tiles

    tiles = Tiles(256, 256)
    for module, table in (("attention_pool", "POOL"), ("segment_pool", "POOL_BACKWARD")):
        monkeypatch.setattr(gpu.kernels(module), table, Candidates(half=[tiles], single=[tiles]))
    reports = aot.compile_all([BAD], ["sm_90"])
    assert not any(r.error for r in reports)
    assert spilled(reports)
    assert unfit(reports)


def test_too_few_warps_for_hgmma_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [r._replace(options=r.options | {"num_warps": 2}) for r in aot.record(SIMILARITY, "sm_90")]
    monkeypatch.setattr(aot, "record", lambda *_: launches[:1])
    assert off_tensor_cores(aot.compile_all([SIMILARITY], ["sm_90"]))


@pytest.mark.parametrize("cached", [False, True])
def test_serialised_matrix_instructions_are_seen(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fences, ptxas must wait by itself for matrix instructions, and says so."""
    from triton.backends.nvidia.compiler import CUDABackend

    make_cubin, cubins = CUDABackend.make_cubin, list[bytes]()

    def without_fences(self: Any, ptx: str, *args: Any) -> bytes:
        cubins.append(make_cubin(self, ptx.replace("wgmma.fence.sync.aligned;", ""), *args))
        return cubins[-1]

    launches = [r for r in aot.record(SIMILARITY, "sm_90") if r.kernel.__name__ == "memory_similarity_fwd_kernel"]
    monkeypatch.setattr(aot, "record", lambda *_: launches)
    assert unfit(aot.compile_all([SIMILARITY], ["sm_90"])) == []  # from now on in Triton's cache
    monkeypatch.setattr(CUDABackend, "make_cubin", without_fences)
    with contextlib.nullcontext() if cached else always_compiled():
        reports = aot.compile_all([SIMILARITY], ["sm_90"])
    assert len(cubins) == 1
    (trouble,) = unfit(reports)
    assert "ptxas: (C75" in trouble


@contextlib.contextmanager
def always_compiled() -> Iterator[None]:
    """Inside, Triton doesn't look into its cache, and keeps nothing in it."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


def test_narrow_loads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_that_begin_anywhere(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[0], x.shape[1] + 1, dtype=x.dtype)[:, :-1]

    monkeypatch.setattr(gpu.kernels("attention_pool"), "rows_of", rows_that_begin_anywhere)
    reports = aot.compile_all([BAD], ["sm_90"])
    assert {r.kernel for r in reports if "values" in r.parameters and narrow(r)} == set(POOLING)

"""The CUDA kernels' machine code: it compiles without a warning, nothing spills, rows are read wide; NVRTC takes it.

`python -m tests.cuda_table` shows the numbers that these tests judge.
"""

from __future__ import annotations

import re

import pytest

from momkd.cuda import ema, nvrtc
from tests import aot, cuda_table
from tests.aot import Report

needs_nvcc = pytest.mark.skipif(bool(cuda_table.unavailable()), reason=cuda_table.unavailable() or "-")
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(params=[pytest.param(a, marks=[] if a == "sm_90" else [pytest.mark.slow]) for a in cuda_table.ARCHS])
def compiled(request: pytest.FixtureRequest) -> list[Report]:
    return cuda_table.reports([request.param])


@needs_nvcc
def test_machine_code(compiled: list[Report]) -> None:
    assert {r.kernel for r in compiled} == set(cuda_table.KERNELS)
    for r in compiled:
        assert not aot.problem(r), r.kernel
        assert r.spills == r.stack == 0, f"{r.kernel}: {r.spills} bytes spilled, a stack of {r.stack}"
        assert r.registers * 32 * r.warps <= REGISTERS
        assert r.shared <= max(ema.MOST_SHARED, ema.REDUCE_SHARED)
        if "rows" in r.kernel:
            assert r.loads.get(128), f"{r.kernel}: no load of 128 bits, {r.loads}"
            blocks = 4 if "shared" in r.kernel else 3
            assert r.registers * 32 * r.warps * blocks <= REGISTERS, f"{r.kernel}: {blocks} blocks on a multiprocessor"
        if "runs" in r.kernel:
            assert r.loads.get(128 if "float32" in r.kernel else 64, 0) >= 4, (
                f"{r.kernel}: four rows in flight, {r.loads}"
            )
        if "reduce" in r.kernel:
            assert r.loads[128] >= 8
            assert r.registers >= 64, "eight loads in flight"


def test_every_kernel_that_is_planned_is_built() -> None:
    source = (cuda_table.ROOT / "csrc" / "cuda" / "ema_scatter.cuh").read_text()
    defined = set(re.findall(r"\b(ema_\w+_kernel)\b(?=\(const|, )", source))
    assert defined == set(cuda_table.KERNELS)
    assert len(defined) == 12


def test_the_sources_need_no_headers() -> None:
    """NVRTC has none but those that it is given."""
    folder = nvrtc.sources()
    for name in ("cuda/ema_scatter.cuh", *nvrtc.HEADERS):
        included = re.findall(r'#\s*include\s*([<"].*?[>"])', (folder / name).read_text())
        assert set(included) <= {f'"{header}"' for header in nvrtc.HEADERS}


@pytest.mark.parametrize("arch", cuda_table.ARCHS)
def test_nvrtc(arch: str) -> None:
    library, reason = nvrtc.library()
    if library is None:
        pytest.skip(reason)
    code = nvrtc.compile(int(arch.removeprefix("sm_")))
    assert code.startswith(b"\x7fELF")
    for kernel in cuda_table.KERNELS:  # its machine code is read as nvcc writes it: older tools can't read NVRTC's
        assert kernel.encode() in code


def test_why_nvrtc_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "library", lambda: (None, "CuPy is not installed"))
    with pytest.raises(RuntimeError, match="CuPy is not installed"):
        nvrtc.compile(90)

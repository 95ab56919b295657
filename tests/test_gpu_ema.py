"""On an NVIDIA GPU: the CUDA kernels of the EMA scatter by nvcc and by NVRTC, against float64 and each other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from momkd import cuda
from momkd import functional as F
from momkd.cuda import ema, nvrtc
from momkd.dispatch import can_run, choose
from tests.compare import FORWARD, assert_close
from tests.ops.test_ema_cuda import SHAPES, case, check

ABLE, REASON = can_run("ema_scatter_", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ABLE, reason=REASON)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEMORIES = [(2, 16), (5, 500)]  # sums in each block, and rows sorted by slot
LARGE = {
    "a slide": (30_001, 2, 16, 64),
    "many slides": (400_003, 2, 16, 64),
    "wide": (20_000, 4, 40, 512),
    "many slots": (9_000, 3, 1024, 96),
}


@pytest.fixture(params=["nvcc", "nvrtc"], autouse=True)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which compiler made the kernels."""
    module, reason = cuda.launcher(torch.cuda.get_device_capability())
    if request.param == "nvcc" and module is nvrtc:
        pytest.skip(f"momkd._cuda is not there or can't run here: the kernels start {reason}")
    if request.param == "nvrtc":
        if nvrtc.library()[0] is None:
            pytest.skip(nvrtc.library()[1])
        monkeypatch.setattr(cuda, "extension", lambda: (None, "not to be used in this test"))
    return str(request.param)


@pytest.fixture(autouse=True)
def poisoned_device() -> Iterator[None]:
    """What nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(n: int, c: int, k: int, s: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    memory, z, row_class = case(n, c, k, s, dtype)
    return memory.cuda(), z.cuda(), row_class.cuda()


def checked_on_cpu(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` with the kernels on the GPU and the float64 reference on the CPU."""
    sums, mass = F.ema_accumulate(memory, z, row_class, weights=weights, backend="cuda")
    slots = F.ema_scatter_(
        memory.clone(), torch.zeros_like(mass), z, row_class, weights=weights, momentum=0.9, backend="cuda"
    )
    monkeypatch.setattr(ema, "ema_accumulate", lambda *_: (sums.cpu(), mass.cpu(), slots.cpu()))
    check(memory.cpu(), z.cpu(), row_class.cpu(), weights.cpu())


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, z, row_class = on_gpu(*(SHAPES | LARGE)[shape], dtype)
    weights = torch.rand(len(z), device="cuda")
    z[::97], z[5::1001, 0], weights[3::50] = 0, torch.nan, -1
    checked_on_cpu(memory, z, row_class, weights, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_on_the_cpu_in_emulation(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all bits: a GPU fuses products and sums. The slots are the same and the rest is close."""
    from tests import emulation

    memory, z, row_class = on_gpu(900, 2, 16, 64, dtype)
    here = ema.ema_accumulate(memory, z, row_class, None, True)
    emulation.install(monkeypatch)
    there = ema.ema_accumulate(memory.cpu(), z.cpu(), row_class.cpu(), None, True)
    assert torch.equal(here[2].cpu(), there[2])
    assert torch.equal(here[1].cpu(), there[1])
    assert_close(here[0].cpu(), there[0], FORWARD)


def scatter(memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
    moved, usage = memory.clone(), torch.zeros(memory.shape[:2], device="cuda")
    return F.ema_scatter_(moved, usage, z, row_class, weights=weights, momentum=0.9), moved, usage


@pytest.mark.parametrize("memory_size", MEMORIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_each_time(dtype: torch.dtype, memory_size: tuple[int, int]) -> None:
    memory, z, row_class = on_gpu(700_001, *memory_size, 64, dtype)
    weights = torch.rand(len(z), device="cuda")
    assert choose("ema_scatter_", None, (memory, z)) == "cuda"
    first = scatter(memory, z, row_class, weights)
    for _ in range(5):
        for a, b in zip(first, scatter(memory, z, row_class, weights), strict=True):
            assert torch.equal(a, b)


def test_both_compilers_give_the_same_bits(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "nvcc":
        pytest.skip("compared in the other half")
    monkeypatch.undo()
    if cuda.launcher(torch.cuda.get_device_capability())[0] is nvrtc:
        pytest.skip("momkd._cuda is not there or can't run here")
    for dtype in DTYPES:
        memory, z, row_class = on_gpu(50_001, 3, 16, 64, dtype)
        want = scatter(memory, z, row_class)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "extension", lambda: (None, "not to be used here"))
            got = scatter(memory, z, row_class)
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b)


def test_the_halves_are_the_whole() -> None:
    memory, z, row_class = on_gpu(100_000, 3, 40, 96)
    _, moved, usage = scatter(memory, z, row_class)
    sums, mass = F.ema_accumulate(memory, z, row_class)
    other, used = memory.clone(), torch.zeros_like(usage)
    F.ema_apply_(other, used, sums, mass, momentum=0.9)
    assert torch.equal(other, moved)
    assert torch.equal(used, usage)


def test_a_million_rows_of_one_slot() -> None:
    """A large memory of which one slot takes all rows: shared out evenly, and added up in float64."""
    memory, z, row_class = on_gpu(1_000_000, 64, 1024, 64)
    assert ema.plan(len(z), *memory.shape, 4).by_slot
    z, memory[7] = z.abs(), torch.rand(1, 64, device="cuda")
    row_class.fill_(7)
    sums, mass = F.ema_accumulate(memory, z, row_class, backend="cuda")
    assert_close(sums[7, 0], torch.nn.functional.normalize(z.double()).sum(0), 1e-6)
    assert float(mass[7, 0]) == float(mass.sum()) == len(z)
    assert not sums.flatten(0, 1)[torch.arange(64 * 1024, device="cuda") != 7 * 1024].any()


def test_untouched_slots_keep_their_bits() -> None:
    memory, z, row_class = on_gpu(40, 2, 500, 24)
    memory *= 1.5
    slots, moved, _ = scatter(memory, z, row_class)
    touched = torch.zeros(2, 500, dtype=torch.bool, device="cuda")
    counted = slots >= 0
    touched[row_class[counted], slots[counted].long()] = True
    assert torch.equal(moved[~touched].view(torch.int32), memory[~touched].view(torch.int32))


def test_no_rows() -> None:
    memory, z, row_class = on_gpu(0, 2, 16, 64)
    slots, moved, usage = scatter(memory, z, row_class)
    assert slots.shape == (0,)
    assert torch.equal(moved, memory)
    assert not usage.any()


def test_more_than_two_to_the_31_elements() -> None:
    rows = 2**31 // 64 + 1000
    if torch.cuda.mem_get_info()[0] < 3 * rows * 64 * 2:
        pytest.skip("not enough memory on this GPU")
    memory = on_gpu(1, 2, 16, 64)[0]
    z = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
    row_class = torch.randint(0, 2, (rows,), device="cuda")
    slots, _, usage = scatter(memory, z, row_class)
    tail, _, _ = scatter(memory, z[-2000:], row_class[-2000:])
    assert torch.equal(slots[-2000:], tail)
    assert float(usage.double().sum()) == pytest.approx(0.1 * rows, rel=1e-5)


@pytest.mark.parametrize("memory_size", MEMORIES)
def test_nothing_waits_for_the_device(memory_size: tuple[int, int]) -> None:
    memory, z, row_class = on_gpu(5000, *memory_size, 64)
    scatter(memory, z, row_class)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scatter(memory, z, row_class, torch.rand(len(z), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_the_current_stream() -> None:
    """Rows that another stream is still writing are waited for by stream order alone."""
    memory, z, row_class = on_gpu(200_000, 2, 16, 64)
    want = scatter(memory, z, row_class)
    torch.cuda.synchronize()
    late = torch.full_like(z, torch.nan)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(z)
        got = scatter(memory, late, row_class)
    stream.synchronize()
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


def test_in_new_threads() -> None:
    """A new thread has no context of CUDA's driver yet; the kernels are loaded by whoever comes first."""
    memory, z, row_class = on_gpu(30_000, 2, 16, 64)
    for known in (nvrtc._module, nvrtc._function):
        known.cache_clear()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        results = [future.result() for future in [pool.submit(scatter, memory, z, row_class) for _ in range(8)]]
    torch.cuda.synchronize()
    for result in results:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("memory_size", MEMORIES)
def test_captured_in_a_graph(memory_size: tuple[int, int]) -> None:
    memory, z, row_class = on_gpu(60_000, *memory_size, 64, torch.bfloat16)
    usage = torch.zeros(memory_size, device="cuda")
    scatter(memory, z, row_class)
    wanted, used = memory.clone(), usage.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = F.ema_scatter_(memory, usage, z, row_class, momentum=0.9)
    for _ in range(3):
        z.copy_(torch.randn_like(z))
        graph.replay()
        assert torch.equal(F.ema_scatter_(wanted, used, z, row_class, momentum=0.9), slots)
        assert torch.equal(memory, wanted)
        assert torch.equal(usage, used)


def test_an_error_of_cuda_is_raised(by: str) -> None:
    memory, z, row_class = on_gpu(100, 2, 16, 64)
    with pytest.raises(Exception, match=r"shared memory|invalid|INVALID"):
        cuda.start("ema_rows_float32_shared_kernel", bytes(ema.TASK_BYTES), 1, 128, 1 << 20, memory.device)
    scatter(memory, z, row_class)  # and the next call is well
    torch.cuda.synchronize()


def test_workspace_is_a_hundredth_of_the_rows() -> None:
    memory, z, row_class = on_gpu(2_000_000, 2, 16, 64)
    scatter(memory, z, row_class)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    F.ema_scatter_(memory, torch.zeros(2, 16, device="cuda"), z, row_class, momentum=0.9)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * z.nbytes

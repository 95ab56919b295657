"""The CUDA kernels of the EMA scatter, thread by thread on the CPU: every way in which launches are cut, adversarial
rows, and results that don't depend on the order in which threads and blocks run.

`tests/ops/test_ema_scatter.py` runs them too, through the public functions; `tests/test_gpu_ema.py` on a GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from momkd import cuda, reference
from momkd.cuda import ema
from tests import emulation
from tests.compare import FORWARD, HALVES, assert_close

pytestmark = pytest.mark.usefixtures("poisoned")
LIMITS = [(64, 1024, 512), (64, 1, 1), (1, 1024, 1), (1, 1, 512), (2, 16, 64), (3, 7, 65), (5, 33, 100), (64, 16, 96)]


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> emulation.Emulator:
    return emulation.install(monkeypatch)


def case(n: int, c: int, k: int, s: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """memory, rows and classes; −1 among them."""
    memory = torch.nn.functional.normalize(torch.randn(c, k, s), dim=-1)
    return memory, torch.randn(n, s).to(dtype), torch.randint(-1, c, (n,))


def check(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None = None, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Against the float64 reference; where two slots are equally near within float32, either will do."""
    sums, mass, slots = ema.ema_accumulate(memory, z, row_class, weights, normalize)
    known = torch.where(row_class < len(memory), row_class, -1).clamp_min(-1)  # on the CPU others are an error
    _, _, nearest = reference.ema_accumulate(memory.double(), z.double(), known, weights, normalize)
    assert torch.equal(slots < 0, nearest < 0)
    valid = slots >= 0
    unit = torch.nn.functional.normalize(z[valid].double(), dim=1, eps=1e-300)
    bank = torch.nn.functional.normalize(memory.double(), dim=-1, eps=1e-12)[row_class[valid]]
    cosines = torch.einsum("ns,nks->nk", unit, bank).nan_to_num(nan=-2.0)
    chosen = cosines.gather(1, slots[valid, None].long())[:, 0]
    assert (chosen >= cosines.amax(1) - 2e-6).all()
    clear = (cosines > cosines.amax(1, keepdim=True) - 1e-5).sum(1) == 1
    assert torch.equal(slots[valid][clear], nearest[valid][clear])

    rows = torch.where(valid[:, None], z.double(), 0.0)
    if normalize:
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    w = torch.ones(len(z), dtype=torch.float64) if weights is None else weights.double()
    w = torch.where(valid & w.isfinite() & (w > 0), w, 0.0)
    cells = row_class.clamp(0, len(memory) - 1) * memory.shape[1] + slots.clamp_min(0)
    want = torch.zeros(memory.shape, dtype=torch.float64).flatten(0, 1).index_add_(0, cells, w[:, None] * rows)
    assert_close(sums.flatten(0, 1), want, FORWARD, "sums")
    assert_close(
        mass.flatten(), torch.zeros(mass.numel(), dtype=torch.float64).index_add_(0, cells, w), FORWARD, "mass"
    )
    return sums, mass, slots


SHAPES = {
    "four lanes a quad": (260, 2, 16, 64),
    "eight lanes, three classes": (150, 3, 16, 128),
    "sixteen lanes": (70, 2, 33, 256),
    "thirty-two lanes, sums out of shared memory": (40, 2, 16, 512),
    "slots out of shared memory": (130, 2, 300, 64),
    "many classes, more slots than bins": (60, 64, 20, 4),
    "one slot": (200, 1, 1, 64),
    "one column": (300, 2, 5, 1),
    "more bins than threads": (260, 9, 31, 12),
    "as many classes as may be": (330, 64, 3, 20),
    "the most slots and columns": (9, 1, 1024, 512),
    "sorted by slot": (1100, 2, 130, 70),
    "sorted by slot, slots in shared memory": (1100, 9, 31, 12),
    "sorted by slot, most slots empty": (40, 33, 64, 8),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_shapes(emulator: emulation.Emulator, shape: str, dtype: torch.dtype) -> None:
    n, c, k, s = SHAPES[shape]
    check(*case(n, c, k, s, dtype), weights=torch.rand(n))


def test_the_shapes_cover_the_plans() -> None:
    cut = [ema.plan(*sizes, item) for sizes in SHAPES.values() for item in (2, 4)]
    assert {p.slot_lanes * p.column_lanes for p in cut} == {4, 8, 16, 32}
    assert {p.in_shared for p in cut} == {True, False}
    assert {p.stages for p in cut} == {1, 2}
    assert {p.slot_lanes for p in cut} >= {1, 2, 4, 8, 16}
    assert {(p.by_slot, p.in_shared) for p in cut} == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize(("c", "k", "s", "by_slot"), [(2, 16, 64, 0), (3, 50, 9, 0), (4, 40, 200, 0), (4, 40, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_schedule_changes_a_bit(
    emulator: emulation.Emulator,
    c: int,
    k: int,
    s: int,
    by_slot: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ema, "BLOCKS", 3)
    if by_slot:
        monkeypatch.setattr(ema, "LONGEST", 0)
    memory, z, row_class = case(900, c, k, s, dtype)
    z[::7], z[3::50] = 0, torch.nan
    usage, weights = torch.rand(c, k), torch.rand(900)
    results = []
    for emulator.schedule in (emulation.FORWARD, emulation.REVERSE, *emulation.SHUFFLED):
        moved, used = memory.clone(), usage.clone()
        results.append((ema.ema_scatter_(moved, used, z, row_class, weights, 0.9, True), moved, used))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    kernels = ["bank", "rows", *["runs"] * by_slot, "reduce"]
    assert [name.split("_")[1] for name in emulator.started] == kernels * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_of_any_size(emulator: emulation.Emulator, dtype: torch.dtype, normalize: bool) -> None:
    """Squared lengths leave float32 on both sides. One class at a time: sums of huge rows would hide tiny ones."""
    most = 4 if dtype == torch.float16 else 36
    for power in (-most, -most // 2 - 1, -12, 12, most // 2 + 1, most):
        memory, z, _ = case(60, 1, 9, 20)
        z = (z * 10.0**power).to(dtype)
        if not z.isfinite().all():
            continue
        z[5] = 0
        check(memory, z, torch.zeros(60, dtype=torch.int64), torch.rand(60), normalize)


def test_the_largest_row(emulator: emulation.Emulator) -> None:
    memory, z, row_class = case(3, 1, 4, 24)
    z[:], row_class[:] = 3e38 * z.sign(), 0
    sums, mass, _ = check(memory, z, row_class)
    assert sums.isfinite().all()
    assert float(mass.sum()) == 3


def test_rows_and_classes_that_do_not_count(emulator: emulation.Emulator) -> None:
    memory, z, row_class = case(400, 3, 12, 37)
    z[0::11, 3], z[1::11, 36], z[2::11, 0] = torch.nan, torch.inf, -torch.inf
    row_class[3::11] = torch.tensor([3, -2, 2**62, -(2**62), 2**32, 2**32 + 1]).repeat(7)[: len(row_class[3::11])]
    row_class[4::11] = -1
    _, mass, slots = check(memory, z, row_class)
    assert not (slots[3::11] >= 0).any()
    assert int(mass.sum()) == int((slots >= 0).sum())


def test_long_sums_stay_accurate(emulator: emulation.Emulator) -> None:
    """Nearly the same row again and again, into one slot."""
    z = torch.rand(20_000, 4) + 1
    sums, mass, _ = ema.ema_accumulate(
        torch.ones(1, 1, 4), z, torch.zeros(20_000).long(), torch.full((20_000,), 0.1), False
    )
    assert_close(sums[0, 0], (torch.tensor(0.1).double() * z.double()).sum(0), 1e-6)
    assert_close(mass, torch.full((1, 1), 20_000.0).double() * torch.tensor(0.1).double(), 1e-6)


def test_a_mean_that_is_not_finite_keeps_the_slot(emulator: emulation.Emulator) -> None:
    memory, usage = torch.nn.functional.normalize(torch.randn(1, 3, 5), dim=-1), torch.zeros(1, 3)
    sums, mass, before = torch.randn(1, 3, 5), torch.ones(1, 3), memory.clone()
    sums[0, 0, 2], sums[0, 1, 4] = torch.nan, torch.inf
    ema.ema_apply_(memory, usage, sums, mass, 0.5)
    assert torch.equal(memory[0, :2], before[0, :2])
    assert not torch.equal(memory[0, 2], before[0, 2])
    assert torch.equal(usage, torch.full((1, 3), 0.5))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("columns", "dtype"), [(64, torch.float32), (24, torch.float32), (24, torch.bfloat16)])
def test_rows_that_begin_anywhere(emulator: emulation.Emulator, offset: int, columns: int, dtype: torch.dtype) -> None:
    memory, wide, row_class = case(150, 2, 16, columns, dtype)[0], torch.randn(300, columns + 8).to(dtype), None
    row_class = torch.randint(0, 2, (150,))
    check(memory, wide[::2, offset : columns + offset], row_class)


# --- rows sorted by slot


@pytest.fixture
def sorting(emulator: emulation.Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Rows are sorted by slot for every memory of more than a few."""
    monkeypatch.setattr(ema, "LONGEST", 0)
    yield monkeypatch
    assert any("runs" in name for name in emulator.started)


@pytest.mark.parametrize("run", [1, 4, 7, 128])
@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_runs_of_any_length(sorting: pytest.MonkeyPatch, run: int, n: int) -> None:
    """Slots that begin and end anywhere in a run, with it, or with the rows."""
    sorting.setattr(ema, "RUN", run)
    memory, z, row_class = case(n, 3, 14, 10)
    row_class[0] = 1
    check(memory, z, row_class, torch.rand(n))
    check(memory[:, :1].expand(3, 14, 10).contiguous(), z, row_class)  # the first slot of each class takes all
    check(memory, z, torch.zeros(n, dtype=torch.int64), torch.rand(n))
    check(memory, z, torch.full((n,), -1))


@pytest.mark.parametrize("columns", [1, 3, 5, 130, 512])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_runs_of_any_width(sorting: pytest.MonkeyPatch, columns: int, dtype: torch.dtype) -> None:
    sorting.setattr(ema, "RUN", 16)
    check(*case(150, 3, 12, columns, dtype), weights=torch.rand(150))
    wide = torch.randn(150, columns + 8).to(dtype)
    check(case(1, 3, 12, columns)[0], wide[:, 1 : columns + 1], torch.randint(-1, 3, (150,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_sorted_rows_of_any_size(sorting: pytest.MonkeyPatch, dtype: torch.dtype, normalize: bool) -> None:
    """Also rows that bring nothing: they may not be told from others by their place alone."""
    for power in (-44, -36, -20, -4, 4, 18, 36) if normalize else (-36, -20, -4, 4, 18, 36):
        memory, z, row_class = case(60, 2, 20, 20)
        z = (z.double() * 10.0**power).to(dtype)
        if not z.isfinite().all():
            continue
        weights = torch.rand(60)
        z[5], z[7, 3], z[9, 0], weights[11], weights[13], row_class[15] = 0, torch.nan, torch.inf, torch.nan, -1, 9
        check(memory, z, row_class, weights, normalize)


def test_long_sorted_sums_stay_accurate(sorting: pytest.MonkeyPatch) -> None:
    """Small weights after a large one: in float32 a part of each would be lost."""
    z = torch.rand(30_000, 1) + 1
    weights = torch.where(torch.arange(30_000) == 0, 1000.0, 1e-3)
    memory, row_class = torch.ones(1, 40, 1), torch.zeros(30_000).long()
    sums, mass, _ = ema.ema_accumulate(memory, z, row_class, weights, False)
    assert_close(sums[0, 0], (weights.double() * z[:, 0].double()).sum()[None], 1e-7)
    assert_close(mass[0, :1], weights.double().sum()[None], 1e-7)


# --- plans


@pytest.mark.parametrize("n", [0, 1, 1000, 4_000_000, 2_000_000_000])
@pytest.mark.parametrize("sizes", LIMITS)
@pytest.mark.parametrize("item", [2, 4])
def test_plans_fit(n: int, sizes: tuple[int, int, int], item: int) -> None:
    c, k, s = sizes
    cut = ema.plan(n, c, k, s, item)
    assert cut.shared <= ema.MOST_SHARED
    assert (cut.blocks - 1) * cut.block_rows < max(n, 1) <= max(cut.blocks * cut.block_rows, 1)
    assert cut.block_rows % cut.tile_rows == 0
    assert 0 < cut.tile_rows <= ema.THREADS
    assert cut.blocks < 2**31
    lanes = cut.slot_lanes * cut.column_lanes
    assert lanes in (4, 8, 16, 32)
    assert cut.column_lanes >= 2
    assert cut.tile_rows <= ema.THREADS * ema.QUAD // lanes
    assert cut.tile_pitch >= s * item
    assert cut.tile_pitch % 32 == 16
    assert cut.bank_slots >= -(-k // (ema.OWN * cut.slot_lanes)) * ema.OWN * cut.slot_lanes
    assert 4 * cut.bank_columns * item == -(-s * item // 16) * 16
    assert all(at % 16 == 0 for at in (cut.sums_at, cut.bank_at, cut.stage_at, cut.stage_bytes))
    assert cut.mass_at % 8 == cut.classes_at % 8 == cut.weights_at % 4 == 0
    partial = ema.workspace_bytes(cut, c, k, s)["partial_sums"]
    assert partial <= max(ema.WORKSPACE, n * (ema.SORTED + 8 * cut.sum_pitch / cut.run_rows), 8 * cut.sum_pitch)
    assert n == 0 or cut.by_slot or cut.block_rows <= max(ema.LONGEST, cut.tile_rows), "more than float32 adds up well"
    assert cut.run_lanes * 4 >= cut.sum_pitch
    assert ema.THREADS % cut.run_lanes == 0


@pytest.mark.parametrize("sizes", [*LIMITS, (4, 130, 64), (3, 1024, 96), (2, 1024, 64)])
def test_large_memories_leave_no_gpu_idle(sizes: tuple[int, int, int]) -> None:
    for n in (100_000, 1_000_000):
        for item in (2, 4):
            cut = ema.plan(n, *sizes, item)
            assert cut.blocks >= ema.FEW_BLOCKS
            assert not cut.by_slot or cut.runs >= 780


def test_more_rows_than_torch_sorts_are_refused() -> None:
    memory, rows = (torch.empty(sizes, device="meta") for sizes in ((64, 1024, 16), (2**31, 16)))
    assert "takes fewer than 2**31 rows for a memory of (64, 1024, 16)" in cuda.unfit(memory, rows)
    assert cuda.unfit(memory, rows[1:]) == ""
    assert cuda.unfit(memory[:2, :16].contiguous(), rows) == ""


def test_the_plan_for_the_shape_it_is_for() -> None:
    """Four blocks on a multiprocessor of an H100, and two rounds of them or a little less."""
    cut = ema.plan(4_000_000, 2, 16, 64, 4)
    assert cut.in_shared
    assert 4 * (cut.shared + 1024) <= 228 * 1024
    assert 0.9 * ema.BLOCKS < cut.blocks <= ema.BLOCKS
    assert sum(ema.workspace_bytes(cut, 2, 16, 64).values()) < 0.01 * 4_000_000 * 64 * 4


def test_both_sides_agree_on_the_task() -> None:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    assert emulation.library().task_bytes() == ctypes.sizeof(ema.Task)
    assert emulation.library().state_bytes() == ema.STATE
    names = {name for name, *_ in ema.Task._fields_}
    assert set(ema.Plan._fields) - {"in_shared", "shared", "by_slot", "runs"} <= names


# --- what the tests above judge shows in kernels that are broken on purpose

BREAKS = {
    "a barrier is missing": (
        "      collect(tile, first, count);\n      __syncthreads();",
        "      collect(tile, first, count);",
    ),
    "copies are not waited for": ("        wait_for_all();", "        ;"),
    "ties go to the last": ("score[r][i] > best[r]", "score[r][i] >= best[r]"),
    "a lane leaves its warp": (
        "      for (int step = quads_of_warp; step < kWarp; step *= 2) {",
        "      for (int step = quads_of_warp; step < kWarp - lane; step *= 2) {",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_broken_is_seen(
    emulator: emulation.Emulator, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("csrc/cuda", "tests/cpp"):
        (tmp_path / folder).mkdir(parents=True)
        for path in (emulation.ROOT / folder).iterdir():
            if path.is_file():
                (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    source = tmp_path / "csrc" / "cuda" / "ema_scatter.cuh"
    old, new = BREAKS[broken]
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))
    monkeypatch.setattr(emulation, "ROOT", tmp_path)
    emulation.library.cache_clear()
    try:
        with pytest.raises((AssertionError, subprocess.SubprocessError)):
            everything_holds(emulator)
    finally:
        emulation.library.cache_clear()


def everything_holds(emulator: emulation.Emulator) -> None:
    memory, z, row_class = case(500, 2, 16, 64)
    memory = memory[:, :4].repeat_interleave(2, 1).repeat(1, 2, 1)
    results = []
    for emulator.schedule in (emulation.FORWARD, emulation.REVERSE, *emulation.SHUFFLED):
        results.append(check(memory, z, row_class))
        assert set(results[-1][2].tolist()) == {-1, 0, 2, 4, 6}
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))


def test_everything_holds(emulator: emulation.Emulator) -> None:
    everything_holds(emulator)

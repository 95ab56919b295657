"""momkd._C against a float64 restatement in numpy: wrong rows, odd shapes, the same bits for any number of threads."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from momkd import native
from momkd.errors import InputError

_C = pytest.importorskip("momkd._C", reason="momkd._C is not built: install momkd with a C++ compiler")

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
TOLERANCE = 1e-5  # relative L2 against float64


@dataclass
class Case:
    """What goes in. `bits` are the rows as they lie in memory, `z` the values that they stand for."""

    memory: np.ndarray  # (C, K, S) float32
    bits: np.ndarray  # (N, S), rows maybe apart
    z: np.ndarray  # (N, S) float64
    row_class: np.ndarray  # (N,) int64
    weights: np.ndarray | None = None  # (N,) float32
    dtype: int = FLOAT32
    normalize: bool = True

    def rows(self) -> tuple[int, ...]:
        n, s = self.bits.shape
        assert n == 0 or s == 1 or self.bits.strides[1] == self.bits.itemsize
        return (
            self.bits.ctypes.data,
            self.dtype,
            n,
            s,
            self.bits.strides[0] // self.bits.itemsize,
            self.row_class.ctypes.data,
            0 if self.weights is None else self.weights.ctypes.data,
            self.memory.ctypes.data,
            *self.memory.shape[:2],
            self.normalize,
        )

    def accumulate(self, threads: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sums = np.full(self.memory.shape, np.nan, np.float32)
        mass = np.full(self.memory.shape[:2], np.nan, np.float32)
        assignments = np.full(len(self.bits), 12345, np.int32)
        _C.ema_accumulate(*self.rows(), threads, sums.ctypes.data, mass.ctypes.data, assignments.ctypes.data)
        return sums, mass, assignments

    def scatter(self, usage: np.ndarray, momentum: float, threads: int = 2) -> tuple[np.ndarray, ...]:
        """The memory, usage and assignments after one update; the case itself is left alone."""
        moved, used = replace(self, memory=self.memory.copy()), usage.copy()
        assignments = np.full(len(self.bits), 12345, np.int32)
        _C.ema_scatter(*moved.rows(), used.ctypes.data, momentum, assignments.ctypes.data, threads)
        return moved.memory, used, assignments


def as_stored(z: np.ndarray, dtype: int) -> tuple[np.ndarray, np.ndarray]:
    """The bits of float32 values `z` in a type, and the values that these bits are."""
    if dtype == FLOAT16:
        half = z.astype(np.float16)
        return half, half.astype(np.float64)
    if dtype == BFLOAT16:
        bits = (z.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return z, z.astype(np.float64)


def make(seed: int, n: int, c: int, k: int, s: int, dtype: int = FLOAT32, **changes: object) -> Case:
    rng = np.random.default_rng(seed)
    memory = rng.standard_normal((c, k, s)).astype(np.float32)
    bits, z = as_stored(rng.standard_normal((n, s)).astype(np.float32), dtype)
    return replace(Case(memory, bits, z, rng.integers(-1, c, n), dtype=dtype), **changes)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def check_accumulate(case: Case, threads: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each slot must be a nearest one within float32, and the sums must be right for these slots."""
    sums, mass, assignments = case.accumulate(threads)
    classes, slots, _ = case.memory.shape
    valid = (case.row_class >= 0) & (case.row_class < classes) & np.isfinite(case.z).all(1)
    np.testing.assert_array_equal(assignments == -1, ~valid)
    z, label, slot = case.z[valid], case.row_class[valid], assignments[valid]
    assert ((slot >= 0) & (slot < slots)).all()

    size = np.abs(z).max(1, keepdims=True, initial=0)
    direction = unit(z / np.where(size > 0, size, 1))
    score = np.einsum("ns,nks->nk", direction, unit(case.memory.astype(np.float64))[label])  # (N, K)
    chosen = score[np.arange(len(slot)), slot]
    best = score.max(1, initial=-2)
    assert (chosen >= best - 2e-6).all(), f"a slot is {np.max(best - chosen):.1e} from the nearest"
    clear = (score > best[:, None] - 1e-5).sum(1) == 1
    np.testing.assert_array_equal(slot[clear], score.argmax(1)[clear])
    assert (slot[size[:, 0] == 0] == 0).all(), "a zero row picks slot 0"

    w = np.ones(len(z)) if case.weights is None else case.weights[valid].astype(np.float64)
    w = np.where(np.isfinite(w) & (w > 0), w, 0)
    share = w[:, None] * (unit(z) if case.normalize else z)
    want_sums, added, want_mass = np.zeros(case.memory.shape), np.zeros(case.memory.shape), np.zeros((classes, slots))
    np.add.at(want_sums, (label, slot), share)
    np.add.at(added, (label, slot), np.abs(share))
    np.add.at(want_mass, (label, slot), w)
    assert close(sums, want_sums, added)
    assert close(mass, want_mass)
    return sums, mass, assignments


def close(got: np.ndarray, want: np.ndarray, added: np.ndarray | float = 0.0) -> bool:
    """Relative L2 error; where terms of size `added` cancel to nothing, one float32 rounding of these is allowed."""
    error = np.linalg.norm(got.astype(np.float64) - want)
    return bool(error <= max(TOLERANCE * np.linalg.norm(want), 2**-24 * np.linalg.norm(added)))


def applied(
    memory: np.ndarray, usage: np.ndarray, sums: np.ndarray, mass: np.ndarray, momentum: float
) -> tuple[np.ndarray, np.ndarray]:
    """The update of memory and usage, restated in float64."""
    memory, mass = memory.astype(np.float64), mass.astype(np.float64)
    mean = sums.astype(np.float64) / np.where(mass > 0, mass, 1)[..., None]
    moved = momentum * memory + (1 - momentum) * mean
    norm = np.linalg.norm(moved, axis=-1, keepdims=True)
    least = 1e-5 * (momentum * np.linalg.norm(memory, axis=-1, keepdims=True) + 1 - momentum)
    change = (mass > 0)[..., None] & (norm > least)
    return np.where(change, moved / np.where(change, norm, 1), memory), momentum * usage + (1 - momentum) * mass


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this build and this processor have."""
    before = _C.build_info()["isa"]
    try:
        _C.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.use_isa(before)


@pytest.mark.parametrize("name", ["baseline", "AVX2", "avx512", ""])
def test_an_instruction_set_by_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    best = _C.build_info()["isa"]
    monkeypatch.setenv("MOMKD_ISA", name)
    monkeypatch.setattr(native, "extension", native.extension.__wrapped__)  # as at the first use in a process
    try:
        _C.use_isa(name.lower() or best)
    except ValueError:
        with pytest.raises(InputError, match=f"MOMKD_ISA: .* has no {name.lower()}; unset it or correct it"):
            native.can_run("attention_pool")
        return
    _C.use_isa(best)
    try:
        assert native.can_run("attention_pool")[0]
        assert _C.build_info()["isa"] == (name.lower() or best)
    finally:
        _C.use_isa(best)


def test_an_instruction_set_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMKD_ISA", "sse9")
    monkeypatch.setattr(native, "extension", native.extension.__wrapped__)
    with pytest.raises(InputError, match="MOMKD_ISA: expected baseline, avx2 or avx512, got sse9; unset it"):
        native.can_run("attention_pool")


@pytest.mark.parametrize("n", [0, 1, 5, 6, 7, 15, 16, 17, 5000])
@pytest.mark.parametrize(("c", "k", "s"), [(1, 1, 1), (2, 16, 64), (3, 17, 3), (5, 33, 100), (4, 2, 16), (2, 15, 1)])
def test_shapes(isa: str, n: int, c: int, k: int, s: int) -> None:
    check_accumulate(make(n * 1000 + k, n, c, k, s))


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("s", [1, 16, 23, 64])
def test_half_rows(isa: str, dtype: int, s: int) -> None:
    check_accumulate(make(s, 700, 2, 16, s, dtype))


@pytest.mark.parametrize("k", [1, 16, 33])
def test_float16_values_are_exact(isa: str, k: int) -> None:
    """Every finite float16, subnormal ones too, one a row; a sum of one row is that row."""
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    rows = np.zeros((2048, 31), np.float16)
    rows.reshape(-1)[: len(finite)] = finite
    memory = np.ones((2048, k, 31), np.float32)
    case = Case(memory, rows, rows.astype(np.float64), np.arange(2048), dtype=FLOAT16, normalize=False)
    sums, _, assignments = case.accumulate()
    np.testing.assert_array_equal(sums[:, 0], rows.astype(np.float32))
    assert (assignments == 0).all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_rows_that_are_not_numbers_are_skipped(isa: str, dtype: int) -> None:
    rng = np.random.default_rng(dtype)
    raw = rng.standard_normal((500, 37)).astype(np.float32)
    for i, bad in enumerate([np.nan, np.inf, -np.inf]):
        raw[i::11, rng.integers(37)] = bad
    raw[5::11] = 0
    bits, z = as_stored(raw, dtype)
    case = replace(make(1, 0, 3, 17, 37), bits=bits, z=z, row_class=rng.integers(0, 3, 500), dtype=dtype)
    sums, mass, assignments = check_accumulate(case)
    assert np.isfinite(sums).all()
    assert (assignments == -1).sum() == np.isnan(z.sum(1)).sum() + np.isinf(z.sum(1)).sum() > 100
    assert mass.sum() == (assignments >= 0).sum()


@pytest.mark.parametrize("bad", [2, -2, -(2**62), 2**62, 2**32, -(2**32)])
def test_classes_outside_the_memory_raise(bad: int) -> None:
    case = replace(make(3, 90, 2, 4, 8), row_class=np.array([-1, 0, 1] * 30))
    _, mass, assignments = check_accumulate(case)
    assert mass.sum() == (assignments >= 0).sum() == 60
    case.row_class[50] = bad
    for call in (case.accumulate, lambda: case.scatter(np.zeros((2, 4), np.float32), 0.9)):
        with pytest.raises(ValueError, match=f"row_class: expected 0 to 1, or -1 for none, got {bad} at index 50"):
            call()


@pytest.mark.parametrize("normalize", [True, False])
def test_weights(isa: str, normalize: bool) -> None:
    rng = np.random.default_rng(4)
    weights = rng.random(3000).astype(np.float32)
    weights[::3] = 0
    weights[1::50], weights[2::50], weights[3::50] = -1, np.nan, np.inf
    check_accumulate(make(5, 3000, 3, 16, 64, weights=weights, normalize=normalize))
    nothing = make(5, 300, 3, 16, 64, weights=np.zeros(300, np.float32), normalize=normalize)
    sums, mass, assignments = check_accumulate(nothing)
    assert not sums.any()
    assert not mass.any()
    assert (assignments >= 0).any()


def test_rows_of_any_size_are_normalised(isa: str) -> None:
    """Squared lengths leave float32 on both sides here; below 1e-12 a row is divided by 1e-12."""
    rng = np.random.default_rng(6)
    z = rng.standard_normal((600, 20)) * 10.0 ** rng.integers(-37, 36, (600, 1))
    z[7] = 3e38  # its length is over the largest float32
    bits, values = as_stored(z.astype(np.float32), FLOAT32)
    case = replace(make(7, 0, 3, 9, 20), bits=bits, z=values, row_class=rng.integers(0, 3, 600))
    sums, _, _ = check_accumulate(case)
    alone = replace(case, bits=bits[7:8], z=values[7:8], row_class=case.row_class[7:8])
    sums, mass, _ = check_accumulate(alone)
    assert np.linalg.norm(sums) == pytest.approx(1, rel=1e-6)
    assert mass.sum() == 1


def test_ties_go_to_the_lowest_slot(isa: str) -> None:
    case = make(8, 2000, 2, 40, 13)
    case.memory[:, 20:] = case.memory[:, :20] * 2  # the same directions; twice is exact
    _, mass, assignments = check_accumulate(case)
    assert assignments.max() < 20
    assert not mass[:, 20:].any()


def test_a_zero_slot_and_negative_scores(isa: str) -> None:
    """Padding scores must not win: with every real score negative the nearest is still a real slot."""
    z = np.ones((50, 8), np.float32)
    memory = -np.ones((1, 3, 8), np.float32)
    memory[0, 1] = 0  # cosine 0, the largest
    case = Case(memory, z, z.astype(np.float64), np.zeros(50, np.int64))
    assert (check_accumulate(case)[2] == 1).all()
    memory[0, 1] = -1
    assert (check_accumulate(case)[2] == 0).all()


def test_a_slot_that_is_not_a_number_is_never_the_nearest(isa: str) -> None:
    case = make(17, 300, 2, 18, 9)
    case.memory[0, 3], case.memory[0, 17, 2], case.memory[1] = np.nan, np.inf, np.nan
    _, _, assignments = case.accumulate()
    assert not np.isin(assignments[case.row_class == 0], [-1, 3, 17]).any()
    assert (assignments[case.row_class == 1] == 0).all()


@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_strided_rows(gap: int, dtype: int) -> None:
    wide, values = as_stored(np.random.default_rng(9).standard_normal((900, 24 + gap)).astype(np.float32), dtype)
    every_second = slice(None, None, 2)
    case = make(9, 450, 2, 16, 24, dtype)
    check_accumulate(replace(case, bits=wide[every_second, :24], z=values[every_second, :24]))
    backwards = replace(case, bits=wide[:450, :24][::-1], z=values[:450, :24][::-1])
    check_accumulate(backwards)
    same = replace(case, bits=np.broadcast_to(wide[:1, :24], (450, 24)), z=np.broadcast_to(values[:1, :24], (450, 24)))
    check_accumulate(same)


@pytest.mark.parametrize(("n", "c", "k", "s"), [(5000, 2, 16, 64), (20000, 1, 1, 3), (9000, 5, 64, 100), (3, 2, 2, 2)])
def test_same_bits_for_any_number_of_threads(isa: str, n: int, c: int, k: int, s: int) -> None:
    weights = np.random.default_rng(10).random(n).astype(np.float32)
    case, usage = make(11, n, c, k, s, weights=weights), np.ones((c, k), np.float32)
    first, updated = case.accumulate(1), case.scatter(usage, 0.9, 1)
    for threads in (1, 2, 3, 2, 8):
        for got, want in zip(case.accumulate(threads), first, strict=True):
            np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
        for got, want in zip(case.scatter(usage, 0.9, threads), updated, strict=True):
            np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("c", "k", "s"), [(1, 1, 1), (3, 17, 5), (2, 16, 64), (4, 64, 128)])
def test_apply(threads: int, c: int, k: int, s: int) -> None:
    rng = np.random.default_rng(12)
    memory = unit(rng.standard_normal((c, k, s))).astype(np.float32)
    usage, mass = rng.random((c, k)).astype(np.float32), rng.random((c, k)).astype(np.float32)
    sums = rng.standard_normal((c, k, s)).astype(np.float32)
    mass[:, ::3] = 0
    if k > 1:  # the mean cancels the slot exactly, so there is no direction to move to
        sums[0, 1], mass[0, 1] = -memory[0, 1], 1
    momentum = 0.5
    want_memory, want_usage = applied(memory, usage, sums, mass, momentum)
    got_memory, got_usage = memory.copy(), usage.copy()
    data = [a.ctypes.data for a in (got_memory, got_usage, sums, mass)]
    _C.ema_apply(*data, c, k, s, momentum, threads)
    assert close(got_memory, want_memory)
    assert close(got_usage, want_usage)
    kept = mass == 0
    if k > 1:
        kept[0, 1] = True
    np.testing.assert_array_equal(got_memory[kept].view(np.int32), memory[kept].view(np.int32))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_scatter_is_both_halves(isa: str, momentum: float) -> None:
    case = make(13, 40, 3, 33, 20)  # fewer rows than slots: some slots stay empty
    usage = np.random.default_rng(14).random((3, 33)).astype(np.float32)
    sums, mass, assignments = check_accumulate(case)
    memory, used, assigned = case.scatter(usage, momentum)
    want_memory, want_usage = applied(case.memory, usage, sums, mass, momentum)
    assert close(memory, want_memory)
    assert close(used, want_usage)
    np.testing.assert_array_equal(assigned, assignments)
    empty = mass == 0
    assert 0 < empty.sum() < empty.size
    np.testing.assert_array_equal(memory[empty].view(np.int32), case.memory[empty].view(np.int32))


def test_long_sums_stay_accurate() -> None:
    """All rows into one slot with nearly the same vector: float32 alone would lose digits."""
    z = np.random.default_rng(15).random((200_000, 4)).astype(np.float32) + 1
    case = Case(np.ones((1, 1, 4), np.float32), z, z.astype(np.float64), np.zeros(len(z), np.int64), normalize=False)
    sums, mass, _ = case.accumulate()
    np.testing.assert_allclose(sums[0, 0], z.astype(np.float64).sum(0), rtol=2e-6)
    assert mass[0, 0] == len(z)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("where", [0, 2500, 4999])
def test_a_class_that_there_is_not_changes_nothing(where: int, threads: int) -> None:
    """Classes are looked at during the pass over the rows, by whichever thread has them."""
    case = make(18, 5000, 2, 4, 8)
    case.row_class[where] = 2
    memory, usage = case.memory.copy(), np.ones((2, 4), np.float32)
    assignments = np.zeros(5000, np.int32)
    with pytest.raises(ValueError, match=f"got 2 at index {where}"):
        _C.ema_scatter(*case.rows(), usage.ctypes.data, 0.9, assignments.ctypes.data, threads)
    np.testing.assert_array_equal(case.memory, memory)
    assert (usage == 1).all()


def test_wrong_numbers_raise() -> None:
    case = make(16, 4, 2, 3, 5)
    good = [*case.rows(), 1, 1, 1, 1]
    for position, value, message in [
        (1, 3, "dtype"),
        (2, -1, "n and s"),
        (3, 0, "n and s"),
        (0, 0, "null"),
        (8, 0, "c and k"),
    ]:
        bad = list(good)
        bad[position] = value
        with pytest.raises(ValueError, match=message):
            _C.ema_accumulate(*bad)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_torch_and_the_kernels_share_one_openmp() -> None:
    """Two runtimes would be two pools of threads, of which one spins while the other works."""
    program = """
import torch
from momkd import functional
memory = torch.randn(2, 3, 4)
rows, labels = torch.randn(5000, 4), torch.zeros(5000, dtype=torch.int64)
functional.ema_scatter_(memory, torch.zeros(2, 3), rows, labels, momentum=0.9, backend="native")
torch.relu(torch.randn(500, 500) @ torch.randn(500, 500))
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(*sorted(p for p in paths if any(name in p for name in ("libgomp", "libomp", "libiomp"))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if _C.build_info()["openmp"] is None:
        pytest.skip("built without OpenMP")
    assert len(done.stdout.split()) == 1, done.stdout


def test_build_info() -> None:
    info = _C.build_info()
    assert info["isa"] in ("baseline", "avx2", "avx512")
    assert info["standard"] >= 201703
    assert info["openmp"] is None or info["openmp"] >= 200805
    assert re.fullmatch(r"(gcc|clang) \d+\.\d+", info["compiler"])
    with pytest.raises(ValueError, match="sse9"):
        _C.use_isa("sse9")

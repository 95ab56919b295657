from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from momkd import functional as F
from momkd import ops
from momkd.dispatch import can_run
from momkd.errors import BackendError
from tests import emulation
from tests.compare import FORWARD, HALVES, assert_close

pytestmark = pytest.mark.usefixtures("poisoned")
# N, C, K, S
SIZES = [
    (0, 2, 16, 64),
    (1, 1, 1, 1),
    (1, 5, 40, 3),
    (15, 2, 15, 7),
    (16, 3, 16, 33),
    (17, 4, 17, 5),
    (127, 5, 2, 1),
    (128, 2, 16, 64),
    (129, 3, 33, 99),
    (1500, 2, 40, 31),
]


@pytest.fixture(params=["torch", "native", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":  # on CPU tensors: the kernels of the GPU, thread by thread
        emulation.install(monkeypatch)
        return "cuda"
    able, reason = can_run("ema_scatter_", request.param)
    if not able:
        pytest.skip(reason)
    return str(request.param)


class Case:
    """A memory of unit vectors, and rows for it."""

    def __init__(self, n: int, c: int, k: int, s: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.memory = torch.nn.functional.normalize(torch.randn(c, k, s), dim=-1)
        self.usage = torch.rand(c, k)
        self.z = torch.randn(n, s).to(dtype)
        self.row_class = torch.randint(-1, c, (n,))
        self.weights: Tensor | None = None
        self.normalize = True

    def scatter(self, momentum: float, backend: str | None, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        """memory and usage after the update, and the assignments; the case itself is left alone."""
        memory, usage = self.memory.clone(), self.usage.clone()
        kind = {"weights": self.weights, "normalize": self.normalize, "backend": backend}
        slots = F.ema_scatter_(memory, usage, self.z, self.row_class, momentum=momentum, **kind, **options)
        assert slots.dtype == torch.int32
        return memory, usage, slots

    def accumulate(self, backend: str | None) -> tuple[Tensor, Tensor]:
        kind = {"weights": self.weights, "normalize": self.normalize, "backend": backend}
        return F.ema_accumulate(self.memory, self.z, self.row_class, **kind)


def naive(case: Case, momentum: float, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row in float64: memory and usage for given assignments, which must be of nearest slots."""
    memory, z = case.memory.double(), case.z.double()
    weights = torch.ones(len(z)) if case.weights is None else case.weights
    sums, mass = torch.zeros_like(memory), torch.zeros(memory.shape[:2], dtype=torch.float64)
    for row, c, k, w in zip(z, case.row_class.tolist(), slots.tolist(), weights.double().tolist(), strict=True):
        if c < 0 or not row.isfinite().all():
            assert k == -1
            continue
        direction = row / max(float(row.norm()), 1e-12)
        cosines = torch.nn.functional.normalize(memory[c], dim=1, eps=1e-12) @ direction
        assert cosines[k] >= cosines.max() - 2e-6
        assert k == int(cosines.argmax()) or (cosines > cosines[k] - 1e-5).sum() > 1
        if 0 < w < float("inf"):
            sums[c, k] += w * (direction if case.normalize else row)
            mass[c, k] += w
    return naive_apply(memory, case.usage, sums, mass, momentum)


def naive_apply(memory: Tensor, usage: Tensor, sums: Tensor, mass: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    out = memory.double().clone()
    for c, k in mass.nonzero().tolist():
        moved = momentum * out[c, k] + (1 - momentum) * sums[c, k].double() / mass[c, k].double()
        if moved.norm() > 1e-5 * (momentum * out[c, k].norm() + 1 - momentum):
            out[c, k] = moved / moved.norm()
    return out, momentum * usage.double() + (1 - momentum) * mass.double()


def check(case: Case, momentum: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    memory, usage, slots = case.scatter(momentum, backend)
    want_memory, want_usage = naive(case, momentum, slots)
    assert_close(memory, want_memory, FORWARD, "memory")
    assert_close(usage, want_usage, FORWARD, "usage")
    return memory, usage, slots


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_the_board(backend: str, sizes: tuple[int, int, int, int], momentum: float, seed: int) -> None:
    check(Case(*sizes, seed=seed), momentum, backend)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_row_dtypes(backend: str, dtype: torch.dtype) -> None:
    """A half is read exactly and summed in float32, so it is as close as float32 is."""
    if backend != "torch" and dtype == torch.float64:
        with pytest.raises(BackendError, match="takes float32, float16 and bfloat16"):
            Case(9, 2, 3, 4, dtype=dtype).scatter(0.9, backend)
        return
    case = Case(300, 3, 17, 33, dtype=dtype)
    check(case, 0.9, backend)
    sums, mass = case.accumulate(backend)
    assert sums.dtype == mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights(backend: str, normalize: bool, dtype: torch.dtype) -> None:
    case = Case(400, 3, 9, 16)
    case.normalize = normalize
    case.weights = torch.rand(400).to(dtype)
    case.weights[::3] = 0
    case.weights[1::20], case.weights[2::20], case.weights[4::20] = -1.0, torch.nan, torch.inf
    memory, usage, _ = check(case, 0.7, backend)
    assert memory.isfinite().all()
    assert usage.isfinite().all()


def test_weights_that_bring_no_mass_change_no_slot(backend: str) -> None:
    case = Case(50, 2, 4, 8)
    case.weights = torch.tensor([0.0, -2.0, torch.nan, torch.inf, -torch.inf]).repeat(10)
    memory, usage, slots = check(case, 0.5, backend)
    assert torch.equal(memory, case.memory)
    assert torch.equal(usage, case.usage * 0.5)
    assert torch.equal(slots >= 0, case.row_class >= 0), "they have a nearest slot all the same"


def test_rows_that_are_not_finite_are_skipped(backend: str) -> None:
    case = Case(60, 2, 5, 7)
    clean = Case(60, 2, 5, 7)
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        case.z[i::12, i] = bad
        clean.row_class[i::12] = -1
    got, want = check(case, 0.9, backend), clean.scatter(0.9, backend)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), "as if they were not there"


def test_skipped_rows_can_be_counted(backend: str) -> None:
    case = Case(90, 2, 5, 7)
    case.z[3, 2], case.z[17], case.z[40, 0] = torch.nan, torch.inf, -torch.inf
    case.row_class[[3, 17, 40, 41]] = torch.tensor([0, 1, 1, -1])
    _, _, slots = check(case, 0.9, backend)
    assert ((slots < 0) & (case.row_class >= 0)).sum() == 3


def test_no_row_counts(backend: str) -> None:
    case = Case(20, 3, 4, 5)
    case.row_class[:] = -1
    memory, usage, slots = check(case, 0.9, backend)
    assert torch.equal(memory, case.memory)
    assert_close(usage, 0.9 * case.usage, FORWARD)
    assert (slots == -1).all()


def test_zero_rows_take_the_first_slot_and_pull_it_nowhere(backend: str) -> None:
    case = Case(10, 2, 6, 5)
    case.z[:], case.row_class[:] = 0, 1
    memory, usage, slots = check(case, 0.9, backend)
    assert (slots == 0).all()
    assert_close(memory, case.memory, FORWARD)
    assert float(usage[1, 0]) == pytest.approx(0.9 * float(case.usage[1, 0]) + 1.0)
    still, _, _ = case.scatter(0.0, backend)
    assert torch.equal(still, case.memory), "no direction to move to"


@pytest.mark.parametrize("slots", [2, 16, 40])
def test_ties_go_to_the_lowest_slot(backend: str, slots: int) -> None:
    case = Case(500, 2, slots, 13)
    case.memory = torch.nn.functional.normalize(torch.randn(2, 1, 13), dim=-1).repeat(1, slots, 1)
    _, usage, chosen = check(case, 0.5, backend)
    assert chosen.max() == 0
    assert torch.equal(usage[:, 1:], case.usage[:, 1:] * 0.5)


def test_a_slot_that_is_not_a_number_is_never_the_nearest(backend: str) -> None:
    case = Case(100, 2, 5, 6)
    case.memory[0, 2, 1], case.memory[0, 3, 0], case.memory[1] = torch.nan, torch.inf, torch.nan
    memory, usage, slots = case.scatter(0.9, backend)
    assert not torch.isin(slots[case.row_class == 0], torch.tensor([-1, 2, 3])).any()
    assert (slots[case.row_class == 1] == 0).all()
    assert memory[0, [0, 1, 4]].isfinite().all()
    assert usage.isfinite().all()


def test_slots_that_received_nothing_keep_their_bits(backend: str) -> None:
    case = Case(20, 3, 33, 9)
    case.memory *= 1 + torch.rand(3, 33, 1)  # not unit: normalising them would show
    memory, _, slots = check(case, 0.6, backend)
    touched = torch.zeros(3, 33, dtype=torch.bool)
    counted = slots >= 0
    touched[case.row_class[counted], slots[counted].long()] = True
    assert 0 < touched.sum() < touched.numel()
    assert torch.equal(memory[~touched].view(torch.int32), case.memory[~touched].view(torch.int32))
    assert_close(memory[touched].norm(dim=-1), torch.ones(int(touched.sum())), FORWARD)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pairs", [1, 7, 500])
def test_rows_that_cancel_keep_the_slot(backend: str, normalize: bool, pairs: int) -> None:
    """What rounding leaves of rows and their opposites is no direction."""
    case = Case(pairs, 1, 1, 33)
    case.normalize, case.weights = normalize, torch.rand(pairs).repeat(2)
    case.z, case.row_class = torch.cat([case.z, -case.z]), torch.zeros(2 * pairs, dtype=torch.int64)
    memory, usage, _ = case.scatter(0.0, backend)
    assert torch.equal(memory, case.memory)
    assert float(usage) == pytest.approx(float(case.weights.sum()))
    case.memory, case.usage = memory, usage  # and a row that cancels the slot itself
    case.z, case.row_class, case.weights = -memory[0], torch.zeros(1, dtype=torch.int64), None
    assert torch.equal(case.scatter(0.5, backend)[0], case.memory)


def test_a_short_mean_is_a_direction_all_the_same(backend: str) -> None:
    case = Case(2, 1, 1, 2)
    case.z, case.row_class = torch.tensor([[1.0, 1e-4], [-1.0, 1e-4]]), torch.zeros(2, dtype=torch.int64)
    memory, _, _ = check(case, 0.0, backend)
    assert_close(memory[0, 0], torch.tensor([0.0, 1.0]), FORWARD)


def test_momentum_of_zero_and_one(backend: str) -> None:
    case = Case(200, 2, 5, 8)
    memory, usage, _ = case.scatter(1.0, backend)
    assert_close(memory, case.memory, FORWARD)
    assert torch.equal(usage, case.usage)
    memory, usage, slots = case.scatter(0.0, backend)
    for c in range(2):
        for k in range(5):
            own = case.z[(case.row_class == c) & (slots == k)]
            assert usage[c, k] == len(own)
            mean = torch.nn.functional.normalize(torch.nn.functional.normalize(own).mean(0), dim=0)
            assert_close(memory[c, k], mean, FORWARD)


def test_usage_settles_at_the_mass_of_a_call(backend: str) -> None:
    """A moving average of what each slot receives: for a slide of mass 1 the class sums to 1."""
    case = Case(30, 2, 4, 8)
    case.row_class[:] = 0
    case.weights = torch.full((30,), 1 / 30)
    for _ in range(60):
        case.memory, case.usage, _ = case.scatter(0.8, backend)
    assert float(case.usage[0].sum()) == pytest.approx(1, abs=1e-5)
    assert float(case.usage[1].sum()) == pytest.approx(0, abs=1e-5)


LAYOUTS = {
    "every second row": lambda z: torch.stack([z, z + 9], 1).flatten(0, 1)[::2],
    "every second column": lambda z: torch.stack([z, z + 9], 2).flatten(1)[:, ::2],
    "a part of wider rows": lambda z: torch.cat([z + 9, z, z - 9], 1)[:, z.shape[1] : 2 * z.shape[1]],
    "columns first": lambda z: z.T.contiguous().T,
    "one row repeated": lambda z: z[:1].expand(len(z), -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 13])
def test_strided_input(backend: str, layout: str, dtype: torch.dtype, width: int) -> None:
    case = Case(70, 2, 5, width, dtype=dtype)
    case.z = LAYOUTS[layout](case.z)
    case.row_class = case.row_class.repeat_interleave(2)[::2]
    case.weights = torch.rand(70, 3)[:, 1]
    check(case, 0.9, backend)


@pytest.mark.parametrize("sizes", SIZES[2:], ids=str)
def test_the_halves_are_the_whole(backend: str, sizes: tuple[int, int, int, int]) -> None:
    case = Case(*sizes, seed=3)
    case.weights = torch.rand(sizes[0])
    memory, usage, _ = case.scatter(0.9, backend)
    sums, mass = case.accumulate(backend)
    assert F.ema_apply_(case.memory, case.usage, sums, mass, momentum=0.9, backend=backend) is None
    assert torch.equal(case.memory, memory)
    assert torch.equal(case.usage, usage)


def test_ranks_that_add_their_halves_hold_the_same_memory(backend: str) -> None:
    case = Case(600, 2, 8, 16)
    whole, used, _ = case.scatter(0.9, backend)
    parts = [Case(600, 2, 8, 16) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.z, part.row_class = case.z[rank::3], case.row_class[rank::3]
    gathered = [part.accumulate(backend) for part in parts]
    sums, mass = sum(g[0] for g in gathered), sum(g[1] for g in gathered)
    F.ema_apply_(case.memory, case.usage, sums, mass, momentum=0.9, backend=backend)
    assert_close(case.memory, whole, FORWARD)
    assert_close(case.usage, used, FORWARD)


@pytest.mark.parametrize("sums_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mass_dtype", [torch.float16, torch.float32, torch.float64])
def test_apply_takes_sums_of_any_dtype(backend: str, sums_dtype: torch.dtype, mass_dtype: torch.dtype) -> None:
    """And from anywhere: a sum over ranks may be strided or of another type."""
    case = Case(0, 2, 5, 7)
    sums = torch.randn(7, 5, 2).to(sums_dtype).permute(2, 1, 0)
    mass = torch.tensor([[0, 1, 2, 0.5, 3], [1, 0, 0, 4, 1]]).to(mass_dtype)
    want = naive_apply(case.memory, case.usage, sums, mass, 0.8)
    if backend != "torch" and sums_dtype == torch.float64:
        with pytest.raises(BackendError, match=r"got float64"):
            F.ema_apply_(case.memory, case.usage, sums, mass, momentum=0.8, backend=backend)
        return
    F.ema_apply_(case.memory, case.usage, sums, mass, momentum=0.8, backend=backend)
    assert_close(case.memory, want[0], FORWARD)
    assert_close(case.usage, want[1], FORWARD)


def test_the_same_bits_again_and_for_any_number_of_threads(backend: str) -> None:
    case = Case(6000, 3, 16, 40)
    case.weights = torch.rand(6000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (2, 1, 2) if backend == "native" else (threads, threads):
            torch.set_num_threads(count)
            results.append(case.scatter(0.9, backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_backends_agree() -> None:
    if not can_run("ema_scatter_", "native")[0]:
        pytest.skip("native cannot run here")
    case = Case(800, 3, 16, 40)
    for a, b in zip(case.scatter(0.9, "torch"), case.scatter(0.9, "native"), strict=True):
        assert_close(a, b, FORWARD)


def test_autocast_and_gradients_do_not_reach_it(backend: str) -> None:
    case = Case(100, 2, 5, 8)
    want = case.scatter(0.9, backend)
    case.z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = case.scatter(0.9, backend)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_opcheck_compile(backend: str) -> None:
    case = Case(17, 2, 3, 5)
    for weights in (None, torch.rand(17)):
        rows = (case.z, case.row_class, weights)
        torch.library.opcheck(ops.ema_accumulate, (case.memory, *rows, True, backend))
        torch.library.opcheck(ops.ema_scatter_, (case.memory, case.usage, *rows, 0.9, True, backend))
    sums, mass = case.accumulate(backend)
    torch.library.opcheck(ops.ema_apply_, (case.memory, case.usage, sums, mass, 0.9, backend))

    def step(memory: Tensor, usage: Tensor, z: Tensor) -> Tensor:
        slots = F.ema_scatter_(memory, usage, z * 2, case.row_class, momentum=0.9, backend=backend)
        sums, mass = F.ema_accumulate(memory, z, case.row_class, backend=backend)
        F.ema_apply_(memory, usage, sums, mass, momentum=0.5, backend=backend)
        return slots

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, traced = [(case.memory.clone(), case.usage.clone()) for _ in range(2)]
    assert torch.equal(compiled(*traced, case.z), step(*eager, case.z))
    for a, b in zip(traced, eager, strict=True):
        assert torch.equal(a, b)


# -- re-seeding --------------------------------------------------------------------------------------------------


def test_reseed_gives_dead_slots_a_row_of_their_class() -> None:
    case = Case(40, 3, 4, 6)
    case.usage = torch.tensor([[0.0, 1.0, 0.01, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.02]])
    memory, usage = case.memory.clone(), case.usage.clone()
    replaced = F.reseed_(memory, usage, case.z, case.row_class, threshold=0.05)
    assert torch.equal(replaced, case.usage < 0.05)
    assert torch.equal(memory[~replaced], case.memory[~replaced])
    assert torch.equal(usage[~replaced], case.usage[~replaced])
    unit = torch.nn.functional.normalize(case.z, dim=1)
    for c in range(3):
        taken = [int((unit[case.row_class == c] == slot).all(1).nonzero()[0]) for slot in memory[c][replaced[c]]]
        assert len(set(taken)) == len(taken), "never the same row twice"
        assert_close(usage[c][replaced[c]], case.usage[c].mean().expand(len(taken)), FORWARD)


def test_reseed_draws_by_weight_from_rows_that_have_a_direction() -> None:
    case = Case(30, 2, 8, 5)
    case.row_class[:15], case.row_class[15:] = 0, 1
    case.usage[:] = 0
    weights = torch.zeros(30)
    weights[[1, 2, 3, 4, 5]], weights[6], weights[7] = 1.0, torch.nan, -1.0
    case.z[1], case.z[2, 0] = 0, torch.nan
    memory, usage = case.memory.clone(), case.usage.clone()
    replaced = F.reseed_(memory, usage, case.z, case.row_class, threshold=1.0, weights=weights)
    assert replaced[0].sum() == 3, "as many as there are rows to take"
    assert not replaced[1].any(), "a class with no row keeps its slots"
    drawn = sorted(
        int((memory[0][replaced[0]] @ z).argmax()) for z in torch.nn.functional.normalize(case.z[3:6], dim=1)
    )
    assert drawn == [0, 1, 2]
    assert_close(memory.norm(dim=-1), torch.ones(2, 8), FORWARD)
    assert torch.equal(memory[~replaced], case.memory[~replaced])

    counts = torch.zeros(2)
    case.z, case.row_class = torch.eye(2), torch.zeros(2, dtype=torch.int64)
    one, used = torch.ones(1, 1, 2), torch.zeros(1, 1)
    for seed in range(300):
        draw = {"weights": torch.tensor([1.0, 3.0]), "generator": torch.Generator().manual_seed(seed)}
        F.reseed_(one, used, case.z, case.row_class, threshold=1.0, **draw)
        counts += one[0, 0]
        used.zero_()
    assert counts[1] / 300 == pytest.approx(0.75, abs=0.08)


def test_reseed_is_the_generators_alone() -> None:
    case = Case(200, 2, 4, 6)
    case.usage[:] = 0

    def draw(seed: int) -> Tensor:
        memory, usage = case.memory.clone(), case.usage.clone()
        generator = torch.Generator().manual_seed(seed)
        F.reseed_(memory, usage, case.z, case.row_class, threshold=1.0, generator=generator)
        return memory

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_reseed_draws_the_same_on_every_device() -> None:
    case = Case(400, 3, 8, 16)
    case.usage[:, ::2], weights = 0, torch.rand(400)
    results = []
    for device in ("cpu", "cuda"):
        given = [t.to(device, copy=True) for t in (case.memory, case.usage, case.z, case.row_class)]
        draw = {"weights": weights.to(device), "generator": torch.Generator().manual_seed(3)}
        replaced = F.reseed_(*given, threshold=0.1, **draw)
        results.append((given[0].cpu(), given[1].cpu(), replaced.cpu()))
    for a, b in zip(*results, strict=True):
        assert_close(a.float(), b.float(), FORWARD)
    assert torch.equal(results[0][2], results[1][2])


def test_reseed_no_rows() -> None:
    case = Case(0, 2, 3, 4)
    assert not F.reseed_(case.memory, case.usage, case.z, case.row_class, threshold=9.0).any()


def test_scatter_reseeds_after_the_update(backend: str) -> None:
    case = Case(80, 2, 9, 6)
    case.usage[:] = 1.0
    generator = torch.Generator().manual_seed(5)
    memory, usage, slots = case.scatter(0.5, backend, reseed_below=2.0, generator=generator)
    want_memory, want_usage, want_slots = case.scatter(0.5, backend)
    dead = want_usage < 2.0
    assert 0 < dead.sum() < 18
    generator.manual_seed(5)
    replaced = F.reseed_(want_memory, want_usage, case.z, case.row_class, threshold=2.0, generator=generator)
    assert torch.equal(replaced, dead)
    for a, b in ((memory, want_memory), (usage, want_usage), (slots, want_slots)):
        assert torch.equal(a, b)


# -- wrong input -------------------------------------------------------------------------------------------------

BAD = [
    ({"momentum": 1.5}, "momentum: expected 0 <= momentum <= 1, got 1.5"),
    ({"momentum": float("nan")}, "momentum: expected 0 <= momentum <= 1, got nan"),
    ({"memory": torch.randn(2, 3, 4).double()}, "memory: expected contiguous float32, got torch.float64"),
    ({"memory": torch.randn(2, 4, 3).mT}, r"memory: expected contiguous float32, got torch.float32 with strides"),
    ({"memory": torch.randn(3, 4)}, r"memory: expected \(C, K, S\) = \(any, any, any\), got \(3, 4\)"),
    ({"memory": torch.randn(2, 0, 4)}, "memory: expected at least one class, slot and column"),
    ({"usage": torch.zeros(2, 3).half()}, "usage: expected contiguous float32, got torch.float16"),
    ({"usage": torch.zeros(3, 2).T}, "usage: expected contiguous float32"),
    ({"usage": torch.zeros(3, 2)}, r"usage: expected \(C, K\) = \(2, 3\), got \(3, 2\)"),
    ({"z": torch.randn(5, 3)}, r"z: expected \(N, S\) = \(any, 4\), got \(5, 3\)"),
    ({"z": torch.ones(5, 4).long()}, r"z: expected float16, .* got torch.int64; use z.float\(\)"),
    ({"row_class": torch.zeros(4).long()}, r"row_class: expected \(N,\) = \(5\), got \(4,\)"),
    ({"row_class": torch.zeros(5)}, r"row_class: expected int64, got torch.float32; use row_class.long\(\)"),
    ({"row_class": torch.tensor([0, 1, 2, 0, 0])}, "row_class: expected 0 to 1, or -1 for none, got 2 at index 2"),
    ({"row_class": torch.tensor([0, 1, -2, 0, 0])}, "row_class: expected 0 to 1, or -1 for none, got -2 at index 2"),
    ({"weights": torch.ones(4)}, r"weights: expected \(N,\) = \(5\), got \(4,\)"),
    ({"weights": torch.ones(5).long()}, r"weights: expected float16, .* use weights.float\(\)"),
    ({"z": torch.randn(5, 4, device="meta")}, r"z: expected on cpu like memory, got meta; use z.to\(memory.device\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "memory": torch.randn(2, 3, 4),
        "usage": torch.zeros(2, 3),
        "z": torch.randn(5, 4),
        "row_class": torch.tensor([0, 1, -1, 0, 1]),
        "momentum": 0.9,
        **change,
    }
    before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match=message):
        F.ema_scatter_(**given)
    for name, value in before.items():
        if value.device.type == "cpu":
            assert torch.equal(value, given[name]), f"{name} was changed"
    given.pop("momentum")
    if "momentum" not in change and "weights" not in change:
        with pytest.raises(ValueError, match=message):
            F.reseed_(**given, threshold=0.1)


def test_a_generator_of_another_device_is_refused() -> None:
    case = Case(5, 2, 3, 4)
    generator = SimpleNamespace(device=torch.device("cuda", 0))  # there may be no GPU to make one on
    with pytest.raises(ValueError, match=r"generator: expected one on the CPU, .* got cuda:0; use torch.Generator\(\)"):
        F.reseed_(case.memory, case.usage, case.z, case.row_class, threshold=0.1, generator=generator)
    with pytest.raises(ValueError, match="generator: expected one on the CPU"):
        case.scatter(0.9, None, reseed_below=0.1, generator=generator)


def test_bad_input_of_the_second_half() -> None:
    memory, usage = torch.randn(2, 3, 4), torch.zeros(2, 3)
    for sums, mass, message in [
        (torch.randn(2, 4, 3), torch.ones(2, 3), r"sums: expected \(C, K, S\) = \(2, 3, 4\), got \(2, 4, 3\)"),
        (torch.randn(2, 3, 4), torch.ones(2, 4), r"mass: expected \(C, K\) = \(2, 3\), got \(2, 4\)"),
        (torch.ones(2, 3, 4).long(), torch.ones(2, 3), r"sums: expected float16, .* got torch.int64"),
        (torch.randn(2, 3, 4), torch.ones(2, 3).int(), r"mass: expected float16, .* got torch.int32"),
        (torch.randn(2, 3, 4), torch.ones(2, 3, device="meta"), "mass: expected on cpu like memory, got meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            F.ema_apply_(memory, usage, sums, mass, momentum=0.9)

"""The native pooling and memory kernels on every instruction set, against float64: odd shapes, any threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from momkd import functional as F
from momkd import native, reference
from momkd.reference.gated_attention_pool import GateParameters
from tests.compare import FORWARD, GRADIENT, HALVES, RAGGED, assert_close, assert_half, offsets_of

_C = pytest.importorskip("momkd._C", reason="momkd._C is not built: install momkd with a C++ compiler")
pytestmark = pytest.mark.usefixtures("poisoned")

Call = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.build_info()["isa"]
    try:
        _C.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.use_isa(before)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


def results(call: Call, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a call gives, and the gradients of its inputs that want one."""
    out = call(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    differentiable = [t for t in out if t.requires_grad]
    return (*out, *torch.autograd.grad(differentiable, wanted, grads[: len(differentiable)]))


def exactly(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)


def compare(call: Call, exact: Call, inputs: tuple[Tensor, ...], *shapes: tuple[int, ...]) -> None:
    grads = tuple(torch.randn(shape) for shape in shapes)
    got = results(call, inputs, grads)
    want = results(exact, exactly(inputs), tuple(g.double() for g in grads))
    outputs = len(got) - sum(t.requires_grad for t in inputs)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if not g.is_floating_point():
            assert torch.equal(g, w)
        elif w.norm() < 1e-12:  # of a bag's only row: 0, or what float64 rounds
            assert (g == 0).all(), f"result {i}: expected 0"
        else:
            assert_close(g, w, FORWARD if i < outputs else GRADIENT, f"result {i}")


# -- pooling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", RAGGED)
@pytest.mark.parametrize(("width", "heads"), [(7, 1), (33, 3), (64, 1)])
def test_attention_pool(isa: str, shape: str, width: int, heads: int) -> None:
    torch.manual_seed(0)
    lengths = RAGGED[shape]
    offsets = offsets_of(lengths)
    values, scores = leaf(sum(lengths), width), leaf(sum(lengths), heads, scale=5)

    def with_backend(name: str) -> Call:
        return lambda v, s: (F.attention_pool(v, s, offsets, backend=name),)

    compare(with_backend("native"), with_backend("torch"), (values, scores), (len(lengths), heads, width))


@pytest.mark.parametrize(("hidden", "heads", "gated"), [(5, 1, True), (16, 3, True), (67, 1, False), (128, 16, True)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gated_attention_pool(isa: str, hidden: int, heads: int, gated: bool, dropout: float) -> None:
    torch.manual_seed(1)
    lengths = (0, 1, 1100, 17)  # more than one block of rows
    offsets = offsets_of(lengths)
    x = leaf(sum(lengths), 20)
    weights = (leaf(hidden, 20), leaf(hidden), leaf(hidden, 20), leaf(hidden), leaf(heads, hidden), leaf(heads))
    if not gated:
        weights = (*weights[:2], *weights[4:])

    def with_backend(name: str) -> Call:
        def call(x: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
            full = w if gated else (*w[:2], None, None, *w[2:])
            return F.gated_attention_pool(
                x, offsets, *full, dropout_p=dropout, seed=2**40 + 7, return_scores=True, backend=name
            )

        return call

    inputs = (x, *weights)
    compare(with_backend("native"), with_backend("torch"), inputs, (len(lengths), heads, 20), (sum(lengths), heads))


def test_activations_over_the_whole_range(isa: str) -> None:
    """tanh and σ by themselves, through scores of one hidden value: relative errors, down to the subnormal numbers."""
    sizes = torch.cat([torch.logspace(-30, 2, 4001), torch.tensor([0.0, 0.6249999, 0.625, 88.7, 104.0, 1e4, 3e38])])
    x = torch.cat([sizes, -sizes])[:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    offsets = offsets_of((len(x),))
    for w_u, b_u, exact in (
        (None, None, torch.tanh(x.double())),
        (one, zero, torch.tanh(torch.tensor(0.5)).double() * torch.sigmoid(x.double())),
    ):
        w_v, b_v = (one, zero) if w_u is None else (torch.zeros(1, 1), torch.full((1,), 0.5))
        _, scores = F.gated_attention_pool(
            x, offsets, w_v, b_v, w_u, b_u, one, zero, return_scores=True, backend="native"
        )
        error = (scores.double() - exact).abs() / exact.abs().clamp_min(1e-31)
        assert error.max() < 1e-6, f"{isa}: {x[error.argmax()].item()} is off by {error.max():.1e}"


# -- memory ------------------------------------------------------------------------------------------------------

BANKS = [(2, 16, 64), (1, 1, 1), (3, 5, 7), (2, 33, 20), (5, 8, 130)]  # C, K, S


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("reduce", ["max", "lse"])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 600])
def test_memory_similarity(isa: str, bank: tuple[int, int, int], reduce: str, rows: int) -> None:
    torch.manual_seed(2)
    z, memory = leaf(rows, bank[2]), leaf(*bank)

    def with_backend(name: str) -> Call:
        return lambda z, m: F.memory_similarity(z, m, reduce=reduce, tau=7.0, backend=name)

    if reduce == "lse" and bank[2] == 1:
        pytest.skip("the cosines of rows of one value are 1 and -1: equal ones have no nearest slot to compare")
    compare(with_backend("native"), with_backend("torch"), (z, memory), (rows, bank[0]))


@pytest.mark.parametrize("shape", RAGGED)
@pytest.mark.parametrize("bank", [(2, 16, 64), (4, 3, 9)])
@pytest.mark.parametrize("branch", ["positive", "per_class"])
def test_memory_guided_pool(isa: str, shape: str, bank: tuple[int, int, int], branch: str) -> None:
    torch.manual_seed(3)
    lengths = RAGGED[shape]
    offsets, memory = offsets_of(lengths), torch.randn(bank)
    heads = bank[0] if branch == "per_class" or bank[0] > 2 else 1
    inputs = leaf(sum(lengths), bank[2]), leaf(sum(lengths), 37), torch.tensor(0.2, requires_grad=True)

    def with_backend(name: str) -> Call:
        def call(z: Tensor, values: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            return F.memory_guided_pool(z, values, memory.to(z.dtype), offsets, t, branch=branch, backend=name)

        return call

    compare(with_backend("native"), with_backend("torch"), inputs, (len(lengths), heads, 37))


@pytest.mark.parametrize("reduce", ["max", "lse"])
def test_rows_of_any_length(isa: str, reduce: str) -> None:
    """Rows whose squares leave float32, zero rows, and rows under eps beside ordinary ones."""
    torch.manual_seed(4)
    z = torch.randn(64, 24) * torch.logspace(-36, 36, 64)[:, None]
    z[5] = 0
    z[::7] = torch.randn(10, 24)
    memory, grad = torch.randn(2, 9, 24), torch.randn(64, 2)
    got, slots = native.kernels("memory_similarity").memory_similarity(z, memory, reduce, 5.0)
    want, want_slots = reference.memory_similarity(z.double(), memory.double(), reduce, 5.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    clear = z.double().norm(dim=1) > 1e-12
    assert torch.equal(slots[clear], want_slots[clear])
    needs = (True, False)
    d_z, _ = native.kernels("memory_similarity").memory_similarity_backward(
        grad, z, memory, reduce, 5.0, want_slots, needs
    )
    d_want, _ = reference.memory_similarity_backward(
        grad.double(), z.double(), memory.double(), reduce, 5.0, want_slots, needs
    )
    normal = d_want.abs().amax(1) > 1e-30  # the others are among the subnormal numbers
    error = (d_z.double() - d_want).norm(dim=1) / d_want.norm(dim=1).clamp_min(1e-300)
    assert error[normal].max() < 1e-4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_alone(isa: str, bad: float) -> None:
    torch.manual_seed(5)
    z, memory = torch.randn(40, 24), torch.randn(2, 9, 24)
    clean, clean_slots = F.memory_similarity(z, memory, backend="native")
    z[17, 3] = bad
    value, slots = F.memory_similarity(z, memory, backend="native")
    others = torch.arange(40) != 17
    assert torch.equal(value[others], clean[others])
    assert torch.equal(slots[others], clean_slots[others])
    assert value[17].isnan().all()
    assert (slots[17] == 0).all()


def test_a_slot_that_is_nan_shows(isa: str) -> None:
    z, memory = torch.randn(20, 24), torch.randn(2, 9, 24)
    memory[1, 4] = torch.nan
    value, slots = F.memory_similarity(z, memory, backend="native")
    want, want_slots = F.memory_similarity(z, memory, backend="torch")
    torch.testing.assert_close(value, want, equal_nan=True)
    assert torch.equal(slots, want_slots)
    assert value[:, 1].isnan().all()


def test_of_equal_slots_the_lowest_is_nearest(isa: str) -> None:
    z = torch.randn(33, 24)
    memory = torch.randn(1, 1, 24).expand(2, 19, 24)
    assert (F.memory_similarity(z, memory, backend="native")[1] == 0).all()


# -- what all share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    lengths = RAGGED["mixed"]
    offsets, n = offsets_of(lengths), sum(lengths)
    z, values, t = leaf(n, 30, dtype=dtype), leaf(n, 45, dtype=dtype), torch.tensor(0.5)
    memory = torch.randn(2, 5, 30)
    w = GateParameters(*(leaf(*s, dtype=dtype) for s in ((24, 45), (24,), (24, 45), (24,), (2, 24), (2,))))
    calls: dict[str, tuple[Call, tuple[Tensor, ...]]] = {
        "guided": (
            lambda b, z, v: F.memory_guided_pool(z, v, memory.to(z.dtype), offsets, t, backend=b)[:1],
            (z, values),
        ),
        "gated": (lambda b, x, *w: (F.gated_attention_pool(x, offsets, *w, backend=b),), (values, *w)),
        "pool": (lambda b, v, s: (F.attention_pool(v, s, offsets, backend=b),), (values, leaf(n, 2, dtype=dtype))),
    }
    for name, (call, inputs) in calls.items():
        shape = call("torch", *inputs)[0].shape
        grad = torch.randn(shape)
        got = results(lambda *a, call=call: call("native", *a), inputs, (grad.to(dtype),))
        plain = results(lambda *a, call=call: call("torch", *a), inputs, (grad.to(dtype),))
        want = results(lambda *a, call=call: call("torch", *a), exactly(inputs), (grad.to(dtype).double(),))
        for i, (g, p, w64) in enumerate(zip(got, plain, want, strict=True)):
            assert g.dtype == dtype
            assert_half(g, w64, p, f"{name} {i}")


def test_any_number_of_threads_gives_the_same_bits() -> None:
    torch.manual_seed(7)
    lengths = (3, 0, 3000, 1, 700)
    offsets, n = offsets_of(lengths), sum(lengths)
    z, values, memory = leaf(n, 24), leaf(n, 40), leaf(2, 9, 24)
    t, scores = torch.tensor(0.3, requires_grad=True), leaf(n, 2)
    weights = tuple(leaf(*s) for s in ((24, 40), (24,), (24, 40), (24,), (2, 24), (2,)))
    grad = torch.randn(5, 1, 40)

    def everything() -> list[Tensor]:
        found = [
            *results(lambda *a: F.memory_guided_pool(*a[:2], memory.detach(), offsets, a[2]), (z, values, t), (grad,)),
            *results(lambda v, s: (F.attention_pool(v, s, offsets),), (values, scores), (grad.expand(5, 2, 40),)),
        ]
        for reduce in ("max", "lse"):
            call = lambda z, m, reduce=reduce: F.memory_similarity(z, m, reduce=reduce)  # noqa: E731
            found += results(call, (z, memory), (values[:, :2].detach(),))
        gate = native.kernels("gated_attention_pool")
        with torch.no_grad():
            found += gate.gated_attention_pool(values, offsets, GateParameters(*weights), 0.25, torch.tensor(3))
        return found

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        for threads in (2, 3, 5):
            _set_native_threads(threads)
            for a, b in zip(one, everything(), strict=True):
                assert torch.equal(a, b), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


def _set_native_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("step", [1, 3])
def test_rows_may_lie_apart(step: int) -> None:
    torch.manual_seed(8)
    wide = torch.randn(50, 3 * 24)
    z = wide[:, : 24 * step : step] if step == 1 else wide[:, ::3]
    memory, offsets = torch.randn(2, 5, 24), offsets_of((20, 30))
    apart = F.memory_guided_pool(z, z, memory, offsets, 0.2, backend="native")
    packed = F.memory_guided_pool(z.contiguous(), z.contiguous(), memory, offsets, 0.2, backend="native")
    for a, b in zip(apart, packed, strict=True):
        assert torch.equal(a, b)
    scores = torch.randn(50, 1)
    assert torch.equal(
        F.attention_pool(z, scores, offsets, backend="native"),
        F.attention_pool(z.contiguous(), scores, offsets, backend="native"),
    )


@pytest.mark.parametrize("bank", [bank for bank in BANKS if bank[2] > 1])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_soft_angle_loss(isa: str, bank: tuple[int, int, int], rows: int) -> None:
    torch.manual_seed(9)
    z, memory, labels = leaf(rows, bank[2]), leaf(*bank), torch.randint(-1, bank[0], (rows,))

    def with_backend(name: str) -> Call:
        return lambda z, m: (F.soft_angle_loss(z, m, labels, reduction="none", backend=name),)

    compare(with_backend("native"), with_backend("torch"), (z, memory), (rows,))

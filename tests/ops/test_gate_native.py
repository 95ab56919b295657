"""The gate by the native kernels: how it multiplies, what it keeps, and that neither changes what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import momkd
from momkd import functional as F
from momkd import native
from momkd.reference.gated_attention_pool import GateParameters
from tests.compare import FORWARD, GRADIENT, HALVES, assert_close, assert_half, cosine, offsets_of
from tests.ops.test_gated_attention_kernel import doubled, parameters

gate = pytest.importorskip("momkd.native.gate", reason="momkd.native.gate")
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(native.extension()[0] is None, reason=f"momkd._C: {native.extension()[1]}"),
]
LENGTHS = (33, 0, 1, 700, 37, 513, 3)
ROWS, HUGE, SEED = sum(LENGTHS), 1 << 60, torch.tensor(7)
WIDTH, HIDDEN = 40, 64  # columns that AMX takes, features that it does not without padding

# The ways in which 16-bit rows are multiplied: by this processor's matrix unit, by torch, or widened.
FORMS = ("amx", "torch", "widened")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    form: str = request.param
    if form == "amx" and native.extension()[0].amx_packed_size(64, 32) == 0:
        pytest.skip("this processor or build has no AMX")
    if form != "amx":
        monkeypatch.setattr(gate, "_packed", lambda weights: None)
        monkeypatch.setattr(gate, "multiplies", lambda dtype: dtype == torch.float32 or form == "torch")
    return form


def gate_of(heads: int = 1, gated: bool = True, hidden: int = HIDDEN, width: int = WIDTH) -> GateParameters:
    torch.manual_seed(0)
    return parameters(width, hidden, heads, gated)


def rows(dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = LENGTHS, width: int = WIDTH) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(sum(lengths), width).to(dtype).requires_grad_()


def of_dtype(given: GateParameters, dtype: torch.dtype) -> GateParameters:
    return GateParameters(*(None if t is None else t.detach().to(dtype).requires_grad_() for t in given))


def step(
    x: Tensor, given: GateParameters, p: float, backend: str = "native", lengths: tuple[int, ...] = LENGTHS
) -> list[Tensor]:
    """Pooled, scores and all gradients."""
    pooled, scores = F.gated_attention_pool(
        *(x, offsets_of(lengths), *given), dropout_p=p, seed=SEED, return_scores=True, backend=backend
    )
    torch.manual_seed(2)
    grads = torch.randn(pooled.shape).to(pooled.dtype), (torch.randn(scores.shape) / 8).to(scores.dtype)
    leaves = [x, *(t for t in given if t is not None)]
    return [pooled, scores, *torch.autograd.grad((pooled, scores), leaves, grads)]


def kept_of(result: Tensor) -> tuple[int, ...]:
    """The shape of what a call keeps for backward, the last of its saved tensors."""
    return tuple(result.grad_fn.saved_tensors[-1].shape)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types of all products that torch makes for the gate."""
    seen: list[torch.dtype] = []
    mm = torch.mm

    def noted(a: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(a.dtype)
        return mm(a, *rest, **options)

    monkeypatch.setattr(torch, "mm", noted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("heads", "gated", "p"), [(1, True, 0.0), (3, True, 0.4), (1, False, 0.4), (3, False, 0.0)])
def test_kept_and_made_again_are_the_same_bits(
    dtype: torch.dtype, heads: int, gated: bool, p: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "BLOCK_BYTES", 0)  # blocks of LEAST_ROWS
    monkeypatch.setattr(gate, "LEAST_ROWS", 256)
    x, given = rows(dtype), of_dtype(gate_of(heads, gated), dtype)
    results = []
    for size in (0, HUGE):
        with momkd.gate_memory(size):
            results.append(step(x, given, p))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("gated", [True, False])
def test_what_is_kept_tells_which_way_was_taken(backend: str, gated: bool) -> None:
    x, given = rows(torch.bfloat16), of_dtype(gate_of(gated=gated), torch.bfloat16)
    branches, call = 2 if gated else 1, (offsets_of(LENGTHS), *given)
    needed = ROWS * branches * HIDDEN * 2
    for size, shape in ((needed, (ROWS, branches, HIDDEN)), (needed - 1, (0,)), (0, (0,))):
        with momkd.gate_memory(size):
            assert kept_of(F.gated_attention_pool(x, *call, backend=backend)) == shape
            assert kept_of(F.gated_attention_scores(x, *given, backend=backend)) == shape


def test_the_torch_backend_says_the_same_either_way() -> None:
    x, given = rows(), gate_of(2)
    with momkd.gate_memory(0):
        again = step(x, given, 0.25, "torch")
    assert all(torch.equal(a, b) for a, b in zip(again, step(x, given, 0.25, "torch"), strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("heads", "gated", "p"), [(1, True, 0.25), (3, False, 0.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_halves_are_as_right_as_plain_torch(
    dtype: torch.dtype, heads: int, gated: bool, p: float, form: str, seed: int
) -> None:
    x = rows(dtype)
    given = of_dtype(gate_of(heads, gated), dtype)
    x64, given64 = x.detach().double().requires_grad_(), doubled(given)
    got, want = step(x, given, p), step(x64, given64, p, "torch")
    plain = _plain(x, given, p)
    for g, w, q in zip(got, want, plain, strict=True):
        assert_half(g, w, q)
    assert all(cosine(g, w) >= 0.999 for g, w in zip(got[2:], want[2:], strict=True))


def _plain(x: Tensor, given: GateParameters, p: float) -> list[Tensor]:
    """The loop over bags in plain torch, in the dtype of x."""
    from momkd.reference.philox import gate_dropout_masks, keep_scale

    linear = torch.nn.functional.linear
    v = torch.tanh(linear(x, given.w_v, given.b_v))
    u = None if given.w_u is None else torch.sigmoid(linear(x, given.w_u, given.b_u))
    if p > 0:
        masks = [m.to(x.dtype) * keep_scale(p) for m in gate_dropout_masks(SEED, len(x), HIDDEN, p)]
        v, u = v * masks[0], None if u is None else u * masks[1]
    scores = linear(v if u is None else v * u, given.w_a, given.b_a)
    pairs = zip(scores.split(LENGTHS), x.split(LENGTHS), strict=True)
    pooled = torch.stack([torch.softmax(s, 0).T @ b for s, b in pairs])
    torch.manual_seed(2)
    grads = torch.randn(pooled.shape).to(pooled.dtype), (torch.randn(scores.shape) / 8).to(scores.dtype)
    leaves = [x, *(t for t in given if t is not None)]
    return [pooled, scores, *torch.autograd.grad((pooled, scores), leaves, grads)]


def test_how_rows_are_multiplied(form: str, multiplied: list[torch.dtype]) -> None:
    """AMX makes the products of a forward itself; nothing 16-bit is widened where the processor has such products."""
    x, given = rows(torch.bfloat16), of_dtype(gate_of(), torch.bfloat16)
    F.gated_attention_pool(x.detach(), offsets_of(LENGTHS), *given, backend="native")
    forward = {"amx": [], "torch": [torch.bfloat16] * 2, "widened": [torch.float32] * 2}[form]
    assert multiplied == forward


@pytest.mark.parametrize(("hidden", "width"), [(5, 1), (16, 31), (16, 32), (33, 64), (64, 100)])
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (31, 1, 33), (1, 1, 1, 0, 2) * 20])
def test_odd_sizes_in_bfloat16(hidden: int, width: int, lengths: tuple[int, ...]) -> None:
    """Tiles of AMX are padded; the products of torch are not: both agree with float64."""
    x, given = rows(torch.bfloat16, lengths, width), of_dtype(gate_of(2, True, hidden, width), torch.bfloat16)
    got = step(x, given, 0.25, lengths=lengths)
    want = step(x.detach().double().requires_grad_(), doubled(given), 0.25, "torch", lengths)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 5e-2)


def test_what_lies_beside_the_rows_is_not_read_as_theirs() -> None:
    """Rows are narrower than a tile, and their neighbours in memory are NaN."""
    wide = torch.full((ROWS, 64), torch.nan, dtype=torch.bfloat16)
    wide[:, :WIDTH] = rows(torch.bfloat16).detach()
    given = of_dtype(gate_of(), torch.bfloat16)
    got = F.gated_attention_pool(wide[:, :WIDTH], offsets_of(LENGTHS), *given, backend="native")
    assert torch.equal(got, F.gated_attention_pool(wide[:, :WIDTH].contiguous(), offsets_of(LENGTHS), *given))
    assert got.isfinite().all()


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_bad_dropout_is_refused_in_every_form(p: float) -> None:
    """One small bag is plain torch, several are not."""
    x, given = torch.randn(6, WIDTH), gate_of()
    for offsets in ([0, 6], [0, 2, 6]):
        with pytest.raises(ValueError, match="dropout_p: expected"):
            F.gated_attention_pool(x, torch.tensor(offsets, dtype=torch.int32), *given, dropout_p=p)
    with pytest.raises(ValueError, match="dropout_p: expected"):
        F.gated_attention_scores(x, *given, dropout_p=p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_bag_is_plain_torch_and_says_what_the_kernels_say(dtype: torch.dtype) -> None:
    x, given, offsets = rows(dtype, (37,)), of_dtype(gate_of(2), dtype), torch.tensor([0, 37], dtype=torch.int32)
    leaves = [x, *(t for t in given if t is not None)]
    plain, by_kernel = (
        F.gated_attention_pool(x, offsets, *given, return_scores=True, backend=backend) for backend in (None, "native")
    )
    assert "momkd" not in str(plain[0].grad_fn).lower()
    tolerance = FORWARD if dtype == torch.float32 else 2e-2
    for g, w in zip(plain, by_kernel, strict=True):
        assert g.dtype == w.dtype
        assert_close(g, w, tolerance)
    for g, w in zip(*(torch.autograd.grad(r[0].sum(), leaves[:5]) for r in (plain, by_kernel)), strict=True):
        assert_close(g, w, 10 * tolerance)
    scores = F.gated_attention_scores(x, *given)
    assert_close(scores, plain[1], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_can_be_taken_twice(dtype: torch.dtype) -> None:
    x, given = rows(dtype), of_dtype(gate_of(), dtype)
    pooled = F.gated_attention_pool(x, offsets_of(LENGTHS), *given, backend="native")
    first, second = (torch.autograd.grad(pooled.sum(), [x, given.w_v], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_says_the_same_whatever_lies_around_it() -> None:
    x, given = rows(torch.bfloat16).detach(), of_dtype(gate_of(2), torch.bfloat16)
    _, together = F.gated_attention_pool(x, offsets_of(LENGTHS), *given, return_scores=True, backend="native")
    for first, end in ((0, 33), (34, 734), (ROWS - 3, ROWS)):
        alone = F.gated_attention_scores(x[first:end], *given, backend="native")
        assert_close(alone, together[first:end], FORWARD)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_turns_its_gradients_alike(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of 16-bit products are written turned, in tiles as wide as the vectors of the instruction set."""
    try:
        native.extension()[0].use_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        monkeypatch.setattr(gate, "multiplies", lambda dtype: True)
        x, given = rows(torch.bfloat16), of_dtype(gate_of(3), torch.bfloat16)
        want = step(x.detach().double().requires_grad_(), doubled(given), 0.25, "torch")
        plain = _plain(x, given, 0.25)
        for g, w, q in zip(step(x, given, 0.25), want, plain, strict=True):
            assert_half(g, w, q)
    finally:
        native.extension()[0].use_isa(_BEST)


_BEST = native.extension()[0].build_info()["isa"] if native.extension()[0] is not None else ""


def test_gradients_of_float32_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BLOCK_BYTES", 0)
    monkeypatch.setattr(gate, "LEAST_ROWS", 64)
    x, given = rows(), gate_of(2)
    want = step(x.detach().double().requires_grad_(), doubled(given), 0.25, "torch")
    for g, w in zip(step(x, given, 0.25), want, strict=True):
        assert_close(g, w, GRADIENT)

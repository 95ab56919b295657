"""What is added to the scores of the gate, and the gate without the pooling, on every backend and against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from momkd import dispatch, ops
from momkd import functional as F
from momkd.ops._backends import module_of
from momkd.reference.gated_attention_pool import GateParameters
from tests.compare import FORWARD, GRADIENT, HALVES, RAGGED, assert_close, assert_half, cosine, offsets_of, relative
from tests.ops.test_gated_attention_pool import NAMES, Arguments, arguments, compare, doubled, fused, naive

pytestmark = pytest.mark.usefixtures("poisoned")
HUGE = 1 << 60
KINDS = [{}, {"gated": False, "heads": 1}, {"bias": False, "heads": 3}]


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    able, reason = dispatch.can_run("gated_attention_pool", name, (torch.zeros(1, 1),))
    if not able:
        pytest.skip(f"{name}: {reason}")
    return name


def scores_of(made: Arguments, **options: Any) -> Tensor:
    return F.gated_attention_scores(*(made[name] for name in NAMES), **options)


def gradients(out: Any, made: Arguments, grads: Any = None) -> list[Tensor]:
    return list(torch.autograd.grad(out, [t for t in made.values() if t is not None], grads, allow_unused=True))


# -- score_bias ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["mixed", "one row", "one empty", "no bags"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(shape: str, kind: dict[str, Any], backend: str) -> None:
    compare(arguments(RAGGED[shape], **kind, biased=True), RAGGED[shape], backend=backend)


def test_with_dropout(backend: str) -> None:
    compare(arguments(RAGGED["mixed"], biased=True), RAGGED["mixed"], p=0.25, seed=5, backend=backend)


def test_scores_hold_what_was_added(backend: str) -> None:
    made = arguments((3, 0, 4), biased=True)
    without = fused({k: v for k, v in made.items() if k != "score_bias"}, (3, 0, 4), backend=backend)[1]
    torch.testing.assert_close(fused(made, (3, 0, 4), backend=backend)[1], without + made["score_bias"])


def test_hidden_patches(backend: str) -> None:
    """A score of −inf takes its patch out of the bag; a bag without any patch left gives zeros, and no gradient."""
    lengths, hidden = (4, 3, 5), [1, 3, 4, 5, 6]
    made = arguments(lengths, biased=True)
    with torch.no_grad():
        made["score_bias"][hidden] = -torch.inf
    pooled, _ = fused(made, lengths, backend=backend)
    seen = [row for row in range(12) if row not in hidden]
    rest = {k: v if k in NAMES[1:] else v.detach()[seen].requires_grad_() for k, v in made.items()}
    want, _ = fused(rest, (2, 0, 5), backend=backend)
    assert (pooled[1] == 0).all()
    assert_close(pooled, want, FORWARD)
    grad = torch.randn_like(pooled)
    got, exact = gradients(pooled, made, grad), gradients(want, rest, grad)
    for name, mine, other in zip(made, got, exact, strict=True):
        if name in NAMES[1:]:
            assert name == "b_a" or relative(mine, other) <= GRADIENT, name  # softmax cancels the gradient of b_a
        else:
            assert_close(mine[seen], other, GRADIENT, name)
            assert (mine[hidden] == 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    lengths = RAGGED["mixed"]
    made = arguments(lengths, 64, 32, dtype=dtype, biased=True)
    exact = doubled(made)
    (pooled, scores), (want, want_scores) = fused(made, lengths, backend=backend), naive(exact, lengths)
    plain, plain_scores = naive(made, lengths)
    assert_half(pooled, want, plain, "pooled")
    assert_half(scores, want_scores, plain_scores, "scores")
    grad = torch.randn_like(pooled)
    for name, got, right in zip(
        made, gradients(pooled, made, grad), gradients(want, exact, grad.double()), strict=True
    ):
        assert got.dtype == dtype
        assert name == "b_a" or cosine(got, right) >= 0.999, name  # softmax cancels the gradient of b_a


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_its_own_dtype(dtype: torch.dtype, backend: str) -> None:
    """Features are float32: it is added in float32, and its gradient has its own type."""
    made = arguments((3, 4), biased=True)
    other = made | {"score_bias": made["score_bias"].detach().to(dtype).requires_grad_()}
    same = made | {"score_bias": other["score_bias"].detach().float().requires_grad_()}
    (got, _), (want, _) = fused(other, (3, 4), backend=backend), fused(same, (3, 4), backend=backend)
    assert torch.equal(got, want)
    grad = torch.randn_like(got)
    for mine, right in zip(gradients(got, other, grad), gradients(want, same, grad), strict=True):
        assert torch.equal(mine, right.to(mine.dtype))


def test_a_bad_bag_leaves_its_neighbours_alone(backend: str) -> None:
    made = arguments((3, 3, 3), biased=True)
    clean = fused(made, (3, 3, 3), backend=backend)[0]
    with torch.no_grad():
        made["score_bias"][4] = torch.nan
    got = fused(made, (3, 3, 3), backend=backend)[0]
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().all()
    d_bias = gradients(got.sum(), made)[-1]
    assert d_bias[[0, 1, 2, 6, 7, 8]].isfinite().all()


# -- the gate without the pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 131])
@pytest.mark.parametrize("kind", [*KINDS, {"p": 0.25}, {"gated": False, "p": 0.25}])
def test_scores_alone(rows: int, kind: dict[str, Any], backend: str) -> None:
    p, seed = kind.get("p", 0.0), 2**40 + 1
    made = arguments((rows,), 33, 17, **{k: v for k, v in kind.items() if k != "p"})
    exact = doubled(made)
    got, want = scores_of(made, dropout_p=p, seed=seed, backend=backend), naive(exact, (rows,), p, seed)[1]
    assert got.dtype == torch.float32
    assert_close(got, want, FORWARD)
    grad = torch.randn_like(got)
    mine, right = gradients(got, made, grad), gradients(want, exact, grad.double())
    for name, a, b in zip((k for k in made if made[k] is not None), mine, right, strict=True):
        assert_close(a, b, GRADIENT, f"d {name}")


@pytest.mark.parametrize("dtype", HALVES)
def test_scores_alone_in_half_precision(dtype: torch.dtype, backend: str) -> None:
    made = arguments((131,), 64, 32, dtype=dtype)
    exact = doubled(made)
    got, want, plain = scores_of(made, backend=backend), naive(exact, (131,))[1], naive(made, (131,))[1]
    assert got.dtype == torch.float32
    assert_half(got, want, plain)
    grad = torch.randn_like(got)
    for name, mine, right in zip(made, gradients(got, made, grad), gradients(want, exact, grad.double()), strict=True):
        assert mine.dtype == dtype
        assert cosine(mine, right) >= 0.999, name


@pytest.mark.parametrize("dtype", HALVES)
def test_half_features_with_float32_parameters(dtype: torch.dtype) -> None:
    """By the backend that is taken for one small bag, with and without the pooling."""
    made = arguments((9,))
    half = made | {"x": made["x"].detach().to(dtype).requires_grad_()}
    exact = doubled(half)
    (pooled, scores), (want, want_scores) = fused(half, (9,)), naive(exact, (9,))
    alone = scores_of(half)
    assert pooled.dtype == dtype
    for got in (scores, alone):
        assert got.dtype == torch.float32
        assert_close(got, want_scores, 2 * torch.finfo(dtype).eps)
    assert_close(pooled, want, 2 * torch.finfo(dtype).eps)
    d_alone, d_want = gradients(alone.sum(), half), gradients(want_scores.sum(), exact)
    for name, mine, right in zip(half, d_alone, d_want, strict=True):
        assert mine.dtype == half[name].dtype
        assert cosine(mine, right) >= 0.999, name


def test_scores_alone_by_opcheck_and_compile() -> None:
    made, options = arguments((5,)), {"dropout_p": 0.5, "seed": 3}
    values = [made[name] for name in NAMES]
    torch.library.opcheck(ops.gated_attention_scores, (*values, 0.5, torch.tensor(3), -1, ""))
    compiled = torch.compile(lambda: scores_of(made, **options), fullgraph=True, backend="aot_eager")
    got, want = compiled(), scores_of(made, **options)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(gradients(got, made, grad), gradients(want, made, grad))


def test_scores_alone_under_autocast() -> None:
    made = arguments((9,))
    with torch.autocast("cpu", torch.bfloat16):
        scores = scores_of(made)
    assert scores.dtype == torch.float32
    assert cosine(scores, scores_of(made)) > 0.999
    scores.sum().backward()
    assert made["w_v"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 7, 12)}, r"x: expected \(N, L\)"),
        ({"x": torch.ones(7, 12, dtype=torch.int64)}, "x: expected float16, "),
        ({"w_u": torch.randn(5, 12)}, r"w_u: expected \(D, L\) = \(6, 12\), got \(5, 12\)"),
        ({"b_a": torch.randn(2, device="meta")}, "b_a: expected on cpu like x, got meta"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scores_of(arguments((7,)) | change)
    with pytest.raises(ValueError, match="dropout_p: expected 0 <= dropout_p < 1"):
        scores_of(arguments((7,)), dropout_p=1.0)


# -- what is not computed ----------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        return func(*args, **(kwargs or {}))


def backward(made: Arguments, backend: str, needs: tuple[bool, ...], pooled: bool = True, keep: bool = False) -> int:
    """The products of a backward whose gradient comes from the pooled rows, or from the scores."""
    where, lengths = module_of("gated_attention_pool", backend), (3, 0, 4)
    values = {k: None if v is None else v.detach() for k, v in made.items()}
    x, offsets, gate = values["x"], offsets_of(lengths), GateParameters(*(values[name] for name in NAMES[1:]))
    out, scores, stats, kept = where.gated_attention_pool(x, offsets, gate, 0.0, None, values["score_bias"], keep)
    grads = (torch.ones_like(out), None) if pooled else (None, torch.ones_like(scores))
    with Products() as products:
        found = where.gated_attention_pool_backward(
            *grads, x, offsets, gate, 0.0, None, out, scores, stats, kept if keep else None, needs
        )
    assert tuple(g is not None for g in found) == needs
    return products.count


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_gradient_of_score_bias_alone_needs_no_gate(name: str) -> None:
    able, reason = dispatch.can_run("gated_attention_pool", name, (torch.zeros(1, 1),))
    if not able:
        pytest.skip(f"{name}: {reason}")
    made, bias_alone = arguments((3, 0, 4), biased=True), (False,) * 7 + (True,)
    pooling = backward(made, name, bias_alone)
    gate = backward(made, name, (False, True, *(False,) * 5, True)) - pooling
    assert gate >= 2  # at least a product of forward again, and the gradient of the weights
    assert backward(made, name, (*(False,) * 6, True, True)) == pooling, "the last bias is a sum of scores"
    assert backward(made, name, bias_alone, pooled=False) == 0


def test_nor_does_it_run_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if not dispatch.can_run("gated_attention_pool", "native", (torch.zeros(1, 1),))[0]:
        pytest.skip("native: momkd._C is not built")
    from momkd.native import gate

    made = arguments((3, 0, 4), biased=True)
    made = {k: v if k == "score_bias" else v.detach() for k, v in made.items()}
    out = fused(made, (3, 0, 4), backend="native")[0].square().sum()
    want = naive(doubled(made), (3, 0, 4))[0].square().sum()
    monkeypatch.setattr(gate, "_backward", None)
    (d_bias,) = torch.autograd.grad(out, [made["score_bias"]])
    assert d_bias.shape == (7, 2)
    assert_close(out, want, FORWARD)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("torch", "momkd.reference.gated_attention_pool", "softmax_pool_backward"),
        ("native", "momkd.native.gate", "attention_pool_backward"),
        ("triton", "momkd.kernels.gated_attention_pool", "pool_backward"),
    ],
)
def test_scores_that_are_trained_alone_need_no_backward_of_the_pooling(
    name: str, module: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    able, reason = dispatch.can_run("gated_attention_pool", name, (torch.zeros(1, 1),))
    if not able:
        pytest.skip(f"{name}: {reason}")
    calls: list[str] = []

    def counted(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: calls.append(function) or own(*args, **options)

    holder = importlib.import_module(module)
    monkeypatch.setattr(holder, function, counted(getattr(holder, function)))
    made = arguments((3, 0, 4), biased=True)
    exact = doubled(made)
    gradients(fused(made, (3, 0, 4), backend=name)[0].sum(), made)
    assert calls
    calls.clear()
    got = gradients(fused(made, (3, 0, 4), backend=name)[1].square().sum(), made)
    assert not calls
    want = gradients(naive(exact, (3, 0, 4))[1].square().sum(), exact)
    for key, mine, right in zip(made, got, want, strict=True):
        assert_close(mine, right, GRADIENT, f"d {key}")


# -- what forward keeps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("gated", [True, False])
def test_the_torch_backend_keeps_activations_within_the_budget(dtype: torch.dtype, gated: bool) -> None:
    made = arguments((3, 0, 4), gated=gated, dtype=dtype)
    x, *rest = (made[name] for name in NAMES)
    size = 7 * (1 + gated) * 6 * dtype.itemsize
    results = []
    for allowed, shape in ((0, (0,)), (size - 1, (0,)), (size, (7, 1 + gated, 6)), (HUGE, (7, 1 + gated, 6))):
        pooled, scores, _, kept = ops.gated_attention_pool(
            x, offsets_of((3, 0, 4)), *rest, None, 0.4, torch.tensor(7), allowed, "torch"
        )
        alone, alone_kept = ops.gated_attention_scores(x, *rest, 0.4, torch.tensor(7), allowed, "torch")
        assert kept.shape == alone_kept.shape == shape
        assert not kept.requires_grad
        assert torch.equal(alone, scores)
        assert torch.equal(kept, alone_kept)
        results.append([pooled, scores, *gradients(pooled.float().square().sum() + scores.square().sum(), made)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or cosine(a, b) >= 0.999
            assert a is None or dtype != torch.float32 or torch.equal(a, b)


def test_kept_activations_save_products() -> None:
    made, needs = arguments((3, 0, 4), biased=True), (True,) * 8
    assert backward(made, "torch", needs, pooled=False) - backward(made, "torch", needs, pooled=False, keep=True) == 2

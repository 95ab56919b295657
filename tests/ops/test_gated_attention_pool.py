from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from momkd import functional as F
from momkd import ops
from momkd.reference.philox import gate_dropout_masks, keep_scale
from tests.compare import FORWARD, GRADIENT, HALVES, RAGGED, assert_close, assert_half, cosine, offsets_of

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = ("x", "w_v", "b_v", "w_u", "b_u", "w_a", "b_a")
Arguments = dict[str, Tensor | None]


def arguments(lengths: tuple[int, ...], width: int = 12, hidden: int = 6, heads: int = 2, **kind: object) -> Arguments:
    """Random x and parameters; kind: gated=False, bias=False, biased=True (with score_bias), dtype."""
    dtype = kind.get("dtype", torch.float32)
    made: Arguments = {
        "x": torch.randn(sum(lengths), width),
        "w_v": torch.randn(hidden, width) / width**0.5,
        "b_v": torch.randn(hidden),
        "w_u": torch.randn(hidden, width) / width**0.5,
        "b_u": torch.randn(hidden),
        "w_a": torch.randn(heads, hidden),
        "b_a": torch.randn(heads),
    }
    if not kind.get("gated", True):
        made["w_u"] = made["b_u"] = None
    if not kind.get("bias", True):
        made["b_v"] = made["b_u"] = made["b_a"] = None
    if kind.get("biased"):
        made["score_bias"] = torch.randn(sum(lengths), heads)
    return {k: None if v is None else v.to(dtype).requires_grad_() for k, v in made.items()}  # type: ignore[arg-type]


def doubled(made: Arguments) -> Arguments:
    return {k: None if v is None else v.detach().double().requires_grad_() for k, v in made.items()}


def naive(made: Arguments, lengths: tuple[int, ...], p: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bag by bag with torch's own functions; the dropout masks are the library's definition."""
    x, w_v, b_v, w_u, b_u, w_a, b_a = (made[name] for name in NAMES)
    linear = torch.nn.functional.linear
    v = torch.tanh(linear(x, w_v, b_v))
    u = torch.ones_like(v) if w_u is None else torch.sigmoid(linear(x, w_u, b_u))
    if p > 0:
        keep_v, keep_u = gate_dropout_masks(torch.tensor(seed), len(x), len(w_v), p)
        v = v * keep_v * keep_scale(p)
        u = u if w_u is None else u * keep_u * keep_scale(p)
    scores = linear(v * u, w_a, b_a)
    if (score_bias := made.get("score_bias")) is not None:
        scores = scores + score_bias
    spans = pairwise(offsets_of(lengths).tolist())
    pooled = [torch.softmax(scores[a:b], 0).T @ x[a:b] for a, b in spans]
    return torch.stack(pooled) if pooled else (scores.T @ x)[None][:0], scores


def fused(made: Arguments, lengths: tuple[int, ...], **options: object) -> tuple[Tensor, Tensor]:
    values, offsets = [made[name] for name in NAMES], offsets_of(lengths)
    options |= {"score_bias": made.get("score_bias"), "return_scores": True}
    return F.gated_attention_pool(values[0], offsets, *values[1:], **options)


def compare(
    made: Arguments, lengths: tuple[int, ...], p: float = 0.0, seed: int = 0, backend: str | None = None
) -> None:
    exact = doubled(made)
    pooled, scores = fused(made, lengths, dropout_p=p, seed=seed, backend=backend)
    want_pooled, want_scores = naive(exact, lengths, p, seed)
    assert_close(pooled, want_pooled, FORWARD, "pooled")
    assert_close(scores, want_scores, FORWARD, "scores")
    g_pooled, g_scores = torch.randn_like(pooled), torch.randn_like(scores)
    torch.autograd.backward([pooled, scores], [g_pooled, g_scores])
    torch.autograd.backward([want_pooled, want_scores], [g_pooled.double(), g_scores.double()])
    for name in made:
        if made[name] is not None:
            assert_close(made[name].grad, exact[name].grad, GRADIENT, f"d {name}")


@pytest.mark.parametrize("shape", RAGGED)
@pytest.mark.parametrize("kind", [{}, {"gated": False}, {"bias": False, "heads": 1}])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_the_board(shape: str, kind: dict[str, object], seed: int) -> None:
    torch.manual_seed(seed)
    compare(arguments(RAGGED[shape], **kind), RAGGED[shape])


@pytest.mark.parametrize(("width", "hidden", "heads"), [(1, 1, 1), (5, 3, 4), (33, 17, 16), (64, 32, 1)])
def test_odd_widths(width: int, hidden: int, heads: int) -> None:
    torch.manual_seed(0)
    compare(arguments(RAGGED["mixed"], width, hidden, heads), RAGGED["mixed"])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("seed", [5, 2**62 + 3])
def test_dropout_is_the_defined_mask(gated: bool, seed: int) -> None:
    torch.manual_seed(0)
    compare(arguments(RAGGED["mixed"], gated=gated), RAGGED["mixed"], p=0.25, seed=seed)


def test_dropout_seeds() -> None:
    made = arguments((20, 30))
    assert torch.equal(fused(made, (20, 30), dropout_p=0.5, seed=4)[0], fused(made, (20, 30), dropout_p=0.5, seed=4)[0])
    torch.manual_seed(1)
    first = fused(made, (20, 30), dropout_p=0.5)[0]
    assert not torch.equal(first, fused(made, (20, 30), dropout_p=0.5)[0])
    torch.manual_seed(1)
    assert torch.equal(first, fused(made, (20, 30), dropout_p=0.5)[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = RAGGED["mixed"]
    made = arguments(lengths, 64, 32, dtype=dtype)
    exact = doubled(made)
    pooled, scores = fused(made, lengths)
    assert pooled.dtype == dtype
    assert scores.dtype == torch.float32
    want, want_scores = naive(exact, lengths)
    plain, plain_scores = naive(made, lengths)
    assert_half(pooled, want, plain, "pooled")
    assert_half(scores, want_scores, plain_scores, "scores")
    grad = torch.randn_like(pooled)
    pooled.backward(grad)
    want.backward(grad.double())
    for name in NAMES[:-1]:  # the softmax cancels the gradient of b_a
        assert cosine(made[name].grad, exact[name].grad) >= 0.999, name


def test_features_in_half_and_parameters_in_float32() -> None:
    torch.manual_seed(0)
    made = arguments((30, 50))
    half = made | {"x": made["x"].detach().half()}
    pooled, _ = fused(half, (30, 50))
    assert pooled.dtype == torch.float16
    pooled.float().sum().backward()
    assert made["w_v"].grad.dtype == torch.float32
    assert_half(pooled, naive(doubled(half), (30, 50))[0], naive({k: v.half() for k, v in made.items()}, (30, 50))[0])


def test_gradcheck() -> None:
    torch.manual_seed(0)
    made = {k: v.detach().double().requires_grad_() for k, v in arguments((3, 0, 1, 4), 3, 2, 2).items()}

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return fused(dict(zip(NAMES, values, strict=True)), (3, 0, 1, 4), dropout_p=0.4, seed=2)

    assert torch.autograd.gradcheck(call, tuple(made[name] for name in NAMES))


@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_and_compile(biased: bool) -> None:
    made = arguments((3, 0, 2), biased=biased)
    values, bias, p = [made[name] for name in NAMES], made.get("score_bias"), 0.5 * biased
    given = (values[0], offsets_of((3, 0, 2)), *values[1:], bias, p, torch.tensor(3) if p else None, -1, "")
    torch.library.opcheck(ops.gated_attention_pool, given)
    compiled = torch.compile(lambda: fused(made, (3, 0, 2), dropout_p=p, seed=3), fullgraph=True, backend="aot_eager")
    got, want = compiled(), fused(made, (3, 0, 2), dropout_p=p, seed=3)
    torch.testing.assert_close(got, want)
    grads = [torch.randn_like(t) for t in want]
    leaves = list(made.values())
    torch.testing.assert_close(*(torch.autograd.grad(out, leaves, grads) for out in (got, want)))


def test_frozen_features_cost_no_gradient() -> None:
    made = arguments((4, 5))
    made["x"] = made["x"].detach()
    fused(made, (4, 5))[0].sum().backward()
    assert made["x"].grad is None
    assert made["w_v"].grad is not None


def test_scores_alone_can_be_trained() -> None:
    torch.manual_seed(0)
    made = arguments((4, 5))
    exact = doubled(made)
    fused(made, (4, 5))[1].square().sum().backward()
    naive(exact, (4, 5))[1].square().sum().backward()
    for name in NAMES:
        assert_close(made[name].grad, exact[name].grad, GRADIENT, f"d {name}")


def test_a_bad_bag_leaves_its_neighbours_alone() -> None:
    torch.manual_seed(0)
    made = arguments((3, 3, 3))
    clean = fused(made, (3, 3, 3))[0]
    x = made["x"].detach().clone()
    x[4, 2] = torch.nan
    x.requires_grad_()
    got, _ = fused(made | {"x": x}, (3, 3, 3))
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().any()
    got.sum().backward()
    assert x.grad[[0, 1, 2, 6, 7, 8]].isfinite().all()


def test_autocast() -> None:
    made = arguments((30, 50))
    with torch.autocast("cpu", torch.bfloat16):
        pooled, scores = fused(made, (30, 50))
    assert pooled.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    pooled.float().sum().backward()
    assert made["w_v"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 5, 12)}, r"x: expected \(N, L\)"),
        ({"w_v": torch.randn(6, 11)}, r"w_v: expected \(D, L\) = \(any, 12\), got \(6, 11\)"),
        ({"w_u": torch.randn(5, 12)}, r"w_u: expected \(D, L\) = \(6, 12\), got \(5, 12\)"),
        ({"w_u": None}, "b_u: expected None, because w_u is None"),
        ({"b_a": torch.randn(3)}, r"b_a: expected \(H,\) = \(2\), got \(3,\)"),
        ({"w_a": torch.randn(2, 6, device="meta")}, "w_a: expected on cpu like x, got meta"),
        ({"score_bias": torch.randn(7, 3)}, r"score_bias: expected \(N, H\) = \(7, 2\), got \(7, 3\)"),
        ({"score_bias": torch.randn(7)}, r"score_bias: expected \(N, H\) = \(7, 2\), got \(7,\)"),
        ({"score_bias": torch.randn(7, 2, device="meta")}, r"score_bias: expected on cpu like x, got meta; use"),
        ({"score_bias": torch.ones(7, 2, dtype=torch.int64)}, "score_bias: expected float16, .* got torch.int64"),
    ],
)
def test_bad_input(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused(arguments((3, 4)) | change, (3, 4))


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_bad_dropout(p: float) -> None:
    with pytest.raises(ValueError, match="dropout_p: expected 0 <= dropout_p < 1"):
        fused(arguments((3, 4)), (3, 4), dropout_p=p)

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from momkd import functional as F
from momkd import ops
from momkd.bags import Bags
from tests.compare import FORWARD, GRADIENT, HALVES, RAGGED, assert_close, assert_half, cosine, offsets_of

pytestmark = pytest.mark.usefixtures("poisoned")


def naive(values: torch.Tensor, scores: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Bag by bag, as one would write it on a board."""
    spans = pairwise(offsets_of(lengths).tolist())
    pooled = [torch.softmax(scores[a:b], 0).T @ values[a:b] for a, b in spans]
    return torch.stack(pooled) if pooled else (scores.T @ values)[None][:0]


@pytest.mark.parametrize("shape", RAGGED)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_the_board(shape: str, heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    lengths = RAGGED[shape]
    n = sum(lengths)
    values = torch.randn(n, 7, requires_grad=True)
    scores = (3 * torch.randn(n, heads)).requires_grad_()
    v64, s64 = values.detach().double().requires_grad_(), scores.detach().double().requires_grad_()
    got, want = F.attention_pool(values, scores, offsets_of(lengths)), naive(v64, s64, lengths)
    assert_close(got, want, FORWARD)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    assert_close(values.grad, v64.grad, GRADIENT, "d values")
    assert_close(scores.grad, s64.grad, GRADIENT, "d scores")


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = RAGGED["mixed"]
    values, scores = torch.randn(sum(lengths), 32).to(dtype), torch.randn(sum(lengths), 2).to(dtype)
    want = naive(values.double(), scores.double(), lengths)
    got = F.attention_pool(values, scores, offsets_of(lengths))
    assert got.dtype == dtype
    assert_half(got, want, naive(values, scores, lengths))
    v = values.clone().requires_grad_()
    v64 = values.double().requires_grad_()
    F.attention_pool(v, scores, offsets_of(lengths)).float().square().sum().backward()
    naive(v64, scores.double(), lengths).square().sum().backward()
    assert cosine(v.grad, v64.grad) >= 0.999


def test_gradcheck() -> None:
    offsets = offsets_of((3, 0, 1, 4))
    values = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, s: F.attention_pool(v, s, offsets), (values, scores))


def test_opcheck_and_compile() -> None:
    offsets = offsets_of((3, 0, 2))
    values, scores = torch.randn(5, 4, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    torch.library.opcheck(ops.attention_pool, (values, scores, offsets, ""))
    compiled = torch.compile(lambda v, s: F.attention_pool(v, s, offsets), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, scores), F.attention_pool(values, scores, offsets))


def test_hidden_rows_and_a_hidden_bag() -> None:
    values, scores = torch.randn(5, 4), torch.randn(5, 1)
    scores[1], scores[3:] = -torch.inf, -torch.inf
    scores.requires_grad_()
    pooled = F.attention_pool(values, scores, offsets_of((3, 2)))
    torch.testing.assert_close(pooled[0, 0], torch.softmax(scores[[0, 2], 0], 0) @ values[[0, 2]])
    assert (pooled[1] == 0).all()
    pooled.sum().backward()
    assert (scores.grad[3:] == 0).all()
    assert scores.grad.isfinite().all()


def test_large_scores_do_not_overflow() -> None:
    pooled = F.attention_pool(torch.eye(3), torch.tensor([[1e4], [1e4], [-1e4]]), offsets_of((3,)))
    torch.testing.assert_close(pooled[0, 0], torch.tensor([0.5, 0.5, 0.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_bag_leaves_its_neighbours_alone(bad: float) -> None:
    torch.manual_seed(0)
    values, scores = torch.randn(9, 4), torch.randn(9, 1)
    offsets = offsets_of((3, 3, 3))
    clean = F.attention_pool(values, scores, offsets)
    spoilt_values, spoilt_scores = values.clone(), scores.clone()
    spoilt_values[4], spoilt_scores[4] = bad, bad
    spoilt_scores.requires_grad_()
    got = F.attention_pool(spoilt_values, spoilt_scores, offsets)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert not got[1].isfinite().all()
    got.sum().backward()
    assert spoilt_scores.grad[[0, 1, 2, 6, 7, 8]].isfinite().all()


def test_bags_in_one_batch_or_apart() -> None:
    bags = Bags.from_list([torch.randn(n, 6) for n in (5, 0, 40, 1)])
    scores = torch.randn(bags.num_rows, 2)
    together = F.attention_pool(bags.features, scores, bags.offsets)
    for b, (x, s) in enumerate(zip(bags, scores.split(list(bags.lengths)), strict=True)):
        assert_close(F.attention_pool(x, s, offsets_of((len(x),)))[0], together[b].double(), 1e-6)


def test_non_contiguous_and_one_sided_gradients() -> None:
    wide, scores = torch.randn(6, 20), torch.randn(2, 6).T
    offsets = offsets_of((2, 4))
    values = wide[:, ::2]
    want = F.attention_pool(values.contiguous(), scores.contiguous(), offsets)
    torch.testing.assert_close(F.attention_pool(values, scores, offsets), want)
    scores = scores.clone().requires_grad_()
    F.attention_pool(values, scores, offsets).sum().backward()
    assert values.grad is None
    assert scores.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 3, 5])}, r"offsets: expected int32 \(B\+1,\), got int64 \(3,\)"),
        ({"offsets": offsets_of((3, 3))}, "offsets: expected to run from 0 to N = 5, got 0 to 6"),
        ({"offsets": torch.tensor([0, 4, 2, 5]).int()}, r"offsets\[2\] < offsets\[1\]"),
        ({"scores": torch.randn(4, 1)}, r"scores: expected \(N, H\) = \(5, any\), got \(4, 1\)"),
        ({"values": torch.ones(5, 2, dtype=torch.int64)}, "values: expected float16, bfloat16, float32 or float64"),
    ],
)
def test_bad_input(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"values": torch.randn(5, 2), "scores": torch.randn(5, 1), "offsets": offsets_of((3, 2))} | change
    with pytest.raises(ValueError, match=message):
        F.attention_pool(**arguments)

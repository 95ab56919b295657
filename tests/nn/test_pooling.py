from __future__ import annotations

import pytest
import torch

from momkd import Bags
from momkd import functional as F
from momkd.nn import GatedAttentionPool
from tests.compare import FORWARD, GRADIENT, assert_close


def bags(lengths: tuple[int, ...] = (70, 0, 1, 130), width: int = 12) -> Bags:
    torch.manual_seed(1)
    return Bags.from_list([torch.randn(n, width) for n in lengths])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_shapes_and_values(gated: bool, heads: int) -> None:
    """Against torch's own layers, bag by bag in float64."""
    batch, pool = bags(), GatedAttentionPool(12, 7, heads, gated=gated)
    pooled, scores = pool.pool_with_scores(batch)
    assert pooled.shape == (4, heads, 12)
    assert scores.shape == (201, heads)
    assert torch.equal(pool(batch), pooled)
    assert_close(pool.scores(batch), scores, FORWARD)
    exact = GatedAttentionPool(12, 7, heads, gated=gated).double()
    exact.load_state_dict(pool.state_dict())
    weights = torch.randn(4, heads, 12).double()
    total = torch.zeros((), dtype=torch.float64)
    for b, x in enumerate(batch.to(dtype=torch.float64)):
        hidden = torch.tanh(exact.attention_v(x))
        if exact.attention_u is not None:
            hidden = hidden * torch.sigmoid(exact.attention_u(x))
        want = torch.softmax(exact.attention_w(hidden), 0).T @ x
        assert_close(pooled[b], want, FORWARD)
        total = total + (want * weights[b]).sum()
    (pooled * weights).sum().backward()
    total.backward()
    for (name, got), want in zip(pool.named_parameters(), exact.parameters(), strict=True):
        if name == "attention_w.bias":  # softmax does not see it: the gradient is zero but for rounding
            assert got.grad.abs().max() < 1e-5
        else:
            assert_close(got.grad, want.grad, GRADIENT, name)


def test_parameters() -> None:
    names = {"attention_v.weight", "attention_v.bias", "attention_w.weight", "attention_w.bias"}
    assert set(GatedAttentionPool(4, 3, gated=False).state_dict()) == names
    assert set(GatedAttentionPool(4, 3).state_dict()) == names | {"attention_u.weight", "attention_u.bias"}


def test_dropout_falls_in_training_only() -> None:
    batch, pool = bags(), GatedAttentionPool(12, 16, dropout=0.5)
    twin = GatedAttentionPool(12, 16)
    twin.load_state_dict(pool.state_dict())
    torch.manual_seed(0)
    one, two = pool(batch), pool(batch)
    assert not torch.equal(one, two), "each call draws its own"
    torch.manual_seed(0)
    assert torch.equal(pool(batch), one), "from torch's generator"
    pool.eval()
    state = torch.get_rng_state()
    assert torch.equal(pool(batch), twin(batch))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn without dropout"


def test_dropout_has_the_right_mean() -> None:
    """Of the scores: the gate is a product of two values that are dropped apart, each scaled up by as much."""
    batch, pool = bags((4,)), GatedAttentionPool(12, 400, dropout=0.3)  # 4 rows of 400 units: cheap to draw
    want = pool.eval().pool_with_scores(batch)[1]
    torch.manual_seed(0)
    pool.train()
    with torch.no_grad():
        mean = torch.stack([pool.pool_with_scores(batch)[1] for _ in range(100)]).mean(0)
    assert (mean - want).abs().max() < 0.1 * float(pool.attention_w.weight.detach().norm())


def test_frozen_features_cost_no_gradient() -> None:
    batch, pool = bags(), GatedAttentionPool(12, 7)
    pool(batch).sum().backward()
    assert batch.features.grad is None
    x = batch.features.clone().requires_grad_()
    pool(batch.with_features(x)).square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).any()


def test_other_width_is_said() -> None:
    with pytest.raises(ValueError, match=r"w_v: expected \(D, L\) = \(any, 12\), got \(7, 5\)"):
        GatedAttentionPool(5, 7)(bags())


def test_under_autocast() -> None:
    batch, pool = bags(), GatedAttentionPool(12, 7)
    with torch.autocast("cpu", torch.bfloat16):
        pooled, scores = pool.pool_with_scores(batch)
    assert pooled.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(pooled[3].float(), pool(batch)[3]).min() > 0.999


def test_compiled() -> None:
    batch, pool = bags(), GatedAttentionPool(12, 7).eval()

    def call(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        v, u, w = pool.attention_v, pool.attention_u, pool.attention_w
        assert u is not None
        return F.gated_attention_pool(x, offsets, v.weight, v.bias, u.weight, u.bias, w.weight, w.bias)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch.features, batch.offsets), pool(batch))


def test_what_it_says() -> None:
    assert "gated=False, dropout=0.25" in repr(GatedAttentionPool(4, 3, gated=False, dropout=0.25))

"""Every drop-in against its restatement in float64: one bag, ragged, padded, forward and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from momkd import Bags
from momkd.compat import _gate, clam, eva, mil_lab, torchmil
from momkd.compat._gate import block_of, read
from momkd.compat._rows import one_bag
from tests.compare import FORWARD, GRADIENT, assert_close
from tests.compat.cases import CASES, Case, run_clam

PADDED = [name for name, case in CASES.items() if case.padded]


@pytest.fixture(autouse=True, params=[True, False], ids=["op", "modules"])
def by_the_op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways: by the fused op, as on a GPU, and by the modules and `attention_pool`."""
    monkeypatch.setattr(_gate, "fused_is_quicker", lambda *tensors: request.param)
    return bool(request.param)


def made(name: str, lengths: tuple[int, ...]) -> tuple[Case, nn.Module, list[Tensor]]:
    torch.manual_seed(len(name))
    case = CASES[name]
    model = case.make().eval()
    return case, model, [torch.randn(n, case.width).requires_grad_() for n in lengths]


def check(case: Case, model: nn.Module, bags: list[Tensor], got: Any) -> None:
    """Values, and the gradients of a random sum of all of them in the parameters and the patches."""
    exact = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    inputs = [x.detach().double().requires_grad_() for x in bags]
    each = [case.want(exact, x) for x in inputs]
    want = torch.cat([bag for bag, _ in each]), None if each[0][1] is None else torch.cat([r for _, r in each])
    total: Any = 0.0
    exact_total: Any = 0.0
    for kind, g, w in zip(("bags", "patches"), got, want, strict=True):
        if w is None:
            continue
        assert_close(g, w, FORWARD, kind)
        weights = torch.randn(w.shape, dtype=torch.float64)
        total, exact_total = total + (g * weights).sum(), exact_total + (w * weights).sum()
    total.backward()
    exact_total.backward()
    scale = max(float(p.grad.norm()) for p in exact.values() if p.grad is not None)
    pairs = [(n, p.grad, exact[n].grad) for n, p in model.named_parameters()]
    pairs += [(f"bag {i}", x.grad, e.grad) for i, (x, e) in enumerate(zip(bags, inputs, strict=True))]
    for n, g, w in pairs:
        if w is None or float(w.norm()) < 1e-9 * scale:  # softmax does not see a common bias: zero but for rounding
            assert g is None or float(g.norm()) < 1e-5 * scale, n
        else:
            assert_close(g, w, GRADIENT, n)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("patches", [70, 1])
def test_one_bag(name: str, patches: int) -> None:
    case, model, bags = made(name, (patches,))
    check(case, model, bags, case.run(model, bags[0][None] if case.padded else bags[0]))


@pytest.mark.parametrize("name", CASES)
def test_ragged(name: str) -> None:
    case, model, bags = made(name, (40, 1, 130) if "DSMIL" in name else (40, 0, 1, 130))
    check(case, model, bags, case.run(model, Bags.from_list(bags)))


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padded(name: str, dtype: torch.dtype) -> None:
    """Padding at the end, in the middle, none; and a bag that is all padding pools to zeros like an empty one."""
    case, model, bags = made(name, (9, 12, 4, 0))
    places = [range(9), range(12), (0, 3, 7, 11), ()]
    x, mask = torch.full((4, 12, case.width), 100.0), torch.zeros(4, 12)
    for b, rows in enumerate(places):
        mask[b, list(rows)] = 1
    x = x.masked_scatter((mask != 0)[..., None].expand_as(x), torch.cat(bags))
    check(case, model, bags, case.run(model, x, mask.to(dtype)))


def test_what_comes_back_where_masked() -> None:
    x, mask = torch.randn(1, 3, 8), torch.tensor([[True, False, True]])
    _, f = torchmil.AttentionPool(8)(x, mask, return_att=True)
    assert f.shape == (1, 3)
    assert f[0, 1] == 0
    model = mil_lab.ABMIL(8).eval()
    _, log = model(x, attn_mask=mask, return_attention=True)
    assert log["attention"][0, 0, 1] == torch.finfo(torch.float32).min
    h, attention = model.forward_attention(x, mask, attn_only=False)
    assert_close(attention[mask[:, None]], log["attention"][mask[:, None]], FORWARD)
    assert torch.equal(model.forward_attention(x, mask), attention)
    assert h.shape == (1, 3, 512)


@pytest.mark.parametrize("name", ["CLAM_SB", "torchmil pool", "DSMIL"])
def test_float64_and_half(name: str) -> None:
    case, model, bags = made(name, (33, 5))
    x = Bags.from_list([b.detach() for b in bags])
    want, _ = case.run(model.double(), x.to(dtype=torch.float64))
    assert want.dtype == torch.float64
    half, _ = case.run(model.bfloat16(), x.to(dtype=torch.bfloat16))
    assert torch.nn.functional.cosine_similarity(half.double(), want).min() > 0.99


@pytest.mark.parametrize("kind", [clam.CLAM_SB, clam.CLAM_MB])
def test_dropout_falls_as_in_clam(kind: Any) -> None:
    """Means and spreads of the logits, fused and by the modules one by one, over 400 draws each."""
    torch.manual_seed(0)
    model, x = kind(embed_dim=16, dropout=0.25).train(), torch.randn(30, 16)
    assert not isinstance(read(block_of(model.attention_net[3])), str), "the fused op has CLAM's dropout"

    def one_by_one() -> Tensor:
        h = model.attention_net[:3](x)
        z = torch.softmax(model.attention_net[3](h)[0], 0).T @ h
        if kind is clam.CLAM_SB:
            return model.classifiers(z)
        return torch.cat([layer(z[c][None]) for c, layer in enumerate(model.classifiers)], 1)

    with torch.no_grad():
        got = torch.cat([model(x)[0] for _ in range(400)])
        want = torch.cat([one_by_one() for _ in range(400)])
    error = ((got.var(0) + want.var(0)) / 400).sqrt()
    assert ((got.mean(0) - want.mean(0)).abs() < 4 * error).all()
    ratio = got.std(0) / want.std(0)
    assert ratio.min() > 0.85
    assert ratio.max() < 1.18
    assert got.std(0).min() > 0.005, "dropout is on"


def test_the_gate_itself_drops() -> None:
    """With the encoder's dropout off, what varies is the gate's, and its scores have the right mean."""
    torch.manual_seed(0)
    model, x = clam.CLAM_SB(embed_dim=16, dropout=0.25).train(), torch.randn(4, 16)
    model.attention_net[2].eval()
    with torch.no_grad():
        draws = torch.stack([model(x)[3] for _ in range(600)])
    want = model.eval()(x)[3]
    assert draws.std(0).min() > 1e-3
    assert ((draws.mean(0) - want).abs() < 5 * draws.std(0) / 600**0.5).all()


def test_dropout_before_the_activation_is_left_to_torch() -> None:
    """eva's place of it: the modules make the scores, so one seed gives the same numbers as the modules."""
    torch.manual_seed(0)
    model, x = eva.ABMIL(8, 2, None, dropout_attention=0.5).train(), torch.randn(1, 20, 8)
    block = block_of(model.gated_attention)
    assert "before the activation" in str(read(block))
    torch.manual_seed(1)
    got = model(x)
    torch.manual_seed(1)
    h = model.projector(x[0])
    scores = model.gated_attention(h)
    assert_close(got, model.classifier(torch.softmax(scores, 0).T @ h), FORWARD)
    assert not isinstance(read(block_of(model.eval().gated_attention)), str), "without dropout its place is no matter"


def test_frozen_patches_cost_no_gradient() -> None:
    model, x = torchmil.AttentionPool(8), torch.randn(2, 5, 8)
    model(x).sum().backward()
    assert x.grad is None


class Squares(nn.Module):
    """An extractor that momkd knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


@pytest.mark.parametrize(
    ("feat_ext", "sees"), [(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), (6, 6)), (Squares(), (2, 4, 6))]
)
def test_a_feature_extractor_sees_what_it_can_take(feat_ext: nn.Module, sees: tuple[int, ...]) -> None:
    """Row-wise ones see real patches only; others the batch as torchmil gives it."""
    model, seen = torchmil.ABMIL((6,), feat_ext=feat_ext), []
    handle = feat_ext.register_forward_hook(lambda _m, given, _out: seen.append(tuple(given[0].shape)))
    x, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    got, f = model(x, mask, return_att=True)
    handle.remove()
    assert f.shape == (2, 4)
    assert seen == [sees]
    z = torch.stack([model.pool(feat_ext(x[b : b + 1, :n]))[0] for b, n in enumerate((2, 4))])
    assert_close(got, model.classifier(z)[:, 0], FORWARD)


def test_torchmil_itself() -> None:
    """The package from PyPI: its state dict, its numbers, its results' shapes."""
    theirs = pytest.importorskip("torchmil.models", reason="the peer needs torchmil: pip install -e '.[peers]'")
    for act, gated in (("tanh", True), ("tanh", False), ("relu", True), ("gelu", False)):
        torch.manual_seed(0)
        peer = theirs.ABMIL(in_shape=(16,), att_act=act, gated=gated)
        model = torchmil.ABMIL(in_shape=(16,), att_act=act, gated=gated)
        assert model.load_state_dict(peer.state_dict()) == ([], [])
        x, mask = torch.randn(3, 20, 16), torch.ones(3, 20)
        mask[0, 5:], mask[1, :3] = 0, 0
        y = torch.tensor([0, 1, 1])
        (got, f), (want, f_want) = (m(x, mask, return_att=True) for m in (model, peer))
        assert_close(got, want, FORWARD)
        assert_close(f[mask != 0], f_want[mask != 0], FORWARD)
        assert_close(model.predict(x, mask)[0], want, FORWARD)
        losses = []
        for m in (model, peer):
            logits, loss = m.compute_loss(y, x, mask)
            assert logits.shape == (3,)
            loss["BCEWithLogitsLoss"].backward()
            losses.append(loss["BCEWithLogitsLoss"])
        assert_close(losses[0], losses[1], FORWARD)
        for (n, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
            assert_close(p.grad, q.grad, GRADIENT, n)


def test_lazy_width() -> None:
    model = torchmil.ABMIL(gated=True)
    assert model(torch.randn(2, 3, 7)).shape == (2,)
    assert model.pool.fc1.module.in_features == model.classifier.module.in_features == 7


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, bags = made("CLAM_MB", (40,))
    x = bags[0].detach()
    monkeypatch.undo()  # as it is
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, want in zip(run_clam(compiled, x), run_clam(model, x), strict=True):
        assert_close(got, want, FORWARD)
    pool = torchmil.AttentionPool(8, gated=True)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert_close(torch.compile(pool, backend="aot_eager")(x, mask), pool(x, mask), FORWARD)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: clam.CLAM_SB(embed_dim=8)(torch.randn(2, 3, 8)),
            r"expected one bag \(N, L\) or momkd.Bags, got a tens",
        ),
        (lambda: mil_lab.ABMIL(8)(torch.randn(3, 8)), r"expected a padded batch \(B, M, L\)"),
        (
            lambda: mil_lab.ABMIL(8)(torch.randn(2, 3, 8), attn_mask=torch.ones(3, 2)),
            r"mask: expected \(B, M\) = \(2, 3\)",
        ),
        (
            lambda: mil_lab.ABMIL(8)(Bags.from_list([torch.randn(3, 8)]), attn_mask=torch.ones(1, 3)),
            "mask: expected None",
        ),
        (lambda: torchmil.AttentionPool(8, act="elu"), "act: expected 'tanh', 'relu' or 'gelu', got 'elu'"),
        (lambda: clam.CLAM_SB(size_arg="tiny"), "size_arg: expected 'small' or 'big', got 'tiny'"),
        (lambda: block_of(nn.Linear(2, 2)), "Linear: expected a block that scores patches"),
        (
            lambda: CASES["DSMIL"].make()(Bags.from_list([torch.randn(3, 24), torch.randn(0, 24)])),
            "expected at least one patch in each bag, for DSMIL's critical one, got bag 1 empty",
        ),
    ],
)
def test_bad_input(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_softmax_of_rows_takes_gradient() -> None:
    rows = one_bag(Bags.from_list([torch.randn(3, 2), torch.randn(4, 2)]))
    scores = torch.randn(7, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rows.softmax, (scores,))
    assert_close(rows.softmax(scores)[:3], torch.softmax(scores[:3], 0), FORWARD)

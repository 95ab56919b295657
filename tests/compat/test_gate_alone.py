"""A gate whose softmax and pooling are its caller's: swapped in place, with what it returned before."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from momkd import Bags, functional
from momkd.compat import _gate, accelerate, clam, dtfd, eva, mil_lab, restore
from momkd.errors import InputError
from tests.compare import FORWARD, GRADIENT, assert_close
from tests.compat import foreign

GATES: dict[str, Callable[[], nn.Module]] = {
    "Attn_Net_Gated": lambda: foreign.PlainGate(8, 4, n_classes=3),
    "Attn_Net_Gated, dropout": lambda: foreign.PlainGate(8, 4, dropout=True),
    "Attn_Net": lambda: foreign.PlainNet(8, 4, dropout=True, n_classes=2),
    "scores": lambda: foreign.PlainScores(8, 4),
    "Attention_Gated": lambda: foreign.PlainAttentionGated(8, 4, 2),
}
CLAMS, ALONE = "CLAM's Attn_Net or Attn_Net_Gated", "a gate that returns its scores"


class OwnModel(nn.Module):
    """Sequential(Linear, ReLU, gate), and the softmax and the product in forward."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), gate)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores, h = self.attention(x)
        logits: Tensor = self.head((torch.softmax(scores, 0).T @ h).sum(0))
        return logits


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call of gated_attention_scores, which is taken wherever it can be."""
    found: list[dict[str, Any]] = []
    real = functional.gated_attention_scores
    monkeypatch.setattr(_gate, "fused_is_quicker", lambda *tensors: True)
    monkeypatch.setattr(functional, "gated_attention_scores", lambda *a, **k: found.append(k) or real(*a, **k))
    return found


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def gradients(model: nn.Module, x: Tensor, out: Tensor) -> list[Tensor]:
    weight = torch.linspace(1, 2, out.numel()).reshape(out.shape)
    return list(torch.autograd.grad((out * weight).sum(), [x, *model.parameters()]))


@pytest.mark.parametrize("name", GATES)
def test_same_numbers_and_the_same_parameters(name: str, calls: list[dict[str, Any]]) -> None:
    gate, x = GATES[name]().eval(), torch.randn(20, 8, requires_grad=True)
    kind, before, keys = type(gate), [id(p) for p in gate.parameters()], list(gate.state_dict())
    want = gate(x)
    d_want = gradients(gate, x, first(want))
    (swap,) = accelerate(gate).swapped
    assert swap.note == "one op where that is quicker"
    assert type(gate) is not kind
    assert isinstance(gate, kind)
    assert [id(p) for p in gate.parameters()] == before
    assert list(gate.state_dict()) == keys
    calls.clear()
    got = gate(x)
    assert len(calls) == 1
    assert type(got) is type(want)
    assert_close(first(got), first(want), FORWARD)
    if isinstance(want, tuple):
        assert got[1] is x
    scale = max(float(g.norm()) for g in d_want)
    for parameter, a, b in zip(["x", *keys], gradients(gate, x, first(got)), d_want, strict=True):
        if b.norm() > 1e-5 * scale:  # a softmax of its own does not see the last bias
            assert_close(a, b, GRADIENT, parameter)
    assert restore(gate) == ("",)
    assert type(gate) is kind
    calls.clear()
    assert torch.equal(first(gate(x)), first(want))
    assert not calls


def test_inside_a_model_of_ones_own(calls: list[dict[str, Any]]) -> None:
    model, x = OwnModel(foreign.PlainGate(8, 4, dropout=True, n_classes=2)).eval(), torch.randn(30, 6)
    x.requires_grad_()
    want = model(x)
    d_want = gradients(model, x, want)
    report = accelerate(model)
    assert [(s.name, s.type, s.layout) for s in report.swapped] == [("attention.2", "PlainGate", CLAMS)]
    assert not report.left
    calls.clear()
    got = model(x)
    assert len(calls) == 1
    assert_close(got, want, FORWARD)
    for (name, _), a, b in zip([("x", x), *model.named_parameters()], gradients(model, x, got), d_want, strict=True):
        if not name.endswith("attention_c.bias"):  # softmax does not see it
            assert_close(a, b, GRADIENT, name)
    again = accelerate(model)
    assert not again.swapped
    assert [s.reason for s in again.left] == ["computed by momkd already"]


@pytest.mark.parametrize("shape", [(2, 9, 8), (2, 3, 4, 8), (8,), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("name", ["Attn_Net_Gated", "Attn_Net", "scores"])
def test_padded_batches(name: str, shape: tuple[int, ...], calls: list[dict[str, Any]]) -> None:
    gate, x = GATES[name]().eval(), torch.randn(shape)
    want = gate(x)
    accelerate(gate)
    calls.clear()
    got = gate(x)
    assert len(calls) == 1
    assert_close(first(got), first(want), FORWARD)
    assert isinstance(want, Tensor) or got[1] is x


def test_its_argument_by_name_and_bags(calls: list[dict[str, Any]]) -> None:
    x = torch.randn(7, 8)
    bags = Bags.from_lengths(x, [3, 4])
    for name, word in (("scores", "features"), ("Attn_Net_Gated", "x")):
        gate = GATES[name]().eval()
        want = first(gate(x))
        accelerate(gate)
        assert_close(first(gate(**{word: x})), want, FORWARD)
        assert_close(first(gate(bags)), want, FORWARD)
    assert gate(bags)[1] is bags


def test_dropout_is_that_of_its_modules(calls: list[dict[str, Any]]) -> None:
    gate, x = GATES["Attn_Net_Gated, dropout"](), torch.randn(20, 8)
    accelerate(gate)
    calls.clear()
    for p in (0.25, 0.5):
        gate.attention_a[2].p = gate.attention_b[2].p = p
        gate(x)
    gate.eval()(x)
    assert [call["dropout_p"] for call in calls] == [0.25, 0.5, 0.0]
    torch.manual_seed(0)
    one = gate.train()(x)[0]
    torch.manual_seed(0)
    assert torch.equal(gate(x)[0], one)
    assert not torch.equal(gate(x)[0], one)
    calls.clear()
    gate.attention_b[2].eval()  # on one branch alone: the modules make the scores
    assert gate(x)[0].isfinite().all()
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, calls: list[dict[str, Any]]) -> None:
    gate, x = GATES["Attn_Net_Gated"]().eval().to(dtype), torch.randn(20, 8).to(dtype)
    want = gate(x)[0]
    accelerate(gate)
    got = gate(x)[0]
    assert got.dtype == want.dtype
    assert_close(got, want, {torch.float16: 5e-3, torch.bfloat16: 5e-2}.get(dtype, FORWARD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast(dtype: torch.dtype, calls: list[dict[str, Any]]) -> None:
    gate, x = GATES["Attn_Net_Gated"]().eval().to(dtype), torch.randn(20, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want = gate(x)[0]
        accelerate(gate)
        got = gate(x)[0]
    assert got.dtype == want.dtype
    assert_close(got, want, 5e-2)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["Attn_Net_Gated", "scores", "Attention_Gated"])
def test_copies(name: str, way: str) -> None:
    gate, x = GATES[name]().eval(), torch.randn(20, 8)
    accelerate(gate)
    if way == "deepcopy":
        twin = copy.deepcopy(gate)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(gate))
    else:
        file = io.BytesIO()
        torch.save(gate, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(first(twin(x)), first(gate(x)))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in gate.parameters()}
    assert restore(twin) == ("",), "a copy is accelerated too"
    twin.load_state_dict(gate.state_dict())


# -- what is left ------------------------------------------------------------------------------------------------------


class Scaled(foreign.PlainGate):
    def forward(self, x: Tensor) -> Any:
        return 2 * super().forward(x)[0], x


class DropsByItself(foreign.PlainGate):
    def forward(self, x: Tensor) -> Any:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class WithPart(foreign.PlainScores):
    def __init__(self) -> None:
        super().__init__(8, 4)
        self.before = nn.Dropout(0.5)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.before(features))


class WithParameter(foreign.PlainScores):
    def __init__(self) -> None:
        super().__init__(8, 4)
        self.sharpness = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        return self.sharpness * super().forward(features)


class AsList(foreign.PlainGate):
    def forward(self, x: Tensor) -> Any:
        return list(super().forward(x))


class TwoArguments(foreign.PlainGate):
    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return super().forward(x)


class Pools(foreign.PlainGate):
    """A whole model with the parts of a gate right inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(super().forward(x)[0], 0).T @ x


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Scaled(8, 4), f"looks like {CLAMS}, but its forward gives other numbers: relative difference"),
        (lambda: DropsByItself(8, 4), "its forward gives other numbers: relative difference"),
        (WithPart, "it has other parts too: before"),
        (WithParameter, "it has other parts too: sharpness"),
        (lambda: AsList(8, 4), "its forward gives other numbers: a list, momkd's a tuple"),
        (lambda: TwoArguments(8, 4), r"its forward takes \(self, x, scale\), not one argument"),
        (lambda: Pools(8, 4), "its forward gives other numbers: shapes"),
        (lambda: eva.GatedAttention(8, 4), "computed by momkd already"),
    ],
)
def test_another_computation_is_left(make: Callable[[], nn.Module], told: str) -> None:
    gate = make().train()
    kind = type(gate)
    with pytest.raises(InputError, match=f"(?s){told}"):
        accelerate(gate)
    assert type(gate) is kind
    assert gate.training
    assert all(part.training for part in gate.modules())


def test_a_gate_that_takes_no_batches_is_swapped() -> None:
    class Strict(foreign.PlainScores):
        def forward(self, features: Tensor) -> Tensor:
            n, _ = features.shape
            return super().forward(features).view(n, 1)

    gate = Strict(8, 4).eval()
    assert accelerate(gate).swapped[0].layout == ALONE


# -- drop-ins ----------------------------------------------------------------------------------------------------------


def test_drop_ins_make_scores_by_the_op_too(calls: list[dict[str, Any]]) -> None:
    x = torch.randn(9, 8)
    for gate in (
        clam.Attn_Net(8, 4, dropout=True),
        clam.Attn_Net_Gated(8, 4),
        dtfd.Attention_Gated(8, 4),
        mil_lab.GlobalAttention(8, 4, 0.25),
        mil_lab.GlobalGatedAttention(8, 4),
        eva.GatedAttention(8, 4).eval(),
    ):
        calls.clear()
        gate(x)
        assert len(calls) == 1, type(gate)
    calls.clear()
    model = clam.CLAM_SB(embed_dim=8).eval()
    scores = model(x, attention_only=True)
    assert len(calls) == 1
    assert_close(scores, model(x)[3], FORWARD)
    eva.GatedAttention(8, 4)(x)
    assert len(calls) == 1, "dropout before the activation is none that the op has"

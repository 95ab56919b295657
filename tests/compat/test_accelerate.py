"""Swapping in place: the numbers stay, the parameters are the same objects, and what is not understood is left."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from momkd import Bags, functional
from momkd.compat import _gate, accelerate, clam, restore
from momkd.compat._accelerate import _tensors
from momkd.errors import InputError
from tests.compare import FORWARD, GRADIENT, assert_close
from tests.compat import foreign

X, BATCH = (20, 8), (2, 9, 8)
MODELS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "CLAM_SB": (lambda: foreign.PlainCLAM(embed_dim=8), X, ""),
    "CLAM_MB ungated": (lambda: foreign.PlainCLAM_MB(embed_dim=8, gate=False), X, ""),
    "MIL-Lab": (lambda: foreign.PlainMILLab(in_dim=8), BATCH, ""),
    "torchmil": (lambda: foreign.PlainAttentionPool(in_dim=8, gated=True), BATCH, ""),
    "torchmil relu": (lambda: foreign.PlainAttentionPool(in_dim=8, act="relu"), BATCH, ""),
    "AttentionDeepMIL": (foreign.PlainDeepMIL, (1, 7, 1, 28, 28), ""),
    "DTFD-MIL": (lambda: foreign.PlainDTFD(8, 4), X, ""),
    "eva": (lambda: foreign.PlainEva(8, 2, 6), BATCH, ""),
    "TRIDENT": (lambda: foreign.PlainTrident(8, 4, n_heads=2, gated=True), BATCH, ""),
    "DSMIL": (lambda: foreign.PlainMILNet(8, 2), X, "b_classifier"),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    return make().eval(), torch.randn(shape)


def total(result: Any) -> Tensor:
    return sum(
        (t * torch.linspace(1, 2, t.numel()).reshape(t.shape)).sum() for t in _tensors(result) if t.is_floating_point()
    )  # type: ignore[return-value]


def assert_same(got: Any, want: Any) -> None:
    got, want = list(_tensors(got)), list(_tensors(want))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, FORWARD)


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_and_the_same_parameters(name: str) -> None:
    model, x = made(name)
    want = model(x)
    total(want).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    before, keys, kind = {n: id(p) for n, p in model.named_parameters()}, list(model.state_dict()), type(model)
    model.zero_grad()
    report = accelerate(model)
    assert [s.name for s in report.swapped] == [MODELS[name][2]]
    assert not report.left
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert isinstance(model, kind)
    assert not model.training
    got = model(x)
    assert_same(got, want)
    total(got).backward()
    scale = max(float(g.norm()) for g in grads.values() if g is not None)
    for n, p in model.named_parameters():
        if grads[n] is not None and grads[n].norm() > 1e-5 * scale:
            assert_close(p.grad, grads[n], GRADIENT, n)
    assert restore(model) == (MODELS[name][2],)
    assert type(model) is kind
    assert_same(model(x), want)
    assert restore(model) == ()


@pytest.mark.parametrize("name", ["CLAM_SB", "torchmil", "DSMIL"])
def test_ragged_batches_come_with_it(name: str) -> None:
    model, x = made(name)
    bags = [torch.randn(n, 8) for n in (5, 30)]
    first = 1 if name == "DSMIL" else 0
    want = torch.cat([list(_tensors(model(b[None] if x.ndim == 3 else b)))[first] for b in bags])
    accelerate(model)
    if name == "DSMIL":
        instance = model.i_classifier(torch.cat(bags))[1]
        got = model.b_classifier(Bags.from_list(bags), instance)[0]
    else:
        got = next(_tensors(model(Bags.from_list(bags))))
    assert_close(got, want, FORWARD)


def test_the_fused_op_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = functional.gated_attention_pool
    monkeypatch.setattr(_gate, "fused_is_quicker", lambda *tensors: True)
    monkeypatch.setattr(functional, "gated_attention_pool", lambda *a, **k: calls.append(1) or real(*a, **k))
    model, x = made("CLAM_SB")
    model(x)
    assert not calls
    accelerate(model)
    calls.clear()
    model(x)
    assert calls == [1]
    restore(model)
    model(x)
    assert calls == [1]


def test_an_optimizer_made_before_goes_on() -> None:
    model, x = made("CLAM_SB")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerate(model)
    first = model(x)[0][0, 0].item()
    model(x)[0][0, 0].backward()
    optimizer.step()
    assert model(x)[0][0, 0].item() < first


@pytest.mark.parametrize("name", ["CLAM_SB", "MIL-Lab", "DSMIL"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(name: str, way: str) -> None:
    model, x = made(name)
    accelerate(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert_same(twin(x), model(x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert restore(twin) == (MODELS[name][2],), "a copy is accelerated too"
    assert_same(twin(x), model(x))
    twin.load_state_dict(model.state_dict())


def test_inside_others_and_twice() -> None:
    torch.manual_seed(0)
    whole = nn.ModuleDict(
        {"a": foreign.PlainCLAM(embed_dim=8), "b": foreign.Survival(), "c": clam.CLAM_SB(embed_dim=8)}
    )
    report = accelerate(whole)
    assert [(s.name, s.type) for s in report.swapped] == [("a", "PlainCLAM"), ("b.block", "PlainGate")]
    assert {s.name: s.reason for s in report.left} == {"c": "computed by momkd already"}
    assert "swapped  a: PlainCLAM, CLAM's CLAM_SB or CLAM_MB; one op where that is quicker" in str(report)
    again = accelerate(whole)
    assert not again.swapped
    assert "left     a: PlainCLAM; computed by momkd already" in str(again)
    assert restore(whole) == ("a", "b.block")


def test_notes_say_what_is_fused() -> None:
    told = {name: accelerate(made(name)[0]).swapped[0].note for name in ("CLAM_SB", "torchmil relu", "DSMIL")}
    assert told == {
        "CLAM_SB": "one op where that is quicker",
        "torchmil relu": "scores by torch (activation ReLU where the op has Tanh), pooled by attention_pool",
        "DSMIL": "pooled by attention_pool",
    }


def test_a_model_that_computes_something_else_is_left() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"sharp": foreign.Sharper(embed_dim=8), "good": foreign.PlainCLAM(embed_dim=8)}).train()
    x = torch.randn(9, 8)
    model.eval()
    want = model["sharp"](x)
    model.train()
    model["sharp"].attention_net[2].eval()
    report = accelerate(model)
    assert [s.name for s in report.swapped] == ["good"]
    assert "its forward gives other numbers: relative difference" in report.left[0].reason
    assert not model["sharp"].attention_net[2].training, "modes are put back one by one"
    assert model["sharp"].training
    model.eval()
    assert_same(model["sharp"](x), want)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "got Sequential with none; looked for.*CLAM's CLAM_SB"),
        (
            lambda: clam.Attn_Net_Gated(8, 4),
            "what came near:\nleft     .the model.: Attn_Net_Gated; computed by momkd already",
        ),
        (
            lambda: foreign.OtherSignature(embed_dim=8),
            r"its forward takes \(self, h, temperature\), not \(self, h, label",
        ),
        (lambda: foreign.PlainAttentionPool(), "its parameters are not made yet; run it once before"),
        (lambda: clam.CLAM_SB(), "computed by momkd already"),
    ],
)
def test_nothing_to_swap_is_said(make: Any, told: str) -> None:
    model = make()
    with pytest.raises(InputError, match=f"(?s){told}"):
        accelerate(model)
    assert restore(model) == ()


def test_own_instance_loss_is_kept() -> None:
    class Own(foreign.PlainCLAM):
        def inst_eval(self, A: Tensor, h: Tensor, classifier: nn.Module) -> Any:
            return h.sum() * 0 + 7.0, torch.zeros(1), torch.zeros(1)

        def forward(
            self,
            h: Tensor,
            label: Tensor | None = None,
            instance_eval: bool = False,
            return_features: bool = False,
            attention_only: bool = False,
        ) -> Any:
            out = super().forward(h, None, False, return_features, attention_only)
            if instance_eval:
                out[4]["instance_loss"] = self.inst_eval(out[3], h, self.instance_classifiers[0])[0]
            return out

    model = Own(embed_dim=8)
    accelerate(model)
    *_, results = model(torch.randn(9, 8), label=torch.tensor([0]), instance_eval=True)
    assert results["instance_loss"] == 7


def test_a_compiled_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gate, "fused_is_quicker", lambda *tensors: True)
    gate, x = foreign.PlainGate(8, 4).eval(), torch.randn(20, 8)
    want = gate(x)
    accelerate(gate)
    assert_same(torch.compile(gate, backend="aot_eager", fullgraph=True)(x), want)


def test_compiled() -> None:
    model, x = made("CLAM_SB")
    want = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    report = accelerate(compiled)
    assert report.swapped[0].name == "_orig_mod"
    assert_same(compiled(x), want)
    assert_same(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)


def test_distributed(tmp_path: Any) -> None:
    """One process: gradients come through the wrapper, made before or after."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = made("CLAM_SB")
        plain = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        assert accelerate(wrapped).swapped[0].name == "module"
        wrapped(x)[0].sum().backward()
        plain(x)[0].sum().backward()
        for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if q.grad is not None and n != "attention_net.3.attention_c.bias":
                assert_close(p.grad, q.grad, GRADIENT, n)
        accelerate(plain)
        assert_same(nn.parallel.DistributedDataParallel(plain)(x), wrapped(x))
    finally:
        torch.distributed.destroy_process_group()


def test_torchmil_itself() -> None:
    theirs = pytest.importorskip("torchmil.models", reason="the peer needs torchmil: pip install -e '.[peers]'")
    torch.manual_seed(0)
    model, x, mask = theirs.ABMIL(in_shape=(8,), gated=True), torch.randn(3, 9, 8), torch.ones(3, 9)
    mask[0, 4:] = 0
    want = model(x, mask)
    report = accelerate(model)
    assert [(s.name, s.layout) for s in report.swapped] == [("pool", "torchmil's AttentionPool")]
    assert_close(model(x, mask), want, FORWARD)
    assert_close(model(Bags.from_padded(x, mask)), want, FORWARD)

"""Released checkpoints: the numbers of a plain re-statement on PyG and vector-quantize-pytorch, term by term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from momkd import Bags, graph
from momkd.compat import momkd_reference
from momkd.errors import InputError
from momkd.models import MoMKD
from tests.compare import FORWARD, GRADIENT, assert_close, relative

SIZES = [(1536, 768, 512, 64, 16), (96, 40, 64, 16, 5)]
TERMS = ("classification", "memory", "reconstruction", "soft_angle_omics", "soft_angle_slide")


def eager(sizes: tuple[int, ...] = SIZES[1]) -> Any:
    """The re-statement with random weights, every tensor of them."""
    why = "the peer needs PyG and vector-quantize-pytorch: pip install -e '.[peers]'"
    pytest.importorskip("torch_geometric", reason=why)
    pytest.importorskip("vector_quantize_pytorch", reason=why)
    from benchmarks.eager_momkd import EagerMoMKD

    model = EagerMoMKD(*sizes).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.tensor(-1.3) if name == "attn_log_tau" else torch.randn_like(p) / max(p.shape[-1], 4) ** 0.5)
            if name.startswith(("wsi_encoder.ln", "wsi_classifier_proto.0", "rna_tower.encoder.1")):
                p.add_(1)
    return model


def slide(width: int, nodes: int = 300) -> tuple[Tensor, Tensor]:
    """Features, and edges with self-loops and duplicates."""
    edges = graph.knn(torch.randint(0, 10_000, (nodes, 2))).edge_index()
    more = torch.tensor([[0, 3, 3], [0, 3, 4]])
    return torch.randn(nodes, width), torch.cat([edges, edges[:, :9], more], 1)


def bags(x: Tensor, edge_index: Tensor) -> Bags:
    return Bags.from_list([x]).with_edges(graph.from_edge_index(edge_index, len(x)))


@pytest.mark.parametrize("sizes", SIZES)
def test_logits_and_attention(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    peer = eager(sizes)
    x, edge_index = slide(sizes[0])
    got = momkd_reference.infer(momkd_reference.load(peer.state_dict()), x, edge_index=edge_index)
    want = peer.double().infer(x.double(), edge_index)
    assert got["logits"].shape == (1, 2)
    for name in ("logits", "attention"):
        assert_close(got[name], want[name], FORWARD, name)
        assert (got[name] - want[name]).abs().max() < 1e-5


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("term", TERMS)
def test_losses_and_gradients_term_by_term(term: str, label: int) -> None:
    """A gradient that is zero there, or not there at all, is so here."""
    torch.manual_seed(label)
    peer = eager()
    x, edge_index = slide(SIZES[1][0])
    profile = torch.randn(1, SIZES[1][1])
    model = momkd_reference.load(peer.state_dict())
    step = model.training_step(bags(x, edge_index), torch.tensor([label]), profile)
    assert set(step.losses) == set(TERMS)
    want = peer.double().losses(x.double(), edge_index, label, profile.double())
    assert_close(step.losses[term], want[term], FORWARD, term)
    step.losses[term].backward()
    want[term].backward()
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in peer.named_parameters()}
    banks = [grads.pop(f"{bank}._codebook.embed") for bank in ("mem_neg", "mem_pos")]
    largest = max(float(g.norm()) for g in (*grads.values(), *banks))
    wanted = {momkd_reference._name_here(name): g for name, g in grads.items()} | {"memory.memory": torch.cat(banks)}
    compared = 0
    for name, p in model.named_parameters():
        got = torch.zeros_like(p) if p.grad is None else p.grad
        if wanted[name].norm() <= 1e-9 * largest:  # a bias before a softmax or a norm: rounding alone
            assert got.norm() <= 1e-5 * largest, name
        else:
            assert_close(got, wanted[name], GRADIENT, name)
            compared += 1
    assert compared >= 5


def test_there_and_back() -> None:
    torch.manual_seed(0)
    peer = eager()
    state = peer.state_dict()
    back = momkd_reference.dump(momkd_reference.load(state))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        if not name.endswith(("initted", "cluster_size", "embed_avg")):
            assert torch.equal(back[name], tensor), name
    peer.load_state_dict(back)  # and the shapes of the rest


def test_without_genomics_and_with_module_prefix() -> None:
    state = {f"module.{k}": v for k, v in eager().state_dict().items() if not k.startswith("rna_")}
    model = momkd_reference.load(state)
    assert model.genomics is None


def test_coordinates_instead_of_edges() -> None:
    torch.manual_seed(0)
    model = momkd_reference.load(eager().state_dict()).train()
    x, coords = torch.randn(50, 96), torch.rand(50, 2)
    edge_index = graph.knn(coords).edge_index()
    one, two = (momkd_reference.infer(model, x, **how) for how in ({"edge_index": edge_index}, {"coords": coords}))
    assert relative(one["attention"], two["attention"]) < 1e-6
    assert model.training
    with pytest.raises(ValueError, match="expected one of them"):
        momkd_reference.infer(model, x)


def released_form() -> MoMKD:
    return MoMKD(8, encoder="gatv2", hidden_features=8, update="gradient", shared_projector=False)


def test_broken_checkpoints_are_named() -> None:
    state = momkd_reference.dump(released_form())
    missing = {k: v for k, v in state.items() if k != "wsi_encoder.ln2.bias"}
    with pytest.raises(InputError, match=r"expected a tensor 'wsi_encoder.ln2.bias'"):
        momkd_reference.load(missing)
    with pytest.raises(InputError, match=r"wsi_encoder.ln2.bias: expected \(8,\), got \(3,\)"):
        momkd_reference.load(state | {"wsi_encoder.ln2.bias": torch.zeros(3)})
    with pytest.raises(InputError, match=r"got 'optimizer.x' beside them"):
        momkd_reference.load(state | {"optimizer.x": torch.zeros(3)})
    with pytest.raises(InputError, match="expected a tensor 'wsi_encoder"):
        momkd_reference.load({})


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"encoder": "mlp"}, "another encoder"),
        ({"num_classes": 3}, "3 classes"),
        ({"shared_projector": True}, "one projector"),
        ({"pooling": "gated"}, "another pooling"),
    ],
)
def test_models_of_another_form_are_refused(options: dict[str, Any], got: str) -> None:
    given: dict[str, Any] = {"encoder": "gatv2", "hidden_features": 8, "shared_projector": False}
    with pytest.raises(InputError, match=got):
        momkd_reference.dump(MoMKD(8, **(given | options)))

"""GATv2Layer against PyG's GATv2Conv, from its state dict; GraphEncoder against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from momkd import Bags, graph, nn
from momkd.models import ABMIL, MoMKD
from tests.compare import FORWARD, GRADIENT, assert_close


def edge_lists() -> dict[str, tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(0)
    nearest = graph.knn(torch.randint(0, 3000, (80, 2), generator=g)).edge_index()
    loops = torch.arange(0, 80, 3).expand(2, -1)
    return {
        "nearest": (nearest, 80),
        "self-loops given": (torch.cat([nearest, loops, loops], 1), 80),
        "duplicates": (torch.cat([nearest, nearest[:, ::2]], 1), 80),
        "isolated nodes": (torch.randint(0, 20, (2, 70), generator=g), 50),
        "no edges": (torch.zeros(2, 0, dtype=torch.int64), 4),
    }


@pytest.mark.parametrize("kind", edge_lists())
@pytest.mark.parametrize(("heads", "each"), [(2, 16), (1, 7)])
def test_the_numbers_of_pyg(kind: str, heads: int, each: int) -> None:
    peer = pytest.importorskip("torch_geometric.nn", reason="the peer needs PyG: pip install -e '.[peers]'")
    torch.manual_seed(0)
    edge_index, nodes = edge_lists()[kind]
    conv = peer.GATv2Conv(24, each, heads=heads)
    for p in conv.parameters():
        torch.nn.init.normal_(p, std=0.4)
    layer = nn.GATv2Layer(24, each, heads=heads)
    layer.load_state_dict(conv.state_dict())
    conv = conv.double()
    x = torch.randn(nodes, 24, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    got, want = layer(x, graph.from_edge_index(edge_index, nodes)), conv(exact, edge_index)
    assert_close(got, want, FORWARD)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    assert_close(x.grad, exact.grad, GRADIENT, "d x")
    wanted = dict(conv.named_parameters())
    for name, p in layer.named_parameters():
        size = wanted[name].grad.norm()
        if size > 1e-9:
            assert_close(p.grad, wanted[name].grad, GRADIENT, name)
        else:  # without edges softmax has nothing to choose
            assert p.grad.norm() < 1e-5


def test_dropout_falls_while_training_only() -> None:
    torch.manual_seed(0)
    layer, edges, x = nn.GATv2Layer(8, 4, heads=2, dropout=0.5), graph.knn(torch.rand(30, 2)), torch.randn(30, 8)
    assert not torch.equal(layer(x, edges), layer(x, edges))
    layer.eval()
    assert torch.equal(layer(x, edges), layer(x, edges))


def test_encoder_is_its_formula() -> None:
    torch.manual_seed(0)
    encoder, edges, x = nn.GraphEncoder(12, 8).eval(), graph.knn(torch.rand(30, 2)), torch.randn(30, 12)
    elu = torch.nn.functional.elu
    first = elu(encoder.ln1(encoder.gat1(x, edges))) + encoder.res_proj1(x)
    second = elu(encoder.ln2(encoder.gat2(first, edges))) + first
    want, got = torch.maximum(first, second), encoder(x, edges)
    assert_close(got, want, 1e-6)
    grad, parameters = torch.randn_like(want), list(encoder.parameters())
    pairs = zip(*(torch.autograd.grad(out, parameters, grad) for out in (got, want)), strict=True)
    for (name, _), (a, b) in zip(encoder.named_parameters(), pairs, strict=True):
        assert_close(a, b, 1e-5, name)
    with pytest.raises(ValueError, match="expected a multiple of heads = 3, got 8"):
        nn.GraphEncoder(12, 8, heads=3)


@pytest.mark.parametrize("kind", [MoMKD, ABMIL])
def test_models_want_a_graph(kind: type[MoMKD] | type[ABMIL]) -> None:
    torch.manual_seed(0)
    model = kind(12, encoder="gatv2", hidden_features=8).eval()
    sizes = (20, 1, 0, 30)
    bags = Bags.from_list([torch.randn(n, 12) for n in sizes])
    with pytest.raises(ValueError, match="bags: expected a graph over the patches"):
        model(bags)
    whole = bags.with_edges(graph.batch([graph.knn(torch.rand(n, 2)) for n in sizes]))
    logits = model(whole).logits
    assert_close(torch.cat([model(whole[1:2]).logits, model(whole[3:]).logits]), logits[[1, 3]], 1e-5)
    step = model.train().training_step(whole, torch.tensor([0, 1, 0, 1]))
    sum(step.losses.values()).backward()
    assert all(p.grad is not None for p in model.encoder.parameters())

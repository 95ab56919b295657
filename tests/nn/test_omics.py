from __future__ import annotations

import pytest
import torch
from torch import nn

from momkd.nn import OmicsDecoder, OmicsEncoder

KINDS = [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Dropout, nn.Linear]


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize(("genes", "width", "hidden"), [(768, 512, 512), (33, 7, 20)])
def test_shapes(batch: int, genes: int, width: int, hidden: int) -> None:
    encoder = OmicsEncoder(genes, width, hidden_features=hidden)
    decoder = OmicsDecoder(width, genes, hidden_features=hidden)
    embedding = encoder(torch.randn(batch, genes))
    assert embedding.shape == (batch, width)
    assert decoder(embedding).shape == (batch, genes)


def test_the_decoder_mirrors_the_encoder() -> None:
    encoder, decoder = OmicsEncoder(40, 8, hidden_features=16, dropout=0.1), OmicsDecoder(8, 40, hidden_features=16)
    assert [type(layer) for layer in encoder.encoder] == [type(layer) for layer in decoder.decoder] == KINDS
    there = [layer.weight.shape for layer in encoder.encoder if isinstance(layer, nn.Linear)]
    back = [layer.weight.T.shape for layer in decoder.decoder if isinstance(layer, nn.Linear)]
    assert there == back[::-1] == [(16, 40), (8, 16)]
    assert encoder.encoder[3].p == 0.1
    assert decoder.decoder[3].p == 0.25


@pytest.mark.parametrize("module", [OmicsEncoder(20, 6, hidden_features=64), OmicsDecoder(20, 6, hidden_features=64)])
def test_dropout_falls_in_training_only(module: nn.Module) -> None:
    x = torch.randn(3, 20)
    module.train()
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_it_can_learn_to_reconstruct() -> None:
    torch.manual_seed(0)
    profile = torch.randn(32, 3) @ torch.randn(3, 20)
    encoder = OmicsEncoder(20, 3, hidden_features=32, dropout=0.0)
    decoder = OmicsDecoder(3, 20, hidden_features=32, dropout=0.0)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(decoder(encoder(profile)), profile)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

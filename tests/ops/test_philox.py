from __future__ import annotations

import pytest
import torch

from momkd.reference.philox import gate_dropout_masks, keep_scale, philox4x32

# Known answers of the Random123 distribution for philox4x32 with ten rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    def words(text: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(int(word, 16)) for word in text.split())

    assert [int(w) for w in philox4x32(words(counter), words(key))] == [int(w) for w in words(result)]


def test_the_written_definition_of_the_mask() -> None:
    """Column 6 of row 2^32 + 5 is word 2 of block 1: low half for tanh, high half for sigma."""
    seed = torch.tensor((7 << 32) + 9)
    zero = torch.tensor(0)
    words = philox4x32((torch.tensor(5), torch.tensor(1), torch.tensor(1), zero), (torch.tensor(9), torch.tensor(7)))
    word = int(words[2])
    tanh, sigma = gate_dropout_masks(seed, 1, 7, 0.5, first_row=(1 << 32) + 5)
    assert bool(tanh[0, 6]) == ((word & 0xFFFF) >= 1 << 15)
    assert bool(sigma[0, 6]) == ((word >> 16) >= 1 << 15)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_rates_and_independence(p: float) -> None:
    tanh, sigma = gate_dropout_masks(torch.tensor(3), 4000, 50, p)
    bound = 5 * (p * (1 - p) / tanh.numel()) ** 0.5
    for mask in (tanh, sigma):
        assert abs(mask.double().mean().item() - (1 - p)) < bound
    both = torch.corrcoef(torch.stack([tanh.double().flatten(), sigma.double().flatten()]))[0, 1]
    assert abs(both) < 0.02
    assert abs(tanh.double().mean().item() * keep_scale(p) - 1) < 2 * bound * keep_scale(p)


def test_a_mask_depends_on_its_place_alone() -> None:
    seed = torch.tensor(11)
    whole = gate_dropout_masks(seed, 40, 10, 0.3)
    part = gate_dropout_masks(seed, 10, 10, 0.3, first_row=20)
    assert torch.equal(whole[0][20:30], part[0])
    assert not torch.equal(whole[0], gate_dropout_masks(torch.tensor(12), 40, 10, 0.3)[0])

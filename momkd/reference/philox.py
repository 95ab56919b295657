"""Dropout bits from Philox 4x32-10, so that every backend draws the same mask and none has to store it.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

The word block of row i and columns 4j … 4j+3 is philox(counter = (i mod 2³², i div 2³², j, 0), key = (seed mod 2³²,
seed div 2³²)). Column d takes word d mod 4: its low 16 bits decide the tanh branch of the gate, its high 16 bits
the σ branch. In graph attention, row p is the place of a hearing (see `momkd.reference.graph_attention`), a column is a
head, the last word of the counter is 1, and the low 16 bits decide. A value is kept when its 16 bits are ≥
round(p·2¹⁶), so the probability is p to within 2⁻¹⁷, and the kept values are scaled by the reciprocal of the exact
probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LEVELS = 1 << 16


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox on words held in int64 tensors (0 ≤ value < 2³²); shapes broadcast. Returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product of two 32-bit words wraps in int64; its bits are still those of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def keep_threshold(p: float) -> int:
    """Of 2¹⁶ levels, those under this one are dropped."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep_scale(p: float) -> float:
    """The factor on kept values: 1 / (exact probability of being kept)."""
    return LEVELS / (LEVELS - keep_threshold(p))


def gate_dropout_masks(seed: Tensor, rows: int, columns: int, p: float, *, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Which values of the tanh and of the σ branch are kept: two (rows, columns) bool tensors on the seed's device.

    Args:
        seed: int64 scalar tensor.
        rows, columns: N and D of the activations.
        p: probability of dropping a value, 0 ≤ p < 1.
        first_row: the row that the first mask row belongs to.
    """
    bits, threshold = _words(seed, first_row, rows, columns, 0), keep_threshold(p)
    return (bits & 0xFFFF) >= threshold, (bits >> 16) >= threshold


def edge_dropout_mask(seed: Tensor, rows: int, heads: int, p: float) -> Tensor:
    """Which weights of graph attention are kept: (rows, heads) bool on the seed's device."""
    return (_words(seed, 0, rows, heads, 1) & 0xFFFF) >= keep_threshold(p)


def _words(seed: Tensor, first_row: int, rows: int, columns: int, last: int) -> Tensor:
    """(rows, columns) words of Philox; `last` is the last word of the counter."""
    device = seed.device
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]  # (N, 1)
    block = torch.arange((columns + 3) // 4, device=device)[None, :]  # (1, D/4)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    words = philox4x32((row & _MASK, row >> 32, block, torch.full_like(block, last)), key)
    return torch.stack(words, dim=-1).flatten(1)[:, :columns]

"""spherical_kmeans: Lloyd's iterations with cosine similarity, to fill a memory from rows seen once.

Seeding draws each next centre with probability in proportion to 1 − its largest cosine with those chosen (k-means++
on the sphere). A centre that loses all its rows is given the row that its own centre serves worst.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momkd.reference.memory_similarity import unit_rows
from momkd.reference.segments import accumulate_dtype


def _draw(weights: Tensor, generator: torch.Generator | None) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))


def _seed(unit: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """k rows of `unit` (N, S), far from one another by chance; N ≥ 1. Surplus centres are random directions."""
    far = unit.new_ones(unit.shape[0]).cpu()  # 1 − largest cosine with a chosen centre, (N,)
    centres: list[Tensor] = []
    while len(centres) < k and bool((far > 1e-6).any()):
        chosen = unit[_draw(far, generator)]
        centres.append(chosen)
        far = torch.minimum(far, (1 - unit @ chosen).clamp_min(0).cpu())
    if len(centres) < k:
        shape = (k - len(centres), unit.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=unit.dtype)
        centres.extend(unit_rows(noise)[0].to(unit.device))
    return torch.stack(centres)


def spherical_kmeans(z: Tensor, k: int, iterations: int, generator: torch.Generator | None = None) -> Tensor:
    """z (N, S) -> k unit centres (k, S). The generator is of the CPU. Waits for the device."""
    rows = z.to(accumulate_dtype(z.dtype))
    unit = unit_rows(rows[rows.isfinite().all(1) & (rows != 0).any(1)])[0]
    if unit.shape[0] == 0:
        noise = torch.randn((k, z.shape[1]), generator=generator, dtype=rows.dtype)
        return unit_rows(noise)[0].to(z.device)
    centres = _seed(unit, k, generator)
    for _ in range(iterations):
        cosine, nearest = (unit @ centres.T).max(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, unit)
        count = torch.bincount(nearest, minlength=k)
        moved = unit_rows(sums)[0]
        lost = (count == 0).nonzero()[:, 0]
        worst = cosine.argsort()[: len(lost)]
        worst = worst[cosine[worst] < 1 - 1e-6]  # rows that already sit on their centre help no other
        moved[lost] = centres[lost]
        moved[lost[: len(worst)]] = unit[worst]
        moved = torch.where((sums.norm(dim=1) > 0)[:, None] | (count == 0)[:, None], moved, centres)
        if torch.allclose(moved, centres, atol=1e-7):
            break
        centres = moved
    return centres

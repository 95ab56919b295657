from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from momkd import functional as F
from tests.compare import FORWARD, assert_close

pytestmark = pytest.mark.usefixtures("poisoned")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def objective(z: Tensor, centres: Tensor) -> float:
    """Mean cosine of the rows with their nearest centre, in float64."""
    return float((unit(z.double()) @ unit(centres.double()).T).amax(1).mean())


def clusters(directions: Tensor, each: int, spread: float = 0.05) -> Tensor:
    """Rows around every direction, of all lengths."""
    rows = directions.repeat_interleave(each, 0) + spread * torch.randn(len(directions) * each, directions.shape[1])
    return rows * torch.rand(len(rows), 1).add(0.1) * 10


@pytest.mark.parametrize(("n", "k", "s"), [(1, 1, 1), (1, 4, 3), (15, 16, 7), (16, 16, 8), (129, 5, 33), (500, 40, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_centres_of_any_shape(n: int, k: int, s: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    centres = F.spherical_kmeans(torch.randn(n, s).to(dtype), k, 10, seeded())
    assert centres.shape == (k, s)
    assert centres.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(centres.norm(dim=1), torch.ones(k), FORWARD)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_that_lie_apart_are_found(seed: int) -> None:
    torch.manual_seed(seed)
    directions = unit(torch.cat([torch.eye(8), -torch.eye(8)]))  # the nearest are at a right angle
    centres = F.spherical_kmeans(clusters(directions, 30), 16, 20, seeded(seed))
    nearest = (directions @ centres.T).argmax(1)
    assert sorted(nearest.tolist()) == list(range(16)), "one centre a cluster"
    assert (directions * centres[nearest]).sum(1).min() > 0.99


def test_it_is_where_lloyd_comes_to_rest() -> None:
    """Each centre is the normalised sum of the unit rows that are nearest to it, restated in float64."""
    torch.manual_seed(1)
    z = torch.randn(300, 6)
    centres = F.spherical_kmeans(z, 7, 200, seeded()).double()
    rows = unit(z.double())
    nearest = (rows @ centres.T).argmax(1)
    means = unit(torch.stack([rows[nearest == j].sum(0) for j in range(7)]))
    assert_close(centres, means, FORWARD)


def test_iterations_never_make_it_worse() -> None:
    torch.manual_seed(2)
    z = torch.randn(400, 5)
    reached = [objective(z, F.spherical_kmeans(z, 6, iterations, seeded(3))) for iterations in (1, 2, 4, 8, 16)]
    assert all(a <= b + 1e-6 for a, b in pairwise(reached))
    assert reached[0] < reached[-1]


def test_only_directions_count() -> None:
    torch.manual_seed(3)
    z = torch.randn(100, 4)
    longer = z * torch.rand(100, 1).add(0.01) * 1e4
    assert_close(F.spherical_kmeans(longer, 5, 10, seeded()), F.spherical_kmeans(z, 5, 10, seeded()), FORWARD)


def test_the_generator_decides() -> None:
    torch.manual_seed(4)
    z = torch.randn(200, 6)
    first = F.spherical_kmeans(z, 5, 1, seeded(1))
    torch.manual_seed(99)
    assert torch.equal(F.spherical_kmeans(z, 5, 1, seeded(1)), first)
    assert not torch.equal(F.spherical_kmeans(z, 5, 1, seeded(2)), first)


def test_rows_without_a_direction_are_left_out() -> None:
    torch.manual_seed(5)
    z = torch.randn(60, 4)
    dirty = torch.cat([z[:20], torch.zeros(5, 4), z[20:], z[:3]])
    dirty[-3, 0], dirty[-2, 1], dirty[-1, 2] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(F.spherical_kmeans(dirty, 4, 10, seeded()), F.spherical_kmeans(z, 4, 10, seeded()))


@pytest.mark.parametrize("rows", [torch.zeros(0, 5), torch.zeros(7, 5), torch.full((3, 5), torch.nan)])
def test_no_row_gives_random_directions(rows: Tensor) -> None:
    centres = F.spherical_kmeans(rows, 6, 10, seeded())
    assert_close(centres.norm(dim=1), torch.ones(6), FORWARD)
    assert (centres @ centres.T - torch.eye(6)).max() < 0.999, "and no two the same"


@pytest.mark.parametrize("distinct", [1, 3])
def test_fewer_directions_than_centres(distinct: int) -> None:
    """The directions that there are become centres; none of these is spent on a double."""
    torch.manual_seed(6)
    directions = unit(torch.randn(distinct, 4))
    centres = F.spherical_kmeans(directions.repeat(20, 1), 8, 10, seeded())
    assert_close(centres.norm(dim=1), torch.ones(8), FORWARD)
    near = centres @ directions.T > 1 - 1e-5
    assert (near.sum(0) == 1).all()


def test_as_many_directions_as_centres() -> None:
    torch.manual_seed(7)
    z = unit(torch.randn(9, 5))
    centres = F.spherical_kmeans(z, 9, 10, seeded())
    assert (z @ centres.T).amax(1).min() > 1 - 1e-5


def test_a_centre_that_loses_its_rows_gets_the_row_served_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded on purpose where nothing is: a lost centre moves to a row, or stays if all are served."""
    near = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.98, -0.12], [0.0, 1.0]])
    seeds = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    monkeypatch.setattr(sys.modules["momkd.reference.spherical_kmeans"], "_seed", lambda *_: seeds)
    centres = F.spherical_kmeans(near, 2, 10)
    assert_close(centres[1], near[3], FORWARD)
    assert centres[0, 0] > 0.999
    alone = F.spherical_kmeans(near[:1], 2, 10)  # here no row is served badly
    assert torch.equal(alone, seeds)


def test_strided_rows_and_no_gradient() -> None:
    torch.manual_seed(8)
    wide = torch.randn(50, 12, requires_grad=True)
    centres = F.spherical_kmeans(wide[:, ::3], 3, 5, seeded())
    assert not centres.requires_grad
    assert torch.equal(centres, F.spherical_kmeans(wide[:, ::3].detach().contiguous(), 3, 5, seeded()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(5), 2), r"z: expected \(N, S\) = \(any, any\), got \(5,\)"),
        ((torch.ones(5, 2).long(), 2), r"z: expected float16, .* got torch\.int64"),
        ((torch.randn(5, 2), 0), "k, iterations: expected at least 1 each, got 0 and 20"),
        ((torch.randn(5, 2), 2, 0), "k, iterations: expected at least 1 each, got 2 and 0"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F.spherical_kmeans(*arguments)

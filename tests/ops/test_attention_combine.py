"""What only the merging of tiles to bags can get wrong: groups of tiles, grids, and sameness of bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from momkd import dispatch, gpu, reference
from momkd import functional as F
from tests.compare import FORWARD, assert_close, offsets_of

able, reason = dispatch.can_run("attention_pool", "triton", (torch.zeros(1),))
interpreted = pytest.mark.skipif(not able, reason=f"Triton: {reason}; TRITON_INTERPRET=1 runs kernels on the CPU")
pytestmark = pytest.mark.usefixtures("poisoned")

ROWS = 64  # of a tile
LENGTHS = (0, 2 * ROWS + 2, 5 * ROWS + 3, 1, 4 * ROWS, 0, 4 * ROWS + 1, 0)


def grouped(size: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Groups of `size` tiles; the names of the kernels that combine tiles, as they are launched."""
    module = gpu.kernels("_combine")
    launched, launch = list[str](), module.launch
    monkeypatch.setattr(module, "GROUP", size)
    monkeypatch.setattr(module, "launch", lambda k, *a, **m: (launched.append(k.__name__), launch(k, *a, **m)))
    return launched


@interpreted
@pytest.mark.parametrize("size", [2, 3, 1000])
@pytest.mark.parametrize("heads", [1, 3])
def test_groups_of_tiles(size: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    launched = grouped(size, monkeypatch)
    values, scores, offsets = torch.randn(sum(LENGTHS), 150), 3 * torch.randn(sum(LENGTHS), heads), offsets_of(LENGTHS)
    start = int(offsets[2])
    scores[start : start + 3 * ROWS + 1] = -math.inf  # whole groups of a bag, and some of the next
    scores[int(offsets[4]) : int(offsets[5])] = -math.inf  # a whole bag
    got = F.attention_pool(values, scores, offsets, backend="triton")
    want = reference.attention_pool(values.double(), scores.double(), offsets)[0]
    assert_close(got, want, FORWARD)
    assert torch.equal(got[[0, 4, 5, 7]], torch.zeros(4, heads, 150))
    assert launched == (["group_kernel"] if size < 1000 else []) + ["combine_kernel"]


@interpreted
def test_a_bag_has_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone a bag fits into one group and is not grouped; beside others it is."""
    torch.manual_seed(0)
    launched = grouped(6, monkeypatch)
    offsets = offsets_of(LENGTHS)
    values, scores = torch.randn(sum(LENGTHS), 40), 3 * torch.randn(sum(LENGTHS), 2)
    together = F.attention_pool(values, scores, offsets, backend="triton")
    assert "group_kernel" in launched
    launched.clear()
    for bag, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        alone = F.attention_pool(values[begin:end], scores[begin:end], offsets_of((end - begin,)), backend="triton")
        assert torch.equal(alone[0], together[bag])
    assert "group_kernel" not in launched


@interpreted
def test_a_nan_in_a_group_stays_in_its_bag(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    grouped(2, monkeypatch)
    offsets = offsets_of(LENGTHS)
    values, scores = torch.randn(sum(LENGTHS), 40), torch.randn(sum(LENGTHS), 1)
    clean = F.attention_pool(values, scores, offsets, backend="triton")
    for bad in (math.nan, math.inf):
        spoilt = scores.clone()
        spoilt[int(offsets[3]) - 1] = bad
        got = F.attention_pool(values, spoilt, offsets, backend="triton")
        assert got[2].isnan().all()
        others = [0, 1, 3, 4, 5, 6, 7]
        assert torch.equal(got[others], clean[others])


@pytest.mark.skipif(gpu.triton()[0] is None, reason=gpu.triton()[1])
@pytest.mark.parametrize(("rows", "bags"), [(1_000_000, 1), (1_000_000, 40), (4_000_000, 1), (16_384 + 64, 1)])
def test_no_program_reads_many_tiles(rows: int, bags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A giant bag is spread over programs, by numbers that the host knows; nothing is launched here."""
    module, width = gpu.kernels("_combine"), 1024
    launched: list[tuple[str, tuple[int, ...], Tensor]] = []
    monkeypatch.setattr(module, "launch", lambda k, grid, parts, *a, **m: launched.append((k.__name__, grid, parts)))
    tiles = rows // ROWS + bags
    parts, stats = torch.zeros(1).expand(tiles, 1, width), torch.zeros(1).expand(tiles, 1, 2)
    like, offsets = torch.zeros(1, width), torch.zeros(bags + 1, dtype=torch.int32)
    module.combine(parts, stats, offsets, like, gpu.kernels("_tuning").Tiles(ROWS, 128))
    (first, grid, _), (second, last_grid, groups) = launched
    assert (first, second) == ("group_kernel", "combine_kernel")
    assert len(grid) == len(last_grid) == 1
    assert grid[0] >= tiles * width // (module.GROUP * 128)
    assert len(groups) <= tiles // module.GROUP + bags
    longest = max(module.GROUP, tiles // module.GROUP + 1)
    assert longest <= 256  # tiles after one another, where all rows are of one bag

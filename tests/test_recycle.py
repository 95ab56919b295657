"""What one step kept is room for the next."""

from __future__ import annotations

import pytest
import torch

from momkd import native

pytestmark = pytest.mark.skipif(native.extension()[0] is None, reason=f"momkd._C: {native.extension()[1]}")


@pytest.fixture(autouse=True)
def _emptied() -> None:
    from momkd.native import recycle

    recycle.clear()


def test_memory_is_lent_again_once_nothing_holds_it() -> None:
    from momkd.native import recycle

    first = recycle.empty((3000, 1000), torch.float32)
    address, part = first.data_ptr(), first[5:]
    assert address % 64 == 0
    del first
    second = recycle.empty((3000, 1000), torch.float32)
    assert second.data_ptr() != address  # a part of the first is alive still
    part.fill_(1)
    second.fill_(2)
    assert (part == 1).all()
    del part, second
    third = recycle.empty((5000, 1000), torch.bfloat16)
    assert third.data_ptr() % 64 == 0
    assert third.dtype == torch.bfloat16


def test_a_buffer_far_too_large_is_not_lent() -> None:
    from momkd.native import recycle

    large = recycle.empty((1 << 24,), torch.float32)
    address = large.data_ptr()
    del large
    assert recycle.empty((1 << 21,), torch.float32).data_ptr() != address


def test_only_one_is_held_and_small_ones_are_torchs_own() -> None:
    from momkd.native import recycle

    made = [recycle.empty((1 << 21,), torch.float32) for _ in range(3)]
    assert len({t.data_ptr() for t in made}) == 3
    del made
    assert len(recycle._free) == 1
    assert not recycle._lent
    recycle.empty((10,), torch.float32)
    assert len(recycle._free) == 1
    recycle.clear()
    assert not recycle._free

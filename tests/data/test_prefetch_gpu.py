"""On a GPU: batches are whole when they are used, though copies run ahead and memory is used again."""

from __future__ import annotations

import pytest
import torch

from momkd.data.batches import BagLoader
from momkd.data.prefetch import DeviceCache
from tests.data.test_prefetch import ALL, HALF, loader, same, threads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
LARGE = 20_000  # patches of width 256: 20 MB


def large(**options: object) -> BagLoader:
    slides = [f"s{i}" for i in range(12)]
    features = {s: torch.full((LARGE, 256), float(i)) for i, s in enumerate(slides)}
    labels = torch.arange(12).remainder(2).numpy()
    return BagLoader(slides, labels, dict.fromkeys(slides, LARGE), features.__getitem__, slides_per_step=1, **options)


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("limit", [None, HALF, ALL])
@pytest.mark.parametrize("options", [{}, {"max_patches": 5, "graphs": True}], ids=str)
def test_batches_are_those_of_the_cpu(options: dict[str, object], limit: int | None, pin: bool) -> None:
    plain, cache = loader(**options), None if limit is None else DeviceCache("cuda", limit)
    made = loader(**options, pin=pin, device_cache=cache)
    for epoch in range(2):
        plan = plain.training(3, epoch)
        taken = made.batches(plan, seed=(3, epoch), device="cuda")
        for batch, want in zip(taken, plain.batches(plan, seed=(3, epoch)), strict=True):
            assert all(t.device.type == "cuda" for t in batch.tensors())
            assert same(batch.to(torch.device("cpu")), want)
    assert threads() == set()


@pytest.mark.parametrize("limit", [None, 6 * LARGE * 256 * 4])
def test_memory_is_not_used_again_before_its_time(limit: int | None) -> None:
    """The compute stream is far behind the host when it reads a batch that the host has already let go."""
    made = large(pin=True, device_cache=None if limit is None else DeviceCache("cuda", limit))
    for _ in range(2):
        sums = []
        for batch in made.batches(made.once(), device="cuda"):
            torch.cuda._sleep(20_000_000)  # about 10 ms; a copy takes 1
            sums.append((batch.bags.features == float(batch.number)).all())
            del batch
        assert torch.stack(sums).all()


def test_few_batches_take_memory() -> None:
    made = large(pin=True)
    list(made.batches(made.once()[:1], device="cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for batch in made.batches(made.once(), device="cuda"):
        torch.cuda._sleep(20_000_000)
        batch.bags.features.sum()
    assert torch.cuda.max_memory_allocated() - before < 3.2 * LARGE * 256 * 4


def test_a_copy_runs_beside_the_computation() -> None:
    """While the compute stream is kept busy, the next batch comes to the device."""
    made = large(pin=True)
    list(made.batches(made.once(), device="cuda"))  # memory is allocated, which may wait for the device
    taken = made.batches(made.once(), device="cuda")
    next(taken)
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy.record()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        batch = next(taken)
        first = float(batch.bags.features[0, 0])  # waits for the copy alone
    assert first == 1.0
    assert not busy.query()
    taken.close()

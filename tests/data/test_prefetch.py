"""Batches ahead of the model: the order of copies and streams, errors and early stops, features kept on a device."""

from __future__ import annotations

import ast
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from momkd import graph
from momkd.data import batches
from momkd.data.batch import Batch
from momkd.data.batches import BagLoader
from momkd.data.prefetch import DeviceCache, ahead
from momkd.errors import InputError
from tests.data.fake_streams import FakeStreams, install, pinned

SIZES = [7, 1, 30, 12, 25, 3, 18, 9]
WIDTH = 4
CPU = torch.device("cpu")


def loader(reads: list[str] | None = None, *, graphs: bool = False, **options: object) -> BagLoader:
    rng = np.random.default_rng(0)
    slides = [f"s{i}" for i in range(len(SIZES))]
    features = {
        s: torch.from_numpy(rng.standard_normal((n, WIDTH))).float() for s, n in zip(slides, SIZES, strict=True)
    }
    coords = {s: rng.integers(0, 50, (n, 2)) for s, n in zip(slides, SIZES, strict=True)}
    omics = rng.standard_normal((len(SIZES), 3)).astype(np.float32)
    omics[2] = np.nan

    def read(slide: str) -> torch.Tensor:
        if reads is not None:
            reads.append(slide)
        return features[slide]

    def edges(slide: str, rows: np.ndarray | None) -> graph.Edges:
        return graph.knn(coords[slide] if rows is None else coords[slide][rows], 3)

    labels = np.arange(len(SIZES)) % 2
    sizes = dict(zip(slides, SIZES, strict=True))
    given = {"slides_per_step": 3, "graph": edges if graphs else None, **options}
    return BagLoader(slides, labels.astype(np.int64), sizes, read, omics, **given)


def threads() -> set[str]:
    return {t.name.split("_")[0] for t in threading.enumerate() if t.name.startswith("momkd-")}


def same(one: Batch, other: Batch) -> bool:
    equal = [torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True)]
    return (one.number, one.slide_ids, one.bags.lengths) == (other.number, other.slide_ids, other.bags.lengths) and all(
        equal
    )


def eventually(true: Callable[[], bool]) -> bool:
    """Whether it comes true within seconds."""
    end = time.monotonic() + 20
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return true()


# -- tasks in a thread -------------------------------------------------------------------------------------------------


def test_a_task_alone_runs_where_it_is_asked_for() -> None:
    assert list(ahead(iter([threading.current_thread]), 2, "momkd-test")) == [threading.main_thread()]
    one, *others = ahead(iter([threading.current_thread] * 3), 2, "momkd-test")
    assert one.name.startswith("momkd-test")
    assert set(others) == {one}
    assert list(ahead(iter([]), 2, "momkd-test")) == []


def test_results_come_in_order_and_only_so_many_are_made_ahead() -> None:
    done: list[int] = []
    made = ahead((lambda n=n: done.append(n) or n for n in range(6)), 2, "momkd-test")
    assert not done, "nothing runs before the first is asked for"
    assert next(made) == 0
    assert eventually(lambda: done == [0, 1, 2])
    time.sleep(0.02)
    assert done == [0, 1, 2]
    assert list(made) == [1, 2, 3, 4, 5]
    assert threads() == set()


def test_an_error_comes_in_its_turn_and_leaves_no_thread() -> None:
    def task(n: int) -> int:
        if n == 2:
            raise InputError("slide 2: bad")
        return n

    made = ahead((lambda n=n: task(n) for n in range(9)), 3, "momkd-test")
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(InputError, match="slide 2: bad"):
        next(made)
    assert threads() == set()
    assert next(made, None) is None


def test_closing_drops_what_has_not_begun() -> None:
    begun: list[int] = []
    go = threading.Event()

    def task(n: int) -> int:
        begun.append(n)
        if n == 1:
            go.wait(20)
        return n

    made = ahead((lambda n=n: task(n) for n in range(9)), 4, "momkd-test")
    assert next(made) == 0
    assert eventually(lambda: begun == [0, 1])
    threading.Timer(0.05, go.set).start()
    made.close()
    assert begun == [0, 1], "tasks 2 to 4 were queued and never run"
    assert threads() == set()


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    return install(monkeypatch)


@pytest.mark.parametrize("graphs", [False, True])
def test_copies_run_on_the_side_stream_and_the_compute_stream_waits(fake: FakeStreams, graphs: bool) -> None:
    made = loader(graphs=graphs)
    plain = list(made.batches(made.once()))
    assert not fake.log, "without a device nothing is copied"
    taken = made.batches(made.once(), device="cpu")
    for n, (batch, want) in enumerate(zip(taken, plain, strict=True)):
        assert same(batch, want)
        copier = [(i, *entry) for i, entry in enumerate(fake.log) if entry[3].startswith("momkd-copy")]
        (place,) = [i for i, entry in enumerate(copier) if entry[1:3] == ("copy", n)]
        before, copy, after = copier[place - 1 : place + 2]
        assert before[1] == "synchronize"
        assert copy[3] == "side"
        assert (after[1], after[3]) == ("record", "side")
        waited = [i for i, entry in enumerate(fake.log) if entry[0] == "wait" and entry[1] == after[2]]
        assert len(waited) == 1
        assert waited[0] > after[0]
        assert fake.log[waited[0]][2:] == ("compute", "MainThread")
        kept = {entry[1] for entry in fake.log[waited[0] :] if entry[0] == "keep" and entry[2] == "compute"}
        assert kept >= {t.data_ptr() for t in batch.tensors()}
        assert len(batch.tensors()) == (11 if graphs else 5)
    assert len(plain) == 3
    assert threads() == set()


def test_the_next_batch_is_copied_while_one_is_in_use_and_no_further(fake: FakeStreams) -> None:
    made = loader(slides_per_step=1)
    taken = made.batches(made.once(), device="cpu")
    for n in range(len(SIZES) - 2):
        assert next(taken).number == n
        assert eventually(lambda n=n: ("copy", n + 1) in [entry[:2] for entry in fake.log])
        time.sleep(0.01)
        assert [entry[1] for entry in fake.of("copy")] == list(range(n + 2))
    taken.close()
    # The copy of batch n + 2 waits for what the compute stream was given until batch n was done with.
    marks = {entry[1]: i for i, entry in enumerate(fake.log) if entry[0] == "record" and entry[2] == "compute"}
    awaited = [(i, marks[entry[1]]) for i, entry in enumerate(fake.log) if entry[0] == "synchronize"]
    received = [i for i, entry in enumerate(fake.log) if entry[0] == "wait"]
    for n, (synchronized, marked) in enumerate(awaited[2:]):
        assert received[n] < marked < synchronized
    assert threads() == set()


def test_a_stream_of_the_consumer_is_the_one_that_waits(fake: FakeStreams) -> None:
    made = loader()
    with torch.cuda.stream(torch.cuda.Stream(name="mine")):
        list(made.batches(made.once(), device="cpu"))
    assert {entry[2] for entry in fake.of("wait", "keep")} == {"mine"}
    assert {entry[2] for entry in fake.of("copy")} == {"side"}


@pytest.mark.parametrize("streams", [False, True])
def test_an_error_of_the_reader_reaches_the_consumer(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if streams:
        install(monkeypatch)
    made = loader(slides_per_step=1)
    plain = made.read

    def read(slide: str) -> torch.Tensor:
        if slide == "s4":
            raise InputError("s4: bad")
        return plain(slide)

    made.read = read
    taken = made.batches(made.once(), device="cpu")
    assert [next(taken).number for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(InputError, match="s4: bad"):
        next(taken)
    assert threads() == set()
    made.skipped = {}
    assert [batch.number for batch in made.batches(made.once(), device="cpu")] == [0, 1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_consumer_that_stops_early_leaves_no_thread(
    stop: int, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streams:
        install(monkeypatch)
    reads: list[str] = []
    made = loader(reads, slides_per_step=1, device_cache=DeviceCache("cpu", 400))
    for batch in made.batches(made.once(), device="cpu"):
        if batch.number == stop:
            break
    assert threads() == set()
    assert len(reads) < len(SIZES) or stop > 3, "the rest of the plan is not read"
    whole = loader(slides_per_step=1)
    for batch, want in zip(made.batches(made.once(), device="cpu"), whole.batches(whole.once()), strict=True):
        assert same(batch, want)


def test_all_tensors_of_a_batch_are_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = pinned(monkeypatch)
    made = loader(graphs=True, pin=True)
    for batch in made.batches(made.training(0, 0), seed=(0, 0)):
        assert batch.omics is not None
        assert [t.data_ptr() in locked for t in batch.tensors()] == [True] * 11


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("meta", False)])
def test_a_batch_is_whole_when_it_comes_back_to_the_host(
    device: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch, *_) = loader(graphs=True).batches([[0, 1]])
    copies: list[bool] = []
    move = torch.Tensor.to

    def noted(t: torch.Tensor, *given: object, **options: object) -> torch.Tensor:
        copies.append(bool(options["non_blocking"]))
        return move(t, *given, **options)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    batch.to(torch.device(device))
    assert copies == [not waits] * len(batch.tensors())


def test_whoever_reads_batches_says_where_they_go() -> None:
    """Else they would be copied on the compute stream, or not at all."""
    package = Path(batches.__file__).parents[1]
    calls = [
        (path.name, {keyword.arg for keyword in node.keywords})
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "batches"
    ]
    assert len(calls) >= 4
    assert [name for name, arguments in calls if "device" not in arguments] == []


# -- features kept on the device ---------------------------------------------------------------------------------------

ALL, HALF = 10**6, sum(SIZES) * WIDTH * 4 // 2
OPTIONS = [{}, {"max_patches": 5}, {"graphs": True}, {"graphs": True, "max_patches": 5, "bucket": 4}, {"pin": True}]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("limit", [0, HALF, ALL])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kept_features_change_no_bit(
    options: dict[str, object], limit: int, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned(monkeypatch)
    if streams:
        install(monkeypatch)
    reads: list[str] = []
    plain, cache = loader(**options), DeviceCache("cpu", limit)
    made = loader(reads, **options, device_cache=cache)
    for epoch in range(3):
        plan = made.training(3, epoch)
        pairs = zip(
            plain.batches(plan, seed=(3, epoch)), made.batches(plan, seed=(3, epoch), device="cpu"), strict=True
        )
        for want, batch in pairs:
            assert same(batch, want)
            if limit == ALL:
                batch.bags.features.zero_()  # what a consumer does to its batch does not reach what is kept
    for share in range(3):
        plan = made.once()
        pairs = zip(
            plain.batches(plan, share=(share, 3)), made.batches(plan, share=(share, 3), device=CPU), strict=True
        )
        for want, batch in pairs:
            assert same(batch, want)
    assert cache.held <= limit
    assert cache.held == sum(cache.get(s).features().nbytes for s in made.slide_ids if cache.get(s))
    if limit == ALL:
        assert sorted(reads) == sorted(set(reads)), "each slide is read once"
    assert threads() == set()


def test_loaders_share_a_cache_and_the_first_slides_stay() -> None:
    reads: list[str] = []
    cache = DeviceCache("cpu", (SIZES[0] + SIZES[2]) * WIDTH * 4)
    one, other = (loader(reads, slides_per_step=1, device_cache=cache) for _ in range(2))
    list(one.batches([[0], [1], [2], [3], [1]], device="cpu"))
    assert reads == ["s0", "s1", "s2", "s3"], "s2 no longer fits beside s0 and s1; s1 is kept"
    assert [cache.get(f"s{i}") is not None for i in range(4)] == [True, True, False, True]
    reads.clear()
    list(other.batches([[0], [2], [1]], device="cpu"))
    assert reads == ["s2"]


def test_memory_holds_what_the_device_does_not() -> None:
    reads: list[str] = []
    made = loader(reads, graphs=True, cache_bytes=10**6, device_cache=DeviceCache("cpu", HALF))
    for _ in range(3):
        list(made.batches(made.once(), device="cpu"))
    assert sorted(reads) == sorted(made.slide_ids)
    both = [slide for slide in made.slide_ids if made.device_cache.get(slide) and made._cache[slide][0] is not None]
    assert both == []
    assert made._held == sum(e.nbytes + (0 if x is None else x.nbytes) for x, e in made._cache.values())


def test_a_cache_of_another_device_is_refused() -> None:
    made = loader(device_cache=DeviceCache("cpu", ALL))
    with pytest.raises(ValueError, match="device: expected cpu like device_cache, got meta; make a cache there"):
        next(made.batches(made.once(), device="meta"))
    assert next(made.batches(made.once())).number == 0, "batches in host memory need no cache"

"""Batches: budgets, balance, an order that depends on seed and epoch alone, and reading ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from momkd.data.batches import BagLoader, class_balance
from momkd.errors import InputError


def loader(sizes: list[int], labels: list[int] | None = None, **options: object) -> BagLoader:
    slides = [f"s{i}" for i in range(len(sizes))]
    size_of = dict(zip(slides, sizes, strict=True))
    features = {s: 100.0 * i + torch.arange(n * 2).view(n, 2) for i, (s, n) in enumerate(size_of.items())}
    given = np.array(labels if labels is not None else [i % 2 for i in range(len(sizes))], np.int64)
    return BagLoader(slides, given, size_of, features.__getitem__, **options)


def test_once_is_every_slide_in_order_within_the_budgets() -> None:
    made = loader([5, 9, 3, 30, 2, 2, 2], slides_per_step=3, patch_budget=15)
    batches = list(made.batches(made.once()))
    assert [b.slide_ids for b in batches] == [("s0", "s1"), ("s2",), ("s3",), ("s4", "s5", "s6")]
    assert [b.bags.lengths for b in batches] == [(5, 9), (3,), (30,), (2, 2, 2)]
    assert batches[0].labels.tolist() == [0, 1]
    assert torch.equal(batches[2].bags.features, made.read("s3"))


def test_an_epoch_follows_from_seed_and_number_alone() -> None:
    one, other = loader([4] * 20), loader([4] * 20)
    assert one.training(3, 1) == other.training(3, 1)
    assert one.training(3, 1) != one.training(3, 2)
    assert one.training(3, 1) != one.training(4, 1)
    order = [row for rows in one.training(0, 0, balanced=False) for row in rows]
    assert sorted(order) == list(range(20))


def test_classes_are_drawn_equally_often() -> None:
    labels = [0] * 90 + [1] * 10 + [-1] * 20
    made = loader([1] * 120, labels)
    drawn = np.concatenate([np.concatenate(made.training(0, epoch)) for epoch in range(100)])
    share = np.bincount(np.array(labels)[drawn] + 1) / len(drawn)
    np.testing.assert_allclose(share, [20 / 120, 50 / 120, 50 / 120], atol=0.01)
    np.testing.assert_allclose(class_balance(np.array([2, 2, 0])), [0.25, 0.25, 0.5])


def test_subsampling_is_of_training_alone_and_repeatable() -> None:
    made = loader([50, 3], max_patches=8, slides_per_step=1)
    plan = made.once()
    assert [b.bags.lengths for b in made.batches(plan)] == [(50,), (3,)]
    first, again = ([b.bags.features for b in made.batches(plan, seed=(0, 1))] for _ in range(2))
    assert [len(x) for x in first] == [8, 3]
    assert torch.equal(first[0], again[0])
    assert len(first[0].unique(dim=0)) == 8
    assert not torch.equal(first[0], next(made.batches(plan, seed=(0, 2))).bags.features)
    packed = loader([50, 50, 50], max_patches=8, patch_budget=16, slides_per_step=9)
    assert [len(rows) for rows in packed.training(0, 0)] == [2, 1]


def test_buckets_join_slides_of_like_size_and_lose_none() -> None:
    sizes = np.random.default_rng(0).integers(1, 100, 64).tolist()
    plain, made = (loader(sizes, slides_per_step=8, patch_budget=300, bucket=bucket) for bucket in (0, 32))
    plan = made.training(3, 1, balanced=False)
    assert plan == loader(sizes, slides_per_step=8, patch_budget=300, bucket=32).training(3, 1, balanced=False)
    assert plan != made.training(3, 2, balanced=False)
    assert sorted(row for rows in plan for row in rows) == list(range(64))
    assert all(len(rows) <= 8 and sum(sizes[row] for row in rows) <= 300 for rows in plan)
    spread = [max(sizes[r] for r in rows) - min(sizes[r] for r in rows) for rows in plan]
    mixed = [max(sizes[r] for r in rows) - min(sizes[r] for r in rows) for rows in plain.training(3, 1, balanced=False)]
    assert np.mean(spread) < np.mean(mixed) / 2
    first = plain.training(3, 1, balanced=False)  # the same slides are drawn, a bucket at a time
    drawn = [row for rows in first for row in rows][:32]
    assert {row for rows in plan for row in rows if row in drawn} == set(drawn)
    means = [np.mean([sizes[row] for row in rows]) for rows in plan]
    assert means != sorted(means, reverse=True)  # large and small steps take turns


def test_profiles_of_slides_without_genomics_are_zero_and_marked() -> None:
    omics = np.array([[1, 2], [np.nan, np.nan], [3, 4]], np.float32)
    batch = next((made := loader([1, 1, 1], omics=omics)).batches(made.once()))
    assert batch.has_omics.tolist() == [True, False, True]
    assert batch.omics.tolist() == [[1, 2], [0, 0], [3, 4]]


def test_the_cache_is_bounded() -> None:
    reads: list[str] = []
    made = loader([10, 10, 10], slides_per_step=1)
    plain = made.read
    made.read = lambda slide: reads.append(slide) or plain(slide)
    made.cache_bytes = 2 * 10 * 2 * 4
    for _ in range(3):
        list(made.batches(made.once()))
    assert reads == ["s0", "s1", "s2", "s2", "s2"]


def test_a_slide_that_cannot_be_read_ends_the_epoch_or_is_noted() -> None:
    made = loader([2, 2, 2, 2], slides_per_step=2)
    plain = made.read

    def read(slide: str) -> torch.Tensor:
        if slide in ("s1", "s2", "s3"):
            raise InputError(f"{slide}: bad")
        return plain(slide)

    made.read = read
    with pytest.raises(InputError, match="s1: bad"):
        list(made.batches(made.once()))
    made.skipped = {}
    assert [b.slide_ids for b in made.batches(made.once())] == [("s0",)]
    assert made.skipped == {f"s{i}": f"s{i}: bad" for i in (1, 2, 3)}


def test_reading_happens_in_a_thread_that_ends() -> None:
    before = threading.active_count()
    made = loader([2] * 9, slides_per_step=1)
    seen = next(iter(made.batches(made.once())))
    assert seen.slide_ids == ("s0",)
    list(made.batches(made.once()))
    assert threading.active_count() <= before + 1

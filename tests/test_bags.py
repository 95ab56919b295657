"""Every promise of `Bags`, on batches that break code: no bags, empty ones, masks with holes, too many rows."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from momkd import Bags
from momkd import functional as F
from tests.compare import RAGGED

LENGTHS = (3, 0, 1, 5, 0)


def some(lengths: tuple[int, ...] = LENGTHS, width: int = 4) -> tuple[list[Tensor], Bags]:
    rows = torch.arange(sum(lengths) * width, dtype=torch.float32).view(-1, width)
    bags = Bags.from_lengths(rows, lengths)
    return list(torch.split(rows, list(lengths))), bags


def check(bags: Bags, expected: list[Tensor]) -> None:
    """All ways of reading agree with a list of tensors."""
    assert len(bags) == len(expected) == len(bags.lengths) == len(bags.unbind())
    assert bags.lengths == tuple(len(x) for x in expected)
    assert bags.num_rows == sum(bags.lengths)
    assert bags.offsets.dtype == torch.int32
    assert bags.offsets.tolist() == [sum(bags.lengths[:b]) for b in range(len(bags) + 1)]
    for got, want in zip(bags, expected, strict=True):
        assert torch.equal(got, want)
    padded, mask = bags.to_padded(-7.0)
    assert padded.shape == (len(bags), max(bags.lengths, default=0), bags.features.shape[1])
    assert mask.dtype == torch.bool
    assert tuple(mask.sum(1).tolist()) == bags.lengths
    assert (padded[~mask] == -7).all()
    for row, keep, want in zip(padded, mask, expected, strict=True):
        assert torch.equal(row[keep], want)
    if len(bags):
        back = Bags.from_padded(padded, mask)
        assert torch.equal(back.features, bags.features)
        assert back.lengths == bags.lengths


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_all_ways_of_making_agree(lengths: tuple[int, ...]) -> None:
    expected, bags = some(lengths)
    check(bags, expected)
    check(Bags(bags.features, bags.offsets), expected)  # lengths are read from the offsets
    if expected:
        check(Bags.from_list(expected), expected)


def test_no_bags_and_no_columns() -> None:
    none = Bags(torch.zeros(0, 4), torch.zeros(1, dtype=torch.int32))
    check(none, [])
    check(Bags.from_padded(torch.zeros(0, 3, 4)), [])
    check(Bags.from_padded(torch.zeros(0, 3, 4), torch.zeros(0, 3)), [])
    check(Bags.from_padded(torch.zeros(2, 0, 4)), [torch.zeros(0, 4)] * 2)
    check(Bags.from_list([torch.zeros(2, 0), torch.zeros(0, 0)]), [torch.zeros(2, 0), torch.zeros(0, 0)])


def test_from_list_of_one_does_not_copy() -> None:
    x = torch.randn(6, 4)
    assert Bags.from_list([x]).features is x


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_with_holes(dtype: torch.dtype) -> None:
    x = torch.arange(24.0).view(3, 4, 2)
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).to(dtype)
    check(Bags.from_padded(x, mask), [x[0, [1, 3]], x[1, :0], x[2]])
    check(Bags.from_padded(x), list(x))
    check(Bags.from_padded(x.transpose(0, 1), mask.T[:, :3]), [x[:, b][mask.T[b] != 0] for b in range(4)])


def test_padding_and_back_carries_gradients() -> None:
    _, bags = some()
    x = bags.features.clone().requires_grad_()
    padded, mask = bags.with_features(x).to_padded()
    Bags.from_padded(padded, mask).features.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_unbind_gives_views() -> None:
    _, bags = some()
    bags.unbind()[3][0] = -1
    assert (bags.features[4] == -1).all()
    assert bags[3].data_ptr() == bags.features[4:].data_ptr()
    assert bags[2:4].features.data_ptr() == bags.features[3:].data_ptr(), "a run of bags is a view too"


SLICES = [
    slice(None),
    slice(1, 3),
    slice(-2, None),
    slice(None, -1),
    slice(2, 2),
    slice(4, 1),
    slice(7, 9),
    slice(-99, 99),
    slice(None, None, 2),
    slice(1, None, 3),
    slice(None, None, -1),
    slice(-1, 0, -2),
    slice(0, 3, -1),
]


@pytest.mark.parametrize("index", SLICES, ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, (0, 0), (7,), ()], ids=str)
def test_slices_are_those_of_a_list(index: slice, lengths: tuple[int, ...]) -> None:
    expected, bags = some(lengths)
    check(bags[index], expected[index])


def test_indices_are_those_of_a_list() -> None:
    expected, bags = some()
    for i in range(-5, 5):
        assert torch.equal(bags[i], expected[i])
    for i in (5, -6):
        with pytest.raises(IndexError):
            bags[i]
    with pytest.raises(ValueError, match="step cannot be zero"):
        bags[::0]


def test_strided_features() -> None:
    wide = torch.randn(9, 12)
    x = wide[:, 1::3]
    assert not x.is_contiguous()
    bags = Bags.from_lengths(x, LENGTHS)
    check(bags, list(torch.split(x, list(LENGTHS))))
    check(bags[::-1], list(torch.split(x, list(LENGTHS)))[::-1])
    turned = torch.randn(4, 9).T
    check(Bags.from_lengths(turned, LENGTHS), list(torch.split(turned, list(LENGTHS))))


def test_as_many_rows_as_offsets_can_count() -> None:
    """2^31 − 1 rows that take the memory of one."""
    most = 2**31 - 1
    one = torch.zeros(1, 1, dtype=torch.float16)
    bags = Bags.from_lengths(one.expand(most, 1), [most - 5, 0, 5])
    assert bags.offsets.tolist() == [0, most - 5, most - 5, most]
    assert bags[2].shape == (5, 1)
    assert bags[1:].lengths == (0, 5)
    too_many = r"lengths: expected at most 2147483647 rows in a batch \(int32 offsets\), got 2147483648"
    with pytest.raises(ValueError, match=too_many):
        Bags.from_lengths(one.expand(most + 1, 1), [most, 1])
    with pytest.raises(ValueError, match=too_many):
        Bags.from_padded(one[None].expand(2, 2**30, 1))


def test_with_features() -> None:
    _, bags = some()
    wide = torch.randn(9, 7, dtype=torch.float64)
    other = bags.with_features(wide)
    assert other.features is wide
    assert other.offsets is bags.offsets
    assert other.lengths == bags.lengths
    _, none = some(())
    assert none.with_features(torch.zeros(0, 9)).features.shape == (0, 9)
    with pytest.raises(ValueError, match=r"features: expected 9 rows, got \(8, 4\)"):
        bags.with_features(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"features: expected \(N, L\), got \(9,\)"):
        bags.with_features(torch.randn(9))


def test_moving() -> None:
    expected, bags = some()
    half = bags.to(dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.offsets.dtype == torch.int32
    check(half, [x.half() for x in expected])
    assert bags.to("cpu").features is bags.features
    far = bags.to("meta")
    assert far.device == far.features.device == far.offsets.device == torch.device("meta")
    assert far.lengths == bags.lengths, "the device is not asked"
    check(copy.deepcopy(bags), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_on_a_gpu() -> None:
    expected, bags = some()
    pinned = bags.pin_memory()
    assert pinned.features.is_pinned()
    assert pinned.offsets.is_pinned()
    check(pinned.to("cuda", non_blocking=True).to("cpu"), expected)
    check(Bags.from_list([x.cuda() for x in expected]), [x.cuda() for x in expected])
    with pytest.raises(ValueError, match=r"offsets: expected on cuda:0 like features, got cpu; use Bags.to\(device\)"):
        Bags(bags.features.cuda(), bags.offsets)


def test_it_cannot_be_changed_and_says_what_it_is() -> None:
    _, bags = some()
    with pytest.raises(FrozenInstanceError):
        bags.features = torch.zeros(9, 4)
    assert repr(bags) == "Bags(5 bags, 9 rows of 4, torch.float32, cpu)"


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("features", "given", "message"),
    [
        (torch.zeros(4), offsets(0, 4), r"features: expected \(N, L\), got \(4,\); one bag alone is Bags.from_list"),
        (torch.zeros(1, 4, 2), offsets(0, 4), r"features: expected \(N, L\), got \(1, 4, 2\)"),
        (torch.zeros(4, 2), offsets(0, 4).long(), r"offsets: expected int32 \(B\+1,\), got torch.int64 \(2,\); use"),
        (torch.zeros(4, 2), offsets(), r"offsets: expected int32 \(B\+1,\), got torch.int32 \(0,\)"),
        (torch.zeros(4, 2), offsets(0, 4)[None], r"offsets: expected int32 \(B\+1,\), got torch.int32 \(1, 2\)"),
        (torch.zeros(4, 2), offsets(0, 4).to("meta"), r"offsets: expected on cpu like features, got meta; use Bags.to"),
        (torch.zeros(4, 2), offsets(1, 4), "offsets: expected to start at 0, got 1"),
        (torch.zeros(4, 2), offsets(0, 3, 1, 4), "offsets: expected never to decrease, but bag 1 has -2 rows"),
        (torch.zeros(4, 2), offsets(0, 3), r"offsets: expected to end at N = 4 \(rows of features\), got 3"),
        (torch.zeros(4, 2), offsets(0), r"offsets: expected to end at N = 4 \(rows of features\), got 0"),
    ],
)
def test_bad_offsets(features: Tensor, given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bags(features, given)


def test_bad_lengths() -> None:
    with pytest.raises(ValueError, match="lengths: expected 2 as in offsets, got 1"):
        Bags(torch.zeros(4, 2), offsets(0, 2, 4), (4,))
    with pytest.raises(ValueError, match="never to decrease, but bag 1 has -1 rows"):
        Bags.from_lengths(torch.zeros(4, 2), [5, -1])
    with pytest.raises(ValueError, match="expected to end at N = 4"):
        Bags.from_lengths(torch.zeros(4, 2), [1, 2])


@pytest.mark.parametrize(
    ("bags", "message"),
    [
        ([], r"bags: expected at least one tensor \(n, L\), got an empty list"),
        ([torch.zeros(3)], r"bags\[0\]: expected \(n, 3\) torch.float32 on cpu like bags\[0\], got \(3,\)"),
        ([torch.tensor(1.0)], r"bags\[0\]: expected \(n, L\) torch.float32 on cpu like bags\[0\], got \(\)"),
        ([torch.zeros(1, 4, 2)], r"bags\[0\]: .* got \(1, 4, 2\) torch.float32 on cpu"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], r"bags\[1\]: expected \(n, 4\) torch.float32 .* got \(3, 5\)"),
        ([torch.zeros(3, 4), torch.zeros(0)], r"bags\[1\]: expected \(n, 4\) .* got \(0,\)"),
        ([torch.zeros(3, 4), torch.zeros(3, 4).half()], r"bags\[1\]: .* got \(3, 4\) torch.float16 on cpu"),
        ([torch.zeros(3, 4), torch.zeros(3, 4, device="meta")], r"bags\[1\]: .* got \(3, 4\) torch.float32 on meta"),
    ],
)
def test_bad_lists(bags: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bags.from_list(bags)


def test_bad_padding() -> None:
    with pytest.raises(ValueError, match=r"x: expected \(B, M, L\), got \(3, 4\)"):
        Bags.from_padded(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"mask: expected \(3, 4\) like x, got \(3, 5\)"):
        Bags.from_padded(torch.zeros(3, 4, 2), torch.zeros(3, 5))


def test_pooling_functions_take_bags() -> None:
    """Bags bring their offsets, or a tensor has them beside it; both or neither is an error."""
    torch.manual_seed(0)
    bags = Bags.from_list([torch.randn(n, 6) for n in (5, 0, 9)])
    x, offsets, gate, scores = bags.features, bags.offsets, torch.randn(4, 6), torch.randn(14, 2)
    weights = (gate, None, None, None, torch.randn(2, 4), None)
    z, memory = torch.randn(14, 3), torch.randn(2, 2, 3)
    assert torch.equal(F.gated_attention_pool(bags, None, *weights), F.gated_attention_pool(x, offsets, *weights))
    assert torch.equal(F.attention_pool(bags, scores), F.attention_pool(x, scores, offsets))
    for got, want in zip(
        F.memory_guided_pool(z, bags, memory, None, 0.2), F.memory_guided_pool(z, x, memory, offsets, 0.2), strict=True
    ):
        assert torch.equal(got, want)
    with pytest.raises(
        ValueError, match="offsets: expected None, because x is Bags, which bring their own, got a tens"
    ):
        F.gated_attention_pool(bags, offsets, *weights)
    with pytest.raises(ValueError, match=r"offsets: expected int32 \(B\+1,\) beside a tensor values, got None"):
        F.attention_pool(x, scores)

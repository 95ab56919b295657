from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import momkd
from momkd import Bags
from momkd import functional as F
from momkd.nn import MemoryBank, MemoryGuidedPool, SoftAngleLoss
from tests.compare import FORWARD, GRADIENT, assert_close

UPDATES = ("momentum", "gradient")


def rows(n: int = 60, classes: int = 2, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(n, width), torch.arange(n) % (classes + 1) - 1


def filled(update: str = "momentum", classes: int = 2) -> MemoryBank:
    bank = MemoryBank(classes, 5, 8, update=update)
    bank.fill_(*rows(200, classes, seed=9), generator=torch.Generator().manual_seed(0))
    if update == "gradient":
        with torch.no_grad():
            bank.memory *= 0.2 + torch.rand(classes, 5, 1)  # the optimizer does not keep it unit
    return bank


# -- the bank ----------------------------------------------------------------------------------------------------


def test_what_the_optimizer_sees() -> None:
    momentum, gradient = filled("momentum"), filled("gradient")
    assert list(momentum.parameters()) == []
    assert [name for name, _ in gradient.named_parameters()] == ["memory"]
    assert isinstance(gradient.memory, nn.Parameter)
    for bank in (momentum, gradient):
        assert set(bank.state_dict()) == {"memory", "usage"}
        assert bank.memory.shape == (2, 5, 8)
        assert bank.usage.shape == (2, 5)
        assert bank.num_classes == 2


@pytest.mark.parametrize("update", UPDATES)
def test_state_dict_round_trip(update: str, tmp_path: object) -> None:
    bank, other = filled(update), MemoryBank(2, 5, 8, update=update)
    assert not other.is_filled
    other.load_state_dict(bank.state_dict())
    assert other.is_filled
    assert torch.equal(other.memory, bank.memory)
    assert torch.equal(other.usage, bank.usage)
    crossed = MemoryBank(2, 5, 8, update=UPDATES[update == "momentum"])
    crossed.load_state_dict(bank.state_dict())  # both kinds hold the same keys
    with pytest.raises(RuntimeError, match="size mismatch for memory"):
        MemoryBank(2, 6, 8, update=update).load_state_dict(bank.state_dict())


@pytest.mark.parametrize("update", UPDATES)
def test_fill(update: str) -> None:
    z, row_class = rows(90, 3)
    row_class[row_class == 1] = -1  # class 1 has no rows
    bank = MemoryBank(3, 4, 8, update=update)
    assert not bank.is_filled
    assert (bank.memory == 0).all()
    bank.fill_(z, row_class, iterations=7, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for c in range(3):
        assert torch.equal(bank.memory[c], F.spherical_kmeans(z[row_class == c], 4, 7, generator))
    assert_close(bank.memory.norm(dim=-1), torch.ones(3, 4), FORWARD)
    assert (bank.usage == 0.25).all()
    assert bank.is_filled
    assert bank.memory.requires_grad is (update == "gradient")
    assert bank.memory.is_leaf
    bank.fill_(z.half(), row_class)
    assert bank.memory.dtype == torch.float32


def test_update_moves_a_buffer() -> None:
    bank, (z, row_class) = filled(), rows()
    memory, usage, weights = bank.memory.clone(), bank.usage.clone(), torch.rand(60)
    kind = {"momentum": 0.9, "weights": weights}
    want = F.ema_scatter_(memory, usage, z, row_class, **kind)
    before, where = bank.memory.clone(), bank.memory.data_ptr()
    got = bank.update_(z.requires_grad_(), row_class, **kind)
    assert torch.equal(got, want)
    assert torch.equal(bank.memory, memory)
    assert torch.equal(bank.usage, usage)
    assert not torch.equal(bank.memory, before)
    assert bank.memory.data_ptr() == where, "in place"
    assert not bank.memory.requires_grad


def test_update_reseeds_when_asked() -> None:
    bank, (z, row_class) = filled(), rows()
    memory, usage = bank.memory.clone(), bank.usage.clone()

    def kind() -> dict[str, object]:
        return {"momentum": 0.5, "reseed_below": 2.0, "generator": torch.Generator().manual_seed(1)}

    F.ema_scatter_(memory, usage, z[:9], row_class[:9], **kind())
    bank.update_(z[:9], row_class[:9], **kind())
    assert torch.equal(bank.memory, memory)
    assert torch.equal(bank.usage, usage)


def test_gradient_is_left_to_the_optimizer() -> None:
    bank, (z, row_class) = filled("gradient"), rows()
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    assert bank.update_(z, row_class, momentum=0.0) is None
    for name, value in bank.state_dict().items():
        assert torch.equal(value, before[name])


def naive_commitment(z: Tensor, row_class: Tensor, memory: Tensor, update: str) -> Tensor:
    losses = []
    for row, c in zip(z, row_class.tolist(), strict=True):
        if c < 0:
            continue
        if update == "momentum":
            losses.append(1 - torch.nn.functional.cosine_similarity(row[None], memory[c], eps=1e-12).max())
        else:
            nearest = (memory[c] - row).norm(dim=1).argmin()
            losses.append((row - memory[c, nearest]).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_commitment_loss(update: str, classes: int, seed: int) -> None:
    bank, (z, row_class) = filled(update, classes), rows(61, classes, seed=seed)
    exact = z.double().requires_grad_()
    loss, want = (
        bank.commitment_loss(z.requires_grad_(), row_class),
        naive_commitment(exact, row_class, bank.memory.detach().double(), update),
    )
    assert loss.shape == ()
    assert_close(loss, want, FORWARD)
    loss.backward()
    want.backward()
    assert_close(z.grad, exact.grad, GRADIENT)
    assert bank.memory.grad is None, "the memory is a constant here"
    assert (z.grad[row_class < 0] == 0).all()


@pytest.mark.parametrize("update", UPDATES)
def test_commitment_loss_leaves_out_what_has_no_class(update: str) -> None:
    bank, (z, row_class) = filled(update), rows()
    want = bank.commitment_loss(z, row_class)
    z[row_class < 0] = torch.nan
    z.requires_grad_()
    loss = bank.commitment_loss(z, row_class)
    loss.backward()
    assert_close(loss, want, FORWARD)
    assert z.grad.isfinite().all()
    for empty in (torch.full((60,), -1), torch.zeros(0, dtype=torch.int64)):
        x = torch.randn(len(empty), 8, requires_grad=True)
        loss = bank.commitment_loss(x, empty)
        loss.backward()
        assert loss == 0
        assert (x.grad == 0).all()


@pytest.mark.parametrize("update", UPDATES)
def test_commitment_loss_of_halves(update: str) -> None:
    bank, (z, row_class) = filled(update), rows()
    half = z.bfloat16().requires_grad_()
    loss = bank.commitment_loss(half, row_class)
    assert loss.dtype == torch.float32
    assert_close(loss, bank.commitment_loss(half.detach().float(), row_class), FORWARD)
    loss.backward()
    assert half.grad.dtype == torch.bfloat16


def test_rows_at_their_prototype_are_committed() -> None:
    for update in UPDATES:
        bank = filled(update)
        z = bank.memory.detach()[1].clone()
        assert abs(float(bank.commitment_loss(z, torch.ones(5, dtype=torch.int64)))) < 1e-6
        assert float(bank.commitment_loss(z, torch.zeros(5, dtype=torch.int64))) > 1e-3


def test_orthogonality_loss() -> None:
    bank, (_, row_class) = filled("gradient", 3), rows(20, 3)
    memory = bank.memory.detach().double().requires_grad_()
    each = []
    for c in row_class[row_class >= 0].tolist():
        cosines = torch.nn.functional.cosine_similarity(memory[c][:, None], memory[c][None], dim=-1)
        each.append(10 * (cosines.square().sum() / 25 - 1 / 5))
    want = torch.stack(each).mean()
    loss = bank.orthogonality_loss(row_class)
    assert_close(loss, want, FORWARD)
    loss.backward()
    want.backward()
    assert_close(bank.memory.grad, memory.grad, GRADIENT)


def test_orthogonality_loss_at_its_ends() -> None:
    bank = MemoryBank(2, 4, 8, update="gradient")
    with torch.no_grad():
        bank.memory[0] = 3 * torch.eye(8)[:4]
        bank.memory[1] = torch.ones(4, 8)
    label = torch.tensor([0])
    with torch.no_grad():
        assert float(bank.orthogonality_loss(label)) == pytest.approx(0, abs=1e-6)
        assert float(bank.orthogonality_loss(label + 1)) == pytest.approx(7.5)
    loss = bank.orthogonality_loss(torch.tensor([-1, -1]))
    loss.backward()
    assert loss == 0
    assert (bank.memory.grad == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 4, 8), "MemoryBank: expected num_classes >= 2, slots >= 1, features >= 1, got 1, 4, 8"),
        ((2, 0, 8), "got 2, 0, 8"),
        ((2, 4, 0), "got 2, 4, 0"),
    ],
)
def test_bad_sizes(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryBank(*arguments)


def test_bad_update_and_what_it_says() -> None:
    with pytest.raises(ValueError, match="update: expected 'momentum' or 'gradient', got 'ema'"):
        MemoryBank(2, update="ema")
    assert repr(MemoryBank(2, 4, 8)) == "MemoryBank(num_classes=2, slots=4, features=8, update='momentum')"


# -- how many slots --------------------------------------------------------------------------------------------------


def using(*usage: list[float], width: int = 8) -> MemoryBank:
    """A bank of random directions with this usage of each class."""
    bank = MemoryBank(len(usage), len(usage[0]), width, adaptive=True)
    torch.manual_seed(2)
    bank.memory.copy_(nn.functional.normalize(torch.randn(bank.memory.shape), dim=-1))
    bank.usage.copy_(torch.tensor(usage))
    return bank


def test_effective_slots() -> None:
    bank = using([2.0, 2, 2, 2], [3, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4])
    shares = [0.1, 0.2, 0.3, 0.4]
    uneven = math.prod(p**-p for p in shares)
    want = torch.tensor([4, 1, 2, 4, uneven], dtype=torch.float64)
    assert_close(bank.effective_slots(), want, FORWARD)


EVENLY, ONE = [1.0] * 8, [1.0] + [0.0] * 7


@pytest.mark.parametrize(
    ("usage", "slides", "wanted"),
    [
        ((EVENLY, EVENLY), 128, 10),
        ((EVENLY, EVENLY), 127, 8),  # too few slides to grow
        ((EVENLY, EVENLY), 64, 8),
        ((EVENLY, EVENLY), 63, 7),  # too few for 8 slots, enough for 7
        ((EVENLY, EVENLY), 47, 6),
        ((EVENLY, EVENLY), 0, 6),
        ((EVENLY, ONE), 1000, 8),  # one class needs all of them
        ((ONE, ONE), 1000, 6),
        ((ONE, ONE), 63, 6),  # for both reasons
        (([1.0] * 3 + [0.9] + [0.0] * 4, ONE), 1000, 6),  # not quite four
        (([1.0] * 5 + [0.0] * 3, ONE), 1000, 8),  # one class between the bounds
        (([1.0] * 7 + [0.0], EVENLY), 128, 10),
        (([1.0] * 6 + [0.0] * 2, EVENLY), 128, 8),
        (([1.0], [1.0]), 16, 2),
        (([1.0], [1.0]), 0, 1),
        (([1.0, 0], [1.0, 0]), 0, 2),  # never under two
        (([1.0] * 240, [1.0] * 240), 10**6, 256),
        (([1.0] * 256, [1.0] * 256), 10**6, 256),
        (([1.0] * 300, [1.0] * 300), 10**6, 300),
    ],
)
def test_wanted_slots(usage: tuple[list[float], ...], slides: int, wanted: int) -> None:
    assert using(*usage).wanted_slots(slides) == wanted


def test_no_step_calls_for_its_undoing() -> None:
    """Usage of every evenness, any number of slides: after growing it does not shrink, nor the other way."""
    torch.manual_seed(0)
    steps = {"more": 0, "fewer": 0}
    for _ in range(400):
        slots = int(torch.randint(1, 30, ()))
        bank = using(*torch.rand(2, slots).pow(8 * float(torch.rand(()))).tolist())
        slides = int(slots * 32 * torch.rand(()))
        wanted = bank.wanted_slots(slides)
        if wanted == slots:
            continue
        bank.resize_(wanted)
        again = bank.wanted_slots(slides)
        steps["more" if wanted > slots else "fewer"] += 1
        assert again >= wanted if wanted > slots else again <= wanted
    assert min(steps.values()) > 20


def test_the_most_used_slots_split() -> None:
    bank = using([1.0, 5, 2, 4], [3, 3, 1, 3])
    memory, usage, before = bank.memory.clone(), bank.usage.clone(), torch.get_rng_state()
    bank.resize_(6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert bank.slots == 6
    assert bank.memory.is_contiguous()
    assert bank.usage.is_contiguous()
    assert torch.equal(bank.memory[:, :4], memory), "those that were there keep their bits, also where they split"
    assert bank.usage.tolist() == [[1, 2.5, 2, 2, 2.5, 2], [1.5, 1.5, 1, 3, 1.5, 1.5]]
    assert_close(bank.usage.sum(1), usage.sum(1), FORWARD)
    assert_close(bank.memory.norm(dim=-1), torch.ones(2, 6), FORWARD)
    for c, parents in enumerate(([1, 3], [0, 1])):
        cosines = (memory[c, parents] * bank.memory[c, 4:]).sum(1)
        assert_close(cosines, torch.full((2,), 1 / math.sqrt(1 + 0.1**2)), FORWARD)
    directions = nn.functional.normalize(bank.memory[:, 4:] - memory[[0, 0, 1, 1], [1, 3, 0, 1]].view(2, 2, 8), dim=-1)
    cosines = directions.view(4, 8) @ directions.view(4, 8).T - torch.eye(4)
    assert float(cosines.abs().max()) < 0.95, "each child goes its own way"
    again, other = using([1.0, 5, 2, 4], [3, 3, 1, 3]), using([1.0, 5, 2, 4], [3, 3, 1, 3])
    again.resize_(6, generator=torch.Generator().manual_seed(5))
    other.resize_(6, generator=torch.Generator().manual_seed(6))
    assert torch.equal(again.memory, bank.memory)
    assert not torch.equal(other.memory, bank.memory)
    assert {name: t.shape for name, t in bank.state_dict().items()} == {"memory": (2, 6, 8), "usage": (2, 6)}


def test_the_child_takes_rows_of_its_parent() -> None:
    bank = using([1.0, 1], [1, 1])
    z = nn.functional.normalize(bank.memory[0, 0] + 0.3 * torch.randn(500, 8), dim=1)
    label = torch.zeros(500, dtype=torch.int64)
    bank.usage[0, 0] = 2
    bank.resize_(3, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(bank.update_(z, label, momentum=0.5), minlength=3)
    assert min(int(counts[0]), int(counts[2])) > 100


def test_the_least_used_slots_are_dropped() -> None:
    bank = using([1.0, 3, 2, 4, 5], [3, 3, 0.5, 3, 1])
    memory = bank.memory.clone()
    heir = memory[0, [1, 3, 4]] @ memory[0, [0, 2]].T
    bank.resize_(3)
    assert torch.equal(bank.memory[0], memory[0, [1, 3, 4]]), "in their order, with their bits"
    assert torch.equal(bank.memory[1], memory[1, [0, 1, 3]])
    want = [3.0, 4.0, 5.0]
    for usage, slot in zip((1, 2), heir.argmax(0).tolist(), strict=True):
        want[slot] += usage
    assert bank.usage[0].tolist() == want
    assert bank.usage.sum(1).tolist() == [15, 10.5]
    assert bank.memory.is_contiguous()
    bank.resize_(3)
    assert torch.equal(bank.memory[0], memory[0, [1, 3, 4]])


def test_a_width_of_one_splits_without_nan() -> None:
    bank = using([1.0, 1], [1, 1], width=1)
    bank.resize_(4)
    assert_close(bank.memory.abs(), torch.ones(2, 4, 1), FORWARD)


def test_what_cannot_be_resized() -> None:
    bank = using([1.0, 1], [1, 1])
    for slots in (0, 5, -1):
        with pytest.raises(ValueError, match=f"resize_: expected 1 to 2K = 4 slots, got {slots}"):
            bank.resize_(slots)
    with pytest.raises(ValueError, match=r"expected a filled memory moved by momentum, got update='gradient'"):
        filled("gradient").resize_(4)
    with pytest.raises(ValueError, match=r"expected a filled memory moved by momentum, got one not filled; call fill_"):
        MemoryBank(2, 4, 8).resize_(5)
    with pytest.raises(ValueError, match="adaptive: expected update='momentum', got 'gradient'"):
        MemoryBank(2, 4, 8, update="gradient", adaptive=True)


def test_an_adaptive_memory_takes_the_slots_of_what_it_loads() -> None:
    for slots in (1, 2, 9, 256):
        state, bank = using([1.0] * slots, [2.0] * slots).state_dict(), using([1.0, 1], [1, 1])
        where = bank.memory.data_ptr()
        bank.load_state_dict(state)
        assert bank.slots == slots
        assert all(torch.equal(tensor, state[name]) for name, tensor in bank.state_dict().items())
        assert (bank.memory.data_ptr() == where) is (slots == 2), "in place where K is the same"
        with pytest.raises(RuntimeError, match="size mismatch for memory"):
            MemoryBank(2, 5, 8).load_state_dict(state)
    for memory in (torch.zeros(2, 257, 8), torch.zeros(2, 0, 8), torch.zeros(3, 4, 8), torch.zeros(2, 4, 9)):
        with pytest.raises(RuntimeError, match="size mismatch for memory"):
            using([1.0, 1], [1, 1]).load_state_dict({"memory": memory, "usage": memory.sum(2)})
    bank = using([1.0, 1], [1, 1])
    before = bank.memory.clone()
    bank.load_state_dict({"usage": torch.ones(2, 2)}, strict=False)
    assert torch.equal(bank.memory, before)


# -- the pool ----------------------------------------------------------------------------------------------------


def bags() -> Bags:
    torch.manual_seed(4)
    return Bags.from_list([torch.randn(n, 6) for n in (7, 0, 1, 20)])


@pytest.mark.parametrize("branch", ["positive", "per_class"])
def test_the_pool_is_the_op(branch: str) -> None:
    batch, bank = bags(), filled()
    z = torch.randn(28, 8)
    got = MemoryGuidedPool(0.3, branch=branch)(z, batch, bank.memory)
    want = F.memory_guided_pool(z, batch.features, bank.memory, batch.offsets, 0.3, branch=branch)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert got[0].shape == (4, 1 if branch == "positive" else 2, 6)


def test_an_unfilled_memory_gives_the_mean() -> None:
    batch = bags()
    pooled, attention, _ = MemoryGuidedPool()(torch.randn(28, 8), batch, MemoryBank(2, 4, 8).memory)
    assert_close(pooled[3, 0], batch[3].mean(0), FORWARD)
    assert_close(attention[8:], torch.full((20, 1), 0.05), FORWARD)
    assert (pooled[1] == 0).all()


@pytest.mark.parametrize(
    ("log_tau", "temperature", "learns"),
    [(-20.0, 0.01, False), (math.log(0.02), 0.02, True), (math.log(1.9), 1.9, True), (3.0, 2.0, False)],
)
def test_temperature_is_clamped(log_tau: float, temperature: float, learns: bool) -> None:
    pool = MemoryGuidedPool()
    with torch.no_grad():
        pool.log_tau.fill_(log_tau)
    assert float(pool.temperature.detach()) == pytest.approx(temperature, rel=1e-5)
    pool(torch.randn(28, 8), bags(), filled().memory)[0].square().sum().backward()
    assert bool(pool.log_tau.grad != 0) is learns


def test_temperature_gradient_by_differences() -> None:
    batch, bank, z, pool = bags(), filled(), torch.randn(28, 8).double(), MemoryGuidedPool(0.4).double()
    batch = batch.to(dtype=torch.float64)
    weight = torch.randn(4, 1, 6).double()

    def value(shift: float) -> Tensor:
        pool.log_tau.data.add_(shift)
        total = (pool(z, batch, bank.memory.double())[0] * weight).sum()
        pool.log_tau.data.sub_(shift)
        return total

    value(0).backward()
    difference = float((value(1e-5) - value(-1e-5)).detach()) / 2e-5
    assert float(pool.log_tau.grad) == pytest.approx(difference, rel=1e-5)


def test_no_gradient_reaches_the_memory_through_the_pool() -> None:
    bank, batch, z = filled("gradient"), bags(), torch.randn(28, 8, requires_grad=True)
    pool = MemoryGuidedPool()
    pool(z, batch, bank.memory)[0].square().sum().backward()
    assert bank.memory.grad is None
    assert z.grad.isfinite().all()
    assert (z.grad != 0).any()


def test_the_pool_starts_where_it_is_told() -> None:
    assert float(MemoryGuidedPool().temperature.detach()) == pytest.approx(0.2)
    assert set(MemoryGuidedPool().state_dict()) == {"log_tau"}
    for wrong in (0.0, 0.009, 2.1, float("nan")):
        with pytest.raises(ValueError, match=r"temperature: expected 0\.01 to 2\.0, got"):
            MemoryGuidedPool(wrong)
    for right in (0.01, 2.0):
        assert float(MemoryGuidedPool(right).temperature.detach()) == pytest.approx(right, rel=1e-6)


# -- the loss ----------------------------------------------------------------------------------------------------


def test_soft_angle_loss_is_the_op_with_its_numbers() -> None:
    z, labels = rows(9)
    bank = filled("gradient")
    loss = SoftAngleLoss(margin=0.1, tau=3.0, beta=7.0)(z, bank.memory, labels)
    assert torch.equal(loss, F.soft_angle_loss(z, bank.memory, labels, margin=0.1, tau=3.0, beta=7.0))
    assert torch.equal(SoftAngleLoss()(z, bank.memory, labels), F.soft_angle_loss(z, bank.memory, labels))
    assert not torch.equal(loss, SoftAngleLoss()(z, bank.memory, labels))
    loss.backward()
    assert (bank.memory.grad != 0).any(), "it reaches a memory that is a parameter"
    assert list(SoftAngleLoss().parameters()) == []
    assert repr(SoftAngleLoss()) == "SoftAngleLoss(margin=0.3, tau=5.0, beta=20.0)"


@pytest.mark.parametrize("weighted", [False, True])
def test_update_by_the_sums_of_several(weighted: bool) -> None:
    """Three parts, each gathered by itself, move the memory as all rows at once."""
    torch.manual_seed(0)
    z, row_class = torch.randn(60, 8), torch.arange(60) % 4 - 1
    weights = torch.rand(60) if weighted else None
    whole, bank = MemoryBank(3, 4, 8), MemoryBank(3, 4, 8)
    whole.fill_(z, row_class, generator=torch.Generator().manual_seed(1))
    bank.load_state_dict(whole.state_dict())
    parts = [slice(0, 7), slice(7, 7), slice(7, 60)]
    rest = [
        F.ema_accumulate(bank.memory, z[part], row_class[part], weights=None if weights is None else weights[part])
        for part in parts[1:]
    ]

    def reduce(sums: Tensor, mass: Tensor) -> None:
        for more, heavier in rest:
            sums += more
            mass += heavier

    first = {"weights": None if weights is None else weights[:7], "momentum": 0.9}
    assert bank.update_(z[:7], row_class[:7], reduce=reduce, **first) is None
    whole.update_(z, row_class, weights=weights, momentum=0.9)
    torch.testing.assert_close(bank.memory, whole.memory, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bank.usage, whole.usage, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="reseed_below: expected None where reduce is given"):
        bank.update_(z, row_class, momentum=0.9, reduce=reduce, reseed_below=0.1)


# -- gate and memory together ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "branch"), [(2, "positive"), (2, "per_class"), (3, "per_class")])
def test_scores_of_gate_and_memory_add(classes: int, branch: str) -> None:
    """Against the definition in float64, with an empty bag and one of one patch; no gradient reaches the memory."""
    torch.manual_seed(0)
    bags = momkd.Bags.from_list([torch.randn(n, 12) for n in (5, 0, 1, 70)])
    z = torch.randn(76, 8, requires_grad=True)
    bank = momkd.nn.MemoryBank(classes, 3, 8, update="gradient")
    with torch.no_grad():
        bank.memory.normal_()
    pool = momkd.nn.GatedMemoryPool(12, 6, 1 if branch == "positive" else classes, 0.3, branch=branch)
    pooled, attention, slots = pool(z, bags, bank.memory)
    unit = torch.nn.functional.normalize
    cosines = torch.einsum("ns,cks->nck", unit(z.double(), dim=1), unit(bank.memory.double(), dim=-1))
    s, nearest = cosines.max(2)
    others = torch.stack([torch.cat([s[:, :c], s[:, c + 1 :]], 1).amax(1) for c in range(classes)], 1)
    score = s - others
    score = score[:, 1:] if branch == "positive" else score
    x, gate = bags.features.double(), pool.gate.double()
    hidden = torch.tanh(gate.attention_v(x)) * torch.sigmoid(gate.attention_u(x))
    score = gate.attention_w(hidden) + score / pool.temperature.double()
    assert torch.equal(slots.long(), nearest)
    for b, (start, end) in enumerate([(0, 5), (5, 5), (5, 6), (6, 76)]):
        alpha = torch.softmax(score[start:end], 0)
        torch.testing.assert_close(pooled[b].double(), alpha.T @ x[start:end], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(attention[start:end].double(), alpha, rtol=1e-5, atol=1e-6)
    pool.float()
    pool(z, bags, bank.memory)[0].square().sum().backward()
    assert bank.memory.grad is None
    assert z.grad is not None
    assert bool((z.grad != 0).any())
    assert pool.gate.attention_v.weight.grad is not None


@pytest.mark.parametrize(("classes", "branch"), [(2, "positive"), (3, "per_class")])
def test_gate_and_memory_in_one_call_are_what_their_scores_pool_to(
    classes: int, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written out: the gate alone, the memory alone, and a pooling of the sum of their scores."""
    batch, bank, z = bags(), filled(classes=classes), torch.randn(28, 8, requires_grad=True)
    x = batch.features.requires_grad_()
    heads = 1 if branch == "positive" else classes
    pool = momkd.nn.GatedMemoryPool(6, 5, heads, 0.3, branch=branch)
    guided = MemoryGuidedPool(0.3, branch=branch)
    guided.log_tau = pool.log_tau
    want_scores = pool.gate.scores(batch) + guided.pool_with_scores(z, batch, bank.memory)[1]
    want = F.attention_pool(batch, want_scores)

    calls: list[str] = []
    for name in F.__all__:
        own = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *a, name=name, own=own, **k: calls.append(name) or own(*a, **k))
    pooled, scores, _ = pool.pool_with_scores(z, batch, bank.memory)
    assert calls == ["memory_similarity", "gated_attention_pool"]
    assert_close(pooled, want, FORWARD)
    assert_close(scores, want_scores, FORWARD)
    weight, leaves = torch.randn_like(want), [z, x, *pool.parameters()]
    got, exact = (torch.autograd.grad((out * weight).sum(), leaves) for out in (pooled, want))
    for (name, _), a, b in zip([("z", z), ("x", x), *pool.named_parameters()], got, exact, strict=True):
        if name != "gate.attention_w.bias":  # softmax does not see it
            assert_close(a, b, GRADIENT, name)


def test_a_gate_of_other_branches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bags, bank = momkd.Bags.from_list([torch.randn(5, 12)]), momkd.nn.MemoryBank(3, 2, 8)
    monkeypatch.setattr(F, "memory_similarity", None)  # before any work is done
    with pytest.raises(ValueError, match="heads: expected 3 for this memory and branch, got 1"):
        momkd.nn.GatedMemoryPool(12, 6)(torch.randn(5, 8), bags, bank.memory)


@pytest.mark.parametrize("update", ["momentum", "gradient"])
def test_assignment_loss(update: str) -> None:
    torch.manual_seed(0)
    bank = momkd.nn.MemoryBank(2, 3, 8, update=update)
    with torch.no_grad():
        bank.memory.normal_()
    z, target = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    counted = torch.tensor([True, True, False, True, True])
    loss = bank.assignment_loss(z, target, counted, tau=4.0)
    unit = torch.nn.functional.normalize
    slots = unit(bank.memory.detach().double().reshape(6, 8), dim=1)
    p, q = (torch.softmax(4 * unit(rows.detach().double(), dim=1) @ slots.T, 1) for rows in (z, target))
    want = (q * (q / p).log()).sum(1)[counted].mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    loss.backward()
    assert target.grad is None
    assert not isinstance(bank.memory, torch.nn.Parameter) or bank.memory.grad is None
    assert z.grad is not None
    assert torch.equal(z.grad[2], torch.zeros(8))
    assert bool((z.grad[counted] != 0).any(1).all())
    same = bank.assignment_loss(target, target, counted, tau=4.0)
    assert same.abs() < 1e-6
    nothing = bank.assignment_loss(z * torch.nan, target, torch.zeros(5, dtype=torch.bool), tau=4.0)
    assert nothing == 0

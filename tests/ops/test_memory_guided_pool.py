from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from momkd import env, ops
from momkd import functional as F
from tests.compare import FORWARD, GRADIENT, HALVES, RAGGED, assert_close, assert_half, cosine, offsets_of

pytestmark = pytest.mark.usefixtures("poisoned")
BRANCHES = [(2, "positive"), (2, "per_class"), (4, "positive")]  # classes, branch
CASES = [(shape, *branch, seed) for shape in RAGGED for branch in BRANCHES for seed in (0, 1)]
if env.triton_interpreted():  # shapes of many tiles take long there: with the most branches and one seed only
    LONG = {"giant", "many tiny"}
    CASES = [case for case in CASES if case[0] not in LONG or (case[1] == 4 and case[3] == 0)]


def naive(z: Tensor, values: Tensor, memory: Tensor, lengths: tuple[int, ...], t: Tensor, branch: str) -> list[Tensor]:
    """Bag by bag; returns pooled and attention."""
    s = torch.nn.functional.cosine_similarity(z[:, None, None], memory[None], dim=-1, eps=1e-12).amax(2)
    classes = memory.shape[0]
    if branch == "positive" and classes == 2:
        scores = (s[:, 1:] - s[:, :1]) / t
    else:
        others = [torch.cat([s[:, :c], s[:, c + 1 :]], 1).amax(1) for c in range(classes)]
        scores = (s - torch.stack(others, 1)) / t
    spans = pairwise(offsets_of(lengths).tolist())
    attention = torch.cat([torch.softmax(scores[a:b], 0) for a, b in spans] or [scores])
    pooled = [attention[a:b].T @ values[a:b] for a, b in pairwise(offsets_of(lengths).tolist())]
    return [torch.stack(pooled) if pooled else (scores.T @ values)[None][:0], attention]


@pytest.mark.parametrize(("shape", "classes", "branch", "seed"), CASES)
def test_matches_the_board(shape: str, classes: int, branch: str, seed: int) -> None:
    torch.manual_seed(seed)
    lengths = RAGGED[shape]
    n = sum(lengths)
    leaves = [torch.randn(n, 9), torch.randn(n, 7), torch.tensor(0.3)]
    memory = torch.randn(classes, 5, 9)
    z, values, t = (x.clone().requires_grad_() for x in leaves)
    z64, values64, t64 = (x.double().requires_grad_() for x in leaves)
    pooled, attention, slots = F.memory_guided_pool(z, values, memory, offsets_of(lengths), t, branch=branch)
    want, want_attention = naive(z64, values64, memory.double(), lengths, t64, branch)
    assert_close(pooled, want, FORWARD, "pooled")
    assert_close(attention, want_attention, FORWARD, "attention")
    cos = torch.nn.functional.cosine_similarity(z64[:, None, None], memory.double()[None], dim=-1)
    assert torch.equal(slots.long(), cos.argmax(2))
    grad = torch.randn_like(pooled)
    pooled.backward(grad)
    want.backward(grad.double())
    assert_close(z.grad, z64.grad, GRADIENT, "d z")
    assert_close(values.grad, values64.grad, GRADIENT, "d values")
    assert_close(t.grad, t64.grad, GRADIENT, "d temperature")


def test_the_memory_is_a_constant() -> None:
    memory = torch.randn(2, 3, 4, requires_grad=True)
    z = torch.randn(5, 4, requires_grad=True)
    pooled, attention, _ = F.memory_guided_pool(z, torch.randn(5, 6), memory, offsets_of((5,)), 0.2)
    pooled.sum().backward()
    assert memory.grad is None
    assert z.grad is not None
    assert not attention.requires_grad


def test_an_empty_memory_of_zeros_pools_to_the_mean() -> None:
    values = torch.randn(5, 6)
    pooled, attention, _ = F.memory_guided_pool(
        torch.randn(5, 4), values, torch.zeros(2, 3, 4), offsets_of((2, 3)), 0.2
    )
    torch.testing.assert_close(pooled[:, 0], torch.stack([values[:2].mean(0), values[2:].mean(0)]))
    torch.testing.assert_close(attention[:, 0], torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = RAGGED["mixed"]
    z, values = torch.randn(sum(lengths), 16).to(dtype), torch.randn(sum(lengths), 24).to(dtype)
    memory, t = torch.randn(2, 4, 16).to(dtype), torch.tensor(0.5)
    z.requires_grad_()
    z64 = z.detach().double().requires_grad_()
    pooled, _, _ = F.memory_guided_pool(z, values, memory, offsets_of(lengths), t)
    want, _ = naive(z64, values.double(), memory.double(), lengths, t.double(), "positive")
    assert_half(pooled, want, naive(z.detach(), values, memory, lengths, t.to(dtype), "positive")[0])
    grad = torch.randn_like(pooled)
    pooled.backward(grad)
    want.backward(grad.double())
    assert cosine(z.grad, z64.grad) >= 0.999


@pytest.mark.parametrize("branch", ["positive", "per_class"])
def test_gradcheck_opcheck_compile(branch: str) -> None:
    torch.manual_seed(0)
    offsets, memory = offsets_of((3, 0, 4)), torch.randn(2, 3, 3, dtype=torch.float64)
    z = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def call(z: Tensor, values: Tensor, t: Tensor) -> Tensor:
        return F.memory_guided_pool(z, values, memory, offsets, t, branch=branch)[0]

    assert torch.autograd.gradcheck(call, (z, values, t))
    torch.library.opcheck(ops.memory_guided_pool, (z, values, memory, offsets, t, branch == "per_class", ""))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, values, t), call(z, values, t))


def test_a_bad_bag_leaves_its_neighbours_alone() -> None:
    torch.manual_seed(0)
    z, values, memory = torch.randn(9, 4), torch.randn(9, 5), torch.randn(2, 3, 4)
    offsets = offsets_of((3, 3, 3))
    clean, _, _ = F.memory_guided_pool(z, values, memory, offsets, 0.2)
    z[4, 1] = torch.nan
    z.requires_grad_()
    got, _, _ = F.memory_guided_pool(z, values, memory, offsets, 0.2)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().any()
    got.sum().backward()
    assert z.grad[[0, 1, 2, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": torch.randn(1, 3, 4)}, "memory: expected at least 2 classes"),
        ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
        ({"temperature": torch.ones(2)}, r"temperature: expected a number or a scalar tensor, got \(2,\)"),
        ({"values": torch.randn(4, 2)}, r"values: expected \(N, L\) = \(5, any\), got \(4, 2\)"),
        ({"branch": "negative"}, "branch: expected 'positive' or 'per_class', got 'negative'"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "z": torch.randn(5, 4),
        "values": torch.randn(5, 2),
        "memory": torch.randn(2, 3, 4),
        "offsets": offsets_of((2, 3)),
        "temperature": 0.2,
    }
    with pytest.raises(ValueError, match=message):
        F.memory_guided_pool(**(arguments | change))

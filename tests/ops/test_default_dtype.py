"""Every op gives the same bits whatever torch's default dtype is: its workspaces name theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from momkd import Bags, dispatch, graph, nn
from momkd import functional as F
from tests.compare import offsets_of

LENGTHS = (3, 0, 1, 1100, 17)  # more than one block of rows of the gate
ROWS, OFFSETS = sum(LENGTHS), offsets_of(LENGTHS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def leaf(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def with_gradients(out: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> list[Tensor]:
    every = [out] if isinstance(out, Tensor) else list(out)
    wanted = [t for t in every if t.requires_grad]
    return [*every, *torch.autograd.grad([t.sum() for t in wanted], inputs)]


def gated(backend: str) -> list[Tensor]:
    x, w_v, b_v, w_u, w_a = leaf(ROWS, 12), leaf(9, 12), leaf(9), leaf(9, 12), leaf(2, 9)
    bias, options = leaf(ROWS, 2), {"dropout_p": 0.25, "seed": 5, "backend": backend}
    out = F.gated_attention_pool(x, OFFSETS, w_v, b_v, w_u, None, w_a, None, score_bias=bias, **options)
    return with_gradients(out, x, w_v, b_v, w_u, w_a, bias)


def gate_alone(backend: str) -> list[Tensor]:
    x, w_v, b_v, w_u, w_a = leaf(ROWS, 12), leaf(9, 12), leaf(9), leaf(9, 12), leaf(2, 9)
    out = F.gated_attention_scores(x, w_v, b_v, w_u, None, w_a, None, dropout_p=0.25, seed=5, backend=backend)
    return with_gradients(out, x, w_v, b_v, w_u, w_a)


def pool(backend: str) -> list[Tensor]:
    values, scores = leaf(ROWS, 12), leaf(ROWS, 2)
    return with_gradients(F.attention_pool(values, scores, OFFSETS, backend=backend), values, scores)


def guided(backend: str) -> list[Tensor]:
    z, values, memory = leaf(ROWS, 8), leaf(ROWS, 12), normal(2, 5, 8)
    temperature = torch.tensor(0.3, dtype=torch.float32, device="cpu", requires_grad=True)
    learned = F.memory_guided_pool(z, values, memory, OFFSETS, temperature, backend=backend)[0]
    fixed = F.memory_guided_pool(z, values, memory, OFFSETS, 0.2, branch="per_class", backend=backend)
    return [*with_gradients(learned, z, values, temperature), *with_gradients(fixed, z, values)]


def similarity(backend: str) -> list[Tensor]:
    z, memory = leaf(ROWS, 8), leaf(3, 5, 8)
    both = [F.memory_similarity(z, memory, reduce=reduce, backend=backend) for reduce in ("max", "lse")]
    return [t for out in both for t in with_gradients(out, z, memory)]


def soft_angle(backend: str) -> list[Tensor]:
    z, memory = leaf(33, 8), leaf(3, 5, 8)
    labels = torch.arange(33, device="cpu") % 4 - 1
    return with_gradients(F.soft_angle_loss(z, memory, labels, backend=backend), z, memory)


def attention(backend: str) -> list[Tensor]:
    edges = graph.batch([graph.knn(normal(n, 2)) for n in (30, 1, 0, 12)])
    x_l, x_r, att = leaf(43, 16), leaf(43, 16), leaf(2, 8)
    return with_gradients(
        F.graph_attention(x_l, x_r, att, edges, dropout_p=0.5, seed=3, backend=backend), x_l, x_r, att
    )


def update(backend: str) -> list[Tensor]:
    z, row_class, weights = normal(ROWS, 8), torch.arange(ROWS, device="cpu") % 3 - 1, normal(ROWS).abs()
    memory, usage = normal(2, 5, 8), normal(2, 5).abs()
    assignments = F.ema_scatter_(memory, usage, z, row_class, momentum=0.9, weights=weights, backend=backend)
    sums, mass = F.ema_accumulate(memory, z, row_class, normalize=False, backend=backend)
    before = memory.clone(), usage.clone()
    F.ema_apply_(memory, usage, sums, mass, momentum=0.5, backend=backend)
    return [assignments, sums, mass, *before, memory, usage]


CALLS: dict[str, Callable[[str], list[Tensor]]] = {
    "gated_attention_pool": gated,
    "gated_attention_scores": gate_alone,
    "attention_pool": pool,
    "memory_guided_pool": guided,
    "memory_similarity": similarity,
    "soft_angle_loss": soft_angle,
    "graph_attention": attention,
    "ema_scatter_": update,
}


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], indirect=True)
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("op", CALLS)
def test_the_default_dtype_changes_no_bit(op: str, backend: str, default_dtype: torch.dtype) -> None:
    able, reason = dispatch.can_run(op, backend, (torch.zeros(1, 1, 1, dtype=torch.float32),))
    if not able:
        pytest.skip(f"{backend}: {reason}")
    torch.set_default_dtype(torch.float32)
    wanted = CALLS[op](backend)
    torch.set_default_dtype(default_dtype)
    for i, (got, want) in enumerate(zip(CALLS[op](backend), wanted, strict=True)):
        assert got.dtype == want.dtype
        assert torch.equal(got, want), f"result {i}"


@pytest.mark.parametrize("default_dtype", [torch.float64, torch.bfloat16, torch.float16], indirect=True)
def test_a_memory_is_float32(default_dtype: torch.dtype) -> None:
    bank = nn.MemoryBank(2, 3, 4)
    assert bank.memory.dtype == bank.usage.dtype == torch.float32
    bank.fill_(normal(40, 4), torch.arange(40) % 2)
    bank.update_(normal(40, 4), torch.arange(40) % 2, momentum=0.9)
    assert bank.memory.dtype == torch.float32


def test_the_default_device_is_not_asked() -> None:
    features = normal(4, 3)
    with torch.device("meta"):
        assert Bags.from_lengths(features, [1, 3]).offsets.tolist() == [0, 1, 4]
        assert graph.knn(features[:1, :2]).device.type == "cpu"

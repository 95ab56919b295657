"""What only the Triton kernels of the ops on the memory can get wrong: blocks of slots, chunks, addresses, NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from momkd import dispatch, reference
from momkd import functional as F
from momkd.errors import BackendError
from tests.compare import FORWARD, GRADIENT, HALVES, assert_close, cosine, offsets_of, sparse

able, reason = dispatch.can_run("memory_similarity", "triton", (torch.zeros(1),))
needs_triton = pytest.mark.skipif(not able, reason=f"Triton: {reason}; TRITON_INTERPRET=1 runs kernels on the CPU")
pytestmark = pytest.mark.usefixtures("poisoned")
# N, S, C, K: over the edges of tiles of rows, of chunks of columns (64) and of blocks of slots (32, 64).
SHAPES = [(31, 16, 3, 1), (33, 33, 2, 17), (5, 512, 2, 33), (65, 65, 3, 65), (4, 1, 2, 256)]


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduce", ["max", "lse"])
def test_memory_similarity_over_the_edges(shape: tuple[int, int, int, int], reduce: str) -> None:
    n, s, c, k = shape
    z, memory = torch.randn(n, s, requires_grad=True), torch.randn(c, k, s, requires_grad=True)
    z64, memory64 = doubled(z, memory)
    got, slots = F.memory_similarity(z, memory, reduce=reduce, tau=60.0, backend="triton")
    want, want_slots = reference.memory_similarity(z64, memory64, reduce, 60.0)
    assert_close(got, want, FORWARD)
    if s > 1:  # else all cosines are ±1
        assert torch.equal(slots, want_slots)
    grad = torch.randn_like(got)
    got.backward(grad)
    if s > 1:
        want.backward(grad.double())
        assert_close(z.grad, z64.grad, GRADIENT, "d z")
        assert_close(memory.grad, memory64.grad, GRADIENT, "d memory")


@needs_triton
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_soft_angle_loss_over_the_edges(shape: tuple[int, int, int, int]) -> None:
    n, s, c, k = shape
    z, memory = torch.randn(n, s, requires_grad=True), torch.randn(c, k, s, requires_grad=True)
    z64, memory64 = doubled(z, memory)
    labels = torch.randint(-1, c, (n,))
    got = F.soft_angle_loss(z, memory, labels, reduction="none", backend="triton")
    want = reference.soft_angle_loss(z64, memory64, labels, 0.3, 5.0, 20.0)
    assert_close(got, want, FORWARD)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    assert_close(z.grad, z64.grad, GRADIENT, "d z")
    assert_close(memory.grad, memory64.grad, GRADIENT, "d memory")


@needs_triton
@pytest.mark.parametrize("shape", [(70, 65, 17, 3), (40, 16, 2, 65)])
@pytest.mark.parametrize("branch", ["positive", "per_class"])
def test_memory_guided_pool_over_the_edges(shape: tuple[int, int, int, int], branch: str) -> None:
    n, s, c, k = shape
    z, values = torch.randn(n, s, requires_grad=True), torch.randn(n, 70, requires_grad=True)
    memory, t, offsets = torch.randn(c, k, s), torch.tensor(0.1, requires_grad=True), offsets_of((n - 1, 0, 1))
    inputs = doubled(z, values, t)
    pooled, attention, slots = F.memory_guided_pool(z, values, memory, offsets, t, branch=branch, backend="triton")
    per_class = branch == "per_class" or c > 2
    want, want_attention, want_slots = reference.memory_guided_pool(
        inputs[0], inputs[1], memory.double(), offsets, inputs[2], per_class
    )
    assert_close(pooled, want, FORWARD, "pooled")
    assert_close(attention, want_attention, FORWARD, "attention")
    assert torch.equal(slots, want_slots)
    grad = torch.randn_like(pooled)
    pooled.backward(grad)
    want.backward(grad.double())
    for name, a, b in zip(("z", "values", "temperature"), (z, values, t), inputs, strict=True):
        assert_close(a.grad, b.grad, GRADIENT, f"d {name}")


@needs_triton
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_and_values_of_different_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    memory, offsets, grad = torch.randn(2, 17, 70), offsets_of((30, 10)), torch.randn(2, 1, 20)
    for z_dtype, value_dtype in ((dtype, torch.float32), (torch.float32, dtype)):
        z = torch.randn(40, 70).to(z_dtype).requires_grad_()
        values = torch.randn(40, 20).to(value_dtype).requires_grad_()
        z64, values64 = doubled(z, values)
        t64 = torch.tensor(0.5, dtype=torch.float64)
        pooled, attention, _ = F.memory_guided_pool(z, values, memory, offsets, 0.5, backend="triton")
        want, want_attention, _ = reference.memory_guided_pool(z64, values64, memory.double(), offsets, t64)
        assert pooled.dtype == value_dtype
        assert attention.dtype == torch.float32
        assert cosine(attention, want_attention.detach()) >= 0.99999
        assert cosine(pooled.detach(), want.detach()) >= 0.9999
        pooled.backward(grad.to(value_dtype))
        want.backward(grad.double())
        assert cosine(z.grad, z64.grad) >= 0.999
        assert cosine(values.grad, values64.grad) >= 0.999


@needs_triton
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_half_precision_of_the_memorys_gradient(dtype: torch.dtype, scale: float) -> None:
    """A gradient far below what float16 holds must not vanish on its way to a float32 memory."""
    torch.manual_seed(0)
    z, memory = torch.randn(70, 70).to(dtype), torch.randn(2, 17, 70, requires_grad=True)
    for reduce in ("max", "lse"):
        grad = scale * torch.randn(70, 2)
        similarity, slots = F.memory_similarity(z, memory, reduce=reduce, backend="triton")
        (got,) = torch.autograd.grad(similarity, memory, grad)
        # With the same slots: of two that are almost as near, half precision may see the other one first.
        _, want = reference.memory_similarity_backward(
            grad.double(), z.double(), memory.detach().double(), reduce, 5.0, slots, (False, True)
        )
        assert cosine(got, want) >= 0.999
        assert 0.98 <= got.norm() / want.norm() <= 1.02


@needs_triton
@pytest.mark.parametrize("reduce", ["max", "lse"])
def test_strided_rows(reduce: str) -> None:
    memory, wide = torch.randn(2, 3, 8), torch.randn(70, 24)
    for z in (wide[:, 3:11], wide[:, ::3], torch.randn(8, 70).T, torch.randn(1, 8).expand(70, 8)):
        results = []
        for rows in (z, z.contiguous()):
            leaf = rows.detach().requires_grad_()
            got, _ = F.memory_similarity(leaf, memory, reduce=reduce, backend="triton")
            got.sum().backward()
            results.append((got.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": lambda z, memory: F.memory_similarity(z, memory, backend="triton")[0],
    "lse": lambda z, memory: F.memory_similarity(z, memory, reduce="lse", backend="triton")[0],
    "loss": lambda z, memory: F.soft_angle_loss(z, memory, torch.tensor([0, 1] * 3), backend="triton"),
    "pool": lambda z, memory: F.memory_guided_pool(z, z, memory, offsets_of((2, 4)), 0.2, backend="triton")[0],
}


@needs_triton
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("width", [24, 80])
def test_rows_that_lie_further_apart_than_32_bits_reach(call: str, width: int) -> None:
    """Row 5 begins 2.5 · 2^31 elements behind row 0; the file behind it has holes and takes no room."""
    far, near, memory = sparse(6, 1 << 30, width), torch.randn(6, width), torch.randn(2, 3, width)
    far.copy_(near)
    results = []
    for rows in (far, near):
        leaf = rows.detach().requires_grad_()
        own = memory.clone().requires_grad_()
        got = CALLS[call](leaf, own)
        (got * torch.arange(1.0, got.numel() + 1).reshape(got.shape)).sum().backward()
        results.append([got.detach(), leaf.grad, *([] if own.grad is None else [own.grad])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_triton
@pytest.mark.parametrize("reduce", ["max", "lse"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone_backward_too(reduce: str, bad: float) -> None:
    """Its slots are slots; with a gradient of 0 nothing of it reaches z or the memory."""
    z, memory = torch.randn(40, 70), torch.randn(3, 17, 70, requires_grad=True)
    z[7, 3] = bad
    z.requires_grad_()
    got, slots = F.memory_similarity(z, memory, reduce=reduce, backend="triton")
    assert got[7].isnan().all()
    assert got.isnan().any(1).sum() == 1
    assert ((slots >= 0) & (slots < 17)).all()
    others = torch.arange(40) != 7
    got[others].sum().backward()
    assert z.grad.isfinite().all()
    assert (z.grad[7] == 0).all()
    assert memory.grad.isfinite().all()
    z.grad = None
    F.memory_similarity(z, memory.detach(), reduce=reduce, backend="triton")[0].sum().backward()
    assert z.grad[others].isfinite().all()
    assert z.grad[7].isnan().any()


@needs_triton
@pytest.mark.parametrize("classes", [2, 16])
def test_a_bad_slot_spoils_its_class(classes: int) -> None:
    z, memory = torch.randn(5, 8), torch.randn(classes, 40, 8)
    memory[1, 35] = torch.nan
    for reduce in ("max", "lse"):
        got, slots = F.memory_similarity(z, memory, reduce=reduce, backend="triton")
        assert torch.equal(got.isnan(), (torch.arange(classes) == 1).expand(5, classes))
        assert (slots[:, 1] == 35).all()
    labels = torch.tensor([0, 1, -1, 0, 1])
    losses = F.soft_angle_loss(z, memory, labels, reduction="none", backend="triton")
    if classes == 2:
        assert torch.equal(losses.isnan(), labels >= 0)
    pooled, _, _ = F.memory_guided_pool(z, z, memory, offsets_of((5,)), 0.2, branch="per_class", backend="triton")
    assert pooled.isnan().all()


@needs_triton
def test_an_unlabelled_row_brings_nothing_to_the_memory_even_when_it_is_not_finite() -> None:
    z, memory = torch.randn(3, 8), torch.randn(2, 3, 8)
    results = []
    for value in (torch.nan, 1.0):
        z[1] = value
        leaf = memory.clone().requires_grad_()
        F.soft_angle_loss(z, leaf, torch.tensor([0, -1, 1]), backend="triton").backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


@needs_triton
def test_tiny_losses_keep_their_digits() -> None:
    memory = torch.eye(8)[:2, None]
    z = memory[:, 0] + 0.01 * torch.randn(2, 8)
    got = F.soft_angle_loss(z, memory, torch.arange(2), reduction="none", backend="triton")
    want = reference.soft_angle_loss(z.double(), memory.double(), torch.arange(2), 0.3, 5.0, 20.0)
    assert want.max() < 1e-5
    assert_close(got, want, FORWARD)


@needs_triton
def test_ties_in_other_blocks_of_slots_take_the_lowest() -> None:
    memory = torch.eye(8)[:2, None].repeat(1, 100, 1)  # products with it are exact
    for reduce in ("max", "lse"):
        assert (F.memory_similarity(torch.randn(20, 8), memory, reduce=reduce, backend="triton")[1] == 0).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((33, 2, 4), "takes a memory of at most 32 classes, got 33"),
        ((2, 257, 4), "takes a memory of at most 256 slots a class, got 257"),
        ((2, 2, 513), "takes a memory of at most 512 columns, got 513"),
    ],
)
def test_sizes_over_the_limits_are_a_reason(
    shape: tuple[int, int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    memory, z = torch.randn(shape), torch.randn(3, shape[2])
    offsets, labels = offsets_of((1, 2)), torch.tensor([0, 1, -1])
    calls: list[Callable[[str | None], object]] = [
        lambda backend: F.memory_similarity(z, memory, backend=backend),
        lambda backend: F.memory_guided_pool(z, z, memory, offsets, 0.2, backend=backend),
        lambda backend: F.soft_angle_loss(z, memory, labels, backend=backend),
    ]
    for call in calls:
        with pytest.raises(BackendError, match=f"'triton' cannot run: {message}; available here: "):
            call("triton")
        call(None)

"""On a GPU: every kernel at the sizes it is for, against float64; it waits for nothing and repeats its bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import momkd
from momkd import functional as F
from momkd import reference
from momkd.reference.gated_attention_pool import GateParameters
from tests.compare import FORWARD, GRADIENT, assert_close, assert_half, cosine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
LENGTHS = (0, 1, 4097, 15, 0, 30_000, 128, 129, 63, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_device() -> Iterator[None]:
    """What nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def bags(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    made = momkd.Bags.from_lengths(torch.randn(sum(LENGTHS), width, device="cuda").to(dtype), LENGTHS)
    return made.features, made.offsets


def check(call: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype) -> None:
    """Value and gradients of `call` on `tensors`, against `plain` on them in float64 (and in `dtype`, for halves)."""
    mine = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    got, want = call(*mine), plain(*exact)
    grad = torch.randn_like(want)
    got.backward(grad.to(got.dtype))
    want.backward(grad)
    if dtype == torch.float32:
        assert_close(got, want, FORWARD)
        for number, (a, b) in enumerate(zip(mine, exact, strict=True)):
            assert_close(a.grad, b.grad, GRADIENT, f"gradient {number}")
    else:
        assert_half(got, want, plain(*tensors))
        for number, (a, b) in enumerate(zip(mine, exact, strict=True)):
            if b.grad.norm() > 1e-6 * grad.norm():
                assert cosine(a.grad, b.grad) >= 0.999, f"gradient {number}"


def gate_parameters(width: int, hidden: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(hidden, width), (hidden,), (hidden, width), (hidden,), (heads, hidden)]
    return [(torch.randn(*s, device="cuda") / s[-1] ** 0.5).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "hidden", "heads"), [(1024, 256, 1), (1536, 384, 4), (500, 64, 1), (2560, 512, 16)])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gated_attention_pool(dtype: torch.dtype, width: int, hidden: int, heads: int, p: float) -> None:
    x, offsets = bags(width, dtype)
    seed = torch.tensor((3 << 32) + 5, device="cuda")
    tensors = [x, *gate_parameters(width, hidden, heads, dtype)]
    options = {"dropout_p": p, "seed": seed, "backend": "triton"}
    check(
        lambda x, *w: F.gated_attention_pool(x, offsets, *w, None, **options),
        lambda x, *w: reference.gated_attention_pool(x, offsets, GateParameters(*w, None), p, seed)[0],
        tensors,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 5])
def test_attention_pool(dtype: torch.dtype, heads: int) -> None:
    values, offsets = bags(1024, dtype)
    scores = torch.randn(len(values), heads, device="cuda").to(dtype)
    check(
        lambda v, s: F.attention_pool(v, s, offsets, backend="triton"),
        lambda v, s: reference.attention_pool(v, s, offsets)[0],
        [values, scores],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "slots", "length"), [(2, 16, 64), (5, 256, 512), (32, 1, 16)])
def test_memory(dtype: torch.dtype, classes: int, slots: int, length: int) -> None:
    z, offsets = bags(length, dtype)
    values, _ = bags(512, dtype)
    memory = torch.nn.functional.normalize(torch.randn(classes, slots, length, device="cuda"), dim=-1).to(dtype)
    labels = torch.randint(-1, classes, (len(z),), device="cuda")
    check(
        lambda z: F.memory_similarity(z, memory, reduce="lse", backend="triton")[0],
        lambda z: reference.memory_similarity(z, memory, "lse", 5.0)[0],
        [z],
        dtype,
    )
    check(
        lambda z: F.soft_angle_loss(z, memory, labels, reduction="none", backend="triton"),
        lambda z: reference.soft_angle_loss(z, memory, labels, 0.3, 5.0, 20.0),
        [z],
        dtype,
    )
    if dtype == torch.float32:  # in half precision the nearest slot may be another, equally near one
        t = torch.tensor(0.2, device="cuda")
        per_class = classes > 2
        check(
            lambda z, v: F.memory_guided_pool(z, v, memory, offsets, t, backend="triton")[0],
            lambda z, v: reference.memory_guided_pool(z, v, memory, offsets, t, per_class)[0],
            [z, values],
            dtype,
        )


def test_no_op_waits_for_the_device() -> None:
    x, offsets = bags(256, torch.bfloat16)
    weights = [w.requires_grad_() for w in gate_parameters(256, 64, 1, torch.bfloat16)]
    memory, t = torch.randn(2, 16, 256, device="cuda"), torch.tensor(0.2, device="cuda")
    seed = torch.tensor(1, device="cuda")

    def step() -> None:
        pooled = F.gated_attention_pool(x, offsets, *weights, None, dropout_p=0.25, seed=seed)
        guided, _, _ = F.memory_guided_pool(x, x, memory, offsets, t)
        (pooled.sum() + guided.sum()).backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_each_time() -> None:
    x, offsets = bags(1024, torch.bfloat16)
    weights = gate_parameters(1024, 256, 1, torch.bfloat16)

    def gradients() -> list[Tensor]:
        own = [w.clone().requires_grad_() for w in [x, *weights]]
        out = F.gated_attention_pool(own[0], offsets, *own[1:], None, backend="triton")
        out.sum().backward()
        return [out.detach(), *(w.grad for w in own)]

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


def test_memory_above_inputs_and_outputs_is_bounded() -> None:
    """Neither pass holds an (N, D) activation: what is held is the partials, and in backward the workspace."""
    n, width, hidden = 400_000, 1024, 256
    x = torch.randn(n, width, device="cuda", dtype=torch.bfloat16)
    made = momkd.Bags.from_lengths(x, [n])
    weights = [w.requires_grad_() for w in gate_parameters(width, hidden, 1, torch.bfloat16)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    F.gated_attention_pool(x, made.offsets, *weights, None, backend="triton").sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    activations = 2 * n * hidden * 2
    assert extra < activations / 2, f"{extra / 1e6:.0f} MB above the input"

"""What the gate keeps of its forward for its backward: the same numbers either way, and when it keeps something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import momkd
from momkd import budget, dispatch, env, ops, reference
from momkd import functional as F
from momkd.errors import InputError
from momkd.reference.gated_attention_pool import GateParameters
from tests.compare import FORWARD, GRADIENT, HALVES, assert_close, cosine, offsets_of
from tests.ops.test_gated_attention_kernel import doubled, parameters

able, reason = dispatch.can_run("gated_attention_pool", "triton", (torch.zeros(1),))
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not able, reason=f"Triton: {reason}; TRITON_INTERPRET=1 runs kernels on the CPU"),
]
WIDTH, HIDDEN, LENGTHS = 20, 24, (33, 0, 1, 37)
HUGE = 1 << 60
ROWS = sum(LENGTHS)
CHUNK = 256  # rows of a program of backward
SEED = torch.tensor(7)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOMKD_GATE_MEMORY", raising=False)


def gate(heads: int = 1, gated: bool = True) -> GateParameters:
    torch.manual_seed(0)
    return parameters(WIDTH, HIDDEN, heads, gated)


def rows(lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(sum(lengths), WIDTH).to(dtype).requires_grad_()


def call(x: Tensor, given: GateParameters, lengths: tuple[int, ...] = LENGTHS, p: float = 0.0) -> tuple[Tensor, Tensor]:
    return F.gated_attention_pool(
        x, offsets_of(lengths), *given, dropout_p=p, seed=SEED if p else None, return_scores=True, backend="triton"
    )


def columns_kept(result: Tensor) -> int:
    """Columns of the products among what backward holds; 0 where none are."""
    shapes = [tuple(t.shape) for t in result.grad_fn.saved_tensors if t is not None]
    found = [shape[1] for shape in shapes if shape in ((ROWS, HIDDEN), (ROWS, 2 * HIDDEN))]
    assert found or (0,) in shapes
    return found[0] if found else 0


def present(given: GateParameters) -> list[Tensor]:
    return [p for p in given if p is not None]


def step(x: Tensor, given: GateParameters, lengths: tuple[int, ...], p: float) -> list[Tensor]:
    """Pooled, scores and all gradients."""
    pooled, scores = call(x, given, lengths, p)
    torch.manual_seed(2)
    grads = torch.randn_like(pooled), torch.randn_like(scores) / 8
    return [pooled, scores, *torch.autograd.grad((pooled, scores), [x, *present(given)], grads)]


def in_chunks_of(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on so many rows are taken at once; by itself a chunk has at least 1024, which take long interpreted."""
    from momkd.kernels import gated_attention_pool as kernel

    monkeypatch.setattr(kernel, "_chunk", lambda x, gate: min(len(x), count))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of all products of the library inside."""
    shapes: list[tuple[int, ...]] = []
    mm = torch.mm

    def noted(*args: Any, **options: Any) -> Tensor:
        made = mm(*args, **options)
        shapes.append(tuple(made.shape))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", noted)
        yield shapes


# -- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("heads", "gated", "p"), [(1, True, 0.0), (3, True, 0.4), (1, False, 0.4), (3, False, 0.0)])
def test_every_budget_gives_the_same_bits(dtype: torch.dtype, heads: int, gated: bool, p: float) -> None:
    x, given = rows(dtype=dtype), gate(heads, gated)
    default = step(x, given, LENGTHS, p)
    for size in (0, HUGE):
        with momkd.gate_memory(size):
            other = step(x, given, LENGTHS, p)
        assert all(torch.equal(a, b) for a, b in zip(default, other, strict=True))


@pytest.mark.parametrize("lengths", [(), (0,), (1,)])
@pytest.mark.parametrize("size", [0, HUGE])
def test_few_rows_or_none(lengths: tuple[int, ...], size: int) -> None:
    x, given = rows(lengths), gate()
    with momkd.gate_memory(size):
        pooled, scores, *gradients = step(x, given, lengths, 0.0)
    assert pooled.shape == (len(lengths), 1, WIDTH)
    assert all(t.isfinite().all() for t in (pooled, scores, *gradients))
    if not sum(lengths):
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("heads", "gated", "p", "size"),
    [(3, True, 0.4, 0), (1, True, 0.0, HUGE), (3, False, 0.0, HUGE), (1, False, 0.4, 0)],
)
def test_chunks_of_rows_add_up(
    dtype: torch.dtype, heads: int, gated: bool, p: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(CHUNK, monkeypatch)
    lengths = (100, 0, 1, 2 * CHUNK - 1)
    x, given = rows(lengths, dtype), gate(heads, gated)
    with momkd.gate_memory(size), counted(monkeypatch) as shapes:
        got = step(x, given, lengths, p)
    columns = HIDDEN * (1 + gated)
    products = [shape[0] for shape in shapes if shape[1] == columns]
    assert products == ([2 * CHUNK + 100] if size else [CHUNK, CHUNK, 100] * 2)
    assert shapes.count((columns, WIDTH)) == 3

    x64, given64 = x.detach().double().requires_grad_(), doubled(given)
    pooled, scores, *_ = reference.gated_attention_pool(x64, offsets_of(lengths), given64, p, SEED)
    torch.manual_seed(2)
    grads = torch.randn_like(got[0]).double(), (torch.randn_like(got[1]) / 8).double()
    want = [pooled, scores, *torch.autograd.grad((pooled, scores), [x64, *present(given64)], grads)]
    for i, (mine, exact) in enumerate(zip(got, want, strict=True)):
        if dtype == torch.float32:
            assert_close(mine, exact, FORWARD if i < 2 else GRADIENT, f"result {i}")
        else:
            assert cosine(mine, exact) >= (0.9999 if i < 2 else 0.999), f"result {i}"


def test_products_that_are_not_kept_fit_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    from momkd.kernels import gated_attention_pool as kernel

    lengths = (2000, 100)
    x, given = rows(lengths), gate()
    whole = step(x, given, lengths, 0.0)
    monkeypatch.setattr(kernel, "WORKSPACE", 1024 * 2 * HIDDEN * 4)
    with momkd.gate_memory(0), counted(monkeypatch) as shapes:
        got = step(x, given, lengths, 0.0)
    assert [shape[0] for shape in shapes if shape[1] == 2 * HIDDEN] == [1024, 1024, 52] * 2
    for mine, one in zip(got, whole, strict=True):
        assert_close(mine, one, 1e-5)


# -- which way is taken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [0, HUGE])
def test_backward_takes_one_product_more_where_nothing_was_kept(
    size: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, given = rows(), gate()
    with momkd.gate_memory(size), counted(monkeypatch) as shapes:
        pooled, _ = call(x.detach() if frozen else x, given)
        assert shapes == [(ROWS, 2 * HIDDEN)]
    assert columns_kept(pooled) == (2 * HIDDEN if size else 0)
    with counted(monkeypatch) as shapes:
        pooled.square().sum().backward()
    again = [] if size else [(ROWS, 2 * HIDDEN)]
    assert sorted(shapes) == sorted([*again, *([] if frozen else [(ROWS, WIDTH)]), (2 * HIDDEN, WIDTH)])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("gated", [True, False])
def test_the_budget_is_the_bytes_of_the_products(dtype: torch.dtype, gated: bool) -> None:
    x, given = rows(dtype=dtype), gate(gated=gated)
    columns = HIDDEN * (1 + gated)
    size = ROWS * columns * dtype.itemsize
    for allowed, expected in ((size, columns), (size - 1, 0), (size + 1, columns)):
        with momkd.gate_memory(allowed):
            assert columns_kept(call(x, given)[0]) == expected


def test_by_default_an_eighth_of_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x, given = rows(), gate()
    size = ROWS * 2 * HIDDEN * 4
    for memory, expected in ((8 * size, 2 * HIDDEN), (8 * size - 1, 0)):
        monkeypatch.setattr(budget, "_memory", lambda device, memory=memory: memory)
        assert columns_kept(call(x, given)[0]) == expected
    monkeypatch.undo()
    assert budget.allowed(budget.DEFAULT, x.device) > 1 << 24


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    x, given = rows(), gate()
    frozen = GateParameters(*(p.detach() for p in given))
    kept: list[int] = []
    function = ops.gated_attention_pool

    def noted(*args: Any) -> tuple[Tensor, ...]:
        result = function(*args)
        kept.append(result[3].numel())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F.pooling.ops, "gated_attention_pool", noted)
        with torch.no_grad():
            call(x, given)
        with torch.inference_mode():
            call(x, given)
        call(x.detach(), frozen)
        assert kept == [0, 0, 0]
        call(x, frozen)
        call(x.detach(), given)
        call(x.detach(), frozen._replace(b_a=given.b_a))
        assert kept[3:] == [ROWS * 2 * HIDDEN] * 3


# -- how it is said --------------------------------------------------------------------------------------------------


def test_the_innermost_block_counts_and_every_block_ends() -> None:
    seen = [budget.asked()]
    with momkd.gate_memory(5):
        with momkd.gate_memory(0):
            seen.append(budget.asked())
        seen.append(budget.asked())
        with pytest.raises(KeyError), momkd.gate_memory(9):
            raise KeyError(seen.append(budget.asked()))
        seen.append(budget.asked())
    seen.append(budget.asked())
    assert seen == [budget.DEFAULT, 0, 5, 9, 5, budget.DEFAULT]


@pytest.mark.parametrize("size", [-1, True, 1.5, "1", None])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match=r"size: expected bytes, a whole number of at least 0, got .*; 0 keeps"):
        momkd.gate_memory(size).__enter__()
    assert budget.asked() == budget.DEFAULT


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    x, given = rows(), gate()
    size = ROWS * 2 * HIDDEN * 4
    for text, expected in (("", True), (f"{size}", True), (f" {size - 1} ", False), ("0", False)):
        monkeypatch.setenv("MOMKD_GATE_MEMORY", text)
        assert columns_kept(call(x, given)[0]) == (2 * HIDDEN if expected else 0)
    with momkd.gate_memory(HUGE):
        assert columns_kept(call(x, given)[0]) == 2 * HIDDEN, "a block counts more"


@pytest.mark.parametrize("text", ["-1", "1.5", "1 GB", "much"])
def test_a_bad_variable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMKD_GATE_MEMORY", text)
    with pytest.raises(InputError, match=r"MOMKD_GATE_MEMORY: expected a whole number from 0 to \d+, got .*; unset it"):
        env.gate_memory()
    with pytest.raises(InputError, match="MOMKD_GATE_MEMORY"):
        call(rows(), gate())


# -- torch.compile and the registration ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_inside_and_outside_of_a_block(backend: str) -> None:
    x, given = rows(), gate()

    def pool(x: Tensor) -> Tensor:
        return call(x, given)[0]

    def bounded(x: Tensor) -> Tensor:
        with momkd.gate_memory(0):
            return call(x, given)[0]

    def gradients(pooled: Tensor) -> list[Tensor]:
        return [pooled, *torch.autograd.grad(pooled.square().sum(), [x, *given])]

    torch._dynamo.reset()
    compiled = torch.compile(pool, backend=backend, fullgraph=True)
    cases: list[tuple[Callable[[Tensor], Tensor], AbstractContextManager[None], int]] = [
        (compiled, nullcontext(), 2 * HIDDEN),
        (compiled, momkd.gate_memory(0), 0),
        (compiled, momkd.gate_memory(HUGE), 2 * HIDDEN),
        (compiled, nullcontext(), 2 * HIDDEN),
        (torch.compile(bounded, backend=backend, fullgraph=True), nullcontext(), 0),
    ]
    want = gradients(pool(x))
    for function, block, columns in cases:
        with block:
            pooled = function(x)
        assert columns_kept(pooled) == columns
        assert all(torch.equal(a, b) for a, b in zip(gradients(pooled), want, strict=True))
    assert budget.asked() == budget.DEFAULT


@pytest.mark.parametrize("size", [0, 1, HUGE, budget.DEFAULT])
@pytest.mark.parametrize("gated", [True, False])
def test_opcheck(size: int, gated: bool) -> None:
    x, given, offsets = rows((3, 0, 2)), gate(2, gated), offsets_of((3, 0, 2))
    bias = torch.randn(5, 2, requires_grad=True)
    arguments = (x, offsets, *given, bias, 0.4, SEED, size, "triton")
    torch.library.opcheck(ops.gated_attention_pool, arguments)
    pooled, scores, stats, kept = (t.detach() for t in ops.gated_attention_pool(*arguments))
    assert kept.shape == ((5, HIDDEN * (1 + gated)) if size in (HUGE, budget.DEFAULT) else (0,))
    saved = (x.detach(), offsets, *(None if p is None else p.detach() for p in given), bias.detach(), SEED)
    needs = [True, True, True, gated, gated, True, True, True]
    backward = torch.ops.momkd.gated_attention_pool_backward.default
    given_grads = torch.randn_like(pooled), torch.randn_like(scores)
    torch.library.opcheck(
        backward,
        (*saved, pooled, scores, stats, kept, *given_grads, 0.4, needs, "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("wrong", ["rows", "columns", "dtype"])
def test_what_backward_is_given_must_be_what_forward_kept(wrong: str) -> None:
    x, w = torch.randn(5, WIDTH), torch.randn(HIDDEN, WIDTH)
    kept = torch.zeros(4 if wrong == "rows" else 5, HIDDEN - (wrong == "columns"))
    kept = kept.double() if wrong == "dtype" else kept
    scores, stats, pooled = torch.zeros(5, 1), torch.zeros(1, 1, 2), torch.zeros(1, 1, WIDTH)
    given = [x, torch.tensor([0, 5], dtype=torch.int32), w, None, None, None, w[:1, :HIDDEN].new_zeros(1, HIDDEN), None]
    with pytest.raises(ValueError, match="kept: expected what forward gave"):
        torch.ops.momkd.gated_attention_pool_backward(
            *given, None, None, pooled, scores, stats, kept, pooled, None, 0.0, [True] * 8, ""
        )

"""Where rows lie: sliced, unaligned, further than 2^31 elements away; and inputs of different types."""

from __future__ import annotations

import fcntl
import gc
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from momkd import functional as F
from momkd.graph import Edges
from tests.compare import FORWARD, assert_close, assert_half, cosine, offsets_of
from tests.gpu import cases
from tests.gpu.cases import Case, Inputs, Outputs
from tests.gpu.check import cotangents, wrong
from tests.gpu.device import DEVICE, HALF_AND_SINGLE, MIXED, REHEARSING, fitting, name_of, on_gpu, smaller

pytestmark = on_gpu

GATE = {"width": smaller(1024, 72), "hidden": smaller(256, 40)}
OPS: dict[str, Callable[..., Case]] = {
    "gated_attention_pool": partial(cases.gated_attention_pool, **GATE),
    "gated_attention_scores": partial(cases.gated_attention_scores, **GATE),
    "attention_pool": partial(cases.attention_pool, width=smaller(1024, 72)),
    "memory_similarity max": cases.memory_similarity,
    "memory_similarity lse": partial(cases.memory_similarity, reduce="lse"),
    "soft_angle_loss": cases.soft_angle_loss,
    "memory_guided_pool": partial(cases.memory_guided_pool, width=smaller(512, 40)),
    "graph_attention": partial(cases.graph_attention, width=smaller(256, 24)),
}

# From a larger tensor: 3 elements after an aligned address and rows 11 further apart than they are wide; every other
# row; every other column.
Slice = tuple[slice, slice]
LAYOUTS: dict[str, Callable[[int, int], tuple[tuple[int, int], Slice]]] = {
    "unaligned": lambda n, w: ((n, w + 11), (slice(None), slice(3, 3 + w))),
    "aligned slice": lambda n, w: ((n + 1, w + 64), (slice(1, None), slice(32, 32 + w))),
    "every other row": lambda n, w: ((2 * n, w), (slice(None, None, 2), slice(None))),
    "every other column": lambda n, w: ((n, 2 * w), (slice(None), slice(None, None, 2))),
}


def sliced(case: Case, layout: str) -> Case:
    """The same case, with rows (and values, where they are apart) that are slices of larger tensors full of NaN."""
    several = 2 if case.op in ("memory_guided_pool", "graph_attention") else 1
    made = [LAYOUTS[layout](*t.shape) for t in case.tensors[:several]]
    whole = [t.new_full(shape, torch.nan) for t, (shape, _) in zip(case.tensors, made, strict=False)]
    for large, t, (_, at) in zip(whole, case.tensors, made, strict=False):
        large[at] = t

    def on_slices(form: Callable[..., Outputs]) -> Callable[..., Outputs]:
        def call(*given: Tensor) -> Outputs:
            return form(*(large[at] for large, (_, at) in zip(given, made, strict=False)), *given[several:])

        return call

    return case._replace(
        tensors=[*whole, *case.tensors[several:]],
        call=on_slices(case.call),
        exact=on_slices(case.exact),
        plain=on_slices(case.plain),
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_slices_of_larger_tensors(op: str, layout: str, dtype: torch.dtype) -> None:
    found = wrong(sliced(OPS[op](Inputs(fitting(op, MIXED), dtype, DEVICE), backend="triton"), layout), dtype)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_half_rows_with_float32_weights(dtype: torch.dtype) -> None:
    case = OPS["gated_attention_pool"](Inputs(MIXED, dtype, DEVICE), backend="triton")
    case = case._replace(tensors=[case.tensors[0], *(t.float() for t in case.tensors[1:])])
    found = wrong(case, dtype)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rows_type", [torch.bfloat16, torch.float32], ids=name_of)
def test_rows_and_values_of_different_types(rows_type: torch.dtype) -> None:
    other = torch.float32 if rows_type == torch.bfloat16 else torch.bfloat16
    case = OPS["memory_guided_pool"](Inputs(MIXED, torch.bfloat16, DEVICE), backend="triton")
    z, values, temperature = case.tensors
    case = case._replace(tensors=[z.to(rows_type), values.to(other), temperature])
    found = wrong(case, torch.bfloat16)
    assert not found, "\n".join(found)
    assert case.call(*case.tensors)[0].dtype == other


# -- more elements than 2^31

GIGABYTES = 40


@pytest.fixture
def much_memory() -> Iterator[None]:
    """One such test at a time on this machine, and what it held is given back; a skip where there is too little."""
    with (Path(tempfile.gettempdir()) / "momkd-gpu-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free = GIGABYTES if REHEARSING else torch.cuda.mem_get_info()[0] / 2**30
        if free < GIGABYTES:
            pytest.skip(f"needs {GIGABYTES} GiB for more than 2^31 elements, this GPU has {free:.0f} free")
        yield
        gc.collect()
        if not REHEARSING:
            torch.cuda.empty_cache()


def many_rows(width: int) -> tuple[Tensor, int]:
    """(N, width) bfloat16 of more than 2^31 elements, and how many of the last rows to look at."""
    last = smaller(3000, 40)
    rows = smaller(2**31 // width + 2 * last, 200)
    return torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE), last


def as_if_alone(case: Case, last: int, grad_of: int) -> None:
    """Of a case of two bags, the second is what it is alone: output and the gradient of its last rows."""
    assert case.tensors[0].numel() > 2**31 or REHEARSING
    mine = [t.detach().requires_grad_() for t in case.tensors]
    out = case.call(*mine)[:1]
    end = [t.detach()[-last:] if len(t) == len(case.tensors[0]) else t.detach() for t in case.tensors]
    exact = [t.double().requires_grad_() for t in end]
    want = case.exact(*exact)[:1]
    got = (out[0][-len(want[0]) :],)
    assert_half(got[0], want[0], case.plain(*end)[0])
    grads = cotangents(want, 1)
    (d_got,) = torch.autograd.grad(got, [mine[grad_of]], [g.to(got[0].dtype) for g in grads])
    (d_want,) = torch.autograd.grad(want, [exact[grad_of]], grads)
    assert cosine(d_got[-last:], d_want) >= 0.999
    if len(got[0]) == last:
        assert not d_got[:-last].any()


def alone(op: str, last: int, tensors: list[Tensor]) -> Case:
    """Two bags of the rows in `tensors`; `exact` and `plain` see the second one alone."""
    sizes: dict[str, dict[str, object]] = {
        "gated_attention_pool": {"width": tensors[0].shape[1], "hidden": smaller(256, 40)},
        "attention_pool": {"width": tensors[0].shape[1]},
        "memory_similarity": {},
        "graph_attention": {"width": tensors[0].shape[1] // 2},
    }
    make = getattr(cases, op)
    small = make(Inputs((last,), torch.bfloat16, DEVICE), backend="triton", **sizes[op])
    return small._replace(tensors=[*tensors, *small.tensors[len(tensors) :]])


@pytest.mark.usefixtures("much_memory")
def test_gated_attention_pool_of_more_than_two_to_the_31_elements() -> None:
    x, last = many_rows(smaller(1024, 72))
    offsets = offsets_of((len(x) - last, last)).to(DEVICE)
    case = alone("gated_attention_pool", last, [x])

    def call(x: Tensor, *w: Tensor) -> Outputs:
        return (F.gated_attention_pool(x, offsets, *w, backend="triton"),)

    as_if_alone(case._replace(call=call), last, 0)


@pytest.mark.usefixtures("much_memory")
def test_attention_pool_of_more_than_two_to_the_31_elements() -> None:
    values, last = many_rows(smaller(1024, 72))
    scores = torch.randn(len(values), 1, dtype=torch.bfloat16, device=DEVICE)
    offsets = offsets_of((len(values) - last, last)).to(DEVICE)
    case = alone("attention_pool", last, [values, scores])

    def call(v: Tensor, s: Tensor) -> Outputs:
        return (F.attention_pool(v, s, offsets, backend="triton"),)

    as_if_alone(case._replace(call=call), last, 0)


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("reduce", ["max", "lse"])
def test_memory_similarity_of_more_than_two_to_the_31_elements(reduce: str) -> None:
    z, last = many_rows(64)
    given = Inputs((last,), torch.bfloat16, DEVICE)
    case = cases.memory_similarity(given, reduce=reduce, backend="triton")
    z[-last:] = case.tensors[0]
    mine, memory = z.requires_grad_(), case.tensors[1]
    out = case.call(mine, memory)[0]
    exact = [case.tensors[0].double().requires_grad_(), memory.double()]
    want = case.exact(*exact)
    assert_half(out[-last:], want[0], case.plain(*case.tensors)[0])
    grads = cotangents(want, 1)
    (d_z,) = torch.autograd.grad(out[-last:], [mine], [grads[0].to(out.dtype)])
    assert cosine(d_z[-last:], torch.autograd.grad(want, [exact[0]], grads)[0]) >= 0.999
    assert not d_z[:-last].any()


@pytest.mark.usefixtures("much_memory")
def test_graph_attention_of_more_than_two_to_the_31_elements() -> None:
    """A chain: every node hears from the one before it."""
    x_l, last = many_rows(smaller(512, 48))
    nodes, x_r = len(x_l), torch.randn_like(x_l)
    att = torch.randn(2, x_l.shape[1] // 2, dtype=torch.bfloat16, device=DEVICE) / 16

    def chain(n: int) -> Edges:
        every = torch.arange(n, dtype=torch.int32, device=DEVICE)
        end = torch.tensor([n - 1], dtype=torch.int32, device=DEVICE)
        heard = torch.cat([every[:1], every])  # (n + 1,): node 0 hears from none
        return Edges(heard, every[:-1], torch.cat([every, end]), every[1:], every[:-1], every)

    mine = [x_l.requires_grad_(), x_r.requires_grad_()]
    out = F.graph_attention(*mine, att, chain(nodes), backend="triton")
    # The first of the last rows hears from one before them.
    end = [t.detach()[-last - 1 :].requires_grad_() for t in mine]
    near = F.graph_attention(*end, att, chain(last + 1), backend="triton")
    assert torch.equal(out[-last:], near[1:])
    grad = torch.randn_like(near[1:])
    for a, b in zip(
        torch.autograd.grad(out[-last:], mine, grad), torch.autograd.grad(near[1:], end, grad), strict=True
    ):
        assert_close(a[-last - 1 :], b, FORWARD)
        assert not a[: -last - 1].any()

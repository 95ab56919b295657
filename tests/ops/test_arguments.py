"""Arguments that would send a kernel outside its tensors raise, under torch.compile and by `torch.ops.momkd` too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from momkd import dispatch, graph, ops
from momkd import functional as F
from momkd.graph import Edges
from tests.compare import offsets_of

ROWS = 10
OFFSETS = {
    "far": [0, 2_000_000_000, ROWS],
    "negative": [0, -5, ROWS],
    "too long": [0, 4, ROWS + 1],
    "too short": [0, 4, ROWS - 1],
    "late start": [2, 4, ROWS],
    "decreasing": [0, 7, 3, ROWS],
    "differences wrap": [0, 2**31 - 1, -2, ROWS],
}


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    able, reason = dispatch.can_run("attention_pool", request.param, (torch.zeros(1, 1),))
    if not able:
        pytest.skip(f"{request.param}: {reason}")
    name: str = request.param
    return name


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


Pool = Callable[[Tensor, str], Any]


def _gated(offsets: Tensor, backend: str) -> Any:
    w = torch.randn(5, 6)
    return F.gated_attention_pool(torch.ones(ROWS, 6), offsets, w, None, w, None, w[:1, :5], None, backend=backend)


POOLS: dict[str, Pool] = {
    "gated_attention_pool": _gated,
    "attention_pool": lambda o, b: F.attention_pool(torch.ones(ROWS, 6), torch.ones(ROWS, 2), o, backend=b),
    "memory_guided_pool": lambda o, b: F.memory_guided_pool(
        torch.ones(ROWS, 4), torch.ones(ROWS, 6), torch.ones(2, 3, 4), o, 0.5, backend=b
    )[0],
}


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend="eager")


@pytest.mark.parametrize("op", POOLS)
@pytest.mark.parametrize("kind", OFFSETS)
def test_offsets(op: str, kind: str, backend: str) -> None:
    offsets = int32(*OFFSETS[kind])
    for call in (POOLS[op], compiled(POOLS[op])):
        with pytest.raises(ValueError, match=r"offsets: expected (to run from 0 to N = 10|never to decrease)"):
            call(offsets, backend)


@pytest.mark.parametrize("kind", OFFSETS)
def test_offsets_of_backward(kind: str, backend: str) -> None:
    offsets = int32(*OFFSETS[kind])
    bags, needs = len(offsets) - 1, [True, True]
    values, scores = torch.ones(ROWS, 6), torch.ones(ROWS, 2)
    pooled, stats = torch.ones(bags, 2, 6), torch.ones(bags, 2, 2)
    with pytest.raises(ValueError, match="offsets: expected"):
        torch.ops.momkd.attention_pool_backward(pooled, values, scores, offsets, pooled, stats, needs, backend)
    z, memory, slots = torch.ones(ROWS, 4), torch.ones(2, 3, 4), torch.zeros(ROWS, 2, dtype=torch.int32)
    guided = (pooled[:, :1], z, values, memory, offsets, torch.tensor(0.5), pooled[:, :1], scores[:, :1], slots)
    with pytest.raises(ValueError, match="offsets: expected"):
        torch.ops.momkd.memory_guided_pool_backward(*guided, False, [True] * 3, backend)
    w_v, w_a = torch.ones(5, 6), torch.ones(2, 5)
    kept = torch.empty(0)
    gated = (values, offsets, w_v, None, None, None, w_a, None, None, None, pooled, scores, stats, kept, pooled, None)
    with pytest.raises(ValueError, match="offsets: expected"):
        torch.ops.momkd.gated_attention_pool_backward(*gated, 0.0, [True] * 8, backend)


@pytest.mark.parametrize("bad", [2, 10**9, 2**62, -2, -(2**62)])
def test_labels(bad: int, backend: str) -> None:
    z, memory, labels = torch.randn(4, 3), torch.randn(2, 5, 3), torch.tensor([0, -1, bad, 1])
    words = f"expected 0 to 1, or -1 for none, got {bad}"
    loss = compiled(lambda y: F.soft_angle_loss(z, memory, y, backend=backend))
    with pytest.raises(ValueError, match=f"labels: {words}"):
        loss(labels)
    with pytest.raises(ValueError, match=f"labels: {words}"):
        torch.ops.momkd.soft_angle_loss(z, memory, labels, 0.3, 5.0, 20.0, backend)
    backward = torch.ops.momkd.soft_angle_loss_backward
    with pytest.raises(ValueError, match=f"labels: {words}"):
        backward(torch.ones(4), z, memory, labels, 0.3, 5.0, 20.0, [True, True], backend)

    usage, before = torch.ones(2, 5), memory.clone()
    step = compiled(lambda y: F.ema_scatter_(memory, usage, z, y, momentum=0.5, backend=backend))
    with pytest.raises(ValueError, match=f"row_class: {words}"):
        step(labels)
    with pytest.raises(ValueError, match=f"row_class: {words}"):
        torch.ops.momkd.ema_accumulate(memory, z, labels, None, True, backend)
    assert torch.equal(memory, before)
    assert torch.equal(usage, torch.ones(2, 5))


def test_good_arguments_pass(backend: str) -> None:
    """Else every test here would pass by an error in its call."""
    for pool in POOLS.values():
        assert compiled(pool)(offsets_of((4, 0, 6)), backend).shape[0] == 3
    z, memory, labels = torch.randn(4, 3), torch.randn(2, 5, 3), torch.tensor([0, -1, 1, 1])
    assert F.soft_angle_loss(z, memory, labels, backend=backend).isfinite()
    torch.ops.momkd.ema_accumulate(memory, z, labels, None, True, backend)
    x, att, edges = torch.randn(4, 6).requires_grad_(), torch.randn(2, 3), chain()
    compiled(lambda *lists: attend(x, att, lists, backend))(*edges.tensors()).sum().backward()


# -- graphs ------------------------------------------------------------------------------------------------------


def chain() -> Edges:
    """0 → 1 → 2 → 3, and 0 → 3."""
    return graph.from_edge_index(torch.tensor([[0, 1, 2, 0], [1, 2, 3, 3]]), 4)


def attend(x: Tensor, att: Tensor, lists: tuple[Tensor, ...], backend: str) -> Tensor:
    out: Tensor = ops.graph_attention(x, x, att, list(lists), 0.2, 0.0, None, backend)[0]
    return out


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("offsets", [0, 0, 2_000_000_000, 2, 4]),
        ("offsets", [0, 0, 1, 2, 5]),
        ("offsets", [1, 1, 1, 2, 4]),
        ("offsets", [0, 3, 1, 2, 4]),
        ("sources", [0, 1, 2, 4]),
        ("sources", [0, 1, 2, -1]),
        ("sources", [0, 10**9, 2, 0]),
        ("order", [0, 1, 2, 10**9]),
        ("order", [0, 1, 2, 2]),
    ],
)
def test_graphs(name: str, values: list[int], backend: str) -> None:
    x, att = torch.randn(4, 6), torch.randn(2, 3)
    lists = {**dict(zip(_LISTS, chain().tensors(), strict=True)), name: int32(*values)}
    for call in (attend, compiled(attend)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            call(x, att, tuple(lists.values()), backend)


_LISTS = ("offsets", "sources", "out_offsets", "targets", "position", "order")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("out_offsets", [0, 2, 3, 4, 5]),
        ("out_offsets", [0, 4, 3, 4, 4]),
        ("out_offsets", [0, 1, 3, 4, 4]),
        ("targets", [1, 3, 2, 10**9]),
        ("targets", [1, 3, 2, 2]),
        ("position", [0, 3, 1, -7]),
        ("position", [0, 3, 1, 1]),
        ("position", [3, 0, 1, 2]),
    ],
)
def test_transposes(name: str, values: list[int]) -> None:
    """The native backward alone reads these lists."""
    pytest.importorskip("momkd._C", reason="momkd._C is not built: install momkd with a C++ compiler")
    lists = {**dict(zip(_LISTS, chain().tensors(), strict=True)), name: int32(*values)}
    out = attend(torch.randn(4, 6).requires_grad_(), torch.randn(2, 3), tuple(lists.values()), "native")
    with pytest.raises(ValueError, match=r"edges\.(out_offsets|targets|position): expected"):
        out.sum().backward()


def test_a_graph_of_other_rows(backend: str) -> None:
    for rows in (3, 5):
        with pytest.raises(ValueError, match="expected"):
            attend(torch.randn(rows, 6), torch.randn(2, 3), chain().tensors(), backend)


# -- sizes and dtypes, which only the native kernels take on trust -------------------------------------------------


def _native_calls() -> dict[str, tuple[Any, str, list[Any]]]:
    """Op, what the message names, and arguments of which one is wrong."""
    op = torch.ops.momkd
    x, s, o = torch.ones(ROWS, 6), torch.ones(ROWS, 2), offsets_of((4, 6))
    z, m, w = torch.ones(ROWS, 4), torch.ones(2, 3, 4), torch.ones(5, 6)
    y, slots = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, 2, dtype=torch.int32)
    usage, t, n = torch.ones(2, 3), torch.tensor(0.5), "native"
    no, both = None, [True, True]
    angle, far = [0.3, 5.0, 20.0, n], torch.full_like(slots, 10**9)
    alone = [0.0, no, 0, n]  # of the gate: dropout, its seed, and what may be kept
    end = [no, *alone]  # no score_bias
    return {
        "scores of fewer rows": (op.attention_pool, "scores", [x, s[:3], o, n]),
        "int64 offsets": (op.attention_pool, "offsets", [x, s, o.long(), n]),
        "no offsets": (op.attention_pool, "offsets", [x, s, o[:0], n]),
        "integer values": (op.attention_pool, "values", [x.int(), s, o, n]),
        "values (B, N, L)": (op.attention_pool, "values", [x[None], s, o, n]),
        "a smaller gradient": (op.attention_pool_backward, "grad", [x[:1], x, s, o, x, x, both, n]),
        "w_v of another width": (op.gated_attention_pool, "w_v", [x, o, w[:, :3], no, no, no, s[:2].T, no, *end]),
        "w_a of another width": (op.gated_attention_pool, "w_v", [x, o, w, no, no, no, w[:1], no, *end]),
        "w_u of fewer rows": (op.gated_attention_pool, "w_u", [x, o, w, no, w[:2], no, w[:1, :5], no, *end]),
        "b_v too short": (op.gated_attention_pool, "b_v", [x, o, w, w[0, :1], no, no, w[:1, :5], no, *end]),
        "b_a too short": (op.gated_attention_pool, "b_a", [x, o, w, no, no, no, w[:2, :5], w[0, :1], *end]),
        "memory of another width": (op.memory_similarity, "memory", [z[:, :3], m, "max", 5.0, n]),
        "memory of one class": (op.memory_similarity, "memory", [z, m[0], "max", 5.0, n]),
        "slots far": (op.memory_similarity_backward, "slots", [s, z, m, far, "max", 5.0, both, n]),
        "slots int64": (op.memory_similarity_backward, "slots", [s, z, m, slots.long(), "max", 5.0, both, n]),
        "fewer slots": (op.memory_similarity_backward, "slots", [s, z, m, slots[:2], "max", 5.0, both, n]),
        "int32 labels": (op.soft_angle_loss, "labels", [z, m, y.int(), *angle]),
        "fewer labels": (op.soft_angle_loss, "labels", [z, m, y[:3], *angle]),
        "tau 0": (op.soft_angle_loss, "tau", [z, m, y, 0.3, 0.0, 20.0, n]),
        "values of fewer rows": (op.memory_guided_pool, "values", [z, x[:3], m, o, t, False, n]),
        "guided slots far": (
            op.memory_guided_pool_backward,
            "slots",
            [x[:2, None], z, x, m, o, t, x[:2, None], s[:, :1], far, False, [True] * 3, n],
        ),
        "int32 classes": (op.ema_accumulate, "row_class", [m, z, y.int(), no, True, n]),
        "fewer classes": (op.ema_accumulate, "row_class", [m, z, y[:3], no, True, n]),
        "fewer weights": (op.ema_accumulate, "weights", [m, z, y, t[None], True, n]),
        "rows of another width": (op.ema_accumulate, "z", [m, z[:, :3], y, no, True, n]),
        "usage of other slots": (op.ema_scatter_, "usage", [m, usage[:, :1], z, y, no, 0.5, True, n]),
        "usage in float64": (op.ema_scatter_, "usage", [m, usage.double(), z, y, no, 0.5, True, n]),
        "usage transposed": (op.ema_scatter_, "usage", [m, torch.ones(3, 2).T, z, y, no, 0.5, True, n]),
        "fewer sums": (op.ema_apply_, "sums", [m, usage, m[:1], usage, 0.5, n]),
        "less mass": (op.ema_apply_, "mass", [m, usage, m.clone(), usage[:1].clone(), 0.5, n]),
    }


@pytest.mark.parametrize("kind", _native_calls())
def test_sizes_and_dtypes(kind: str) -> None:
    pytest.importorskip("momkd._C", reason="momkd._C is not built: install momkd with a C++ compiler")
    op, name, arguments = _native_calls()[kind]
    with pytest.raises((ValueError, RuntimeError), match=f"{name}: (expected|backend)"):
        op(*arguments)


@pytest.mark.parametrize(("classes", "per_class"), [(1, False), (1, True), (3, False)])
def test_classes_that_have_no_margin(classes: int, per_class: bool, backend: str) -> None:
    z, memory = torch.randn(ROWS, 4), torch.randn(classes, 2, 4)
    with pytest.raises(ValueError, match=f"memory: expected 2 classes, or more with per_class, got {classes}"):
        ops.memory_guided_pool(z, z, memory, offsets_of((4, 6)), torch.tensor(0.5), per_class, backend)

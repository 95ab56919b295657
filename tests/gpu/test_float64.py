"""Every op in every type on ragged bags, values and gradients against float64; and bit for bit from run to run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests.gpu import cases
from tests.gpu.cases import Case, Inputs
from tests.gpu.check import cotangents, gradients, leaves, wrong
from tests.gpu.device import BATCHES, DEVICE, DTYPES, MIXED, REHEARSING, SEEDS, fitting, name_of, on_gpu, smaller

pytestmark = on_gpu

GATE = {"width": smaller(1024, 72), "hidden": smaller(256, 40)}
MANY_HEADS = {"width": smaller(1536, 48), "hidden": smaller(384, 20), "heads": 4}
ODD_GATE = {"width": smaller(500, 33), "hidden": smaller(70, 17)}
WIDTH, GUIDED, HEAD = smaller(1024, 72), smaller(512, 40), smaller(256, 24)
ODD_MEMORY = (3, 17, 65)
LARGEST = (5, smaller(256, 40), smaller(512, 70))

OPS: dict[str, Callable[..., Case]] = {
    "gated_attention_pool": partial(cases.gated_attention_pool, **GATE),
    "gated_attention_pool, dropout": partial(cases.gated_attention_pool, **GATE, p=0.25),
    "gated_attention_pool, 4 heads, dropout": partial(cases.gated_attention_pool, **MANY_HEADS, p=0.25),
    "gated_attention_pool, odd widths": partial(cases.gated_attention_pool, **ODD_GATE),
    "gated_attention_pool, 4 heads, score_bias": partial(cases.gated_attention_pool, **MANY_HEADS, biased=True),
    "gated_attention_scores": partial(cases.gated_attention_scores, **GATE),
    "attention_pool": partial(cases.attention_pool, width=WIDTH),
    "attention_pool, 5 heads": partial(cases.attention_pool, width=WIDTH, heads=5),
    "memory_similarity max": cases.memory_similarity,
    "memory_similarity lse": partial(cases.memory_similarity, reduce="lse"),
    "memory_similarity max, odd sizes": partial(cases.memory_similarity, sizes=ODD_MEMORY),
    "memory_similarity lse, odd sizes": partial(cases.memory_similarity, sizes=ODD_MEMORY, reduce="lse"),
    "soft_angle_loss": cases.soft_angle_loss,
    "soft_angle_loss, odd sizes": partial(cases.soft_angle_loss, sizes=ODD_MEMORY),
    "memory_guided_pool": partial(cases.memory_guided_pool, width=GUIDED),
    "memory_guided_pool, 3 classes": partial(cases.memory_guided_pool, sizes=ODD_MEMORY, width=GUIDED),
    "graph_attention": partial(cases.graph_attention, width=HEAD),
    "graph_attention, dropout": partial(cases.graph_attention, width=HEAD, p=0.5),
    "graph_attention, odd width": partial(cases.graph_attention, heads=3, width=smaller(100, 10)),
}


# Each combination costs a GPU some seconds of compiling: float16 leaves the odd sizes to bfloat16.
COMBINATIONS = [(op, dtype) for op in OPS for dtype in DTYPES if "odd" not in op or dtype != torch.float16]


def label(value: str | torch.dtype) -> str:
    return value if isinstance(value, str) else name_of(value)


@pytest.mark.parametrize(("op", "dtype"), COMBINATIONS, ids=label)
def test_values_and_gradients(op: str, dtype: torch.dtype) -> None:
    found = []
    for name, lengths in BATCHES.items():
        for seed in SEEDS:
            case = OPS[op](Inputs(fitting(op, lengths), dtype, DEVICE, seed), backend="triton")
            found += [f"{name}, seed {seed}, {line}" for line in wrong(case, dtype, seed=seed)]
    assert not found, "\n".join(found)


# The largest that the kernels take, with the ungated form among them; a memory that is a constant needs no gradient.
LIMITS: dict[str, Callable[..., Case]] = {
    "gated_attention_pool, 16 heads": partial(
        cases.gated_attention_pool, width=smaller(2560, 40), hidden=smaller(512, 36), heads=16, p=0.25
    ),
    "gated_attention_pool, ungated": partial(cases.gated_attention_pool, **GATE, gated=False, p=0.25),
    "attention_pool, 32 heads": partial(cases.attention_pool, width=smaller(260, 20), heads=32),
    "memory_similarity max, largest": partial(cases.memory_similarity, sizes=LARGEST, learned=False),
    "memory_similarity lse, largest": partial(cases.memory_similarity, sizes=LARGEST, reduce="lse", learned=False),
    "memory_guided_pool, 32 classes": partial(cases.memory_guided_pool, sizes=(smaller(32, 20), 1, 40), width=GUIDED),
    "soft_angle_loss, 32 classes": partial(cases.soft_angle_loss, sizes=(smaller(32, 20), 1, 40), learned=False),
    "graph_attention, 1024 columns": partial(cases.graph_attention, heads=1, width=smaller(1024, 70)),
}


@pytest.mark.parametrize("op", LIMITS)
def test_limits(op: str) -> None:
    dtype = torch.float32 if op.startswith(("memory", "soft")) else torch.bfloat16
    found = wrong(LIMITS[op](Inputs(fitting(op, MIXED), dtype, DEVICE), backend="triton"), dtype)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("op", [op for op in OPS if "odd" not in op])
def test_the_same_bits_each_time(op: str, dtype: torch.dtype) -> None:
    case = OPS[op](Inputs(fitting(op, MIXED), dtype, DEVICE), backend="triton")

    def results() -> list[torch.Tensor]:
        given = leaves(case)
        out = case.call(*given)
        return [*out, *gradients(out, given, cotangents(out, case.differentiable))]

    first = results()
    for _ in SEEDS:
        for a, b in zip(first, results(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["gated_attention_pool", "attention_pool", "memory_guided_pool", "graph_attention"])
def test_a_bag_that_is_not_finite_stays_alone(op: str) -> None:
    """Every other bag keeps its bits, forward and backward."""
    # On some CPUs torch.mm in bfloat16 carries a NaN into the row before it.
    given = Inputs((65, 1, 0, 17), torch.float32 if REHEARSING else torch.bfloat16, DEVICE)
    case = OPS[op](given, backend="triton")
    by_row = op == "graph_attention"
    others = torch.tensor([*range(65), *range(66, given.rows)], device=DEVICE)
    bags = others if by_row else torch.tensor([0, 2, 3], device=DEVICE)

    def results(bad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        mine = leaves(case)
        if bad:
            with torch.no_grad():
                mine[0][65] = torch.nan
        out = case.call(*mine)[:1]
        return out[0].detach(), gradients(out, mine[:1], cotangents(out, 1))[0]

    (clean, d_clean), (got, d_got) = results(False), results(True)
    assert got[65 if by_row else 1].isnan().all()
    assert torch.equal(got[bags], clean[bags])
    assert torch.equal(d_got[others], d_clean[others])

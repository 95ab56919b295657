"""Figures of gated_attention_pool: sizes, types, and its peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

import momkd
from benchmarks import bench_gated_attention_pool as gate
from benchmarks.bags import ragged
from benchmarks.bench_growth import lengths_of
from benchmarks.cases import check
from benchmarks.gpu_machine import Call, Figures, Item, Machine, errors_of_forms, forward_only, measured
from benchmarks.measure import rotating
from momkd import Bags

CACHE = 128 << 20  # bytes that inputs rotate over: more than the second-level cache of any GPU of today
SECTION = "gated_attention_pool"
CORNER = (1, 17, 0, 129, 3000, 870)  # lengths of the bags that a result is checked on


def gated(
    m: Machine,
    full: int,
    bags: int,
    width: int = gate.WIDTH,
    dtype: torch.dtype = torch.bfloat16,
    dropout_p: float = 0.0,
    heads: int = 1,
    tuned: bool = False,
) -> Figures:
    """One size: forward and forward with backward, on inputs that are not in the cache."""
    torch.manual_seed(0)
    w = gate.weights(m.device, dtype, width=width, heads=heads)
    few = CORNER[:4] if m.tiny else CORNER
    corner = Bags.from_lengths(torch.randn(sum(few), width, device=m.device).to(dtype), few)
    error = check(gate.make_case(corner, w, dropout_p))
    n = m.rows(full)
    lengths = lengths_of("lognormal", n, bags)
    size = n * width * dtype.itemsize
    sets = 2 if m.tiny else min(max(1, -(-CACHE // size)), 64)
    x = torch.randn(sets, n, width, device=m.device, dtype=dtype)
    made = [gate.make_case(Bags.from_lengths(each, lengths), w, dropout_p, products=2) for each in x]
    first, (operations, moved) = made[0], made[0].work
    if tuned:
        with momkd.tune():
            first.steps()["momkd"]()
    figures: Figures = {"relative error": error, **first.facts, "bags": bags, "input sets": sets, "L": width}
    figures |= {"heads": heads, "dropout": dropout_p, "dtype": str(dtype).removeprefix("torch.")}
    ways: dict[str, tuple[list[Call], tuple[float, float]]] = {
        "forward": ([forward_only(case.forms["momkd"]) for case in made], (operations / 2, moved / 2)),
        "forward and backward": ([case.steps()["momkd"] for case in made], (operations, moved)),
    }
    for way, (calls, work) in ways.items():
        figures[way] = measured(m, {"momkd": rotating(calls)}, work, dtype)
        if m.plain_product and dtype.itemsize == 2:
            figures[way]["share of the plain product's rate"] = 1e12 * figures[way]["TFLOP/s"] / m.plain_product
    return figures


Size = tuple[int, int, int]
FEW = 3  # of the sizes below come before the peers
FIRST: Sequence[Size] = (
    (100_000, 32, 1024),
    (1_000_000, 32, 1024),
    (10_000, 32, 1024),
    (1_000, 1, 1024),
    (1_000_000, 32, 1536),
    (10_000, 1, 1024),
    (1_000_000, 1, 1024),
    (100_000, 100, 1024),
)


def first_items(m: Machine) -> Iterator[Item]:
    """The sizes that say most, and the peers."""
    yield from (_sized(m, size) for size in ([(200, 1, 64), (200, 32, 64)] if m.tiny else FIRST[:FEW]))
    for way in ("forward and backward", "forward"):
        yield Item("peers", way, partial(peers, m, way == "forward and backward"))


def other_items(m: Machine) -> Iterator[Item]:
    """Each variant at one size, the other sizes, and last what tuning finds: its choices hold from then on."""
    width = 64 if m.tiny else gate.WIDTH
    variants = {
        "float16": {"dtype": torch.float16},
        "float32": {"dtype": torch.float32},
        "dropout 0.25": {"dropout_p": 0.25},
        "4 heads": {"heads": 4},
    }
    for name, options in variants.items():
        yield Item(SECTION, f"100000 patches, 32 bags, {name}", partial(gated, m, 100_000, 32, width, **options))
    patches, widths = ((), ()) if m.tiny else ((100_000, 1_000_000, 10_000, 1_000), (1024, 1536))
    sizes = [(n, bags, width) for width in widths for n in patches for bags in (1, 32, 100)]
    rest = [] if m.tiny else FIRST[FEW:]
    yield from (_sized(m, size) for size in [*rest, *(size for size in sizes if size not in FIRST)])
    yield Item(SECTION, "1000000 patches, 32 bags, tuned", partial(gated, m, 1_000_000, 32, width, tuned=True))


def _sized(m: Machine, size: Size) -> Item:
    patches, bags, width = size
    return Item(SECTION, f"{patches} patches, {bags} bags, L={width}", partial(gated, m, patches, bags, width))


def peers(m: Machine, backward: bool) -> Figures:
    """32 ragged bags against the plain forms in the same run, each with its own error."""
    dtype = torch.bfloat16
    width = 64 if m.tiny else gate.WIDTH
    bags = ragged(m.device, 8 if m.tiny else 8000, width, dtype)
    w = gate.weights(m.device, dtype, width=width)
    case = gate.make_case(bags, w, products=2)
    figures: Figures = {"relative error": check(case), **case.facts, "largest bag": max(bags.lengths)}
    case.forms.update(gate.peers(bags, w, compiler="eager" if m.tiny else "inductor"))
    share = 1.0 if backward else 0.5
    calls = case.steps() if backward else {name: forward_only(form) for name, form in case.forms.items()}
    figures |= measured(m, calls, (share * case.work[0], share * case.work[1]), dtype)
    errors_of_forms(case, figures)
    return figures

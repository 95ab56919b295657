"""gated_attention_pool against the best plain form over a grid of sizes: where is it slower than what one would write?

`pytest benchmarks/bench_gate_grid.py` takes a few sizes of the grid, `--full` all of it. `extra_info` holds for each
size the ratio to the best of loop, flattened form and the flattened form by torch.compile, and the least of them all.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from benchmarks.bench_gated_attention_pool import multiplies, peers, weights
from benchmarks.measure import interleaved, must_agree, record
from momkd import Bags
from momkd import functional as F
from momkd.reference.gated_attention_pool import GateParameters

ROWS, WIDTHS, HIDDEN, COUNTS = (64, 512, 4096, 32_768, 200_000), (192, 768, 1024, 1536), (64, 256, 512), (1, 8, 64)
FEW = ((64, 192, 64, 1), (512, 1024, 256, 1), (512, 768, 64, 8), (4096, 192, 256, 8), (16_384, 1024, 256, 1))
MOST = 6e10  # operations of a product, that even --full ends


def sizes(full: bool) -> list[tuple[int, int, int, int]]:
    """Patches, their width, that of the gate, and bags."""
    if not full:
        return list(FEW)
    grid = product(ROWS, WIDTHS, HIDDEN, COUNTS)
    return [size for size in grid if 4.0 * size[0] * size[1] * size[2] <= MOST]


def ratios(rows: int, width: int, hidden: int, count: int, dtype: torch.dtype, backward: bool) -> dict[str, float]:
    """How many times as fast as each plain form the op is, and its time in seconds."""
    lengths = [rows // count] * count
    lengths[0] += rows - sum(lengths)
    torch.manual_seed(0)
    x = torch.randn(rows, width).to(dtype)
    bags, w = Bags.from_lengths(x, lengths), weights("cpu", dtype, width=width, hidden=hidden, grad=backward)
    forms = {"momkd": lambda: F.gated_attention_pool(x, bags.offsets, *w), **peers(bags, w)}
    del forms["padded batch"]
    try:
        forms["flattened, torch.compile"]()
    except Exception as error:  # torch.compile fails on some shapes
        print(f"N={rows} L={width} D={hidden} bags={count}: torch.compile failed ({type(error).__name__}), left out")
        del forms["flattened, torch.compile"]
    want = forms["loop over bags"]().detach().double()
    must_agree(forms["momkd"](), want, 1e-4 if dtype == torch.float32 else 3e-2)
    calls = {name: _step(form, w) if backward else form for name, form in forms.items()}
    rounds = 3 if rows * width * hidden > 1 << 31 else 9 if rows > 1000 else 51
    taken = interleaved(calls, rounds=rounds, warmup=3)
    return {name: seconds / taken["momkd"] for name, seconds in taken.items() if name != "momkd"} | {
        "seconds": taken["momkd"]
    }


def _step(form: Any, w: GateParameters) -> Any:
    leaves = [p for p in w if p is not None]
    return lambda: torch.autograd.grad(form().sum(), leaves)


@pytest.mark.parametrize("backward", [True, False], ids=["fwd+bwd", "fwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gate_over_sizes(benchmark: Any, full: bool, dtype: torch.dtype, backward: bool) -> None:
    multiplies("cpu", dtype)
    found: dict[str, dict[str, float]] = {}
    for size in sizes(full):
        torch.compiler.reset()
        found["N={} L={} D={} bags={}".format(*size)] = ratios(*size, dtype, backward)
    least = {size: min(v for k, v in each.items() if k != "seconds") for size, each in found.items()}
    benchmark.extra_info |= {
        "ratios": found,
        "least": min(least.values()),
        "least at": min(least, key=least.__getitem__),
    }
    x, w = torch.randn(512, 192).to(dtype), weights("cpu", dtype, width=192, hidden=64, grad=False)
    record(benchmark, lambda: F.gated_attention_pool(Bags.from_list([x]), None, *w), "cpu")

"""attention_pool forward and backward against a loop over bags and the flattened form.

Floor: values read forward and again backward, their gradient written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.bags import bag_of_each_row, pool_flattened, ragged
from benchmarks.cases import Case
from benchmarks.measure import compare, must_agree, on_each_device, require
from momkd import Bags, dispatch, reference
from momkd import functional as F

WIDTH = 512


def make_case(bags: Bags, heads: int = 1) -> Case:
    """The op and its peers on these bags; values and scores get gradients."""
    dtype, device = bags.features.dtype, bags.features.device
    values = bags.features.requires_grad_()
    scores = torch.randn(bags.num_rows, heads, device=device).to(dtype).requires_grad_()
    index, lengths = bag_of_each_row(bags), list(bags.lengths)

    def loop() -> Tensor:
        pairs = zip(values.split(lengths), scores.split(lengths), strict=True)
        return torch.stack([torch.softmax(s, 0).T @ x for x, s in pairs])

    return Case(
        {
            "momkd": lambda: F.attention_pool(values, scores, bags.offsets),
            "reference": lambda: F.attention_pool(values, scores, bags.offsets, backend="torch"),
            "loop over bags": loop,
            "flattened": lambda: pool_flattened(values, scores[:, 0], index, len(bags)),
        },
        (values, scores),
        lambda values, scores: reference.attention_pool(values, scores, bags.offsets)[0],
        (3 * 2 * values.numel(), 3 * values.nbytes),
        dtype,
        loop if dtype in (torch.float16, torch.bfloat16) else None,
        {
            "patches": bags.num_rows,
            "backend": dispatch.choose("attention_pool", None, (values, scores, bags.offsets)),
        },
    )


@on_each_device
def test_attention_pool(benchmark: Any, full: bool, device: str) -> None:
    require(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = make_case(ragged(device, 8000 if full or device == "cuda" else 800, WIDTH, dtype))
    want = case.exact(*(leaf.detach().double() for leaf in case.leaves))
    must_agree(case.forms["momkd"](), want, 1e-5 if dtype == torch.float32 else 1e-2)
    compare(benchmark, device, case.steps(), work=case.work, dtype=dtype, **case.facts)

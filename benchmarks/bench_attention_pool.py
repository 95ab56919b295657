"""attention_pool forward and backward against a loop over bags and the flattened form.

Floor: values read forward and again backward, their gradient written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.bags import bag_of_each_row, pool_flattened, ragged
from benchmarks.measure import compare, forward_and_backward, must_agree, on_each_device, require
from momkd import dispatch, reference
from momkd import functional as F

WIDTH = 512


@on_each_device
def test_attention_pool(benchmark: Any, full: bool, device: str) -> None:
    require(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bags = ragged(device, 8000 if full or device == "cuda" else 800, WIDTH, dtype)
    values = bags.features.requires_grad_()
    scores = torch.randn(bags.num_rows, 1, device=device).to(dtype).requires_grad_()
    want, _ = reference.attention_pool(values.detach().double(), scores.detach().double(), bags.offsets)
    must_agree(F.attention_pool(values, scores, bags.offsets), want, 1e-5 if dtype == torch.float32 else 1e-2)
    index, lengths = bag_of_each_row(bags), list(bags.lengths)

    def loop() -> Tensor:
        pairs = zip(values.split(lengths), scores.split(lengths), strict=True)
        return torch.stack([torch.softmax(s, 0).T @ x for x, s in pairs])

    forms = {
        "momkd": lambda: F.attention_pool(values, scores, bags.offsets),
        "reference": lambda: F.attention_pool(values, scores, bags.offsets, backend="torch"),
        "loop over bags": loop,
        "flattened": lambda: pool_flattened(values, scores[:, 0], index),
    }
    compare(
        benchmark,
        device,
        {name: forward_and_backward(form, (values, scores)) for name, form in forms.items()},
        work=(3 * 2 * values.numel(), 3 * values.nbytes),
        dtype=dtype,
        patches=bags.num_rows,
        backend=dispatch.choose("attention_pool", None, (values, scores, bags.offsets)),
    )

"""gated_attention_pool forward and backward against a loop over bags, the flattened form and a padded batch.

Floor: 2·N·L·2D operations three times (forward, recomputed in backward, and for the weights; features are frozen), or
the features read as often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bags import bag_of_each_row, pool_flattened, ragged
from benchmarks.measure import compare, forward_and_backward, must_agree, on_each_device, require
from momkd import Bags, dispatch, reference
from momkd import functional as F
from momkd.reference.gated_attention_pool import GateParameters

WIDTH, HIDDEN = 1024, 256


def attend(x: Tensor, w: GateParameters) -> Tensor:
    """Scores of one bag or of a padded batch, as CLAM writes them."""
    gate = torch.tanh(torch.nn.functional.linear(x, w.w_v, w.b_v))
    gate = gate * torch.sigmoid(torch.nn.functional.linear(x, w.w_u, w.b_u))
    return torch.nn.functional.linear(gate, w.w_a, w.b_a)


def loop_over_bags(bags: Bags, w: GateParameters) -> Tensor:
    return torch.stack([torch.softmax(attend(x, w), 0).T @ x for x in bags])


def padded(x: Tensor, mask: Tensor, w: GateParameters) -> Tensor:
    scores = attend(x, w).masked_fill(~mask[..., None], -torch.inf)
    return torch.softmax(scores, 1).transpose(1, 2) @ x


def flattened(x: Tensor, index: Tensor, w: GateParameters) -> Tensor:
    return pool_flattened(x, attend(x, w)[:, 0], index)


@pytest.mark.parametrize("backward", [True, False], ids=["fwd+bwd", "fwd"])
@on_each_device
def test_gated_attention_pool(benchmark: Any, full: bool, device: str, backward: bool) -> None:
    require(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bags = ragged(device, 8000 if full or device == "cuda" else 100, WIDTH, dtype)
    shapes = [(HIDDEN, WIDTH), (HIDDEN,), (HIDDEN, WIDTH), (HIDDEN,), (1, HIDDEN), (1,)]
    made = [(torch.randn(*s, device=device) / s[-1] ** 0.5).to(dtype).requires_grad_(backward) for s in shapes]
    w = GateParameters(*made)

    exact = GateParameters(*(p.detach().double() for p in made))
    want, _, _ = reference.gated_attention_pool(bags.features.double(), bags.offsets, exact)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    must_agree(F.gated_attention_pool(bags.features, bags.offsets, *w), want, tolerance)
    del want

    x, mask = bags.to_padded()
    index = bag_of_each_row(bags)
    compiled = torch.compile(flattened, dynamic=False)
    forms: dict[str, Callable[[], Tensor]] = {
        "momkd": lambda: F.gated_attention_pool(bags.features, bags.offsets, *w),
        "loop over bags": lambda: loop_over_bags(bags, w),
        "flattened": lambda: flattened(bags.features, index, w),
        "flattened, torch.compile": lambda: compiled(bags.features, index, w),
        "padded batch": lambda: padded(x, mask, w),
    }
    product = 2 * bags.num_rows * WIDTH * 2 * HIDDEN
    passes = 3 if backward else 1
    compare(
        benchmark,
        device,
        {name: forward_and_backward(form, made) if backward else form for name, form in forms.items()},
        work=(passes * product, passes * bags.features.nbytes),
        dtype=dtype,
        patches=bags.num_rows,
        backend=dispatch.choose("gated_attention_pool", None, (bags.features, bags.offsets, made[0], made[2], made[4])),
    )


@on_each_device
def test_the_library_product_of_the_same_shape(benchmark: Any, full: bool, device: str) -> None:
    """Forward beside one plain product (N, L) by (L, 2D): what gate, softmax and pooling cost on top of it."""
    require(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bags = ragged(device, 8000 if full or device == "cuda" else 100, WIDTH, dtype)
    w_v, w_u = (torch.randn(HIDDEN, WIDTH, device=device).to(dtype) / 32 for _ in range(2))
    w_a = torch.randn(1, HIDDEN, device=device).to(dtype) / 16
    both = torch.cat([w_v, w_u]).T.contiguous()
    calls = {
        "momkd": lambda: F.gated_attention_pool(bags.features, bags.offsets, w_v, None, w_u, None, w_a, None),
        "a plain product": lambda: bags.features @ both,
    }
    work = 2 * bags.num_rows * WIDTH * 2 * HIDDEN, bags.features.nbytes
    compare(benchmark, device, calls, work=work, dtype=dtype, patches=bags.num_rows)

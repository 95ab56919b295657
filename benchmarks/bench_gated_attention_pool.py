"""gated_attention_pool forward and backward against a loop over bags, the flattened form and a padded batch.

Floor: 2·N·L·2D operations three times (forward, recomputed in backward, and for the weights; features are frozen), at
the rate of a large matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import interleaved, product_rate
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


def flattened(x: Tensor, index: Tensor, count: int, w: GateParameters) -> Tensor:
    scores = attend(x, w)[:, 0]
    top = scores.new_full((count,), -torch.inf).scatter_reduce(0, index, scores, "amax")
    weight = torch.exp(scores - top[index])
    total = weight.new_zeros(count).index_add(0, index, weight)
    return x.new_zeros(count, x.shape[1]).index_add(0, index, (weight / total[index])[:, None] * x)[:, None]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gated_attention_pool(benchmark: Any, full: bool, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    large = full or device == "cuda"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    median = 8000 if large else 400
    lengths = (median * torch.exp(0.6 * torch.randn(32, generator=generator))).long().tolist()
    bags = Bags.from_lengths(torch.randn(sum(lengths), WIDTH, device=device).to(dtype), lengths)
    shapes = [(HIDDEN, WIDTH), (HIDDEN,), (HIDDEN, WIDTH), (HIDDEN,), (1, HIDDEN), (1,)]
    made = [(torch.randn(*s, device=device) / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]
    w = GateParameters(*made)

    exact = GateParameters(*(p.detach().double() for p in made))
    want, _, _ = reference.gated_attention_pool(bags.features.double(), bags.offsets, exact)
    got = F.gated_attention_pool(bags.features, bags.offsets, *w).double()
    error = float((got - want).norm() / want.norm())
    assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"wrong by {error:.1e}: no time is reported"

    x, mask = bags.to_padded()
    index = torch.repeat_interleave(torch.arange(32, device=device), torch.tensor(lengths, device=device))
    compiled = torch.compile(flattened, dynamic=False)
    forms: dict[str, Callable[[], Tensor]] = {
        "momkd": lambda: F.gated_attention_pool(bags.features, bags.offsets, *w),
        "loop over bags": lambda: loop_over_bags(bags, w),
        "flattened": lambda: flattened(bags.features, index, 32, w),
        "flattened, torch.compile": lambda: compiled(bags.features, index, 32, w),
        "padded batch": lambda: padded(x, mask, w),
    }

    def step(form: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for p in made:
                p.grad = None
            form().sum().backward()

        return run

    seconds = interleaved({name: step(form) for name, form in forms.items()}, rounds=7)
    for name, each in seconds.items():
        benchmark.extra_info[f"seconds of {name}"] = each
        benchmark.extra_info[f"times as fast as {name}"] = each / seconds["momkd"]
    work = (
        3 * 2 * sum(lengths) * WIDTH * 2 * HIDDEN
    )  # forward, recomputed, and for the weights: the features are frozen
    benchmark.extra_info["attained"] = work / product_rate(device, dtype) / seconds["momkd"]
    benchmark.extra_info["patches"] = sum(lengths)
    benchmark.extra_info["backend"] = dispatch.choose("gated_attention_pool", None, (bags.features, bags.offsets))
    benchmark.pedantic(step(forms["momkd"]), rounds=3)

"""gated_attention_pool forward and backward against a loop over bags, the flattened form and a padded batch.

Floor: 2·N·L·2D operations twice (forward, and for the weights; features are frozen), or the features read as often.
Where activations don't fit `momkd.gate_memory` there is one product more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bags import bag_of_each_row, pool_flattened, ragged
from benchmarks.cases import Case
from benchmarks.measure import compare, must_agree, on_each_device, require
from momkd import Bags, dispatch, native, reference
from momkd import functional as F
from momkd.reference.gated_attention_pool import GateParameters
from momkd.reference.philox import gate_dropout_masks, keep_scale

WIDTH, HIDDEN = 1024, 256
SEED = 5  # of dropout


def weights(
    device: str, dtype: torch.dtype, *, width: int = WIDTH, hidden: int = HIDDEN, heads: int = 1, grad: bool = True
) -> GateParameters:
    """Random weights of a gate, as large as an initialised layer's."""
    shapes = [(hidden, width), (hidden,), (hidden, width), (hidden,), (heads, hidden), (heads,)]
    made = [(torch.randn(*s, device=device) / s[-1] ** 0.5).to(dtype).requires_grad_(grad) for s in shapes]
    return GateParameters(*made)


def attend(x: Tensor, w: GateParameters, keep: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Scores of one bag or of a padded batch, as CLAM writes them; `keep` are masks of dropout with their scale."""
    tanh = torch.tanh(torch.nn.functional.linear(x, w.w_v, w.b_v))
    sigma = torch.sigmoid(torch.nn.functional.linear(x, w.w_u, w.b_u))
    gate = tanh * sigma if keep is None else tanh * keep[0] * (sigma * keep[1])
    return torch.nn.functional.linear(gate, w.w_a, w.b_a)


def loop_over_bags(bags: Bags, w: GateParameters) -> Tensor:
    return torch.stack([torch.softmax(attend(x, w), 0).T @ x for x in bags])


def loop_with_dropout(bags: Bags, w: GateParameters, p: float) -> Tensor:
    """The loop with the masks that the op draws from SEED."""
    seed = torch.tensor(SEED, device=bags.device)
    masks = gate_dropout_masks(seed, bags.num_rows, w.w_v.shape[0], p)
    scaled = [(mask.to(bags.features.dtype) * keep_scale(p)).split(list(bags.lengths)) for mask in masks]
    each = zip(bags, *scaled, strict=True)
    return torch.stack([torch.softmax(attend(x, w, (tanh, sigma)), 0).T @ x for x, tanh, sigma in each])


def padded(x: Tensor, mask: Tensor, w: GateParameters) -> Tensor:
    scores = attend(x, w).masked_fill(~mask[..., None], -torch.inf)
    return torch.softmax(scores, 1).transpose(1, 2) @ x


def flattened(x: Tensor, index: Tensor, w: GateParameters, count: int) -> Tensor:
    return pool_flattened(x, attend(x, w)[:, 0], index, count)


def make_case(bags: Bags, w: GateParameters, dropout_p: float = 0.0, *, products: int = 2) -> Case:
    """The op on these bags, features frozen. `products` are those of forward and backward: 3 where nothing is kept."""
    x = bags.features
    seed = torch.tensor(SEED, device=x.device) if dropout_p else None

    def exact(*wide: Tensor) -> Tensor:
        return reference.gated_attention_pool(x.double(), bags.offsets, GateParameters(*wide), dropout_p, seed)[0]

    half = x.dtype in (torch.float16, torch.bfloat16)
    plain = (lambda: loop_with_dropout(bags, w, dropout_p)) if dropout_p else lambda: loop_over_bags(bags, w)
    product = 2 * bags.num_rows * x.shape[1] * 2 * w.w_v.shape[0]
    return Case(
        {"momkd": lambda: F.gated_attention_pool(x, bags.offsets, *w, dropout_p=dropout_p, seed=seed)},
        tuple(p for p in w if p is not None),
        exact,
        (products * product, products * x.nbytes),
        x.dtype,
        plain if half else None,
        {
            "patches": bags.num_rows,
            "backend": dispatch.choose("gated_attention_pool", None, (x, bags.offsets, w.w_v, w.w_u, w.w_a)),
        },
    )


def peers(bags: Bags, w: GateParameters, *, compiler: str = "inductor") -> dict[str, Callable[[], Tensor]]:
    """The same for one head as one would write it in plain torch."""
    x, mask = bags.to_padded()
    index, count = bag_of_each_row(bags), len(bags)
    compiled = torch.compile(flattened, dynamic=False, backend=compiler)
    return {
        "loop over bags": lambda: loop_over_bags(bags, w),
        "flattened": lambda: flattened(bags.features, index, w, count),
        "flattened, torch.compile": lambda: compiled(bags.features, index, w, count),
        "padded batch": lambda: padded(x, mask, w),
    }


def slides(device: str, count: int, patches: int, dtype: torch.dtype) -> Bags:
    """`patches` in `count` bags of unlike lengths."""
    shares = torch.arange(2.0, 2.0 + count)
    lengths = (patches * shares / shares.sum()).long().tolist()
    lengths[0] += patches - sum(lengths)
    torch.manual_seed(0)
    return Bags.from_lengths(torch.randn(patches, WIDTH, device=device).to(dtype), lengths)


def multiplies(device: str, dtype: torch.dtype) -> None:
    """Skip where the processor has no products of this type: nobody would compute in it."""
    if device == "cpu" and dtype == torch.bfloat16 and not native.bfloat16_unit():
        pytest.skip("this CPU has no bfloat16 products (AMX or AVX-512 BF16)")


@pytest.mark.parametrize("backward", [True, False], ids=["fwd+bwd", "fwd"])
@on_each_device
def test_gated_attention_pool(benchmark: Any, full: bool, device: str, backward: bool) -> None:
    """32 bags; on a CPU of so few patches that everything stays in its cache."""
    require(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    against_peers(benchmark, device, ragged(device, 8000 if full or device == "cuda" else 100, WIDTH, dtype), backward)


@pytest.mark.parametrize("backward", [True, False], ids=["fwd+bwd", "fwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("count", [4, 32])
@on_each_device
def test_slides(benchmark: Any, full: bool, device: str, count: int, dtype: torch.dtype, backward: bool) -> None:
    """As many patches as a batch of slides has: more than any cache holds."""
    require(device)
    multiplies(device, dtype)
    patches = 460_000 if full or device == "cuda" else 46_000
    against_peers(benchmark, device, slides(device, count, patches, dtype), backward, rounds=7 if full else 3)


def against_peers(benchmark: Any, device: str, bags: Bags, backward: bool, rounds: int = 7) -> None:
    dtype = bags.features.dtype
    w = weights(device, dtype, grad=backward)
    case = make_case(bags, w)
    want = case.exact(*(p.detach().double() for p in case.leaves))
    must_agree(case.forms["momkd"](), want, 1e-5 if dtype == torch.float32 else 1e-2)
    del want
    case.forms.update(peers(bags, w))
    work = case.work if backward else (case.work[0] / 2, case.work[1] / 2)
    calls: dict[str, Callable[[], object]] = {**case.steps()} if backward else {**case.forms}
    compare(benchmark, device, calls, work=work, dtype=dtype, rounds=rounds, **case.facts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@on_each_device
def test_the_library_product_of_the_same_shape(benchmark: Any, full: bool, device: str, dtype: torch.dtype) -> None:
    """Forward beside one plain product (N, L) by (L, 2D): what gate, softmax and pooling cost on top of it."""
    require(device)
    multiplies(device, dtype)
    bags = slides(device, 4, 460_000 if full or device == "cuda" else 46_000, dtype)
    w_v, w_u = (torch.randn(HIDDEN, WIDTH, device=device).to(dtype) / 32 for _ in range(2))
    w_a = torch.randn(1, HIDDEN, device=device).to(dtype) / 16
    both = torch.cat([w_v, w_u]).T.contiguous()
    calls = {
        "momkd": lambda: F.gated_attention_pool(bags.features, bags.offsets, w_v, None, w_u, None, w_a, None),
        "a plain product": lambda: bags.features @ both,
    }
    work = 2 * bags.num_rows * WIDTH * 2 * HIDDEN, bags.features.nbytes
    compare(benchmark, device, calls, work=work, dtype=dtype, patches=bags.num_rows)

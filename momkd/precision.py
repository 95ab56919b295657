"""Whether matrix products are computed in bfloat16: the one meaning of `train.amp`.

bfloat16 halves what a product reads, and a processor with instructions for it multiplies many times faster. Weights,
the memory, losses, softmax, the classifier and the genomics stay float32.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import torch

from momkd import native
from momkd.errors import InputError

if TYPE_CHECKING:
    from momkd.config import TrainConfig

# Values (patches × their width) of a step from which on bfloat16 is the faster on a CPU: below, casting costs about
# what the products save. Measured by benchmarks/bench_precision.py, with AMX.
ENOUGH = 500_000


def multiplier(device: torch.device) -> str:
    """Return what a device has for products in bfloat16, such as "AMX"; "" where it has nothing."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.get_device_name() if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    return native.bfloat16_unit() if device.type == "cpu" else ""


def choose(amp: bool | str, device: torch.device, values: float) -> bool:
    """Return whether to train in bfloat16 on a device.

    Args:
        amp: `train.amp`: true, false, or "auto", which is true where that is faster.
        device: where to train.
        values: patches × their width that a step holds, see `values_of_step`.

    Raises:
        InputError: true on a CPU that multiplies no bfloat16.
    """
    if amp == "auto":
        has = multiplier(device)
        return bool(has) if device.type != "cpu" else values >= ENOUGH and _is_faster(has)
    if amp and device.type == "cpu" and not multiplier(device):
        raise InputError(
            "train.amp: expected a GPU, or a CPU with AMX or AVX-512-BF16, for true, got a CPU without 16-bit products;"
            " set train.amp=auto, which computes in float32 here"
        )
    return bool(amp)


def _is_faster(has: str) -> bool:
    """Whether a CPU multiplies bfloat16 faster than float32: with AMX many times; AVX-512-BF16 alone has to show it."""
    return has == "AMX" or (bool(has) and _speed_up() > 1.5)


@cache
def _speed_up() -> float:
    """How many times as fast as in float32 this CPU multiplies in bfloat16: the best of some products, 50 ms in all."""
    taken: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.inference_mode():
        for _ in range(5):
            for dtype, seconds in taken.items():
                x, weight = torch.ones(1024, 1024, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
                torch.nn.functional.linear(x[:8], weight)
                began = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds.append(time.perf_counter() - began)
    return min(taken[torch.float32]) / min(taken[torch.bfloat16])


def values_of_step(sizes: Iterable[int], width: int, options: TrainConfig, ranks: int = 1) -> float:
    """Return about how many values (patches × their width) each of the ranks sees in a step.

    Args:
        sizes: patches of the slides.
        width: L, of a patch.
    """
    each = [min(size, options.max_patches) if options.max_patches else size for size in sizes]
    if not each:
        return 0.0
    mean = sum(each) / len(each)
    return max(mean, min(mean * options.slides_per_step, options.patch_budget)) * width / ranks


def autocast(device: torch.device, on: bool) -> torch.autocast:
    """Return the block that computes matrix products in bfloat16 where `on`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)

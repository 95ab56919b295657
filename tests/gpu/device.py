"""Where the tests of this folder run, and how large: on a GPU, or, to rehearse them, on the CPU with small sizes.

`MOMKD_REHEARSE_GPU=1 TRITON_INTERPRET=1 pytest tests/gpu` runs them on the CPU, all but those about CUDA itself.
"""

from __future__ import annotations

import os

import pytest
import torch

from momkd import env
from tests.compare import RAGGED
from tests.gpu import interpreter

REHEARSING = os.environ.get("MOMKD_REHEARSE_GPU", "").strip() == "1"
if REHEARSING:
    if not env.triton_interpreted():
        raise RuntimeError("MOMKD_REHEARSE_GPU: expected TRITON_INTERPRET=1 beside it, got none; set both")
    interpreter.round_to_nearest()

DEVICE = torch.device("cpu" if REHEARSING else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_AND_SINGLE = (torch.bfloat16, torch.float32)
SEEDS = (0,) if REHEARSING else (0, 1, 2)

# Bags of the sizes that the kernels are for, and a few rows over the edges of tiles.
LARGE = (0, 1, 33, 15, 0, 65, 3) if REHEARSING else (0, 1, 4097, 15, 0, 9001, 128, 129, 63, 1)
MIXED = (0, 1, 15, 17, 0, 65, 3, 0) if REHEARSING else RAGGED["mixed"]
_SMALL = {name: RAGGED[name] for name in ("one row", "one empty", "no bags")}
BATCHES = {"large": LARGE, **(_SMALL if REHEARSING else RAGGED)}

# Two runs of one kernel give the same bits; matrix products of cuBLAS may sum in another order on another stream. So
# much of a bfloat16 result, half its last digit, may then differ.
ANOTHER_ORDER = 2.0**-8

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSING or torch.cuda.is_available()), reason="no GPU that torch can use"),
]
about_cuda = pytest.mark.skipif(REHEARSING, reason="about CUDA itself: not part of a rehearsal on the CPU")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def smaller(full: int, rehearsed: int) -> int:
    """A width: `full` on a GPU, `rehearsed` on the CPU."""
    return rehearsed if REHEARSING else full


def fitting(op: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """These bags; in a rehearsal smaller ones for graph attention, which starts a program for each node."""
    return tuple(min(n, 9) for n in lengths) if REHEARSING and op.startswith("graph") else lengths

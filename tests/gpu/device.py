"""Where the tests of this folder run, and how large: on a GPU, or, to rehearse them, on the CPU with small sizes.

MOMKD_REHEARSE_GPU=1 TRITON_INTERPRET=1 pytest tests/gpu runs them on the CPU, all but those about CUDA itself.
"""

from __future__ import annotations

import os

import torch

from momkd import env

REHEARSING = os.environ.get("MOMKD_REHEARSE_GPU", "").strip() == "1"
if REHEARSING and not env.triton_interpreted():
    raise RuntimeError("MOMKD_REHEARSE_GPU: expected TRITON_INTERPRET=1 beside it, got none; set both")

DEVICE = torch.device("cpu" if REHEARSING else "cuda")
AVAILABLE = REHEARSING or torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = (0,) if REHEARSING else (0, 1, 2)

# Bags of the sizes that the kernels are for, beside the small ones of tests/compare.py.
LARGE = (0, 1, 70, 15, 0, 129, 3) if REHEARSING else (0, 1, 4097, 15, 0, 9001, 128, 129, 63, 1)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""The CUDA kernels at every plan of the tests, for NVIDIA's checkers, on a machine with a GPU:

    compute-sanitizer --tool memcheck python -m tests.cuda_sanitize    # and racecheck, initcheck, synccheck

Rows fill their memory to the last byte of an allocation of their own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a read
past the end shows. initcheck tells of no uninitialised workspace: it is not filled with NaN here.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from momkd import dispatch
from momkd import functional as F
from tests.ops.test_ema_cuda import SHAPES, case


def main() -> None:
    able, reason = dispatch.can_run("ema_scatter_", "cuda")
    if not able:
        raise SystemExit(f"cuda_sanitize: {reason}")
    for name, sizes in SHAPES.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            memory, z, row_class = (t.cuda() for t in case(*sizes, dtype))
            usage, weights = torch.zeros(memory.shape[:2], device="cuda"), torch.rand(len(z), device="cuda")
            F.ema_scatter_(memory, usage, z, row_class, weights=weights, momentum=0.9, backend="cuda")
            sums, mass = F.ema_accumulate(memory, z, row_class, backend="cuda")
            F.ema_apply_(memory, usage, sums, mass, momentum=0.9, backend="cuda")
            torch.cuda.synchronize()
            print(name, dtype, "done", flush=True)


if __name__ == "__main__":
    main()

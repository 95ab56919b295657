"""Triton's interpreter, made to round as a GPU does: by itself it cuts float32 off where bfloat16 ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from momkd import env


def round_to_nearest() -> None:
    """From now on in this process; nothing where kernels are not interpreted."""
    if not env.triton_interpreted():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, from_dtype: Any, to_dtype: Any, mode: Any) -> Any:
        if from_dtype == tl.float32 and to_dtype == tl.bfloat16:
            single = torch.from_numpy(np.array(values, dtype=np.float32))
            return single.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(values, from_dtype, to_dtype, mode)

    interpreter._convert_float = rounded

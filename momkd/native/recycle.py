"""Large tensors whose memory is used again: what one step kept for its backward, the next step fills anew.

The system hands out memory page by page, zeroed, at its first touch, and takes it back when it is freed. For what
the gate keeps of a batch that takes as long as a tenth of its products. So one freed buffer is held, of at most
MOST bytes, until the next call that it fits.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

from momkd.native import extension

LEAST, MOST = 4 << 20, 1 << 30  # bytes of a buffer that is worth it, and of one that may be held
_ALIGNED = 64
_free: list[Tensor] = []  # at most one
_lent: dict[int, weakref.ref[_Lent]] = {}


class _Lent(np.ndarray):
    """The view by which a buffer is lent: tensors made of it keep it alive, and its end is seen."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor on the CPU."""
    size = math.prod(shape) * dtype.itemsize
    if not LEAST <= size <= MOST:
        return torch.empty(shape, dtype=dtype)
    buffer = _free.pop() if _free else None
    if buffer is None or not size + _ALIGNED <= buffer.nbytes <= 2 * size + _ALIGNED:
        buffer = torch.empty(size + _ALIGNED, dtype=torch.uint8)
        extension()[0].use_large_pages(buffer.data_ptr(), buffer.nbytes)
    start = -buffer.data_ptr() % _ALIGNED
    view = buffer.numpy()[start : start + size].view(_Lent)
    key = id(view)

    def ended(_: object) -> None:
        del _lent[key]
        _free[:] = [buffer]

    _lent[key] = weakref.ref(view, ended)
    return torch.from_numpy(view).view(dtype).view(shape)


def clear() -> None:
    """Give the buffer that is held back to the system."""
    _free.clear()

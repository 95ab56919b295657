"""How many bytes of activations the gate may keep from its forward for its backward."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from momkd import env

_SHARE = 8  # by default, a call may keep one eighth of the device's memory
DEFAULT = -1
_budget = DEFAULT  # a plain global: torch.compile guards it, and compiles again where it changes


@contextmanager
def gate_memory(size: int) -> Iterator[None]:
    """Bound what each call of the gate keeps for its backward inside the block.

    Where gradients are wanted, `gated_attention_pool` and `gated_attention_scores` keep what their backward would else
    make again: tanh(·) and σ(·), or the products that they are of (Triton), N · 2D values in the dtype of the features
    (N · D without the σ branch), 1 KB a patch for D = 256 in 16-bit types. Backward then takes two matrix products in
    place of three. Above the budget it makes them again, a bounded block at a time: the same numbers, to rounding by
    Triton and bit for bit by the native kernels. Without this block, MOMKD_GATE_MEMORY says how many bytes, else one
    eighth of the memory of the device, whatever of it is free: a compiled graph has to know beforehand.

    Args:
        size: bytes a call may keep; 0 keeps nothing.

    Raises:
        ValueError: size is not a whole number of at least 0.

    Example:
        >>> pool = momkd.nn.GatedAttentionPool(in_features=8, hidden_features=4)
        >>> with momkd.gate_memory(0):
        ...     pooled = pool(momkd.Bags.from_list([torch.randn(5, 8)]))
        >>> pooled.sum().backward()
    """
    global _budget
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"size: expected bytes, a whole number of at least 0, got {size!r}; 0 keeps nothing")
    before, _budget = _budget, size
    try:
        yield
    finally:
        _budget = before


def asked() -> int:
    """Return the bytes that the innermost `gate_memory` allows, or DEFAULT outside of one."""
    return _budget


def allowed(size: int, device: torch.device) -> int:
    """Return the bytes that a call on `device` may keep; `size` is what `asked` returned."""
    if size != DEFAULT:
        return size
    given = env.gate_memory()
    return _memory(device) // _SHARE if given is None else given


@cache
def _memory(device: torch.device) -> int:
    """Return the bytes of memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30

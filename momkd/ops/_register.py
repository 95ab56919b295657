"""How every op is registered: a torch.library custom op whose body is not touched by autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def custom_op(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register `momkd::name` with the schema of the function's signature.

    The public functions have already cast what autocast should cast; inside, an op accumulates in float32, and
    autocast must not turn that into half precision behind its back.
    """

    def register(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def run(*args: Any) -> Any:
            device = next(a for a in args if isinstance(a, Tensor)).device.type
            with torch.autocast(device, enabled=False):
                return function(*args)

        return torch.library.custom_op(f"momkd::{name}", run, mutates_args=tuple(mutates_args))

    return register

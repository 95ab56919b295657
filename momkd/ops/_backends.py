"""Where an op's functions are: every backend holds them under the same names, with the same arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from momkd import cuda, gpu, native, reference
from momkd.dispatch import choose


def backend_of(op: str, backend: str, args: Sequence[Tensor | None], **facts: Any) -> Any:
    """The module whose functions run `op` on these tensors: the named backend or the one that `choose` takes."""
    return module_of(op, choose(op, backend, args, **facts))


def module_of(op: str, chosen: str) -> Any:
    """The module whose functions run `op` by a backend that `choose` has named."""
    return gpu.kernels(op) if chosen == "triton" else _module(op, chosen)


@cache
def _module(op: str, chosen: str) -> Any:
    if chosen == "cuda":
        return cuda.kernels(op)
    return native.kernels(op) if chosen == "native" else reference

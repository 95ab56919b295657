"""Every environment variable that momkd reads at run time.

MOMKD_BACKEND: the backend for every op that has it, instead of the best that can run: triton, cuda, native or torch.
    An op without that backend keeps its own choice (`momkd doctor` shows it); an op that has it but cannot run it here
    raises with the reason.
TRITON_INTERPRET: Triton's own; with 1 its kernels run in Python on the CPU, slowly, to look at their numbers.
"""

from __future__ import annotations

import os


def backend_override() -> str | None:
    """MOMKD_BACKEND, or None when unset or empty."""
    return os.environ.get("MOMKD_BACKEND", "").strip().lower() or None


def triton_interpreted() -> bool:
    """TRITON_INTERPRET, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "yes", "on", "y")

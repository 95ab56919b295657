"""Every environment variable that momkd reads at run time.

MOMKD_BACKEND: the backend for every op that has it, instead of the best that can run: triton, cuda, native or torch.
    An op without that backend keeps its own choice (`momkd doctor` shows it); an op that has it but cannot run it here
    raises with the reason.
"""

from __future__ import annotations

import os


def backend_override() -> str | None:
    """MOMKD_BACKEND, or None when unset or empty."""
    return os.environ.get("MOMKD_BACKEND", "").strip().lower() or None

"""Every environment variable that momkd reads at run time.

MOMKD_BACKEND: the backend for every op that has it, instead of the best that can run: triton, cuda, native or torch.
    An op without that backend keeps its own choice (`momkd doctor` shows it); an op that has it but cannot run it here
    raises with the reason.
MOMKD_TUNE: with 1, Triton kernels time a few ways to cut their work at their first use in a shape (`momkd.tune`).
MOMKD_CACHE_DIR: the folder of what was found so, by default ~/.cache/momkd.
TRITON_INTERPRET: Triton's own; with 1 its kernels run in Python on the CPU, slowly, to look at their numbers.
"""

from __future__ import annotations

import os
from pathlib import Path


def backend_override() -> str | None:
    """MOMKD_BACKEND, or None when unset or empty."""
    return os.environ.get("MOMKD_BACKEND", "").strip().lower() or None


def triton_interpreted() -> bool:
    """TRITON_INTERPRET, as Triton reads it."""
    return _switched_on("TRITON_INTERPRET")


def tuning_asked() -> bool:
    """MOMKD_TUNE."""
    return _switched_on("MOMKD_TUNE")


def cache_folder() -> Path | None:
    """MOMKD_CACHE_DIR, or the folder for momkd among the user's caches; None where there is no home."""
    if given := os.environ.get("MOMKD_CACHE_DIR", "").strip():
        return Path(given).expanduser()
    try:
        return Path.home() / ".cache" / "momkd"
    except RuntimeError:
        return None


def _switched_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on", "y")

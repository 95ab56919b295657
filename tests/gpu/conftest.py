"""What every test on a GPU starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_device() -> Iterator[None]:
    """What nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # several processes share the GPU


@pytest.fixture(autouse=True)
def default_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that somebody tuned on this machine are not taken."""
    monkeypatch.setenv("MOMKD_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MOMKD_TUNE", raising=False)

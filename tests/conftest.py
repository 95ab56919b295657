"""Fixtures that every test may use."""

from __future__ import annotations

import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from momkd.simulate import SimulatedCohort, SimulationConfig, simulate

# Files that take longest. Begun first, none of them runs on alone when all others have ended (pytest-xdist gives a
# process whole files, and would begin with those of most tests).
LONGEST = (
    *("test_aot", "test_real_data", "test_fuzz", "test_distributed", "ops/test_ema_cuda"),
    *("test_faults", "test_explain"),
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"tests/{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(Path(item.location[0]).as_posix(), len(place)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real cohorts, kept beside the repository and never in it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real cohorts are not on this machine: no folder ../shared/data beside the repository")
    return folder


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN (or the largest integer), so that an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # this is when torch fills uninitialised memory
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def tf32_switches() -> Iterator[dict[str, Callable[[bool], None]]]:
    """Every way to tell torch whether float32 products may use TF32, by name; undone afterwards."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, "fp32_precision", None)

    def older(allowed: bool) -> None:
        matmul.allow_tf32 = allowed

    def words(allowed: bool) -> None:
        torch.set_float32_matmul_precision("high" if allowed else "highest")

    def newer(allowed: bool) -> None:
        matmul.fp32_precision = "tf32" if allowed else "ieee"

    def everywhere(allowed: bool) -> None:
        matmul.fp32_precision = "none"  # follow the switch of all backends
        torch.backends.fp32_precision = "tf32" if allowed else "ieee"

    yield {"older": older, "words": words} | ({} if before is None else {"newer": newer, "everywhere": everywhere})
    words(False)
    if before is not None:
        torch.backends.fp32_precision, matmul.fp32_precision = "none", before


@pytest.fixture(autouse=True)
def _own_seed(request: pytest.FixtureRequest) -> None:
    """Every test draws its own numbers, the same ones alone, in any order and in any process of `pytest -n`."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what libraries draw from
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Two threads, or one where `pytest -n` runs several tests at once."""
    torch.set_num_threads(min(1 if "PYTEST_XDIST_WORKER" in os.environ else 2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> SimulatedCohort:
    """A simulated cohort that trains in a second a fold; tests that change files copy it first."""
    config = SimulationConfig(
        slides=36, external_slides=10, patches=30, patches_max=60, features=16, genes=40, folds=2, val_fraction=0.25
    )
    return simulate(tmp_path_factory.mktemp("tiny") / "cohort", config)


@pytest.fixture
def own_cohort(tiny_cohort: SimulatedCohort, tmp_path: Path) -> SimulatedCohort:
    """A copy that a test may change."""
    root = tmp_path / "cohort"
    shutil.copytree(tiny_cohort.root, root)
    return SimulatedCohort(
        root=root,
        features=root / "features",
        labels=root / "labels.csv",
        omics=root / "omics.csv",
        splits=root / "splits",
        instances=root / "instances.csv",
        external=None,
    )

"""Names that the file system gives: bytes that are not UTF-8 are refused by the name that holds them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from momkd.config import Config
from momkd.convert import checkpoint_to_run
from momkd.data.cohort import open_cohort
from momkd.errors import InputError
from momkd.experiment import train_run
from momkd.runs import Run, RunInfo


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name is not UTF-8."""
    folder = tmp_path / os.fsdecode(b"a\xffb")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"this file system takes no such name: {error}")
    return folder


def test_feature_files(odd: Path, tmp_path: Path) -> None:
    for name in ("good", odd.name):
        np.save(tmp_path / f"{name}.npy", np.ones((3, 4), np.float32))
    told = r"/a\\udcffb\.npy: expected a feature file named in UTF-8, got other bytes; rename it"
    with pytest.raises(InputError, match=told):
        open_cohort(tmp_path)
    left = open_cohort(tmp_path, skip_bad=True)
    assert list(left.paths) == ["good"]
    assert list(left.skipped) == [odd.name]
    np.save(odd / "good.npy", np.ones((3, 4), np.float32))
    assert list(open_cohort(odd).paths) == ["good"]  # ids alone go into tables
    torch.save(torch.ones(3, 4), odd / "tensor.pt")
    with pytest.raises(InputError, match=r"/a\\udcffb/tensor\.pt: expected a file of tensors named in UTF-8"):
        open_cohort(odd)


def test_folders_of_runs_and_checkpoints(odd: Path, tmp_path: Path) -> None:
    told = r"/a\\udcffb{}: expected {} named in UTF-8, got other bytes; rename it$"
    run = told.format("", "the folder of a run")
    with pytest.raises(InputError, match=run):
        Run.create(odd, Config(), RunInfo(["0", "1"], "label", 5, [0], 1, {}, {}, {}))
    Run.create(tmp_path / "run", Config(), RunInfo(["0", "1"], "label", 5, [0], 1, {}, {}, {}))
    for name in ("config.toml", "run.json"):
        os.replace(tmp_path / "run" / name, odd / name)
    with pytest.raises(InputError, match=run):
        Run(odd)
    places = {"features": tmp_path / "features", "labels": tmp_path / "labels.csv", "splits": tmp_path / "splits"}
    with pytest.raises(InputError, match=run):
        train_run(**places, out=odd, config=Config(), device="cpu")
    torch.save({}, odd / "a.pt")
    with pytest.raises(InputError, match=told.format("/a.pt", "a checkpoint").replace(".", r"\.")):
        checkpoint_to_run(odd / "a.pt", tmp_path / "out")

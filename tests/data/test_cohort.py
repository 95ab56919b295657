"""A cohort's feature files are looked at before any work starts."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from momkd.data.cohort import open_cohort
from momkd.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, shape, dtype in (("a", (3, 4), "float16"), ("b", (5, 4), "float16"), ("c", (2, 4), "float32")):
        np.save(tmp_path / f"{name}.npy", np.ones(shape, dtype))
    return tmp_path


def test_slides_in_the_order_asked_for(folder: Path) -> None:
    cohort = open_cohort(folder, ["b", "a"])
    assert list(cohort.paths) == ["b", "a"]
    assert dict(cohort.sizes) == {"b": 5, "a": 3}
    assert (cohort.width, cohort.dtype, len(cohort)) == (4, torch.float16, 2)
    assert cohort.read("b").dtype == torch.float16


def test_one_type_for_all(folder: Path) -> None:
    cohort = open_cohort(folder)
    assert list(cohort.paths) == ["a", "b", "c"]
    assert all(cohort.read(slide).dtype == torch.float32 for slide in cohort.paths)


def break_one(folder: Path, kind: str) -> None:
    if kind == "empty":
        with h5py.File(folder / "bad.h5", "w") as file:
            file["features"] = np.zeros((0, 4), np.float16)
    elif kind == "narrow":
        np.save(folder / "bad.npy", np.ones((2, 3), np.float16))
    elif kind == "broken":
        (folder / "bad.h5").write_bytes(b"nothing of HDF5")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "expected a feature file of slide 'bad' of labels.csv, got none"),
        ("empty", "bad.h5: expected patches, got none (an empty slide)"),
        ("narrow", "bad.npy: features: expected width 4, got 3; all slides need features of one encoder"),
        ("broken", "bad.h5: expected a whole HDF5 file, got 15 bytes that do not read"),
    ],
)
def test_a_bad_slide_is_an_error_or_skipped(folder: Path, kind: str, message: str) -> None:
    break_one(folder, kind)
    wanted = ["a", "bad", "b"]
    with pytest.raises(InputError) as caught:
        open_cohort(folder, wanted, source="labels.csv")
    assert message in str(caught.value)
    assert "1 of 3 slides are bad; --skip-bad leaves them out" in str(caught.value)
    assert "\n" not in str(caught.value)
    cohort = open_cohort(folder, wanted, source="labels.csv", skip_bad=True)
    assert list(cohort.paths) == ["a", "b"]
    assert message in cohort.skipped["bad"]


def test_a_trained_width_is_binding(folder: Path) -> None:
    with pytest.raises(InputError, match="expected width 8, got 4"):
        open_cohort(folder, width=8)
    with pytest.raises(InputError, match="expected width 8, got 4"):  # skipping all would be silent failure
        open_cohort(folder, width=8, skip_bad=True)

"""Digests of content: the same where files were moved, others where a value changed, of a packed store too."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from momkd.data import digests
from momkd.data.cohort import open_cohort
from momkd.data.pack import pack
from momkd.data.slides import write_trident


def test_features_in_files_and_in_a_store(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((40, 2000)).astype(np.float32)

    def written(folder: str, x: np.ndarray) -> str:
        (tmp_path / folder).mkdir()
        write_trident(tmp_path / folder / "a.h5", x, np.zeros((40, 2)), patch_size_level0=1, encoder="e")
        return digests.of_features(open_cohort(tmp_path / folder))

    def packed(folder: str, name: str) -> str:
        pack(tmp_path / folder, tmp_path / name)
        return digests.of_features(open_cohort(tmp_path / name))

    one = written("one", x)
    (tmp_path / "one").rename(tmp_path / "moved")
    assert digests.of_features(open_cohort(tmp_path / "moved")) == one
    assert written("longer", x.repeat(2, 1)) != one
    assert written("other", -x) != one
    store = packed("moved", "one.h5")
    assert store != one
    assert packed("moved", "again.h5") == store
    assert packed("other", "other.h5") != store
    with h5py.File(tmp_path / "moved" / "a.h5", "r+") as file:
        file["features"][20, 1000] += 1  # in the middle
    assert digests.of_features(open_cohort(tmp_path / "moved")) != one

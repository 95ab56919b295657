"""Graphs of slides in a folder and in batches; subsampled slides; what is wrong with a kept graph is said."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from momkd import graph
from momkd.data.batches import BagLoader
from momkd.data.cohort import open_cohort
from momkd.data.graphs import SlideGraphs
from momkd.data.slides import write_trident
from momkd.data.sources import SlideFiles
from momkd.errors import InputError
from momkd.graph import Edges


def same(a: Edges, b: Edges) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    for name, n in (("a", 40), ("b", 9), ("c", 70)):
        grid = np.stack(np.unravel_index(rng.permutation(100)[:n], (10, 10)), 1) * 256
        features = rng.standard_normal((n, 5)).astype(np.float32)
        write_trident(tmp_path / f"features/{name}.h5", features, grid, patch_size_level0=256, encoder="test")
    return tmp_path / "features"


def coords(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file["coords"])


def test_kept_graphs_are_those_built_anew(folder: Path, tmp_path: Path) -> None:
    paths = {name: folder / f"{name}.h5" for name in "abc"}
    for name, path in paths.items():
        want = graph.knn(coords(path), 8)
        assert same(SlideGraphs(SlideFiles(paths))(name), want)
        for _ in range(2):  # written, then read
            assert same(SlideGraphs(SlideFiles(paths), folder=tmp_path / "graphs")(name), want)
    assert sorted(p.name for p in (tmp_path / "graphs").iterdir()) == ["a.h5", "b.h5", "c.h5"]


def test_a_kept_graph_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    paths, kept = {"a": folder / "a.h5"}, tmp_path / "graphs"
    SlideGraphs(SlideFiles(paths), 8, kept)("a")
    with pytest.raises(InputError, match=r"a\.h5: expected a graph of 5 neighbours of this slide, got another one"):
        SlideGraphs(SlideFiles(paths), 5, kept)("a")
    with h5py.File(folder / "a.h5", "r+") as file:
        file["coords"][3] += 1
    with pytest.raises(InputError, match="expected a graph of the coordinates of this slide"):
        SlideGraphs(SlideFiles(paths), 8, kept)("a")


@pytest.mark.parametrize("harm", ["bytes", "missing", "outside", "decreasing", "short"])
def test_a_broken_graph_is_refused(folder: Path, tmp_path: Path, harm: str) -> None:
    graphs = SlideGraphs(SlideFiles({"a": folder / "a.h5"}), 8, tmp_path)
    graphs("a")
    path = tmp_path / "a.h5"
    if harm == "bytes":
        path.write_bytes(path.read_bytes()[:300])
    else:
        with h5py.File(path, "r+") as file:
            if harm == "missing":
                del file["sources"]
            elif harm == "outside":
                file["sources"][7] = 40
            elif harm == "decreasing":
                file["offsets"][5] = 300
            else:
                del file["order"]
                file["order"] = np.arange(39, dtype=np.int32)
    told = (
        "another file or a damaged one; choose another folder"
        if harm == "bytes"
        else "one that does not read .*; remove it"
    )
    with pytest.raises(InputError, match=rf"a\.h5: expected a graph of momkd, got {told}") as caught:
        graphs("a")
    assert "NoneType" not in str(caught.value)


@pytest.mark.parametrize("other", ["features", "text", "empty"])
def test_another_file_in_the_place_of_a_graph_stays(folder: Path, tmp_path: Path, other: str) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes({"features": (folder / "a.h5").read_bytes(), "text": b"years of work", "empty": b""}[other])
    before = path.read_bytes()
    with pytest.raises(
        InputError, match=r"a\.h5: expected a graph of momkd, got another file .*; choose another folder"
    ):
        SlideGraphs(SlideFiles({"a": folder / "a.h5"}), 8, tmp_path)("a")
    assert path.read_bytes() == before


def test_slides_without_coordinates_are_named_before_any_work(folder: Path) -> None:
    np.save(folder / "d.npy", np.zeros((3, 5), np.float32))
    open_cohort(folder)
    with pytest.raises(InputError, match=r"d\.npy: expected coordinates .*1 of 4 slides are bad"):
        open_cohort(folder, neighbours=8)
    assert list(open_cohort(folder, neighbours=8, skip_bad=True).skipped) == ["d"]
    with pytest.raises(InputError, match="expected coordinates"):
        SlideGraphs(SlideFiles({"d": folder / "d.npy"}))("d")


@pytest.mark.parametrize("most", [0, 30])
def test_batches_carry_the_graphs_of_their_patches(folder: Path, most: int) -> None:
    cohort = open_cohort(folder, neighbours=3)
    loader = BagLoader(
        list("abc"), np.array([0, 1, 0]), cohort.sizes, cohort.read, max_patches=most, cache_bytes=1 << 20,
        graph=cohort.graphs,
    )  # fmt: skip
    for _ in range(2):  # read, then from memory
        (batch,) = loader.batches([[2, 0, 1]], seed=(1,))
        features = {name: cohort.read(name) for name in "abc"}
        each = []
        for name, x in zip("cab", batch.bags, strict=True):
            if most and len(features[name]) > most:
                assert len(x) == most
            rows = [int((features[name] == row).all(1).nonzero()) for row in x]
            each.append(graph.knn(coords(folder / f"{name}.h5")[rows], 3))
        assert batch.bags.edges is not None
        assert same(batch.bags.edges, graph.batch(each))
    assert batch.to(torch.device("cpu")).bags.edges is not None

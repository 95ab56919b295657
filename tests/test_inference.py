"""Slides above the patch budget are seen block by block: the same results, in the memory of a block."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from momkd.config import Config
from momkd.data import write_trident
from momkd.errors import InputError
from momkd.evaluate import evaluate_external
from momkd.explain import Options, explain_run
from momkd.inference import open_slides, probabilities
from momkd.predict import predict_run
from momkd.runs import Run, RunInfo, build_model, save_model
from tests.processes import start

L, SIZES = 8, {"giant": 130, "a": 5, "another": 61, "b": 12}
SMALL = ["model.hidden_features=12", "model.gate_features=8", "model.projection_features=6", "memory.slots=3"]


def made(folder: Path, preset: str, *settings: str, width: int = L) -> Run:
    config = Config.preset(preset).with_settings([*settings])
    info = RunInfo(["no", "yes"], "label", width, [0, 1], 2, {}, {}, {})
    run = Run.create(folder, config, info)
    for fold in (0, 1):
        torch.manual_seed(fold)
        model = build_model(config, width, 2)
        if model.memory is not None:
            model.memory.memory.copy_(torch.randn_like(model.memory.memory))
        run.fold(fold).mkdir()
        save_model(run.fold(fold), model, {"epoch": 0})
    return run


@pytest.fixture
def features(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "features", np.random.default_rng(0)
    folder.mkdir()
    for slide, n in SIZES.items():
        grid = np.stack([np.arange(n) % 12, np.arange(n) // 12], 1) * 256
        write_trident(
            folder / f"{slide}.h5", rng.standard_normal((n, L), np.float32), grid, patch_size_level0=256, encoder="e"
        )
    return folder


@pytest.mark.parametrize("settings", [["abmil"], ["fast"], ["fast", "model.pooling=memory"], ["paper"]], ids=" ".join)
def test_blocks_change_no_prediction(features: Path, tmp_path: Path, settings: list[str]) -> None:
    run = made(tmp_path / "run", settings[0], *SMALL, *settings[1:])
    tables, folders = [], []
    for budget in (None, 50):
        folders.append(tmp_path / f"attention of {budget}")
        out = tmp_path / "out.csv"
        predict_run(run, features, out, attention=folders[-1], patch_budget=budget)
        tables.append(pd.read_csv(out))
    assert tables[0]["slide_id"].tolist() == sorted(SIZES)
    pd.testing.assert_frame_equal(*tables, rtol=1e-5)
    for slide in SIZES:
        with h5py.File(folders[0] / f"{slide}.h5") as whole, h5py.File(folders[1] / f"{slide}.h5") as blocks:
            assert set(whole) == set(blocks)
            np.testing.assert_allclose(blocks["attention"][:], whole["attention"][:], rtol=1e-4, atol=1e-7)
            assert "slots" not in whole or np.array_equal(blocks["slots"][:], whole["slots"][:])


def test_what_coordinates_say_is_told_once_they_are_read(features: Path, tmp_path: Path) -> None:
    with h5py.File(features / "giant.h5", "a") as file:
        file["coords"][:] *= 2
    run, told = made(tmp_path / "run", "abmil", *SMALL), list[str]()
    predict_run(run, features, tmp_path / "out.csv", attention=tmp_path / "attention", note=told.append)
    assert sum("giant.h5: the grid is 2 times as wide as a patch" in note for note in told) == 1


def test_blocks_change_no_explanation(features: Path, tmp_path: Path) -> None:
    run = made(tmp_path / "run", "fast", *SMALL)
    for budget in (None, 50):
        explain_run(run, features, tmp_path / str(budget), options=Options(limit=1), patch_budget=budget)
    for name in ("slides.csv", "slots.csv", "prototypes.csv"):
        whole, blocks = (pd.read_csv(tmp_path / budget / name) for budget in ("None", "50"))
        pd.testing.assert_frame_equal(whole, blocks, rtol=1e-4)


def test_external_cohorts_and_validation_come_in_blocks_too(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path / "run", "abmil", *SMALL)
    pd.DataFrame({"slide_id": list(SIZES), "label": ["no", "yes"] * 2}).to_csv(tmp_path / "labels.csv", index=False)
    largest = 0
    pooled = type(run.load_model(0)).pooled

    def watched(model: torch.nn.Module, bags: object) -> object:
        nonlocal largest
        largest = max(largest, bags.num_rows)  # type: ignore[attr-defined]
        return pooled(model, bags)

    monkeypatch.setattr(type(run.load_model(0)), "pooled", watched)
    evaluate_external(run, features, tmp_path / "labels.csv", patch_budget=50)
    assert largest == 50
    _, loader = open_slides(run, features, torch.device("cpu"), patch_budget=50)
    loader.cache_bytes = 1 << 20
    first = probabilities(run.load_model(0), loader, torch.device("cpu"))
    shutil.rmtree(features)  # all is kept in memory now
    again = probabilities(run.load_model(0), loader, torch.device("cpu"))
    assert first[0] == again[0] == sorted(SIZES)
    assert np.array_equal(first[1], again[1])


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_a_bad_block_is_told_or_its_slide_left_out(features: Path, tmp_path: Path, value: float) -> None:
    run = made(tmp_path / "run", "abmil", *SMALL)
    with h5py.File(features / "giant.h5", "r+") as file:
        file["features"][100] = value
    with pytest.raises(InputError, match="giant"):
        predict_run(run, features, tmp_path / "out.csv", patch_budget=50)
    assert not (tmp_path / "out.csv").exists()
    table, skipped = predict_run(run, features, tmp_path / "out.csv", patch_budget=50, skip_bad=True)
    assert list(skipped) == ["giant"]
    assert set(table["slide_id"]) == set(SIZES) - {"giant"}


def peak(run: Path, features: Path, out: Path) -> None:
    import resource

    opened = Run(run)
    opened.load_model(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    predict_run(opened, features, out, patch_budget=20_000, folds=[0])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_400_000_patches_take_the_memory_of_a_block(tmp_path: Path) -> None:
    made(tmp_path / "run", "fast", "model.gate_features=8", "model.projection_features=4", "memory.slots=2", width=4)
    folder = tmp_path / "features"
    folder.mkdir()
    np.save(folder / "giant.npy", np.ones((400_000, 4), np.float16))
    process = start(peak, tmp_path / "run", folder, tmp_path / "out.csv")
    assert process.wait() == 0, process.stderr
    assert int(process.stdout.split()[-1]) < 400_000  # kilobytes; the output of the encoder alone is 819 MB

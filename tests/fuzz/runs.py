"""The files of a run, and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from momkd.compat import momkd_reference
from momkd.config import Config
from momkd.convert import _read as read_checkpoint
from momkd.models import MoMKD
from momkd.runs import Run, RunInfo, build_model, save_model
from tests.fuzz.kinds import Kind, Trap

CONFIG = [
    "model.hidden_features=4", "model.gate_features=4", "model.projection_features=4", "memory.slots=2",
    "omics.features=4", "omics.hidden_features=4",
]  # fmt: skip


def run_files(folder: Path) -> None:
    config = Config.preset("fast").with_settings(CONFIG)
    info = RunInfo(["0", "1"], "label", 5, [0], 1, {}, {}, {})
    run = Run.create(folder.parent / "run", config, info)
    run.fold(0).mkdir()
    save_model(run.fold(0), build_model(config, 5, 2), {"epoch": 3})
    for path in (run.folder / "config.toml", run.folder / "run.json", run.fold(0) / "model.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "hostile.toml").write_text(config.to_toml().replace("hidden_features = 4", "hidden_features = 65536"))
    values = json.loads((folder / "run.json").read_text())
    for name, changes in {
        "wide": {"in_features": 2**31 - 1},
        "out": {"folds": ["../../x"]},
        "one": {"classes": ["a"]},
    }.items():
        (folder / f"hostile_{name}.json").write_text(json.dumps(values | changes))
    (folder / "hostile_deep.json").write_text("[" * 100_000)
    (folder / "hostile_deep.toml").write_text("a = " + "[" * 100_000)
    save_file({"x": torch.zeros(3)}, folder / "hostile.safetensors", metadata={"momkd": "[" * 100_000})


def checkpoint_files(folder: Path) -> None:
    torch.save({"model": {"a": torch.zeros(3)}}, folder / "a.pt")
    save_file({"a": torch.zeros(3), "b": torch.ones(2, 2)}, folder / "b.safetensors")
    torch.save({"model": Trap(folder.parent / "canary")}, folder / "hostile.pt")


def released_files(folder: Path) -> None:
    """Of the released code: every tensor is checked, used or not."""
    options: dict[str, Any] = {"hidden_features": 4, "projection_features": 4, "slots": 2, "heads": 2}
    model = MoMKD(3, encoder="gatv2", update="gradient", shared_projector=False, classifier_features=4, **options)
    state = momkd_reference.dump(model)
    torch.save(state, folder / "a.pt")
    for name, value in (
        ("initted", torch.ones(0)),
        ("cluster_size", torch.full((1, 2), float("nan"))),
        ("embed_avg", torch.full((1, 2, 4), 1e300, dtype=torch.float64)),
        ("embed", torch.ones(1, 2, 4, dtype=torch.complex64)),
    ):
        torch.save(state | {f"mem_pos._codebook.{name}": value}, folder / f"hostile_{name}.pt")


def use_released(path: Path) -> None:
    state = read_checkpoint(path)
    momkd_reference.load(state)
    assert all(tensor.numel() and tensor.float().isfinite().all() for tensor in state.values())


def use_run(path: Path) -> None:
    folder = path.parent / "run"
    place = {".toml": "config.toml", ".json": "run.json"}.get(path.suffix, "fold_0/model.safetensors")
    good = (folder / place).read_bytes()
    try:
        (folder / place).write_bytes(path.read_bytes())
        run = Run(folder)
        for fold in run.info.folds:
            run.load_model(fold)
    finally:
        (folder / place).write_bytes(good)


def use_checkpoint(path: Path) -> None:
    assert all(isinstance(tensor, torch.Tensor) for tensor in read_checkpoint(path).values())


KINDS = {
    "run": Kind(run_files, use_run, 600),
    "released": Kind(released_files, use_released, 30),
    "checkpoint": Kind(checkpoint_files, use_checkpoint, 500),
}

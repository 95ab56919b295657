"""Checkpoints of the released MoMKD become runs, and runs become such checkpoints: `momkd convert`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from momkd.compat import momkd_reference
from momkd.config import Config
from momkd.data.atomic import atomic_write
from momkd.data.raw import load_torch, one_line
from momkd.errors import InputError
from momkd.models import MoMKD
from momkd.runs import Run, RunInfo, build_model, load_weights, save_model

_INSIDE = ("model", "state_dict", "model_state_dict")  # where training scripts keep the state dict in a file


def checkpoint_to_run(path: Path | str, out: Path | str, *, classes: Sequence[str] = ("0", "1")) -> Run:
    """A run of one fold whose model is a released checkpoint; `momkd predict` and `momkd evaluate` take it.

    Args:
        path: .pt (a state dict, or a dict that holds one) or .safetensors.
        out: folder of the run; it must not be there, or be empty.
        classes: names of classes 0 and 1.

    Raises:
        InputError: a file that does not read or is no released MoMKD, or a folder that is taken.
    """
    path, out = Path(path), Path(out)
    if len(classes) != 2:
        raise InputError(
            f"classes: expected the names of two classes, got {len(classes)}; write them as --classes no,yes"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a new folder, got one with files; choose another --out")
    try:
        model = momkd_reference.load(_read(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    encoder: Any = model.encoder
    _, slots, features = model.memory.memory.shape
    settings = {
        "model.hidden_features": encoder.res_proj1.out_features,
        "model.heads": encoder.gat1.att.shape[1],
        "model.projection_features": features,
        "model.shared_projector": "false",
        "memory.update": "gradient",
        "memory.slots": slots,
    }
    if model.genomics is not None:
        hidden, *_ = tower = model.genomics.encoder.encoder
        settings |= {"omics.genes": hidden.in_features, "omics.hidden_features": hidden.out_features}
        settings["omics.features"] = tower[-1].out_features
    config = Config.preset("paper").with_settings([f"{key}={value}" for key, value in settings.items()])
    info = RunInfo(
        classes=list(classes),
        label="label",
        in_features=model.in_features,
        folds=[0],
        num_splits=1,
        data={"features": None, "labels": None, "omics": None, "splits": None, "checkpoint": str(path)},
        versions={name: version(name) for name in ("momkd", "torch")},
        skipped={},
    )
    run = Run.create(out, config, info)
    run.fold(0).mkdir()
    save_model(run.fold(0), model, {"converted": path.name})
    return run


def run_to_checkpoint(folder: Path | str, out: Path | str, *, fold: int = 0) -> dict[str, Tensor]:
    """The state dict of the released code from a fold of a run, with its genomics tower; written to `out` (.pt).

    Raises:
        InputError: no such fold, a model of another form, or a file that cannot be written.
    """
    run = Run(folder)
    if fold not in run.info.folds:
        raise InputError(f"fold: expected one of {', '.join(map(str, run.info.folds))}, got {fold}")
    tower = run.fold(fold) / "genomics.safetensors"
    model = build_model(run.config, run.info.in_features, run.num_classes, _genes(tower))
    if not isinstance(model, MoMKD):
        raise InputError(f"{folder}: expected a run of model.kind=momkd, got {run.config.model.kind}")
    load_weights(model, run.fold(fold) / "model.safetensors", *([tower] if tower.is_file() else []))
    state = momkd_reference.dump(model)
    with atomic_write(out) as temporary:
        torch.save(state, temporary)
    return state


def _genes(tower: Path) -> int | None:
    """Genes that the tower of a fold reads, or None where it has none."""
    if not tower.is_file():
        return None
    return int(_read(tower)["genomics.encoder.encoder.0.weight"].shape[1])


def _read(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file; nothing in it is ever executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = load_torch(path)
    except FileNotFoundError:
        raise InputError(f"{path}: expected a checkpoint, got nothing there; check the path") from None
    except (Exception, SafetensorError) as error:  # the unpickler of a damaged file raises nearly anything
        raise InputError(
            f"{path}: expected a checkpoint of tensors, got a file that does not read ({one_line(error)}); save its "
            "state dict again"
        ) from error
    for name in _INSIDE:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a state dict, got {type(state).__name__}; save model.state_dict()")
    return state

"""Checkpoints of the released MoMKD become runs, and runs become such checkpoints: `momkd convert`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from momkd.compat import momkd_reference
from momkd.compat.state_dicts import check_state_dict
from momkd.config import Config
from momkd.data.atomic import make_folder, write_json
from momkd.data.files import regular_file
from momkd.data.folders import whole_folder
from momkd.data.outputs import check_outputs, check_replaced, run_files
from momkd.data.own import Finite, fitted, short
from momkd.data.raw import load_torch, one_line
from momkd.errors import InputError
from momkd.models import MoMKD
from momkd.names import check_utf8
from momkd.predict import threshold_of
from momkd.runs import METRICS, Run, RunInfo, save_model, write_torch

_CARRIED = "momkd"  # in the metadata of a state dict, where the names of modules stand
_INSIDE = ("model", "state_dict", "model_state_dict")  # where training scripts keep the state dict in a file


class Carried(msgspec.Struct):
    """What a checkpoint of `run_to_checkpoint` carries beside its tensors; one of the released code lacks it."""

    classes: Annotated[list[str], msgspec.Meta(min_length=2, max_length=2)]
    label: str
    neighbours: Annotated[int, msgspec.Meta(ge=1, le=64)]
    threshold: Finite | None = None


def checkpoint_to_run(path: Path | str, out: Path | str, *, classes: Sequence[str] | None = None) -> Run:
    """A run of one fold whose model is a released checkpoint; `momkd predict` and `momkd evaluate` take it.

    Args:
        path: .pt (a state dict, or a dict that holds one) or .safetensors.
        out: folder of the run; it must not be there, or be empty. It is made whole or not at all.
        classes: names of classes 0 and 1; None takes those that the checkpoint carries, or "0" and "1".

    Raises:
        InputError: a file that does not read or is no released MoMKD, or a folder that is taken.
    """
    path = Path(path)
    check_outputs({"--out": out}, {"the checkpoint": path}, whole=("--out",))
    if classes is not None and (len(classes) != 2 or classes[0] == classes[1]):
        raise InputError(
            f"classes: expected the names of two classes, got {short(list(classes))}; give --classes no,yes"
        )
    with whole_folder(out, name="a run", mark="run.json") as folder:
        state = _read(path)
        carried = _carried(state, path)
        try:
            model = momkd_reference.load(state)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        info = RunInfo(
            classes=list(classes or carried.classes),
            label=carried.label,
            in_features=model.in_features,
            folds=[0],
            num_splits=1,
            data={"features": None, "labels": None, "omics": None, "splits": None, "checkpoint": str(path)},
            versions={name: version(name) for name in ("momkd", "torch")},
            skipped={},
        )
        run = Run.create(folder, _config_of(model, carried), info)
        make_folder(run.fold(0))
        save_model(run.fold(0), model, {"converted": path.name})
        if carried.threshold is not None:
            write_json(folder / METRICS, {"folds": [{"fold": 0, "threshold": carried.threshold}]})
    return Run(out)


def _config_of(model: MoMKD, carried: Carried) -> Config:
    """The configuration that a released checkpoint was trained by, as far as it can be known from its widths."""
    encoder: Any = model.encoder
    classifier: Any = model.classifier
    _, slots, features = model.memory.memory.shape
    settings = {
        "model.hidden_features": encoder.res_proj1.out_features,
        "model.heads": encoder.gat1.att.shape[1],
        "model.neighbours": carried.neighbours,
        "model.classifier_features": classifier.layers[1].out_features,
        "model.projection_features": features,
        "model.shared_projector": "false",
        "memory.update": "gradient",
        "memory.slots": slots,
    }
    if model.genomics is not None:
        hidden, *_ = tower = model.genomics.encoder.encoder
        settings |= {"omics.genes": hidden.in_features, "omics.hidden_features": hidden.out_features}
        settings["omics.features"] = tower[-1].out_features
        settings["omics.decoder_features"] = model.genomics.decoder.decoder[0].out_features
    return Config.preset("paper").with_settings([f"{key}={value}" for key, value in settings.items()])


def run_to_checkpoint(folder: Path | str, out: Path | str, *, fold: int = 0) -> dict[str, Tensor]:
    """The state dict of the released code from a fold of a run, with its genomics tower; written to `out` (.pt).

    The names of the classes and of the label, the number of neighbours and the threshold go with it as metadata of the
    state dict, which the released code does not see and `checkpoint_to_run` reads.

    Raises:
        InputError: no such fold, a model of another form, or a file that cannot be written.
    """
    run = Run(folder)
    check_outputs({"--out": out}, {"the run": run_files(run.folder)})
    check_replaced([out], _is_converted, "a checkpoint that momkd converted")
    if fold not in run.info.folds:
        raise InputError(f"fold: expected one of {', '.join(map(str, run.info.folds))}, got {fold}")
    if run.config.model.kind != "momkd":
        raise InputError(f"{folder}: expected a run of model.kind=momkd, got {run.config.model.kind}")
    model = run.load_model(fold, tower=True)
    assert isinstance(model, MoMKD)
    state = momkd_reference.dump(model)
    carried = Carried(run.info.classes, run.info.label, run.config.model.neighbours, threshold_of(run, [fold]))
    kept: Any = OrderedDict(state)
    kept._metadata = OrderedDict({_CARRIED: msgspec.to_builtins(carried)})
    write_torch(out, kept)
    return state


def _is_converted(path: Path) -> bool:
    """Whether a file is a checkpoint of `run_to_checkpoint`: it carries what only that writes."""
    try:
        values = getattr(load_torch(path), "_metadata", {})
        msgspec.convert(values[_CARRIED], Carried)
    except Exception:  # the unpickler of another file raises nearly anything
        return False
    return True


def _carried(state: Mapping[str, Tensor], path: Path) -> Carried:
    values = getattr(state, "_metadata", None)
    if not isinstance(values, Mapping) or _CARRIED not in values:
        return Carried(["0", "1"], "label", Config().model.neighbours)
    carried: Carried = fitted(values[_CARRIED], Carried, source=str(path), remedy="convert the run again")
    return carried


def _read(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file; nothing in it is ever executed."""
    regular_file(path, "a checkpoint")
    check_utf8(path, path, "a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = load_torch(path)
    except (Exception, SafetensorError) as error:  # the unpickler of a damaged file raises nearly anything
        raise InputError(
            f"{path}: expected a checkpoint of tensors, got a file that does not read ({one_line(error)}); save its "
            "state dict again"
        ) from error
    for name in _INSIDE:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    check_state_dict(state, str(path), finite=False)
    return cast(Mapping[str, Tensor], state)

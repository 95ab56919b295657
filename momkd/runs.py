"""The folder of a run: what training writes, and what evaluation, prediction and resuming read.

RUN/
    config.toml            every option of the run
    run.json               classes, width of the features, folds, where the data came from, versions
    predictions.csv        validation and test slides of every fold; predictions_external.csv of another cohort
    metrics.json           with intervals; beside it roc.png and training.png
    run.lock               who is training; removed at the end
    fold_K/
        model.safetensors      the best epoch: all that inference needs; its header says epoch and validation score
        genomics.safetensors   the genomics tower of that epoch; inference never opens it
        genes.json             which genes the tower reads, and how they are scaled
        log.csv                a row an epoch
        state.pt               for --resume; removed when the fold is done
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from momkd.compat.state_dicts import check_state_dict
from momkd.config import Config, read_config
from momkd.data.atomic import atomic_write, make_folder, write_json, write_text
from momkd.data.own import Finite, Fold, Size, read_json, short
from momkd.data.raw import one_line
from momkd.errors import InputError
from momkd.models import ABMIL, BatchDistillation, MILModel, MoMKD, OmicsClassifier
from momkd.names import check_utf8
from momkd.nn import MemoryBank
from momkd.precision import multiplier
from momkd.predictions import read_predictions

METRICS = "metrics.json"
PREDICTIONS = "predictions.csv"
EXTERNAL = "predictions_external.csv"
_TOWER = "genomics."


def build_model(config: Config, in_features: int, num_classes: int, omics_features: int | None = None) -> MILModel:
    """The model that a configuration describes, with fresh weights; without `omics_features` it has no tower."""
    model, memory, omics, loss = config.model, config.memory, config.omics, config.loss
    if model.encoder == "gatv2" and model.hidden_features % model.heads:
        raise InputError(
            f"model.hidden_features: expected a multiple of model.heads = {model.heads}, got {model.hidden_features}"
        )
    if model.kind == "omics":
        return OmicsClassifier(
            in_features,
            num_classes,
            features=omics.features,
            hidden_features=omics.hidden_features,
            decoder_features=omics.decoder_features,
            dropout=omics.dropout,
        )
    slide: dict[str, Any] = {
        name: getattr(model, name)
        for name in (
            *("encoder", "hidden_features", "gate_features", "branch", "dropout"),
            *("classifier_features", "heads", "attention_dropout", "encoder_dropout"),
        )
    }
    if model.kind == "abmil":
        return ABMIL(in_features, num_classes, **slide)
    both: dict[str, Any] = {
        "omics_features": omics_features,
        "projection_features": model.projection_features,
        "omics_embedding": omics.features,
        "omics_hidden": omics.hidden_features,
        "omics_decoder_hidden": omics.decoder_features,
        "omics_dropout": omics.dropout,
    }
    if model.kind == "distill":
        return BatchDistillation(in_features, num_classes, match=model.match, **both, **slide)
    return MoMKD(
        in_features,
        num_classes,
        pooling=model.pooling,
        shared_projector=model.shared_projector,
        slots=memory.slots,
        adaptive=memory.adaptive,
        update="gradient" if memory.update == "gradient" else "momentum",
        rows=memory.rows,
        rho=memory.rho,
        temperature=model.temperature,
        margin=loss.margin,
        tau=loss.tau,
        beta=loss.beta,
        assignment_tau=loss.assignment_tau if loss.assignment > 0 else None,
        paired=loss.pairing > 0,
        coupled=memory.coupled,
        **both,
        **slide,
    )


@dataclass(frozen=True)
class RunInfo:
    """What run.json says."""

    classes: Annotated[list[str], msgspec.Meta(min_length=2)]
    label: str
    in_features: Size  # L of the patch features; of the genomics alone, G is in genes.json
    folds: Annotated[list[Fold], msgspec.Meta(min_length=1)]
    num_splits: Fold
    data: dict[str, str | None]  # where features, labels, omics and splits came from
    versions: dict[str, str]
    skipped: dict[str, str]
    digests: dict[str, str] = field(default_factory=dict)  # of what they held, see `momkd.data.digests`
    precision: Literal["", "float32", "bfloat16"] = ""  # of products in training; "" in runs that don't say

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: expected different names, got {short(self.classes)} with one twice")
        if len(set(self.folds)) < len(self.folds):
            raise ValueError(f"folds: expected different numbers, got {short(self.folds)} with one twice")


class FoldMetrics(msgspec.Struct):
    """Of a fold in metrics.json: the threshold of two classes that its validation slides chose."""

    fold: Fold
    threshold: Finite | None = None


class RunMetrics(msgspec.Struct):
    """What inference reads of metrics.json."""

    folds: list[FoldMetrics] = []


class Run:
    """A run's folder, opened.

    Raises:
        InputError: the folder is missing, is no run, or was written by something else.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        check_utf8(self.folder, self.folder, "the folder of a run")  # safetensors opens no other
        config, info = self.folder / "config.toml", self.folder / "run.json"
        if not config.is_file() or not info.is_file():
            came = "a folder without config.toml and run.json" if self.folder.is_dir() else "nothing there"
            raise InputError(f"{self.folder}: expected the folder of a run, got {came}; train first, or check the path")
        self.config = read_config(config)
        self.info = read_json(info, RunInfo, what="the description of a run", remedy="train again")

    @classmethod
    def create(cls, folder: Path | str, config: Config, info: RunInfo) -> Run:
        """Writes config.toml and run.json; the folder is made."""
        folder = Path(folder)
        check_utf8(folder, folder, "the folder of a run")
        make_folder(folder)
        write_text(folder / "config.toml", config.to_toml())
        write_json(folder / "run.json", asdict(info))
        return cls(folder)

    @classmethod
    def described(cls, folder: Path | str, config: Config, info: RunInfo) -> Run:
        """A run that another process writes: nothing is read."""
        run = cls.__new__(cls)
        run.folder, run.config, run.info = Path(folder), config, info
        return run

    @property
    def num_classes(self) -> int:
        return len(self.info.classes)

    def amp(self, device: torch.device) -> bool:
        """Whether the models compute in bfloat16 on a device: as they were trained, where it has 16-bit products."""
        if not self.info.precision:  # such runs took bfloat16 on GPUs alone
            return bool(self.config.train.amp) and device.type == "cuda"
        return self.info.precision == "bfloat16" and (device.type == "cuda" or bool(multiplier(device)))

    def fold(self, number: int) -> Path:
        return self.folder / f"fold_{number}"

    def finished(self, number: int) -> bool:
        """Whether a fold has been trained to its end."""
        return (self.fold(number) / PREDICTIONS).is_file()

    def predictions(self) -> pd.DataFrame:
        """The validation and test slides of all folds, as `read_predictions` returns them.

        Raises:
            InputError: predictions.csv is missing, lacks a fold, or says something else than that of a fold.
        """
        path = self.folder / PREDICTIONS
        table = read_predictions(path)
        remedy = "copy the run again, or go on with train --resume, which writes it anew"
        for number in self.info.folds:
            rows = table[table["fold"] == number]
            if not len(rows):
                raise InputError(f"{path}: expected predictions of fold {number} as run.json says, got none; {remedy}")
            if (own := self.fold(number) / PREDICTIONS).is_file():
                wanted = read_predictions(own)
                facts = ["slide_id", "fold", "part", *(name for name in map(str, wanted) if name.startswith("prob_"))]
                rows, wanted = (part.reindex(columns=facts).sort_values(facts[:3]) for part in (rows, wanted))
                if not np.array_equal(rows.to_numpy(object), wanted.to_numpy(object)):
                    raise InputError(
                        f"{path}: expected the {len(wanted)} rows of {own}, got others ({len(rows)}); {remedy}"
                    )
        return table

    def load_model(self, number: int, device: torch.device | str = "cpu", *, tower: bool = False) -> MILModel:
        """The best epoch of a fold for inference: in evaluation mode, and with its genomics tower only where asked.

        Raises:
            InputError: the fold is not there, or its checkpoint is broken or of another configuration.
        """
        if self.config.model.kind == "omics":
            raise InputError(f"{self.folder}: expected a model of slides, got genomics alone; it can't predict slides")
        path, genes = self.fold(number) / "model.safetensors", None
        source = path.parent if tower else path
        state, _ = _read_weights(path)
        if tower and (part := self.fold(number) / "genomics.safetensors").is_file():
            state |= _read_weights(part)[0]
            first = state.get(f"{_TOWER}encoder.encoder.0.weight")
            genes = None if first is None or first.ndim != 2 else first.shape[1]
        with torch.device("meta"):  # sizes that the file does not hold are refused before they take memory
            check_tensors(build_model(self.config, self.info.in_features, self.num_classes, genes), state, str(source))
        model = build_model(self.config, self.info.in_features, self.num_classes, genes)
        model.load_state_dict(state)
        return model.to(device).eval()


def save_model(folder: Path, model: nn.Module, facts: Mapping[str, Any]) -> None:
    """The weights of a model: those of inference with `facts` in the header, and its genomics tower apart."""
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    tower = {name: t for name, t in state.items() if name.startswith(_TOWER)}
    if tower:
        with atomic_write(folder / "genomics.safetensors") as temporary:
            save_file(tower, temporary, metadata={"momkd": json.dumps(dict(facts))})
    with atomic_write(folder / "model.safetensors") as temporary:
        rest = {name: t for name, t in state.items() if name not in tower}
        save_file(rest, temporary, metadata={"momkd": json.dumps(dict(facts))})


def load_weights(model: nn.Module, path: Path, *parts: Path) -> dict[str, Any]:
    """Fill a model from a file of `save_model`, and from further ones that hold parts of it; returns the first's facts.

    Raises:
        InputError: no such file, not safetensors, or its tensors are not those of the model.
    """
    state, facts = _read_weights(path)
    for part in parts:
        state |= _read_weights(part)[0]
    restore(model, state, str(path))
    return facts


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: expected a checkpoint, got nothing there; train this fold first")
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(json.loads((file.metadata() or {}).get("momkd", "{}")))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of a damaged header, of several kinds
        raise InputError(
            f"{path}: expected a safetensors checkpoint, got a file that does not read ({one_line(error)}); "
            "copy it again or train again"
        ) from error
    return check_state_dict(state, str(path)), facts


def restore(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load tensors into a model. Raises InputError for the first that is missing, unknown or of another shape."""
    check_tensors(model, state, source)
    model.load_state_dict(dict(state))


def check_tensors(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raises InputError for the first tensor that is missing, unknown, of another shape, not dense or not finite.

    An adaptive memory may have any K.
    """
    other = "it belongs to another configuration: use the config.toml beside it"
    check_state_dict(state, source)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, MemoryBank):
            wanted |= module.shapes_in(state, f"{name}.")
    for name, shape in wanted.items():
        if name not in state:
            raise InputError(f"{source}: expected a tensor {name!r} {shape}, got none; {other}")
        if state[name].shape != shape:
            raise InputError(f"{source}: {name}: expected {shape}, got {tuple(state[name].shape)}; {other}")
    if extra := [name for name in state if name not in wanted]:
        raise InputError(f"{source}: expected no tensor {extra[0]!r}, got {tuple(state[extra[0]].shape)}; {other}")


def write_torch(path: Path | str, value: Any) -> None:
    """Writes tensors and plain values as `torch.save` does; whole or not at all."""
    buffer = io.BytesIO()  # torch does not say why it could not write a file
    torch.save(value, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())

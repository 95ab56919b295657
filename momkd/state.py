"""What `--resume` goes on from: state.pt and log.csv of a fold, read back only where they fit what is being trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from momkd.data.files import regular_file
from momkd.data.own import Finite, fitted, read_rows, short
from momkd.data.raw import load_torch, one_line
from momkd.errors import InputError
from momkd.runs import check_tensors

_REMEDY = "remove it to train this fold from the start"
_FREE = (
    "lr",
    "fused",
    "foreach",
    "capturable",
    "initial_lr",
    "params",
)  # of the optimizer: may differ from its options
_MOVING = ("last_epoch", "_last_lr", "best", "num_bad_epochs", "cooldown_counter")  # of the schedule
Epochs = Annotated[int, msgspec.Meta(ge=0, le=100_000)]


class OptimizerState(msgspec.Struct):
    """Of AdamW: the step and the two moments of each parameter, by its number, and the options."""

    state: dict[int, dict[str, Tensor]]
    param_groups: list[dict[str, Any]]


class TrainingState(msgspec.Struct):
    """state.pt.

    Attributes:
        epoch: the next one.
        best: validation AUC and minus the loss of the best epoch.
        waited: epochs since then.
        log: a row an epoch.
        kept: the weights of the best epoch.
        model, optimizer, schedule: their state dicts.
    """

    epoch: Epochs
    best: tuple[Finite, Finite] | None
    waited: Epochs
    log: list[dict[str, int | float]]
    kept: dict[str, Tensor]
    model: dict[str, Tensor]
    optimizer: OptimizerState
    schedule: dict[str, Any]


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: ReduceLROnPlateau
) -> TrainingState:
    """The content of state.pt, once all of it fits these; nothing in the file is ever executed, and nothing is changed.

    Raises:
        InputError: the file does not read, or belongs to another training.
    """
    regular_file(path, "the state of a run", _REMEDY)
    try:
        value = load_torch(path)
    except Exception as error:  # the unpickler of a damaged file raises nearly anything
        raise InputError(
            f"{path}: expected the state of a run, got a file that does not read ({one_line(error)}); {_REMEDY}"
        ) from error
    state: TrainingState = fitted(value, TrainingState, source=str(path), remedy=_REMEDY)
    try:
        check_tensors(model, state.model, f"{path}: model")
        check_tensors(model, state.kept, f"{path}: kept")
    except InputError as error:
        raise InputError(f"{error}, or {_REMEDY}") from error
    wrong = _wrong_optimizer(state.optimizer, optimizer) or _wrong_schedule(state.schedule, schedule)
    if [row.get("epoch") for row in state.log] != list(range(state.epoch)):
        wrong = f"log: expected a row for each of {state.epoch} epochs, got {len(state.log)} rows"
    if wrong:
        raise InputError(f"{path}: {wrong}; {_REMEDY}")
    known = schedule.state_dict()
    state.schedule = {name: value for name, value in state.schedule.items() if name in known}
    return state


def read_log(path: Path) -> pd.DataFrame:
    """log.csv: a row an epoch, with its number in the column epoch. Raises InputError where it is no such table."""
    remedy = "remove it, or train this fold again"
    rows = read_rows(path, dict[str, float], what="the log of a training", remedy=remedy)
    if not rows:
        raise InputError(f"{path}: expected a row for each epoch, got none; {remedy}")
    if any("epoch" not in row for row in rows):
        raise InputError(f"{path}: expected a column 'epoch', got {', '.join(rows[0])[:80]}; {remedy}")
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def _wrong_optimizer(given: OptimizerState, optimizer: torch.optim.Optimizer) -> str | None:
    """What does not fit, in words."""
    groups = optimizer.state_dict()["param_groups"]
    if len(given.param_groups) != len(groups):
        return f"optimizer: expected {len(groups)} groups, got {len(given.param_groups)}"
    for theirs, ours in zip(given.param_groups, groups, strict=True):
        if not _is_rate(theirs.get("lr")) or not _is_same(theirs.get("params"), ours["params"]):
            return "optimizer: expected the parameters of this model and their rate, got others"
        for name, value in ours.items():
            if name not in _FREE and name in theirs and not _is_same(theirs[name], value):
                return f"optimizer: expected {name}={value} as configured, got another"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, tensors in given.state.items():
        if not 0 <= number < len(parameters):
            return f"optimizer: expected {len(parameters)} parameters, got one with number {number}"
        wanted = {"step": torch.Size(), **dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[number].shape)}
        for name, shape in wanted.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape or not _is_usable(tensor, name != "exp_avg"):
                return f"optimizer: parameter {number}: expected {name} as finite numbers {tuple(shape)}, got others"
    return None


def _is_usable(tensor: Tensor, positive: bool) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or not tensor.is_floating_point():
        return False
    return bool(tensor.isfinite().all()) and not (positive and bool((tensor < 0).any()))


def _is_rate(value: object) -> bool:
    return type(value) is float and 0 <= value <= 10


def _wrong_schedule(given: dict[str, Any], schedule: ReduceLROnPlateau) -> str | None:
    """What does not fit, in words."""
    for name, value in schedule.state_dict().items():
        came = given.get(name, value)
        moved = name in _MOVING and all(map(_is_number, came if isinstance(came, list) else [came]))
        if not moved and not _is_same(came, value):
            return f"schedule: expected {name}={value} as configured, got {short(came)}"
    return None


def _is_same(came: object, value: object) -> bool:
    """Whether what came is this plain value; a tensor or whatever else may have come is not compared."""
    if type(came) is not type(value):
        return False
    if isinstance(came, list | tuple) and isinstance(value, list | tuple):
        return len(came) == len(value) and all(map(_is_same, came, value))
    return bool(came == value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)

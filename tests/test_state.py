"""What resuming reads, changed in every place: one line that names file and field, and nothing is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import ReduceLROnPlateau

from momkd.config import Config
from momkd.data.lock import LOCK, locked
from momkd.errors import InputError
from momkd.runs import Run, RunInfo, build_model, save_model, write_torch
from momkd.simulate.write import MARK, read_mark
from momkd.state import load_state
from momkd.study.arms import choose_arms
from momkd.study.cohort import StudyCohort
from momkd.study.run import Study, _check_same

SMALL = ["hidden_features=4", "gate_features=4", "projection_features=4", "classifier_features=3"]
CONFIG = Config.preset("fast").with_settings([*(f"model.{s}" for s in SMALL), "memory.slots=2"])


class Training:
    """A model, its optimizer after one step, and its schedule; and the state that is saved of them."""

    def __init__(self) -> None:
        self.model = build_model(CONFIG, 5, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.schedule = ReduceLROnPlateau(self.optimizer, "max", 0.2, 5, threshold=0.0)
        sum(p.square().sum() for p in self.model.parameters()).backward()  # type: ignore[union-attr]
        self.optimizer.step()
        self.schedule.step(0.5)

    def state(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        log = [{"epoch": 0, "val_auc": float("nan")}, {"epoch": 1, "val_auc": 0.5, "learning_rate": 1e-3}]
        return {**parts, "epoch": 2, "best": (0.5, -0.7), "waited": 0, "log": log, "kept": dict(parts["model"])}

    def load(self, path: Path) -> Any:
        return load_state(path, self.model, self.optimizer, self.schedule)


def change(state: Any, place: str, value: Any) -> None:
    *outer, last = (int(name) if name.isdigit() else name for name in place.split("/"))
    for name in outer:
        state = state[name]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value


NAN = float("nan")
WEIGHT = "classifier.layers.1.bias"  # (3,)


def test_the_state_that_was_saved_is_read(tmp_path: Path) -> None:
    one = Training()
    write_torch(tmp_path / "state.pt", one.state())
    read = Training().load(tmp_path / "state.pt")
    assert (read.epoch, read.best, read.waited) == (2, (0.5, -0.7), 0)
    assert type(read.log[0]["epoch"]) is int  # a float would change log.csv
    assert torch.equal(read.kept[WEIGHT], one.model.state_dict()[WEIGHT])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("epoch", KeyError, "expected 'epoch' in it, got none"),
        ("epoch", -1, "epoch: expected int >= 0, got -1"),
        ("epoch", "2", "epoch: expected int, got '2'"),
        ("epoch", 3, "log: expected a row for each of 3 epochs, got 2 rows"),
        ("best", (NAN, 0.0), "best[0]: expected finite number, got nan"),
        ("best", 0.5, "best: expected"),
        ("waited", 10**30, "waited: expected int <= 100000, got 10000"),
        ("log", [{"epoch": 0}, 3], "log[1]: expected names with values, got 3"),
        ("log/1/val_auc", "x", "log[1][...]: expected"),
        ("log/1/epoch", 0, "log: expected a row for each of 2 epochs"),
        ("model", torch.ones(2), "expected names with values, got a tensor"),
        ("optimizer/param_groups/0/eps", torch.ones(2), "optimizer: expected eps=1e-08 as configured"),
        ("schedule/cooldown", torch.zeros(1).expand(10**5, 10**5), "schedule: expected cooldown=0 as configured"),
        ("model", [1], "model: expected names with values, got"),
        (f"model/{WEIGHT}", KeyError, f"model: expected a tensor '{WEIGHT}' (3,), got none"),
        (f"model/{WEIGHT}", 3, "expected Tensor, got int"),
        (f"model/{WEIGHT}", torch.zeros(4), f"model: {WEIGHT}: expected (3,), got (4,)"),
        (f"model/{WEIGHT}", torch.full((3,), NAN), f"model: {WEIGHT}: expected finite values, got NaN or infinity"),
        (f"kept/{WEIGHT}", torch.zeros(3, device="meta"), f"kept: {WEIGHT}: expected a tensor with values"),
        (f"kept/{WEIGHT}", torch.zeros(3, dtype=torch.int8), f"kept: {WEIGHT}: expected a tensor of floating-point"),
        ("optimizer", {}, "expected 'state' in it, got none"),
        ("optimizer/param_groups", [], "optimizer: expected 1 groups, got 0"),
        ("optimizer/param_groups/0/lr", "x", "optimizer: expected the parameters of this model and their rate"),
        ("optimizer/param_groups/0/lr", NAN, "optimizer: expected the parameters of this model and their rate"),
        ("optimizer/param_groups/0/params", [0], "optimizer: expected the parameters of this model and their rate"),
        ("optimizer/param_groups/0/betas", (5.0, 9.0), "optimizer: expected betas=(0.9, 0.999) as configured"),
        ("optimizer/state/0/exp_avg", torch.ones(2), "optimizer: parameter 0: expected exp_avg as finite numbers"),
        ("optimizer/state/0/exp_avg_sq", KeyError, "optimizer: parameter 0: expected exp_avg_sq as finite numbers"),
        ("optimizer/state/0/step", torch.tensor(NAN), "optimizer: parameter 0: expected step as finite numbers ()"),
        ("optimizer/state/99", {}, "got one with number 99"),
        ("optimizer/state/0", 3, "optimizer.state[...]: expected"),
        ("schedule/best", "x", "schedule: expected best="),
        ("schedule/num_bad_epochs", None, "schedule: expected num_bad_epochs=0 as configured, got None"),
        ("schedule/factor", 7.0, "schedule: expected factor=0.2 as configured, got 7.0"),
        ("schedule/_last_lr", [NAN], "schedule: expected _last_lr="),
    ],
)
def test_a_state_that_was_changed(tmp_path: Path, place: str, value: Any, message: str) -> None:
    path, training = tmp_path / "state.pt", Training()
    state = training.state()
    change(state, place, value)
    write_torch(path, state)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        training.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert "remove it to train this fold from the start" in said
    assert len(said.splitlines()) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in training.model.state_dict().items())


def test_attributes_of_the_schedule_are_not_taken_from_the_file(tmp_path: Path) -> None:
    training, path = Training(), tmp_path / "state.pt"
    write_torch(path, {**training.state(), "schedule": {**training.schedule.state_dict(), "step": 3}})
    assert "step" not in training.load(path).schedule


@pytest.mark.parametrize(
    ("value", "message"), [([1], "expected names with values, got"), ({3: 1}, "a name: expected str, got another")]
)
def test_a_file_of_something_else(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "state.pt"
    write_torch(path, value)
    with pytest.raises(InputError, match=message):
        Training().load(path)
    path.write_bytes(b"noise")
    with pytest.raises(InputError, match="got a file that does not read"):
        Training().load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="got a named pipe"):
        Training().load(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nan", torch.tensor([0.0, NAN, 1.0]), "expected finite values, got NaN or infinity; take an earlier"),
        ("inf", torch.tensor([0.0, float("inf"), 1.0]), "expected finite values"),
        ("whole numbers", torch.zeros(3, dtype=torch.int64), "expected a tensor of floating-point numbers, got int64"),
        ("number", torch.tensor(0.0), r"expected \([34],\), got \(\)"),
    ],
)
def test_weights_of_a_fold(tmp_path: Path, name: str, value: torch.Tensor, message: str) -> None:
    run = Run.create(tmp_path / "run", CONFIG, RunInfo(["a", "b"], "x", 5, [0], 1, {}, {}, {}))
    run.fold(0).mkdir()
    save_model(run.fold(0), build_model(CONFIG, 5, 2, 6), {"epoch": 3})
    run.load_model(0)
    assert run.load_model(0, tower=True).state_dict()["genomics.projector.bias"].shape == (4,)
    for file, tensor in (("model", WEIGHT), ("genomics", "genomics.projector.bias")):
        path = run.fold(0) / f"{file}.safetensors"
        good = path.read_bytes()
        value = value if tensor == WEIGHT or value.ndim == 0 else value[:1].repeat(4) + value[1:2]
        save_file({**load_file(path), tensor: value}, path)
        with pytest.raises(InputError, match=message) as caught:
            run.load_model(0, tower=True)
        assert "fold_0" in str(caught.value)
        assert tensor in str(caught.value)
        path.write_bytes(good)


def refuse(read: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read()
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("study.json", "{}", "study.json: expected 'arms' in it, got None; remove it to go on"),
        ("study.json", '{"arms": {"abmil": {"preset": 3, "settings": []}}}', "expected"),
        ("study.json", '{"arms": {"abmil": {"preset": "x"}}}', "expected"),
        ("study.json", '{"arms": {}, "folds": NaN}', "got no such JSON"),
        ("study.json", '{"arms": {}, "folds": 7}', "expected a study with "),
        ("study.json", "[" * 10**5, "got no such JSON"),
        (MARK, "[]", "expected names with values, got []; simulate into another folder"),
        (MARK, '{"config": {"slides": [1]}}', "config[...]: expected"),
        (MARK, '{"config": {}, "from": 7}', "from: expected str | nothing, got 7"),
        (LOCK, "[" * 4000, "in use by process ? on ?"),
        (LOCK, '{"pid": 1, "host": "a\\nb\\u001b[31m", "job": ["x"]}', "on a\\nb\\x1b[31m, SLURM job ['x'] since ?"),
    ],
)
def test_files_of_studies_simulations_and_locks(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    cohort = StudyCohort(tmp_path, tmp_path / "labels.csv", ("x",))
    readers: dict[str, Callable[[], object]] = {
        "study.json": lambda: _check_same(Study(tmp_path, cohort, tuple(choose_arms(["abmil"])))),
        MARK: lambda: read_mark(tmp_path),
        LOCK: lambda: locked(tmp_path).__enter__(),
    }
    refuse(readers[name], message)
    assert (tmp_path / name).read_text() == text


def test_a_study_goes_on_with_its_own_description(tmp_path: Path) -> None:
    cohort = StudyCohort(tmp_path, tmp_path / "labels.csv", ("x",))
    _check_same(Study(tmp_path, cohort, tuple(choose_arms(["abmil"]))))
    _check_same(Study(tmp_path, cohort, tuple(choose_arms(["memory"]))))
    assert set(json.loads((tmp_path / "study.json").read_text())["arms"]) == {"abmil", "memory"}

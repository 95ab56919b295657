"""momkd's own files and checkpoints, changed in their structure: values become extremes, names go or come twice."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from momkd.compat import momkd_reference
from momkd.config import Config
from momkd.convert import checkpoint_to_run
from momkd.data.genes import OmicsTransform
from momkd.data.own import read_json
from momkd.errors import InputError
from momkd.models import MoMKD
from momkd.predict import threshold_of
from momkd.runs import METRICS, Run, RunInfo, build_model
from momkd.simulate.write import MARK, read_mark
from momkd.state import load_state, read_log
from momkd.study.arms import choose_arms
from momkd.study.cohort import StudyCohort
from momkd.study.run import Study, _check_same
from tests.fuzz.kinds import WORK, Kind
from tests.test_state import CONFIG, Training

TEXTS = (
    "nan", "NaN", "Infinity", "-Infinity", "1e39", "1e400", "-1", "0", "1", "true", "null", "9" * 5000,
    "9" * 40, "4294967296", "0.5",
    '""', '"x"', '"a\\nb"', '"\\u001b[31m"', '"../../x"', '"\\ud800"', '"' + "x" * 10**5 + '"',
    "[]", "[[]]", "{}", '{"a": 1, "a": 2}', "[1, -1]", '["a", "a"]', "[" * 10**4, "2026-01-01",
)  # fmt: skip


def own_files(folder: Path) -> None:
    run = Run.create(folder.parent / "run", CONFIG, RunInfo(["0", "1"], "label", 5, [0, 2], 3, {"a": None}, {}, {}))
    files = {name: (run.folder / name).read_text() for name in ("config.toml", "run.json")}
    files[METRICS] = '{"test": {}, "folds": [{"fold": 0, "threshold": 0.25}, {"fold": 2, "threshold": null}]}'
    files["genes.json"] = json.dumps(OmicsTransform(("a", "b"), (0.5, 1.0), (2.0, 1.0), True, 5.0).to_dict())
    files["study.json"] = '{"arms": {"abmil": {"preset": "abmil", "settings": []}}, "folds": 5, "settings": []}'
    files[MARK] = '{"note": "x", "momkd": "0", "config": {"slides": 36, "visibility": 0.5, "dtype": "float16"}}'
    files["log.csv"] = "epoch,val_loss,val_auc\n0,0.5,\n1,0.25,0.75\n"
    for name, text in files.items():
        (folder / name).write_text(text)


def other_text(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """A file of text after one or two changes of a value or a name."""
    text = path.read_text()
    for _ in range(rng.choice((1, 1, 2))):
        if path.suffix == ".json":
            text = _other_json(text, rng)
        else:
            lines = text.splitlines()
            at = rng.randrange(len(lines))
            sign = "," if path.suffix == ".csv" else " = "
            cells = lines[at].split(sign)
            cells[rng.randrange(len(cells))] = rng.choice(TEXTS)
            changed = (sign.join(cells), "", lines[at] + "\n" + lines[at], f"{sign}{lines[at]}")
            lines[at] = rng.choice((changed[0], *changed))
            text = "\n".join(lines) + "\n"
    return text.encode("utf-8", "surrogatepass")


def _other_json(text: str, rng: random.Random) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # after a first change
        return text
    places = [*_places(value, ())]
    if not places:
        return rng.choice(TEXTS)
    *outer, last = rng.choice(places)
    holder = value
    for name in outer:
        holder = holder[name]
    match rng.randrange(4):
        case 0:
            del holder[last]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("", last + "x", "a\n", "../x"))] = holder.pop(last)
        case _:
            holder[last] = "HERE"
    return json.dumps(value).replace('"HERE"', rng.choice(TEXTS))


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield (*path, name)
        yield from _places(value[name], (*path, name))


def use_own(path: Path) -> None:
    run = path.parent / "run"
    if path.name == "log.csv":
        assert "epoch" in read_log(path)
    elif path.name == "genes.json":
        value = read_json(path, dict[str, Any], what="genes", remedy="train again")  # type: ignore[arg-type]
        transform = OmicsTransform.from_dict(value, source=str(path))
        assert np.isfinite([*transform.mean, *transform.std]).all()
    elif path.name == "study.json":
        cohort = StudyCohort(Path("f"), Path("l"), ("x",))
        _check_same(Study(path.parent, cohort, tuple(choose_arms(["abmil"]))))
    elif path.name == MARK:
        assert isinstance(read_mark(path.parent).config, dict)
    else:
        good = (run / path.name).read_bytes() if (run / path.name).exists() else None
        try:
            shutil.copyfile(path, run / path.name)
            opened = Run(run)
            assert np.isfinite(threshold_of(opened, opened.info.folds))
            usable(opened.config)
        finally:
            (run / path.name).unlink()
            if good is not None:
                (run / path.name).write_bytes(good)


def usable(config: Config) -> None:
    """Every library takes its numbers."""
    assert Config.from_toml(config.to_toml()) == config
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=config.train.learning_rate, weight_decay=config.train.weight_decay)
    torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", config.train.plateau_factor)
    torch.manual_seed(config.train.seed)
    np.random.RandomState(config.train.seed)  # scikit-learn makes one
    with torch.device("meta"):
        build_model(config, 5, 2, 6)


# Tensors


def hostile_tensors() -> list[Any]:
    deep: Any = ()
    for _ in range(12):
        deep = (deep, deep)
    return [
        *(torch.tensor(1.0), torch.zeros(0), torch.zeros(4, 0), torch.zeros(1, 1, 1, 1), torch.eye(8).to_sparse()),
        *(torch.zeros(8, device="meta"), torch.zeros(1).expand(10**5, 10**5), torch.full((8,), float("nan"))),
        *(torch.full((8,), 1e38), torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.complex64)),
        *(torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.float16), torch.zeros(8, 10**5)),
        *(None, 3, "text", [torch.zeros(8)], {"a": 1}, deep, b"x", float("nan"), -1, 2**70, True),
    ]


def other_tensors(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """What `torch.save` wrote, after one or two changes of a value or a name."""
    value = torch.load(path, weights_only=True)
    for _ in range(rng.choice((1, 1, 2))):
        holder = value
        while (deeper := [v for v in _values(holder) if isinstance(v, dict | list) and v]) and rng.random() < 0.7:
            holder = rng.choice(deeper)
        if not holder:
            continue
        last = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        match rng.randrange(4):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[rng.choice((3, ("a", 1), "x\n\x1b[31m", 2.5, None))] = holder.pop(last)
            case _:
                holder[last] = rng.choice(hostile_tensors())
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, list) else []


def state_files(folder: Path) -> None:
    torch.save(Training().state(), folder / "state.pt")


def use_state(path: Path) -> None:
    training = Training()
    state = load_state(path, training.model, training.optimizer, training.schedule)
    training.model.load_state_dict(state.model)
    training.optimizer.load_state_dict({"state": state.optimizer.state, "param_groups": state.optimizer.param_groups})
    training.schedule.load_state_dict(state.schedule)
    training.optimizer.step()
    training.schedule.step(0.25)
    assert all(bool(p.isfinite().all()) for p in training.model.parameters())


def released_files(folder: Path) -> None:
    widths: dict[str, Any] = {"hidden_features": 8, "projection_features": 4, "slots": 2, "classifier_features": 5}
    tower = {"omics_features": 6, "omics_embedding": 4, "omics_hidden": 3}
    model = MoMKD(8, encoder="gatv2", update="gradient", shared_projector=False, **widths, **tower)
    torch.save(momkd_reference.dump(model), folder / "released.pt")
    torch.save({"model": momkd_reference.dump(model), "epoch": 3}, folder / "inside.pt")


def use_released(path: Path) -> None:
    out = path.parent / WORK
    try:
        run = checkpoint_to_run(path, out)
        assert all(bool(p.isfinite().all()) for p in run.load_model(0, tower=True).parameters())
    except InputError:
        assert not out.exists()
        raise
    finally:
        shutil.rmtree(out, ignore_errors=True)


KINDS = {
    "own files": Kind(own_files, use_own, 350, other_text),
    "state": Kind(state_files, use_state, 100, other_tensors),
    "state dicts": Kind(released_files, use_released, 100, other_tensors),
}

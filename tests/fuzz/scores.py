"""Predictions and their metrics; slides of extreme values through a model; ids that spreadsheets run."""

from __future__ import annotations

import io
import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from momkd.data import read_labels, read_slide
from momkd.data.atomic import write_csv
from momkd.data.batches import BagLoader
from momkd.inference import probabilities
from momkd.metrics import evaluate_predictions
from momkd.models import ABMIL, MILModel, MoMKD
from momkd.patients import RULES
from momkd.predictions import prediction_table, read_predictions
from tests.fuzz.kinds import WORK, Kind, mutated

CLASSES = {"two": ("1", "2"), "three": ("=a", "b,c", "[/b]")}
CELLS = (
    *("", "0", "1", "2", "-1", "0.5", "1e-7", "1e-320", "1.0000005", "nan", "inf", "1e400", "9" * 5000, "-", "'=1+1"),
    *("=1+1", "[/b]", "val", "test", "external", "train", "b,c", "\u202e", "\x1b[31m", "True", "None", "1_0"),
)
VALUES = (0.0, 1e-45, 1.0, 1e15, 1e19, 1e30, 3e38, -3e38, math.inf, math.nan)
SLIDES = 6  # of a fold and part
SIGNS = "=+-@'\"\t\r\n ,;|%＝＋\0\u202e\x1b[a1.eE"


def prediction_files(folder: Path) -> None:
    """Patients of one and of two slides; each class in each part."""
    rng = np.random.default_rng(0)
    for name, classes in CLASSES.items():
        parts = []
        for fold, part in ((0, "val"), (0, "test"), (1, "test"), (0, "external")):
            slides = [f"{part if part == 'external' else (fold, part)}{n}" for n in range(SLIDES)]
            labels = pd.DataFrame({"case_id": [f"p{n // 2}{part}" for n in range(SLIDES)]}, index=slides)
            labels["label"] = np.arange(SLIDES) // 2 % len(classes)
            probs = rng.dirichlet(np.ones(len(classes)), SLIDES)
            at: dict[str, Any] = {"fold": fold, "part": part, "threshold": 0.5}
            parts.append(prediction_table(labels.rename_axis("slide_id"), slides, probs, classes, **at))
        write_csv(folder / f"{name}.csv", pd.concat(parts))


def some_cells(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """Some cells are others, a column is another, or any bytes."""
    if rng.random() < 0.3:
        return mutated(path, rng, others)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for _ in range(rng.choice((1, 1, 2, 5))):
        row, column = rng.randrange(len(table)), rng.randrange(len(table.columns))
        match rng.randrange(5):
            case 0:
                table.iloc[:, column] = rng.choice(CELLS)
            case 1:
                table.iloc[:, column] = table.iloc[:, rng.randrange(len(table.columns))]
            case 2:
                table = table.drop(index=table.index[row]) if len(table) > 1 else table
            case _:
                table.iloc[row, column] = rng.choice(CELLS)
    return table.to_csv(index=False).encode()


def use_predictions(path: Path) -> None:
    classes = CLASSES[path.stem]
    table = read_predictions(path)
    rule = RULES[len(table) % len(RULES)]
    metrics = evaluate_predictions(table, classes, bootstrap=2, patients=rule, source=str(path))
    json.dumps(metrics, allow_nan=False)
    for level in (metrics, metrics["by_patient"]):
        for part in ("test", "pooled", "external", "external_ensemble"):
            for value in level.get(part, {}).values():
                assert value["estimate"] is None or 0 <= value["estimate"] <= 1


def value_files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(folder / "one.npy", rng.standard_normal((1, 6), np.float32))
    np.save(folder / "many.npy", rng.standard_normal((9, 6), np.float32))


def some_values(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    x = np.load(path)
    for _ in range(rng.choice((1, 1, 3, 20))):
        rows = slice(None) if rng.random() < 0.2 else rng.randrange(len(x))
        x[rows, rng.randrange(x.shape[1])] = rng.choice(VALUES)
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


@cache
def models() -> tuple[MILModel, ...]:
    torch.manual_seed(0)
    memory = MoMKD(6, hidden_features=4, projection_features=4, slots=2)
    assert memory.memory is not None
    memory.memory.memory.copy_(torch.randn_like(memory.memory.memory))
    return ABMIL(6, hidden_features=4), memory


def use_values(path: Path) -> None:
    """A slide beside a good one: every result is finite or the slide is named, and the other one's stays the same."""
    x = torch.from_numpy(read_slide(path).features)
    good = torch.ones(3, 6)
    skipped: dict[str, str] = {}
    loader = BagLoader(["a", "b"], np.array([0, 1]), {"a": len(x), "b": 3}, {"a": x, "b": good}.__getitem__)
    beside = BagLoader(["a", "b"], loader.labels, loader.sizes, loader.read, skipped=skipped)
    for model in models():
        slides, probs, _ = probabilities(model, beside, torch.device("cpu"))
        assert slides[-1] == "b", skipped
        assert np.isfinite(probs).all()
        alone = BagLoader(["b"], np.array([1]), {"b": 3}, lambda _: good)
        np.testing.assert_allclose(probs[-1], probabilities(model, alone, torch.device("cpu"))[1][0], atol=1e-6)
    for model in models():
        assert np.isfinite(probabilities(model, loader, torch.device("cpu"))[1]).all()


def id_files(folder: Path) -> None:
    (folder / "plain.txt").write_text("007\nTCGA-AB-1234\na.b\n1e5\n")
    (folder / "formulas.txt").write_text("=1+1\n@x\n+a\n-b\n'=c\n-1\n")


def some_ids(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    ids = [*path.read_text().splitlines()[:3], *("".join(rng.choices(SIGNS, k=rng.randrange(5))) for _ in range(2))]
    return json.dumps(ids).encode()


def use_ids(path: Path) -> None:
    """Ids through a table of labels: read back as they were, and no cell of it is a formula."""
    text = path.read_text()
    ids = json.loads(text) if text.startswith("[") else text.splitlines()
    ids = [name.strip() for name in ids]  # as every reader of tables takes them
    table = pd.DataFrame({"slide_id": ids, "case_id": ids, "label": [str(n % 2) for n in range(len(ids))]})
    folder = path.parent / WORK
    folder.mkdir(exist_ok=True)
    write_csv(folder / "labels.csv", table)
    back = read_labels(folder / "labels.csv")
    assert list(back.table.index) == ids
    for cell in pd.read_csv(folder / "labels.csv", dtype=str, keep_default_na=False)["slide_id"]:
        assert len(cell) < 2 or cell[0] not in "=+-@＝＋" or math.isfinite(float(cell)), cell


KINDS = {
    "predictions": Kind(prediction_files, use_predictions, 60, some_cells),
    "values": Kind(value_files, use_values, 150, some_values),
    "ids": Kind(id_files, use_ids, 300, some_ids),
}

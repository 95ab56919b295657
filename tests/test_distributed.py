"""Several ranks train as one process does: the same losses, the same memory on each, whatever falls to whom."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from momkd import distributed
from momkd.config import Config
from momkd.data.batches import BagLoader, deal
from momkd.errors import InputError, RankError
from momkd.inference import probabilities
from momkd.runs import build_model
from momkd.simulate import SimulatedCohort
from momkd.train import Trainer
from tests.ranks import ROOT, environment, run_ranks

L, G = 6, 5
SMALL = ["model.hidden_features=16", "model.projection_features=8", "memory.slots=3", "omics.features=8"]
PLAIN = ["model.dropout=0", "omics.dropout=0", "model.attention_dropout=0", "model.encoder_dropout=0"]


def slides(n: int, seed: int, graph: bool = False, labels: Sequence[int] | None = None) -> BagLoader:
    """Ragged bags, one of them large; every third without genomics, every seventh without label."""
    rng = np.random.default_rng(seed)
    given = np.arange(n) % 2 if labels is None else np.array(labels)
    sizes = {f"s{i}": 200 if i == 3 else int(rng.integers(1, 40)) for i in range(n)}
    features = {slide: torch.from_numpy(rng.standard_normal((size, L)).astype(np.float32)) for slide, size in sizes.items()}
    for slide, label in zip(features, given, strict=True):
        features[slide][::5, 0] += 3.0 * (2 * int(label) - 1)
    omics = rng.standard_normal((n, G)).astype(np.float32)
    omics[:, 0] += 2 * given
    omics[::3] = np.nan
    given = given.copy()
    if labels is None:
        given[::7] = -1

    def edges(slide: str, rows: Any) -> Any:
        from momkd.graph import knn

        coords = torch.arange(2 * sizes[slide]).view(-1, 2) % 17
        return knn(coords if rows is None else coords[torch.from_numpy(rows)], 3)

    return BagLoader(
        list(features),
        given.astype(np.int64),
        sizes,
        features.__getitem__,
        omics,
        slides_per_step=4,
        max_patches=30,
        cache_bytes=10**8,
        graph=edges if graph else None,
    )


def trained(preset: str, settings: list[str], n: int = 19, labels: Sequence[int] | None = None) -> dict[str, Any]:
    """Trains here, on this rank of however many; the log, the weights and the scores of the validation slides."""
    torch.manual_seed(0)
    config = Config.preset(preset).with_settings([*SMALL, "train.learning_rate=0.001", *settings])
    graph = config.model.encoder == "gatv2"
    model = build_model(config, L, 2, None if preset == "abmil" else G)
    validation = slides(11, 1, graph)
    made = Trainer(model, config, slides(n, 0, graph, labels), validation)
    made.run()
    _, probs, _ = probabilities(model, validation, torch.device("cpu"))
    timeless = [{k: v for k, v in row.items() if k != "patches_per_second"} for row in made.log]
    return {"log": timeless, "state": {**model.state_dict()}, "probs": torch.from_numpy(probs)}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> float:
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12))
    assert error <= tolerance, error
    return error


def agree(tmp_path: Path, ranks: int, **given: Any) -> dict[str, float]:
    """Checks that ranks end as one process does, and alike bit for bit; returns the largest relative differences."""
    ended = run_ranks(tmp_path, ranks, "tests.test_distributed:trained", **given)
    for end in ended:
        assert end.code == 0, end.stderr
    first = ended[0].value
    for other in (end.value for end in ended[1:]):
        assert other["log"] == first["log"]
        assert torch.equal(other["probs"], first["probs"])
        for name, tensor in first["state"].items():
            assert torch.equal(other["state"][name], tensor), name
    alone = trained(**given)
    losses = [name for name in alone["log"][0] if name.endswith("_loss")]
    table, wanted = (pd.DataFrame(made["log"])[losses].to_numpy() for made in (first, alone))
    assert table.shape == wanted.shape
    found = {"losses": float(np.abs(table / np.where(wanted == 0, 1, wanted) - (wanted != 0)).max())}
    assert found["losses"] <= 1e-5, found
    for name in ("memory.memory", "memory.usage"):
        if name in alone["state"]:
            found[name] = close(first["state"][name], alone["state"][name])
    found["probs"] = close(first["probs"], alone["probs"])
    return found

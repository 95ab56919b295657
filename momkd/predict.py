"""Predictions of slides by a trained run, from the slide alone: `momkd predict`. The genomics tower is never built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from momkd.bags import Bags
from momkd.bootstrap import Floats
from momkd.data.atomic import make_folder, write_csv
from momkd.data.own import read_json
from momkd.data.raw import check_id
from momkd.data.slides import write_hdf5
from momkd.data.sources import SlideSource
from momkd.errors import InputError
from momkd.inference import autocast, open_slides, pick_device
from momkd.models import Prediction
from momkd.runs import METRICS, Run, RunMetrics


def predict_run(
    run: Run,
    features: Path | str,
    out: Path | str,
    *,
    attention: Path | str | None = None,
    folds: Sequence[int] | None = None,
    skip_bad: bool = False,
    device: str | None = None,
    graphs: Path | str | None = None,
    report: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Predicts every slide of a folder with the models of all folds and averages their probabilities.

    Args:
        run: a finished run.
        features: folder of feature files of the encoder that the run was trained with, or a packed store of them.
        out: CSV to write: slide_id, prob_<class> of each class, predicted. Of two classes the second is predicted from
            the mean of the thresholds that the folds chose on their validation slides, of more the most probable.
        attention: folder to write one HDF5 a slide into: `attention` (N, H) float32, the mean over folds; `slots`
            (F, N, C) int16, each fold's nearest prototype of each class to each patch; `coords` as in the features.
        folds: which models to use; None takes all.
        skip_bad: leave out slides that cannot be used, instead of ending.
        device: such as "cuda:1"; None takes a GPU where there is one.
        graphs: folder where graphs of patches are kept, for the encoder gatv2.
        report: called with (slides done, slides).
        note: called with each line on how features were read that a user should know.

    Returns:
        What was written to `out`, and the slides that were skipped with the reason.

    Raises:
        InputError: a slide that cannot be used, a fold that is not there; nothing is written to `out` then.
    """
    used = list(run.info.folds if folds is None else folds)
    if bad := [fold for fold in used if fold not in run.info.folds]:
        raise InputError(f"fold: expected one of {', '.join(map(str, run.info.folds))}, got {bad[0]}")
    where = pick_device(device)
    models = [run.load_model(fold, where) for fold in used]
    cohort, loader = open_slides(run, features, where, skip_bad=skip_bad, graphs=graphs)
    if note is not None:
        for told in cohort.notes:
            note(told)
    folder = None if attention is None else make_folder(attention)
    rows: list[dict[str, Any]] = []
    with closing(loader.batches(loader.once(), device=where)) as batches:
        for batch in batches:
            with torch.inference_mode(), autocast(where, run.config.train.amp):
                each = [model(batch.bags) for model in models]
            probs = torch.stack([torch.softmax(p.logits.double(), 1) for p in each]).mean(0).cpu().numpy()
            rows += [
                {"slide_id": slide, **{f"prob_{name}": p for name, p in zip(run.info.classes, values, strict=True)}}
                for slide, values in zip(batch.slide_ids, probs, strict=True)
            ]
            if folder is not None:
                _write_attention(folder, cohort.source, batch.slide_ids, batch.bags, each, used)
            if report is not None:
                report(len(rows), len(cohort))
    table = pd.DataFrame(rows)
    predicted = decide(table.iloc[:, 1:].to_numpy(), threshold_of(run, used))
    table["predicted"] = [run.info.classes[c] for c in predicted]
    write_csv(out, table)
    return table, cohort.skipped


def threshold_of(run: Run, folds: Sequence[int]) -> float:
    """The probability from which on folds of a run say the second of two classes: the mean of those that they chose."""
    path = run.folder / METRICS
    chosen = []
    if run.num_classes == 2 and path.is_file():
        metrics = read_json(path, RunMetrics, what="the metrics of a run", remedy="make them with momkd evaluate")
        known = {fold.fold: fold.threshold for fold in metrics.folds}
        chosen = [threshold for fold in folds if (threshold := known.get(fold)) is not None]
    return float(np.mean(chosen)) if chosen else 0.5


def decide(probs: Floats, threshold: float) -> list[int]:
    """Probabilities (n, C) -> the n classes: of two the second from the threshold on, of more the most probable."""
    return [int(c) for c in (probs.argmax(1) if probs.shape[1] > 2 else probs[:, 1] >= threshold)]


def _write_attention(
    folder: Path,
    source: SlideSource,
    slides: Sequence[str],
    bags: Bags,
    each: Sequence[Prediction],
    folds: Sequence[int],
) -> None:
    mean = torch.stack([p.attention.float() for p in each]).mean(0)  # (N, H)
    slots = torch.stack([p.slots for p in each if p.slots is not None]) if each[0].slots is not None else None
    for slide, a, b in zip(slides, bags.offsets[:-1].tolist(), bags.offsets[1:].tolist(), strict=True):
        coords, attrs = source.coords(slide)
        with write_hdf5(folder / f"{check_id(slide, source.name(slide))}.h5") as file:
            file.create_dataset("attention", data=mean[a:b].cpu().numpy())
            if slots is not None:
                file.create_dataset("slots", data=slots[:, a:b].to(torch.int16).cpu().numpy())
                file["slots"].attrs["folds"] = list(folds)
            if coords is not None:
                file.create_dataset("coords", data=coords)
                kept = ("patch_size_level0", "coords_unit")
                file["coords"].attrs.update({name: attrs[name] for name in kept if name in attrs})

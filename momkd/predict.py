"""Predictions of slides by a trained run, from the slide alone: `momkd predict`. The genomics tower is never built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from momkd.bootstrap import Floats
from momkd.data.atomic import make_folder, write_csv
from momkd.data.ids import TCGA_CASE, is_barcode, match_ids, matched_note
from momkd.data.outputs import check_outputs, check_replaced, holds, run_files
from momkd.data.own import read_json
from momkd.data.raw import check_id
from momkd.data.slides import write_hdf5
from momkd.data.sources import SlideSource
from momkd.data.tables import read_cases
from momkd.errors import InputError
from momkd.inference import Seen, none_left, open_slides, pick_device, see
from momkd.patients import by_patient, check_rule
from momkd.predictions import (
    PREDICT,
    check_predictions,
    choose_thresholds,
    is_predictions,
    prediction_table,
    with_predicted,
)
from momkd.runs import METRICS, PREDICTIONS, Run, RunMetrics


def predict_run(
    run: Run,
    features: Path | str,
    out: Path | str,
    *,
    attention: Path | str | None = None,
    cases: Path | str | None = None,
    case_from: str | None = None,
    out_patients: Path | str | None = None,
    patients: str | None = None,
    folds: Sequence[int] | None = None,
    skip_bad: bool = False,
    device: str | None = None,
    graphs: Path | str | None = None,
    patch_budget: int | None = None,
    report: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Predicts every slide of a folder with the models of all folds and averages their probabilities.

    Args:
        run: a finished run.
        features: folder of feature files of the encoder that the run was trained with, or a packed store of them.
        out: CSV to write, with the columns of `momkd.predictions`: `label` is empty, `part` is "predict", `fold` is
            empty or the only fold. Of two classes the second is predicted from the mean of the thresholds that the
            folds chose on their validation slides, of more the most probable.
        attention: folder to write one HDF5 a slide into: `attention` (N, H) float32, the mean over folds; `slots`
            (F, N, C) int16, each fold's nearest prototype of each class to each patch; `coords` as in the features.
        cases: CSV of slide_id and case_id; None: every slide is a case of its own.
        case_from: the column of `cases` that names the cases; or "tcga", with or without a table: the first 12
            characters of the slides' barcodes.
        out_patients: CSV to write a row a patient into: case_id, slides (how many) and the other columns of `out`.
        patients: how a patient's slides are joined: "mean", "max" or "noisy-or"; None takes that of the run.
        folds: which models to use; None takes all.
        skip_bad: leave out slides that cannot be used, instead of ending.
        device: such as "cuda:1"; None takes a GPU where there is one.
        graphs: folder where graphs of patches are kept, for the encoder gatv2.
        patch_budget: patches computed at a time, a larger slide comes in blocks of so many (but for gatv2); None takes
            that of the run.
        report: called with (slides done, slides).
        note: called with what a person should know, in one line.

    Returns:
        What was written to `out`, and the slides that were skipped with the reason.

    Raises:
        InputError: a slide that cannot be used, a fold that is not there, no slide left; nothing is written to `out`
            then.
    """
    used = list(dict.fromkeys(run.info.folds if folds is None else folds))
    if bad := [fold for fold in used if fold not in run.info.folds]:
        raise InputError(f"fold: expected one of {', '.join(map(str, run.info.folds))}, got {bad[0]}")
    places = {"--out": out, "--attention": attention, "--graphs": graphs, "--out-patients": out_patients}
    check_outputs(places, {"--features": features, "--cases": cases, "the run": run_files(run.folder)})
    check_replaced([place for place in (out, out_patients) if place], is_predictions, "predictions of momkd")
    rule = check_rule(patients or run.config.train.patients)
    where = pick_device(device)
    models = [run.load_model(fold, where) for fold in used]
    cohort, loader = open_slides(run, features, where, skip_bad=skip_bad, graphs=graphs, patch_budget=patch_budget)
    note = note or (lambda text: None)
    told = cohort.notes
    for text in told:
        note(text)
    case_ids = _case_ids(loader.slide_ids, cases, case_from, note)
    folder = None if attention is None else make_folder(attention)
    if folder is not None:
        what, files = "an earlier one with 'attention'", (folder / f"{slide}.h5" for slide in cohort.paths)
        check_replaced(files, holds("attention"), what, remedy="choose another folder")
    slides: list[str] = []
    probs: list[Floats] = []
    with closing(see(models, loader, loader.once(), where, amp=run.amp(where))) as batches:
        for seen in batches:
            mean = torch.stack([torch.softmax(p.logits.double(), 1) for p in seen.each]).mean(0)
            slides += [seen.slide_ids[bag] for bag in seen.good]
            probs.append(mean[seen.good].cpu().numpy())
            if folder is not None:
                _write_attention(folder, cohort.source, seen, used)
            if report is not None:
                report(len(slides), len(cohort))
    if not slides:
        raise none_left(str(features), loader.slide_ids, cohort.skipped)
    for text in cohort.notes:  # of coordinates, which were read meanwhile
        if text not in told:
            note(text)
    facts = pd.DataFrame({"case_id": case_ids, "label": -1}, index=pd.Index(loader.slide_ids, name="slide_id"))
    at: dict[str, Any] = {"fold": used[0] if len(used) == 1 else None, "part": PREDICT}
    table = prediction_table(
        facts, slides, np.concatenate(probs), run.info.classes, **at, threshold=threshold_of(run, used)
    )
    write_csv(out, table)
    if out_patients is not None:
        write_csv(out_patients, _patients(run, table, used, rule))
    return table, cohort.skipped


def _case_ids(
    slides: Sequence[str], cases: Path | str | None, case_from: str | None, note: Callable[[str], None]
) -> list[str]:
    """The case of each slide: by a table, by its barcode, or the slide itself."""
    if cases is not None:
        case_of, told = read_cases(cases, case_from)
        for text in told:
            note(text)
        same = match_ids(slides, case_of)
        if same:
            note(matched_note("features", same, str(cases)))
        found = {slide: case_of[same.get(slide, slide)] for slide in slides if same.get(slide, slide) in case_of}
        if unknown := [slide for slide in slides if slide not in found]:
            count = f"{len(unknown)} of {len(slides)} slides have none"
            raise InputError(f"{cases}: expected the case_id of slide {unknown[0]!r}, got none ({count}); add it")
        return [found[slide] for slide in slides]
    if case_from is not None and case_from.casefold() != "tcga":
        raise InputError(f"--case-from: expected tcga, or --cases with the column {case_from!r}, got it alone; add it")
    odd = next((slide for slide in slides if not is_barcode(slide)), None)
    barcodes = [slide[:TCGA_CASE].upper() for slide in slides]
    if case_from is not None:
        if odd is not None:
            raise InputError(f"--case-from tcga: expected slides named like TCGA-XX-XXXX, got {odd!r}; give --cases")
        return barcodes
    patients = len(set(barcodes))
    if odd is None and patients < len(slides):
        made = f"the first 12 characters of the TCGA barcodes make {patients} patients of {len(slides)} slides"
        note(f"each slide is taken as a patient, but {made}; --case-from tcga takes those")
    return list(slides)


def _patients(run: Run, table: pd.DataFrame, folds: Sequence[int], rule: str) -> pd.DataFrame:
    """A row a patient; the threshold is that of the patients of the folds' validation parts."""
    classes = run.info.classes
    patients = by_patient(table.assign(label=-1), classes, rule).drop(columns="slide_id")
    patients.insert(1, "slides", patients.pop("slides"))
    patients["label"] = pd.Series([None] * len(patients), dtype=object)
    return with_predicted(patients, classes, threshold_of(run, folds, patients=rule))


def threshold_of(run: Run, folds: Sequence[int], *, patients: str | None = None) -> float:
    """The probability from which on folds of a run say the second of two classes: the mean of those that they chose.

    `patients`: that of patients whose slides are joined by this rule, chosen anew on the predictions of the run.
    """
    path = run.folder / (METRICS if patients is None else PREDICTIONS)
    if run.num_classes != 2 or not path.is_file():
        return 0.5
    if patients is None:
        metrics = read_json(path, RunMetrics, what="the metrics of a run", remedy="make them with momkd evaluate")
        known: dict[int, float | None] = {fold.fold: fold.threshold for fold in metrics.folds}
    else:
        table = check_predictions(run.predictions(), run.info.classes, str(path))
        known = dict(choose_thresholds(by_patient(table, run.info.classes, patients), run.info.classes, []))
    chosen = [threshold for fold in folds if (threshold := known.get(fold)) is not None]
    return float(np.mean(chosen)) if chosen else 0.5


def _write_attention(
    folder: Path,
    source: SlideSource,
    seen: Seen,
    folds: Sequence[int],
) -> None:
    each = seen.each
    mean = torch.stack([p.attention.float() for p in each]).mean(0)  # (N, H)
    slots = torch.stack([p.slots for p in each if p.slots is not None]) if each[0].slots is not None else None
    edges = [0, *accumulate(seen.lengths)]
    for bag in seen.good:
        slide, a, b = seen.slide_ids[bag], edges[bag], edges[bag + 1]
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

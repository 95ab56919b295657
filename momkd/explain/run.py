"""`momkd explain`: maps of attention, and the patches behind every prototype of one model of a run.

OUT/
    index.html        all of it to read, in one file that loads nothing
    explanation.json  the run, the fold, the options and what to know
    slides.csv        every slide: patches, probabilities, predicted class, label, whether it has a map
    slots.csv         every prototype: usage in training, shares of patches and of attention
    prototypes.csv    the patches nearest to every prototype: slide, row, coordinates, cosine
    slots.png, prototypes.png
    maps/             SLIDE.png, and SLIDE.geojson for QuPath
    thumbnails/       pictures of the nearest patches
Slots and prototypes are there where the model has a memory, thumbnails where images of the slides are given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import momkd
from momkd.bootstrap import Floats
from momkd.data.atomic import write_csv, write_json, write_text
from momkd.data.classes import LabelOptions
from momkd.data.folders import whole_folder
from momkd.data.ids import match_ids, matched_note, under_ids
from momkd.data.outputs import check_outputs
from momkd.data.tables import Labels
from momkd.errors import InputError
from momkd.evaluate import labels_for
from momkd.explain.index import Content, Memory, SlideCard, index_html
from momkd.explain.look import NearestPatches, Shares, unit_prototypes
from momkd.explain.maps import map_slides
from momkd.explain.prototypes import show_memory
from momkd.explain.thumbnails import SlideImages
from momkd.explain.view import Options, View
from momkd.inference import open_slides, pick_device
from momkd.models import MoMKD
from momkd.predictions import read_predictions
from momkd.runs import PREDICTIONS, Run
from momkd.simulate.write import MARK as SIMULATED
from momkd.simulate.write import NOTE

_MARK = "explanation.json"


@dataclass(frozen=True)
class Explained:
    """What `explain_run` wrote: the page, how many slides were seen and mapped, what to know, what was skipped."""

    index: Path
    slides: int
    maps: int
    notes: list[str]
    skipped: dict[str, str]


def explain_run(
    run: Run,
    features: Path | str,
    out: Path | str,
    *,
    fold: int | None = None,
    options: Options | None = None,
    images: Path | str | None = None,
    labels: Path | str | None = None,
    label: str | None = None,
    label_options: LabelOptions | None = None,
    skip_bad: bool = False,
    device: str | None = None,
    graphs: Path | str | None = None,
    patch_budget: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Explained:
    """Explains the model of one fold on every slide of a folder. Memory holds a few batches, and a row a slide.

    Args:
        run: a finished run.
        features: folder of feature files of the encoder that the run was trained with, or a packed store of them.
        out: folder to make, see the top of this module; an earlier explanation there is replaced, nothing else.
        fold: whose model; None takes the first.
        options: how much is shown.
        images: folder of the images of whole slides, for thumbnails; slides without one are noted.
        labels: CSV of slide_id and the label, to show beside what was predicted.
        label: its column; None takes that of the run, by its name.
        label_options: what is missing and which cases there are; the classes are the run's.
        skip_bad: leave out slides that cannot be used, instead of ending.
        device: such as "cuda:1"; None takes a GPU where there is one.
        graphs: folder where graphs of patches are kept, for the encoder gatv2.
        patch_budget: patches computed at a time, as in `predict_run`.
        report: called with (slides done, slides); those with a map count twice.

    Raises:
        InputError: an option, a fold, a table or a slide that cannot be used, or `out` holds something else.
    """
    options = options or Options()
    options.check()
    fold = run.info.folds[0] if fold is None and run.info.folds else fold
    if fold is None or fold not in run.info.folds:
        raise InputError(f"--fold: expected one of {', '.join(map(str, run.info.folds))}, got {fold}")
    places = {"--features": features, "--labels": labels, "the run": run.folder}
    check_outputs({"--out": out, "--graphs": graphs}, places, whole=("--out",))
    where = pick_device(device)
    model = run.load_model(fold, where)
    pictures = None if images is None else SlideImages(images)
    table = _known_labels(run, labels, label, label_options)
    prototypes = unit_prototypes(model.memory) if isinstance(model, MoMKD) and model.memory.is_filled else None
    with whole_folder(out, name="an explanation", mark=_MARK, overwrite=True) as folder:
        cohort, loader = open_slides(run, features, where, skip_bad=skip_bad, graphs=graphs, patch_budget=patch_budget)
        view = View(run, fold, model, prototypes, cohort, loader, where, options)
        view.notes.extend((*_facts(view, features), *cohort.notes))
        known: dict[str, int] = {}
        if table is not None:
            matched = match_ids(cohort.paths, table.table.index)
            label_of = table.table["label"].to_dict()
            known = {slide: label_of.get(matched.get(slide, slide), -1) for slide in cohort.paths}
            view.notes.extend([table.summary(), *table.notes])
            if matched:
                view.notes.append(matched_note(str(features), matched, table.source))
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            if report is not None:
                report(done, len(cohort) + min(options.limit, len(cohort)))

        seen = _see_all(view, known, step)
        if labels is not None and (seen.table["label"] < 0).all():
            raise InputError(f"{labels}: expected labels of the slides of {features}, got none; check slide_id")
        cards = map_slides(view, seen.table, folder, step)
        view.notes.extend(text for text in cohort.notes if text not in view.notes)  # of coordinates, read meanwhile
        reasons = Counter(card.missing for card in cards if card.map is None)
        view.notes.extend(f"{number} of {len(cards)} slides: {reason}" for reason, number in reasons.items())
        if afloat := sum(card.map is not None and card.geojson is None for card in cards):
            view.notes.append(
                f"{afloat} of {len(cards)} slides: no GeoJSON and no thumbnails: their coordinates are not in level-0 "
                "pixels; give --patch-size."
            )
        memory = None
        if seen.nearest is not None and seen.shares is not None:
            memory = show_memory(view, seen.table, seen.nearest, seen.shares, seen.pooled, pictures, folder)
        _write(folder, view, seen.table, cards, memory)
    drawn = sum(card.map is not None for card in cards)
    return Explained(Path(out) / "index.html", len(seen.table), drawn, view.notes, cohort.skipped)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Every slide, a row each, and what was kept of their patches where the model has a memory; pooled is (n, S)."""

    table: pd.DataFrame
    pooled: Floats
    nearest: NearestPatches | None
    shares: Shares | None


def _see_all(view: View, known: Mapping[str, int], step: Callable[[], None]) -> _Seen:
    nearest = shares = None
    if view.prototypes is not None:
        nearest, shares = NearestPatches(len(view.names), view.options.nearest), Shares(len(view.names))
    rows: list[dict[str, Any]] = []
    pooled: list[Floats] = []
    part = under_ids(_parts(view.run, view.fold), view.cohort.paths)
    for slide in view.look(view.loader.once(), view.options.per_slide):
        name = slide.slide_id
        probs = {f"prob_{c}": p for c, p in zip(view.classes, slide.probs.tolist(), strict=True)}
        told = {"predicted": slide.predicted, "label": known.get(name, -1), "part": part.get(name, "")}
        rows.append({"slide_id": name, "patches": len(slide.attention), **probs, **told})
        if slide.near is not None and nearest is not None and shares is not None:
            nearest.add(slide.near)
            shares.add(slide)
            pooled.append(slide.near.pooled)
        step()
    if not rows:
        first, why = next(iter(view.cohort.skipped.items()))
        raise InputError(f"{first}: {why} (and no other slide could be read)")
    return _Seen(pd.DataFrame(rows), np.array(pooled), nearest, shares)


def _known_labels(
    run: Run, labels: Path | str | None, label: str | None, options: LabelOptions | None
) -> Labels | None:
    if labels is None:
        if label is not None:
            raise InputError(f"--label: expected --labels with it, got {label!r} alone; give the table too")
        return None
    return labels_for(run, labels, label, options, cases=False)


def _parts(run: Run, fold: int) -> dict[str, str]:
    """Which slides validated or tested this fold; others of the cohort may have trained it."""
    path = run.folder / PREDICTIONS
    if not path.is_file():
        return {}
    table = read_predictions(path)
    table = table[table["fold"] == fold]
    return dict(zip(table["slide_id"].astype(str), table["part"].astype(str), strict=True))


def _facts(view: View, features: Path | str) -> list[str]:
    """What a reader must know of the model and of the data."""
    notes = []
    if any((parent / SIMULATED).is_file() for parent in Path(features).resolve().parents[:2]):
        notes.append(NOTE)
    notes.append(
        f"This is the model of fold {view.fold} alone; momkd predict takes the mean of all folds. Slides that the fold "
        "was trained on are described better than new ones would be."
    )
    config, has_memory = view.run.config, isinstance(view.model, MoMKD)
    if not has_memory:
        notes.append("The model has no memory (abmil): there are no prototypes to show, only attention.")
    elif view.prototypes is None:
        notes.append("The memory of the model was never filled: there are no prototypes to show, only attention.")
    elif config.memory.update != "momentum":
        notes.append(
            f"The memory was not moved by momentum (memory.update is {config.memory.update}), so its usage in training "
            "was not counted: it is the same for all slots."
        )
    if has_memory and not view.guided:
        notes.append("Attention comes from a gate and not from the memory: prototypes did not guide it.")
    return notes


def _write(folder: Path, view: View, table: pd.DataFrame, cards: Sequence[SlideCard], memory: Memory | None) -> None:
    """The tables of slides and of facts, and the page."""
    name = view.run.folder.resolve().name
    facts = {
        "momkd": momkd.__version__,
        "run": name,
        "fold": view.fold,
        "classes": view.classes,
        "options": asdict(view.options),
        "slides": len(table),
        "notes": view.notes,
        "skipped": view.cohort.skipped,
    }
    write_json(folder / _MARK, facts)
    names = {-1: "", **dict(enumerate(view.classes))}
    mapped = table["slide_id"].isin([card.slide_id for card in cards if card.map is not None])
    said = {column: table[column].map(names) for column in ("predicted", "label")}
    write_csv(folder / "slides.csv", table.assign(**said, map=mapped))
    chosen = (
        f"{len(cards)} of {len(table)} slides, of each predicted class in turn those that the model is most certain "
        "of. All slides are in slides.csv."
    )
    title = f"Explanation of {name}, fold {view.fold}"
    seen = (view.run.info.label, view.classes, view.branches, view.guided, view.gated)
    content = Content(title, *seen, chosen, cards, memory, view.notes)
    write_text(folder / "index.html", index_html(content, folder))

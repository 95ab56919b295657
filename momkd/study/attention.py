"""How well the attention of a run finds the patches that are known to matter: `momkd study --instances`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from momkd.data.ids import under_ids
from momkd.data.own import Fold, Share, read_rows
from momkd.data.text import read_text_table
from momkd.errors import InputError
from momkd.inference import open_slides, pick_device, see
from momkd.metrics import attention_auc
from momkd.predictions import check_predictions, read_predictions
from momkd.runs import PREDICTIONS, Run


def attention_table(
    run: Run, features: Path | str, instances: Path | str, kind: str, *, device: str | None = None
) -> pd.DataFrame:
    """Attention AUC of every test slide of the last class: patches of type `kind` against all others.

    Args:
        run: a finished run.
        features: as for training.
        instances: CSV of slide_id, row (of the features) and type; slides that it does not name are left out.
        kind: the type that counts as positive.
        device: as for training.

    Returns:
        Columns fold, slide_id, attention_auc; slides of one kind of patch have none and are left out.

    Raises:
        InputError: no column of those three, no such type, or other rows than the features have.
    """
    truth = read_text_table(Path(instances), ["slide_id", "row", "type"])
    truth["row"] = pd.to_numeric(truth["row"], errors="coerce")
    if kind not in set(truth["type"]):
        known = ", ".join(sorted(set(truth["type"]))[:8])
        raise InputError(f"{instances}: expected patches of type {kind!r}, got {known}; name one of them")
    known_slides = {str(slide): rows.sort_values("row") for slide, rows in truth.groupby("slide_id")}
    where = pick_device(device)
    _, loader = open_slides(run, features, where)
    place = {slide: n for n, slide in enumerate(loader.slide_ids)}
    known_slides = under_ids(known_slides, place)
    rows = []
    for fold in run.info.folds:
        path = run.fold(fold) / PREDICTIONS
        predicted = check_predictions(read_predictions(path), run.info.classes, str(path))
        test = predicted[(predicted["part"] == "test") & (predicted["label"] == run.num_classes - 1)]
        name_of = under_ids({slide: slide for slide in test["slide_id"]}, place)  # that of the run
        wanted = [slide for slide in name_of if slide in known_slides]
        model = run.load_model(fold, where)
        plan = [[place[slide]] for slide in wanted]
        with closing(see([model], loader, plan, where, amp=run.amp(where))) as batches:
            for seen in batches:
                (slide,), (prediction,) = seen.slide_ids, seen.each
                attention = prediction.attention[:, -1].float().cpu().numpy()
                own = known_slides[slide]
                if not np.array_equal(own["row"], np.arange(len(attention))):
                    raise InputError(
                        f"{instances}: {slide}: expected rows 0 to {len(attention) - 1} once each, got {len(own)}; a "
                        "row stands for a patch of the features"
                    )
                auc = attention_auc(attention, (own["type"] == kind).to_numpy(np.int64))
                if auc is not None:
                    rows.append({"fold": fold, "slide_id": name_of[slide], "attention_auc": auc})
    table: pd.DataFrame = pd.DataFrame(rows, columns=["fold", "slide_id", "attention_auc"])
    return table


class AttentionRow(msgspec.Struct):
    """A row of attention.csv: how well the attention of a fold finds the patches of a slide."""

    fold: Fold
    slide_id: str
    attention_auc: Share


def read_attention(path: Path) -> list[AttentionRow]:
    """The table of `attention_table`, as it was written. Raises InputError where it was changed."""
    return read_rows(path, AttentionRow, what="the attention of a run", remedy="remove it and repeat the study")

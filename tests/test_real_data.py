"""Real cohorts, where they lie beside the repository: the figures that plain baselines reach there are reached here.

The references are in the README of each data folder: ABMIL in plain torch on the region-grouped splits of ColonCancer,
logistic regression on the expression of TCGA-BRCA; each as a mean over folds, with its standard deviation.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedKFold

from momkd.config import Config
from momkd.experiment import train_run
from momkd.metrics import mean_attention_auc
from momkd.predict import predict_run
from momkd.runs import Run

pytestmark = pytest.mark.slow

COLON_AUC, COLON_AUC_SD = 0.935, 0.079
COLON_ATTENTION_AUC, COLON_ATTENTION_AUC_SD = 0.811, 0.055
TEACHER_AUC = {"HER2": 0.905, "odx85": 0.938}  # five stratified folds
TEACHER_MARGIN = 0.03


def auc_of(run: Run) -> float:
    return float(json.loads((run.folder / "metrics.json").read_text())["test"]["auc"]["estimate"])


def attention_auc(run: Run, data: Path, work: Path) -> float:
    """Epithelial nuclei against all others by attention, mean over the positive test bags, then over folds."""
    labels = pd.read_csv(data / "labels.csv").set_index("slide_id")["label"]
    instances = pd.read_csv(data / "instances.csv").sort_values("row")
    truth = {slide: (rows["type"] == "epithelial").astype(int) for slide, rows in instances.groupby("slide_id")}
    folds = []
    for fold in run.info.folds:
        attended = work / f"attention_{fold}"
        predict_run(run, data / "features", work / "predictions.csv", attention=attended, folds=[fold])
        test = pd.read_csv(data / f"splits_{fold}.csv")["test"].dropna()
        pairs = {}
        for slide in test[labels.loc[test].to_numpy() == 1]:
            with h5py.File(attended / f"{slide}.h5") as file:
                pairs[slide] = (file["attention"][:, 0], truth[slide])
        folds.append(mean_attention_auc(pairs)["mean"])
    return float(np.mean(folds))


@pytest.mark.parametrize("preset", ["abmil", "fast"])
def test_colon(shared_data: Path, tmp_path: Path, preset: str) -> None:
    data = shared_data / "colon"
    size = ["model.hidden_features=256", "model.gate_features=128"]  # as in the reference
    config = Config.preset(preset).with_settings([*size, "train.epochs=40"])
    run = train_run(data / "features", data / "labels.csv", data, tmp_path / "run", config=config)
    auc, attention = auc_of(run), attention_auc(run, data, tmp_path)
    print(f"ColonCancer, {preset}: AUC {auc:.3f}, attention AUC {attention:.3f}")
    assert auc >= COLON_AUC - COLON_AUC_SD
    assert attention >= COLON_ATTENTION_AUC - COLON_ATTENTION_AUC_SD


@pytest.mark.parametrize("task", TEACHER_AUC)
def test_the_genomics_alone(shared_data: Path, tmp_path: Path, task: str) -> None:
    data = shared_data / "tcga_brca"
    table = pd.read_csv(data / "labels.csv").dropna(subset=[task]).reset_index(drop=True)
    table[task] = table[task].astype(int)
    table.assign(slide_id=table["case_id"])[["slide_id", "case_id", task]].to_csv(tmp_path / "labels.csv", index=False)
    (tmp_path / "splits").mkdir()
    rng = np.random.default_rng(0)
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(table, table[task])
    for fold, (rows_outside, rows_test) in enumerate(folds):
        rest = table.iloc[rows_outside]
        val = [case for _, rows in rest.groupby(task) for case in rng.permutation(rows["case_id"])[: len(rows) // 7]]
        parts = {"train": rest["case_id"][~rest["case_id"].isin(val)], "val": val}
        parts["test"] = table["case_id"].iloc[rows_test]
        columns = {part: pd.Series(list(cases)) for part, cases in parts.items()}
        pd.DataFrame(columns).to_csv(tmp_path / "splits" / f"splits_{fold}.csv")
    run = train_run(
        None,
        tmp_path / "labels.csv",
        tmp_path / "splits",
        tmp_path / "run",
        config=Config.preset("omics"),
        label=task,
        omics=data / "expression.csv.gz",
    )
    print(f"TCGA-BRCA, {task} from expression: AUC {auc_of(run):.3f}")
    assert auc_of(run) >= TEACHER_AUC[task] - TEACHER_MARGIN

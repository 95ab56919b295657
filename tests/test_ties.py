"""Scores that differ by rounding alone tie; those that a model can tell apart do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from momkd.metrics import attention_auc, evaluate_predictions
from momkd.plots import _roc_folds, percentile_rank
from momkd.predictions import youden_threshold
from momkd.ties import resolution, tied
from tests.test_metrics import CLASSES, fold_table


def by_hand(scores: np.ndarray) -> np.ndarray:
    result = np.empty(len(scores))
    lowest = -np.inf
    limit = -np.inf
    for i in np.argsort(scores, kind="stable"):
        if scores[i] > limit:
            lowest, limit = scores[i], scores[i] + float(resolution(scores[i]))
        result[i] = lowest
    return result


@pytest.mark.parametrize("spread", [0.0, 1e-9, 3e-7, 1e-5, 0.3])
@pytest.mark.parametrize("middle", [1e-7, 0.5, 1 - 1e-7])
def test_groups_are_those_of_one_pass_from_the_lowest(spread: float, middle: float) -> None:
    rng = np.random.default_rng(0)
    scores = np.clip(middle * (1 + spread * rng.standard_normal(500)), 0, 1)
    np.testing.assert_array_equal(tied(scores), by_hand(scores))
    assert (np.diff(tied(np.sort(scores))) >= 0).all()


@pytest.mark.parametrize("logit", [-16.0, -3.0, 0.0, 3.0, 12.0])
def test_probabilities_of_one_logit_and_its_rounding_errors_tie(logit: float) -> None:
    rng = np.random.default_rng(0)
    z = np.float32(logit) * (1 + 1.2e-7 * rng.integers(-3, 4, 200)).astype(np.float32)
    p = torch.softmax(torch.stack([torch.zeros(200), torch.from_numpy(z)], 1).double(), 1)[:, 1].numpy()
    assert len(set(tied(p))) == 1
    apart = torch.sigmoid(torch.tensor([logit, logit + 1e-3, logit + 1]).double()).numpy()
    assert len(set(tied(apart))) == 3


def test_scores_of_rounding_errors_rank_no_better_than_chance_and_say_so() -> None:
    labels = [0, 1] * 20
    noise = [0.4 + 1e-8 * label for label in labels]  # the float64 ranks are perfect
    assert roc_auc_score(labels, noise) == 1
    got = evaluate_predictions(fold_table(0, labels, noise), CLASSES, bootstrap=50)
    assert got["test"]["auc"] == {"estimate": 0.5, "low": 0.5, "high": 0.5}
    assert got["test"]["auprc"]["estimate"] == 0.5
    assert "test, fold 0: every slide has the same score: the model tells none apart" in got["notes"]
    assert youden_threshold(np.array(labels), np.array(noise)) is None
    assert attention_auc(np.array(noise) / 1000, labels) == 0.5
    curves = _roc_folds(fold_table(0, labels, noise), CLASSES, "test", "x", np.linspace(0, 1, 5))
    np.testing.assert_allclose(curves, [[0, 0.25, 0.5, 0.75, 1]])
    assert set(percentile_rank(noise)) == {0.5}
    apart = evaluate_predictions(fold_table(0, labels, [0.4 + 1e-3 * x for x in labels]), CLASSES, bootstrap=0)
    assert apart["test"]["auc"]["estimate"] == 1
    assert not any("same score" in note for note in apart["notes"])


def test_many_scores_take_no_time_and_none_is_none() -> None:
    scores = np.random.default_rng(0).random(300_000)
    assert len(np.unique(tied(scores))) > 200_000
    assert tied([]).shape == (0,)

"""CLAM's instance-level loss: the patches with the highest and lowest attention train a classifier for each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from momkd.compat._rows import Rows


def judge(
    model: Any, attention: Tensor, h: Tensor, classifier: nn.Module, inside: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, predictions and targets of the k patches with the highest attention and, `inside`, the k with the lowest.

    attention (N,) or (K, N), of which the last row counts. Of a bag's own class the first are positive and the second
    negative; of another class the first are negative.
    """
    row = attention if attention.ndim == 1 else attention[-1]
    k = model.k_sample
    chosen = [row.topk(k)[1]]
    targets = [torch.full((k,), int(inside), device=h.device)]
    if inside:
        chosen.append((-row).topk(k)[1])
        targets.append(torch.zeros(k, dtype=torch.int64, device=h.device))
    wanted = torch.cat(targets)
    logits = classifier(h[torch.cat(chosen)])
    return model.instance_loss_fn(logits, wanted), logits.argmax(1), wanted


def evaluate(model: Any, rows: Rows, scores: Tensor, label: Tensor | None) -> dict[str, Any]:
    """The mean over the bags of each bag's instance loss, and all labels and predictions as arrays."""
    if label is None or label.numel() != rows.bags:
        got = "none" if label is None else str(tuple(label.shape))
        raise ValueError(f"label: expected ({rows.bags},) int64, a class for each bag, beside instance_eval, got {got}")
    classes: list[int] = label.reshape(-1).tolist()
    if not all(0 <= c < model.n_classes for c in classes):
        raise ValueError(f"label: expected classes from 0 to {model.n_classes - 1}, got {classes}")
    attention = rows.softmax(scores).T  # (K, N)
    edges: list[int] = rows.offsets.tolist()
    total: Any = 0.0
    predictions, targets = [], []
    for bag, own_class in enumerate(classes):
        a, b = edges[bag], edges[bag + 1]
        if b - a < model.k_sample:
            raise ValueError(
                f"instance_eval: expected at least k_sample = {model.k_sample} patches in a bag, got {b - a} "
                f"in bag {bag}; leave instance_eval out for it or lower k_sample"
            )
        for c, classifier in enumerate(model.instance_classifiers):
            row = attention[c if attention.shape[0] > 1 else slice(None), ..., a:b]
            if c == own_class:
                loss, predicted, wanted = model.inst_eval(row, rows.x[a:b], classifier)
            elif model.subtyping:
                loss, predicted, wanted = model.inst_eval_out(row, rows.x[a:b], classifier)
            else:
                continue
            total = total + loss / (rows.bags * (len(model.instance_classifiers) if model.subtyping else 1))
            predictions.append(predicted)
            targets.append(wanted)
    labels, guesses = (torch.cat(parts).cpu().numpy() for parts in (targets, predictions))
    return {"instance_loss": total, "inst_labels": labels, "inst_preds": guesses}

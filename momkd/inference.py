"""Running a trained model over slides."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from momkd.data.batches import BagLoader, Batch
from momkd.models import MILModel, Prediction


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or a GPU where there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def autocast(device: torch.device, on: bool) -> torch.autocast:
    """bfloat16 matrix products on a GPU where `on`; the CPU always computes in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on and device.type == "cuda")


@torch.inference_mode()
def predictions(
    model: MILModel, loader: BagLoader, device: torch.device, *, amp: bool = True
) -> Iterator[tuple[Batch, Prediction]]:
    """Every slide of the loader once, in order and in evaluation mode."""
    model.eval()
    for batch in loader.batches(loader.once()):
        moved = batch.to(device)
        with autocast(device, amp):
            prediction = model(moved.bags)
        yield batch, prediction


def probabilities(
    model: MILModel, loader: BagLoader, device: torch.device, *, amp: bool = True
) -> tuple[list[str], NDArray[np.float64], NDArray[np.int64]]:
    """Slide ids (n), class probabilities (n, C) and labels (n,) of every slide of the loader that can be read."""
    slides: list[str] = []
    probs, labels = [], []
    for batch, prediction in predictions(model, loader, device, amp=amp):
        slides += batch.slide_ids
        probs.append(torch.softmax(prediction.logits.double(), 1).cpu().numpy())
        labels.append(batch.labels.numpy())
    if not slides:
        return [], np.zeros((0, 0)), np.zeros(0, np.int64)
    return slides, np.concatenate(probs), np.concatenate(labels)

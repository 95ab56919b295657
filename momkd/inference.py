"""Running a trained model over slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momkd import distributed
from momkd.config import TrainConfig
from momkd.data.allocation import INFERENCE, memory_for
from momkd.data.batch import Batch
from momkd.data.batches import BagLoader, deal
from momkd.data.cohort import Cohort, open_cohort
from momkd.data.prefetch import DeviceCache
from momkd.device import pick_device as pick_device
from momkd.errors import InputError
from momkd.models import MILModel
from momkd.runs import Run

LARGE = 1e4  # features above that come from no encoder


def autocast(device: torch.device, on: bool) -> torch.autocast:
    """bfloat16 matrix products on a GPU where `on`; the CPU always computes in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on and device.type == "cuda")


def open_slides(
    run: Run,
    features: Path | str,
    device: torch.device,
    *,
    skip_bad: bool = False,
    graphs: Path | str | None = None,
) -> tuple[Cohort, BagLoader]:
    """Every slide of a folder or of a packed store, without labels, as the models of a run want them.

    Raises:
        InputError: a slide that cannot be used; with `skip_bad` it is left out and noted in the cohort.
    """
    cohort = open_cohort(
        features,
        width=run.info.in_features,
        skip_bad=skip_bad,
        source=str(features),
        neighbours=run.config.model.graph_neighbours,
        graphs=graphs,
    )
    slides, options = list(cohort.paths), run.config.train
    loader = BagLoader(
        slides,
        np.full(len(slides), -1, np.int64),
        cohort.sizes,
        cohort.read,
        slides_per_step=options.slides_per_step,
        patch_budget=options.patch_budget,
        pin=device.type == "cuda",
        graph=cohort.graphs,
        skipped=cohort.skipped if skip_bad else None,
    )
    return cohort, loader


def device_cache(options: TrainConfig, device: torch.device) -> DeviceCache | None:
    """What `train.device_cache_gb` keeps on a GPU; None where it is 0, and on the CPU, whose memory it would copy."""
    limit = int(options.device_cache_gb * 1e9)
    return DeviceCache(device, limit) if limit and device.type == "cuda" else None


def own_batches(loader: BagLoader) -> tuple[list[list[int]], list[int]]:
    """The plan of every slide once, and the numbers of those batches of it that fall to this rank."""
    plan = loader.once()
    patches = [sum(loader.patches(rows)) for rows in plan]
    return plan, deal(patches, distributed.size())[distributed.rank()]


def finite_rows(loader: BagLoader, batch: Batch, logits: Tensor, attention: Tensor | None = None) -> list[int]:
    """The bags of a batch whose results are finite; the others are noted in the loader's `skipped`.

    Args:
        loader: where the batch is from.
        batch: B slides.
        logits: (B, any).
        attention: (N, any); None is not looked at.

    Raises:
        InputError: naming the first slide of which a result is not finite, where the loader skips none.
    """
    good = torch.isfinite(logits).all(1)
    if attention is not None and not bool(torch.isfinite(attention).all()):
        bags = torch.split(torch.isfinite(attention).all(1), list(batch.bags.lengths))
        good = good & torch.stack([rows.all() for rows in bags])
    for bag, fine in enumerate(good.tolist()):
        if fine:
            continue
        slide, x = batch.slide_ids[bag], batch.bags[bag]
        largest = float(x.abs().max()) if len(x) else 0.0
        told = f"expected finite results, got NaN or infinity of features up to {largest:.2g}"
        remedy = "extract its features again or leave it out (--skip-bad)"
        reason = f"{told}; {remedy if largest > LARGE else 'the weights of the model are too large: train again'}"
        if loader.skipped is None:
            raise InputError(f"slide {slide!r}: {reason}")
        loader.skipped[slide] = reason
    return [bag for bag, fine in enumerate(good.tolist()) if fine]


def none_left(what: str, slides: Sequence[str], skipped: Mapping[str, str]) -> InputError:
    """The error of slides of which none can be used: `what` names them all, `skipped` says why."""
    why = next((f"slide {slide!r}: {skipped[slide]}" for slide in slides if slide in skipped), "check the features")
    return InputError(f"{what}: expected slides that can be used, got none of {len(slides)}; {why}")


@torch.inference_mode()
def probabilities(
    model: MILModel, loader: BagLoader, device: torch.device, *, amp: bool = True
) -> tuple[list[str], NDArray[np.float64], NDArray[np.int64]]:
    """Slide ids (n), class probabilities (n, C) and labels (n,) of every slide of the loader that can be used.

    Of several ranks each computes some of the batches, all call this, and all get all of it. n may be 0.

    Raises:
        InputError: naming a slide that cannot be read, does not fit into memory or gives no finite result, where the
            loader skips none.
    """
    model.eval()
    found: list[tuple[str, list[float], int]] = []
    with distributed.together():
        plan, mine = own_batches(loader)
        with closing(loader.batches(plan, only=mine, device=device)) as batches:
            for batch in batches:
                names, truth = batch.slide_ids, batch.labels.tolist()
                with memory_for(names, batch.bags.num_rows, "predict", INFERENCE, device), autocast(device, amp):
                    logits = model(batch.bags).logits
                probs = torch.softmax(logits.double(), 1).tolist()
                found += [(names[bag], probs[bag], truth[bag]) for bag in finite_rows(loader, batch, logits)]
    place = {slide: n for n, slide in enumerate(loader.slide_ids)}
    everyone = sorted((row for part in distributed.gather(found) for row in part), key=lambda row: place[row[0]])
    if not everyone:
        return [], np.zeros((0, 0)), np.zeros(0, np.int64)
    slides, rows, labels = zip(*everyone, strict=True)
    return list(slides), np.array(rows, np.float64), np.array(labels, np.int64)

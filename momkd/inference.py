"""Running a trained model over slides."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momkd import distributed
from momkd.config import TrainConfig
from momkd.data.allocation import INFERENCE, memory_for
from momkd.data.batches import BagLoader, deal
from momkd.data.cohort import Cohort, open_cohort
from momkd.data.prefetch import DeviceCache
from momkd.device import pick_device as pick_device
from momkd.errors import InputError
from momkd.models import MILModel, MoMKD, Prediction, SlideInBlocks
from momkd.models.momkd import Projections
from momkd.precision import autocast
from momkd.runs import Run

LARGE = 1e4  # features above that come from no encoder


def open_slides(
    run: Run,
    features: Path | str,
    device: torch.device,
    *,
    skip_bad: bool = False,
    graphs: Path | str | None = None,
    patch_budget: int | None = None,
) -> tuple[Cohort, BagLoader]:
    """Every slide of a folder or of a packed store, without labels, as the models of a run want them.

    `patch_budget`: patches computed at a time; None takes that of the run.

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
        patch_budget=budget_of(run, patch_budget),
        pin=device.type == "cuda",
        graph=cohort.graphs,
        skipped=cohort.skipped if skip_bad else None,
        read_blocks=cohort.blocks,
    )
    return cohort, loader


def budget_of(run: Run, patch_budget: int | None) -> int:
    """Patches computed at a time: as given, or that of the run."""
    if patch_budget is not None and patch_budget < 1:
        raise InputError(
            f"patch_budget: expected 1 or more patches, got {patch_budget}; leave it out for the run's own"
        )
    return run.config.train.patch_budget if patch_budget is None else patch_budget


def device_cache(options: TrainConfig, device: torch.device) -> DeviceCache | None:
    """What `train.device_cache_gb` keeps on a GPU; None where it is 0, and on the CPU, whose memory it would copy."""
    limit = int(options.device_cache_gb * 1e9)
    return DeviceCache(device, limit) if limit and device.type == "cuda" else None


def own_batches(loader: BagLoader) -> tuple[list[list[int]], list[int]]:
    """The plan of every slide once, and the numbers of those batches of it that fall to this rank."""
    plan = loader.once()
    patches = [sum(loader.patches(rows)) for rows in plan]
    return plan, deal(patches, distributed.size())[distributed.rank()]


@dataclass(frozen=True, eq=False)
class Seen:
    """B slides with N patches in all, and what each of some models says of them.

    Attributes:
        slide_ids, labels, lengths: of the slides: ids, class numbers (-1: none) and patches.
        each: the prediction of each model.
        projections: of each model, where they were asked for.
        good: the slides whose results are finite; the others are noted as skipped.
    """

    slide_ids: Sequence[str]
    labels: Sequence[int]
    lengths: Sequence[int]
    each: Sequence[Prediction]
    projections: Sequence[Projections]
    good: Sequence[int]


def see(
    models: Sequence[MILModel],
    loader: BagLoader,
    plan: Sequence[Sequence[int]],
    device: torch.device,
    *,
    amp: bool,
    only: Sequence[int] | None = None,
    doing: str = "predict",
    projected: bool = False,
) -> Generator[Seen, None, None]:
    """Run models over the batches of a plan, in its order. A slide above the budget comes block by block.

    Args:
        models: in evaluation mode, on `device`.
        loader, plan, only: see `BagLoader.batches`.
        amp: compute matrix products in bfloat16.
        doing: what is done with the slides, for messages.
        projected: also give projections, of models that have a memory.

    Raises:
        InputError: a slide cannot be read, does not fit into memory or gives a result that is not finite, and the
            loader skips none.
    """
    numbers = range(len(plan)) if only is None else only
    for in_blocks, group in groupby(numbers, key=lambda number: loader.comes_in_blocks(plan[number])):
        if in_blocks:
            for number in group:
                seen = _in_blocks(models, loader, plan[number][0], device, amp, doing, projected)
                if seen is not None:
                    yield seen
            continue
        with closing(loader.batches(plan, only=list(group), device=device)) as batches:
            for batch in batches:
                bags, each, projections = batch.bags, [], []
                room = memory_for(batch.slide_ids, bags.num_rows, doing, INFERENCE, device)
                with room, torch.inference_mode(), autocast(device, amp):
                    for model in models:
                        if projected and isinstance(model, MoMKD):
                            projections.append(model.project(bags))
                            each.append(projections[-1].prediction)
                        else:
                            each.append(model(bags))
                given = batch.slide_ids, batch.labels.tolist(), bags.lengths, each, projections
                yield Seen(*given, _finite(loader, batch.slide_ids, bags.lengths, each, bags.__getitem__))


def _in_blocks(
    models: Sequence[MILModel],
    loader: BagLoader,
    row: int,
    device: torch.device,
    amp: bool,
    doing: str,
    projected: bool,
) -> Seen | None:
    """One slide, block by block; None where it cannot be read and is skipped."""
    slide = loader.slide_ids[row]
    slides = [SlideInBlocks(model, projected=projected and isinstance(model, MoMKD)) for model in models]
    patches, largest = 0, torch.zeros(1, 1)
    try:
        with closing(loader.blocks(row)) as blocks:
            for block in blocks:
                room = memory_for([slide], len(block), doing, INFERENCE, device)
                with room, torch.inference_mode(), autocast(device, amp):
                    x = block.to(device)
                    for one in slides:
                        one.add(x)
                    largest = torch.maximum(largest, x.abs().max().float().cpu())
                patches += len(block)
    except InputError as error:
        if loader.skipped is None:
            raise
        loader.skipped[slide] = str(error)
        return None
    with torch.inference_mode(), autocast(device, amp):
        projections = [one.projections() for one in slides if one.projected]
        each = [one.prediction() for one in slides]
    good = _finite(loader, [slide], [patches], each, lambda _: largest)
    return Seen([slide], [int(loader.labels[row])], [patches], each, projections, good)


def _finite(
    loader: BagLoader,
    slide_ids: Sequence[str],
    lengths: Sequence[int],
    each: Sequence[Prediction],
    features: Callable[[int], Tensor],
) -> list[int]:
    """The slides whose logits and attention are finite; the others are noted in `skipped`, or raise where it is None.

    Of a slide that is not finite, `features` tells how large its own are.
    """
    if all(prediction.is_finite() for prediction in each):
        return list(range(len(slide_ids)))
    good = torch.stack([torch.isfinite(p.logits).all(1) for p in each]).all(0)  # (B,)
    rows = torch.stack([torch.isfinite(p.attention).all(1) for p in each]).all(0)  # (N,)
    fine = good.tolist()
    if not bool(rows.all()):
        fine = [a and bool(bag.all()) for a, bag in zip(fine, torch.split(rows, list(lengths)), strict=True)]
    for bag, ok in enumerate(fine):
        if ok:
            continue
        x = features(bag)
        largest = float(x.abs().max()) if len(x) else 0.0
        told = f"expected finite results, got NaN or infinity of features up to {largest:.2g}"
        remedy = "extract its features again" + (" or leave it out (--skip-bad)" if loader.skipped is None else "")
        reason = f"{told}; {remedy if largest > LARGE else 'the weights of the model are too large: train again'}"
        if loader.skipped is None:
            raise InputError(f"slide {slide_ids[bag]!r}: {reason}")
        loader.skipped[slide_ids[bag]] = reason
    return [bag for bag, ok in enumerate(fine) if ok]


def none_left(what: str, slides: Sequence[str], skipped: Mapping[str, str]) -> InputError:
    """The error of slides of which none can be used: `what` names them all, `skipped` says why."""
    why = next((f"slide {slide!r}: {skipped[slide]}" for slide in slides if slide in skipped), "check the features")
    return InputError(f"{what}: expected slides that can be used, got none of {len(slides)}; {why}")


def probabilities(
    model: MILModel, loader: BagLoader, device: torch.device, *, amp: bool = False
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
        with closing(see([model], loader, plan, device, amp=amp, only=mine)) as batches:
            for seen in batches:
                probs = torch.softmax(seen.each[0].logits.double(), 1).tolist()
                found += [(seen.slide_ids[bag], probs[bag], seen.labels[bag]) for bag in seen.good]
    place = {slide: n for n, slide in enumerate(loader.slide_ids)}
    everyone = sorted((row for part in distributed.gather(found) for row in part), key=lambda row: place[row[0]])
    if not everyone:
        return [], np.zeros((0, 0)), np.zeros(0, np.int64)
    slides, rows, labels = zip(*everyone, strict=True)
    return list(slides), np.array(rows, np.float64), np.array(labels, np.int64)

"""Batches on their way to the model: the rate of copies to a GPU, and an epoch of training with its waits for data.

An epoch is trained with the same batches brought in different ways: read ahead (and, for a GPU, copied ahead on a side
stream, or kept there), and as peers without reading ahead, and copied by the stream that computes. `share waiting` is
the part of the epoch that the training loop spent waiting for a batch; on a GPU that is the host's wait, and a copy on
the compute stream shows in the time alone. All files are in the page cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.bench_data_path import simulated
from benchmarks.measure import interleaved, must_agree, on_each_device, record, require
from momkd.config import Config
from momkd.data.batch import Batch
from momkd.data.batches import BagLoader
from momkd.data.cohort import Cohort, open_cohort
from momkd.data.pack import pack
from momkd.data.prefetch import DeviceCache
from momkd.runs import build_model
from momkd.train import Trainer

SETTINGS = ["train.epochs=1", "train.patch_budget=20000", "train.balanced=false", "model.hidden_features=64"]
Bring = Callable[..., Iterator[Batch]]


def on_side_stream(loader: BagLoader, plan: Sequence[Sequence[int]], **options: Any) -> Iterator[Batch]:
    """As momkd does it."""
    return BagLoader.batches(loader, plan, **options)


def on_compute_stream(loader: BagLoader, plan: Sequence[Sequence[int]], **options: Any) -> Iterator[Batch]:
    """Read ahead; the consumer's thread copies."""
    device = torch.device(options.pop("device"))
    for batch in BagLoader.batches(loader, plan, **options):
        yield batch.to(device)


def not_ahead(loader: BagLoader, plan: Sequence[Sequence[int]], **options: Any) -> Iterator[Batch]:
    """Each batch is read when it is asked for."""
    for number in range(len(plan)):
        yield from on_compute_stream(loader, plan, only=[number], **options)


class Timed(BagLoader):
    """A loader that adds up how long the consumer waited for its batches."""

    bring: Bring
    waited: float = 0.0

    def batches(self, plan: Sequence[Sequence[int]], **options: Any) -> Any:
        batches = self.bring(self, plan, **options)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch


class Epoch:
    """An epoch of the ABMIL baseline; a call returns the weights after it, and notes its seconds and its waits."""

    def __init__(self, cohort: Cohort, device: str, bring: Bring, cache: DeviceCache | None = None) -> None:
        self.cohort, self.device = cohort, device
        self.config = Config.preset("abmil").with_settings(SETTINGS)
        slides, options = list(cohort.paths), self.config.train
        labels, pin = np.arange(len(slides)) % 2, device == "cuda"
        self.loader = Timed(slides, labels, cohort.sizes, cohort.read, patch_budget=options.patch_budget, pin=pin)
        self.loader.bring, self.loader.device_cache = bring, cache
        self.times: list[tuple[float, float]] = []  # seconds, and of them waiting

    def __call__(self) -> Tensor:
        torch.manual_seed(0)
        trainer = Trainer(build_model(self.config, self.cohort.width, 2), self.config, self.loader, device=self.device)
        self.loader.waited, began = 0.0, time.perf_counter()
        model = trainer.run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append((time.perf_counter() - began, self.loader.waited))
        return torch.cat([p.detach().float().flatten().cpu() for p in model.parameters()])


@on_each_device
@pytest.mark.parametrize("source", ["packed store", "one file a slide"])
def test_training_epoch(benchmark: Any, full: bool, device: str, source: str, tmp_path: Path) -> None:
    require(device)
    folder = tmp_path / "features"
    folder.mkdir()
    simulated(folder, 4000 if full else 100)
    if source == "packed store":
        pack(folder, tmp_path / "cohort.h5")
    cohort = open_cohort(tmp_path / "cohort.h5" if source == "packed store" else folder)
    ours = "read ahead" if device == "cpu" else "read and copied ahead"
    runs = {ours: Epoch(cohort, device, on_side_stream), "not read ahead": Epoch(cohort, device, not_ahead)}
    if device == "cuda":
        runs["copied on the compute stream"] = Epoch(cohort, device, on_compute_stream)
        runs["kept on the device"] = Epoch(cohort, device, on_side_stream, DeviceCache(device, 40 * 10**9))
    weights = {name: run() for name, run in runs.items()}
    for name, run in runs.items():
        must_agree(weights[name], weights[ours], 1e-3 if device == "cuda" else 1e-7)
        run.times.clear()
    seconds = interleaved(runs, rounds=5 if full else 3, warmup=0)
    info = benchmark.extra_info
    for name, run in runs.items():
        best, waited = min(run.times)
        info[f"slides/s of {name}"] = len(cohort) / best
        info[f"share waiting of {name}"] = waited / best
        info[f"seconds of {name}"] = seconds[name]
        if name != ours:
            info[f"times as fast as {name}"] = seconds[name] / seconds[ours]
    info |= {
        "slides": len(cohort),
        "patches": sum(cohort.sizes.values()),
        "dtype": str(cohort.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    record(benchmark, runs[ours], device, rounds=1)


@pytest.mark.parametrize("megabytes", [4, 64, 512])
def test_copy_to_the_cuda_device(benchmark: Any, megabytes: int) -> None:
    require("cuda")
    pageable = torch.ones(megabytes << 19, dtype=torch.float16)
    sources = {"pinned memory": pageable.pin_memory(), "pageable memory": pageable}
    target = torch.empty_like(pageable, device="cuda")
    for source in sources.values():
        target.zero_()
        target.copy_(source)
        assert bool((target == 1).all()), "a wrong copy: no time is reported"

    def copy(source: Tensor) -> Callable[[], None]:
        def run() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        return run

    calls = {name: copy(source) for name, source in sources.items()}
    seconds = interleaved(calls, rounds=15, warmup=3)
    for name, each in seconds.items():
        benchmark.extra_info[f"seconds of {name}"] = each
        benchmark.extra_info[f"GB/s of {name}"] = pageable.nbytes / each / 1e9
    benchmark.extra_info |= {"MB": megabytes, "device": torch.cuda.get_device_name()}
    record(benchmark, calls["pinned memory"], "cuda")

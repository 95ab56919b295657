"""The training loop: one model, one fold. Written to be read; `momkd.experiment` runs it over folds and files.

An epoch draws class-balanced ragged batches; for each the weighted terms of the loss, backward, clip, step; then the
memory moves by what these slides bring to it. Then validation: its AUC drives the learning rate, early stopping and the
choice of the epoch that is kept. Between epochs an adaptive memory is given the K that its usage asks for. Everything
follows from the seed and the number of the epoch, so on the CPU a run that was interrupted and resumed ends with the
same bits as one that was not.

Several ranks (`momkd.distributed`) share every batch by patches; a mean of the loss is over the rows of all of them,
and the memory moves by the sums of all. So a run is the same, but for rounding and dropout, on any number of ranks.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from momkd import distributed, functional
from momkd.config import Config
from momkd.data.allocation import TRAINING, memory_for
from momkd.data.atomic import write_csv
from momkd.data.batch import Batch
from momkd.data.batches import BagLoader
from momkd.errors import InputError
from momkd.inference import LARGE, own_batches, probabilities
from momkd.models import MemoryRows, MILModel, TrainingStep
from momkd.models.reservoir import Reservoir
from momkd.precision import autocast, choose, values_of_step
from momkd.runs import save_model, write_torch
from momkd.state import load_state
from momkd.ties import tied

_TIE = 1e-10  # of the loss, under any step of an AUC: small validation parts tie often, and the lower loss is better
_RESUMED = ("epoch", "best", "waited", "log", "kept")


@dataclass(frozen=True)
class Progress:
    """Where training is; losses are means over the epoch so far, before their weights."""

    epoch: int
    epochs: int
    step: int
    steps: int
    losses: dict[str, float]
    patches_per_second: float
    best: float | None  # validation AUC


@dataclass(frozen=True)
class _Taken:
    """A step since the optimizer last moved."""

    made: TrainingStep  # of this rank's share
    slides: int  # of all ranks


class _Losses(nn.Module):
    """A model whose forward is its training step, so that DistributedDataParallel sees it."""

    def __init__(self, model: MILModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> TrainingStep:
        return self.model.training_step(batch.bags, batch.labels, batch.omics, batch.has_omics)


class Trainer:
    """Trains a model and keeps its best epoch.

    Args:
        model: changed in place; after `run` it is the best epoch.
        config: see `momkd.config`.
        training: slides to learn from; those without label teach by reconstruction alone.
        validation: slides that choose the epoch; where they lack a class, the last epoch is kept.
        device: where to compute.
        folder: where model, log and state are written each epoch (by rank 0), and where `run` goes on from; or None.
        report: called a few times a second.
        amp: compute matrix products in bfloat16; None asks `momkd.precision.choose` what `train.amp` means here.
    """

    def __init__(
        self,
        model: MILModel,
        config: Config,
        training: BagLoader,
        validation: BagLoader | None = None,
        *,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        report: Callable[[Progress], None] | None = None,
        amp: bool | None = None,
    ) -> None:
        self.device, self.folder, self.report = torch.device(device), folder, report
        self.model, self.config, self.options = model.to(self.device), config, config.train
        self.training, self.validation = training, validation
        self.ranks, self.losses = distributed.size(), _Losses(self.model)
        sizes = (training.sizes[slide] for slide in training.slide_ids)
        values = values_of_step(sizes, model.in_features, self.options, self.ranks)
        self.amp = choose(self.options.amp, self.device, values) if amp is None else amp
        self.parallel: nn.Module = self.losses
        if self.ranks > 1:  # buffers are kept equal by what is done to them here
            known = inspect.signature(DistributedDataParallel).parameters
            option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until 2.12
            options: dict[str, Any] = {option: False}
            self.parallel = DistributedDataParallel(self.losses, **options)
        self.weights = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=self.options.learning_rate,
            weight_decay=self.options.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        patience, factor = self.options.plateau_patience, self.options.plateau_factor
        self.schedule = ReduceLROnPlateau(self.optimizer, "max", factor, patience, threshold=0.0)
        self.warmup = 0 if model.memory is None else min(config.memory.warmup, self.options.epochs - 1)
        self.draws = torch.Generator()  # of re-seeding slots, the same on all ranks
        self.epoch = 0  # the next one
        self.best: tuple[float, float] | None = None  # validation AUC and minus the loss of the best epoch
        self.waited = 0  # epochs since then
        self.log: list[dict[str, float]] = []
        self.kept: dict[str, Tensor] = {}  # the weights of that epoch

    def run(self) -> MILModel:
        """Train to the end; returns the model of the best epoch in evaluation mode."""
        if self.folder is not None and distributed.share((self.folder / "state.pt").is_file()):
            with distributed.together():
                self._resume(self.folder / "state.pt")
        distributed.check_same(self.model.state_dict(), "weights before training")
        while self.epoch < self.options.epochs and self.waited < self.options.patience:
            torch.manual_seed(_mixed(self.options.seed, self.epoch, distributed.rank()))  # of dropout
            slots = self._prepare_memory()
            self.log.append({"epoch": self.epoch, **slots, **self._train_epoch(), **self._validate()})
            self._judge(self.log[-1]["val_auc"], self.log[-1]["val_loss"])
            self.epoch += 1
            distributed.check_same(self.model.state_dict(), f"weights after epoch {self.epoch}")
            with distributed.together():
                self._save()
        self.model.load_state_dict(self.kept)
        return self.model.eval()

    # -- an epoch ------------------------------------------------------------------------------------------------

    def _train_epoch(self) -> dict[str, float]:
        options, seed = self.options, (self.options.seed, self.epoch)
        plan = self.training.training(*seed, balanced=options.balanced)
        names: list[str] = []
        sums = torch.zeros(0, device=self.device)  # of each term
        taken: list[_Taken] = []
        step = seen = 0
        began = shown = time.perf_counter()
        self.draws.manual_seed(_mixed(*seed, 0, 1))
        self.model.train()
        with contextlib.closing(self._shares(plan, seed)) as shares:
            for step, (batch, slides, patches) in enumerate(shares, start=1):
                told = self._step(batch, slides, taken, last=step == len(plan))
                seen += patches
                terms, names = torch.stack(list(told.values())), list(told)
                sums = sums + terms if len(sums) else terms
                now = time.perf_counter()
                if self.report and (now - shown > 0.2 or step == len(plan)):  # reading the sums waits for the device
                    shown, best = now, self.best[0] if self.best else None
                    means = _means(names, sums, step)
                    self.report(
                        Progress(self.epoch, options.epochs, step, len(plan), means, seen / (now - began), best)
                    )
        if taken:
            self._move(taken)
        means = {f"{name}_loss": mean for name, mean in _means(names, sums, step).items()}
        with distributed.together():
            if not means or not all(np.isfinite(mean) for mean in means.values()):
                bad = ", ".join(f"{name} {mean}" for name, mean in means.items() if not np.isfinite(mean))
                told_ = f"{bad} in epoch {self.epoch}; {self._remedy()}" if means else "no slide that can be read"
                raise InputError(f"training: expected finite losses, got {told_}")
        seconds = time.perf_counter() - began
        rate = float(self.optimizer.param_groups[0]["lr"])
        return {**means, "learning_rate": rate, "patches_per_second": seen / seconds}

    def _step(self, batch: Batch, slides: int, taken: list[_Taken], *, last: bool) -> dict[str, Tensor]:
        """Forward and backward of a batch, and, after `accumulate` of them, the model moves; the terms of all ranks.

        `slides`: of the batch on all ranks; `taken`: those since the model moved last, to which this one is added.
        """
        options = self.options
        moving = len(taken) + 1 == options.accumulate or last
        room = memory_for(batch.slide_ids, batch.bags.num_rows, "train on", TRAINING, self.device)
        with room, contextlib.nullcontext() if moving or self.ranks == 1 else self.parallel.no_sync():  # type: ignore[operator]
            with autocast(self.device, self.amp):
                made = self.parallel(batch)
            terms, told = self._over_ranks(made)
            roots = {name: term for name, term in terms.items() if term.requires_grad}
            weights = [
                t.new_full((), getattr(self.config.loss, name) / options.accumulate) for name, t in roots.items()
            ]
            torch.autograd.backward(list(roots.values()), weights)  # of their weighted sum, which nobody asks for
        taken.append(_Taken(made, slides))
        if len(taken) == options.accumulate:
            self._move(taken)
            taken.clear()
        return told

    def _remedy(self) -> str:
        """What to do where a loss is not finite: the slides of the largest features, if no encoder makes such."""
        large: list[tuple[float, str]] = []
        plan = [[row] for row in range(len(self.training.slide_ids))]
        with contextlib.closing(self.training.batches(plan, device=self.device)) as each:
            for batch in each:
                top = float(batch.bags.features.abs().max()) if batch.bags.num_rows else 0.0
                large += [(top, batch.slide_ids[0])] if top > LARGE else []
        if large:
            top, slide = max(large)
            others = f", and {len(large) - 1} others above {LARGE:,.0f}" if len(large) > 1 else ""
            skips = "" if self.training.skipped is None else "; --skip-bad leaves out no slide that spoils training"
            return (
                f"slide {slide!r} has features up to {top:.2g}{others}: extract them again or take such slides out of "
                f"the splits{skips}"
            )
        return "lower train.learning_rate"

    def _shares(
        self, plan: Sequence[Sequence[int]], seed: tuple[int, int]
    ) -> Generator[tuple[Batch, int, int], None, None]:
        """This rank's share of every batch, and the slides and patches that it has on all ranks."""
        share = None if self.ranks == 1 else (distributed.rank(), self.ranks)
        with contextlib.closing(self.training.batches(plan, seed=seed, share=share, device=self.device)) as batches:
            if self.ranks == 1:
                for batch in batches:
                    yield batch, len(batch.bags), batch.bags.num_rows
                return
            for _ in plan:
                with distributed.together():  # a slide that cannot be read ends the training of all
                    batch = next(batches)
                total = torch.tensor([len(batch.bags), batch.bags.num_rows], dtype=torch.float64)
                distributed.add_(total)
                yield batch, int(total[0]), int(total[1])

    def _over_ranks(self, made: TrainingStep) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms of the loss to differentiate, and what they are over all ranks.

        DistributedDataParallel takes the mean of the ranks' gradients. So that it becomes that of the mean over the
        rows of all, a rank's mean over n rows of N counts ranks · n / N.
        """
        if self.ranks == 1:
            terms = made.losses
            return terms, {name: term.detach() for name, term in terms.items()}
        means = [mean for several in made.terms.values() for mean in several]
        counts = torch.stack([mean.count for mean in means]).double()
        values = torch.stack([mean.value.detach() for mean in means]).double()
        total = torch.stack([counts, counts * values])
        distributed.add_(total)
        share = (counts / total[0].clamp_min(1) * self.ranks).unbind()
        whole = (total[1] / total[0].clamp_min(1)).unbind()
        terms, told, n = {}, {}, 0
        for name, several in made.terms.items():
            mine = [mean.value * part.to(mean.value.dtype) for mean, part in zip(several, share[n:], strict=False)]
            terms[name] = torch.stack(mine).sum()
            told[name] = torch.stack(whole[n : n + len(several)]).sum()
            n += len(several)
        return terms, told

    def _move(self, taken: Sequence[_Taken]) -> None:
        """Step the optimizer, then move the memory by what the slides of these steps bring."""
        memory, options = self.model.memory, self.config.memory
        if memory is not None and self.epoch < self.warmup:
            memory.memory.grad = None  # where it is a parameter: at zero its cosines have a gradient without bound
        if self.options.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.weights, self.options.clip_norm)
        self.optimizer.step()
        for weight in self.weights:
            weight.grad = None
        rows = [step.made.memory_rows for step in taken if step.made.memory_rows is not None]
        if memory is None or not rows or options.update != "momentum" or self.epoch < self.warmup:
            return
        moved, m = MemoryRows.concatenate(rows), options.momentum
        if m is None:  # half of the memory is new after `half_life` epochs, however many slides that is
            slides = sum(step.slides for step in taken)
            m = 2.0 ** (-slides / (options.half_life * len(self.training.slide_ids)))
        reduce = distributed.add_ if self.ranks > 1 else None
        memory.update_(moved.rows, moved.row_class, momentum=m, weights=moved.weights, reduce=reduce)
        if options.reseed_below is None or not bool((memory.usage < options.reseed_below).any()):
            return
        z, row_class, weights = map(distributed.gather_rows, (moved.rows, moved.row_class, moved.weights))
        functional.reseed_(
            *(memory.memory, memory.usage, z, row_class),
            weights=weights,
            threshold=options.reseed_below,
            generator=self.draws,
        )

    def _prepare_memory(self) -> dict[str, float]:
        """Before an epoch: fill the memory at the end of the warm-up, later give it the K it asks for. For the log."""
        memory, labels = self.model.memory, self.training.labels
        if self.epoch == self.warmup:
            self._fill_memory()
        if memory is None or not memory.adaptive:
            return {}
        if self.epoch > self.warmup:
            counts = np.bincount(labels[labels >= 0])
            wanted = memory.wanted_slots(int(counts[counts > 0].min(initial=len(labels))))
            draws = torch.Generator().manual_seed(_mixed(self.options.seed, self.epoch, 0, 2))
            if wanted != memory.slots:
                memory.resize_(wanted, generator=draws)
        return {"slots": memory.slots}

    @torch.no_grad()
    def _fill_memory(self) -> None:
        """A pass over the training slides: the memory becomes clusters of what they would scatter into it.

        A batch's draws follow from its number alone, so that the reservoirs of several ranks become that of one.
        """
        memory, seed = self.model.memory, self.options.seed
        if memory is None:
            return
        self.model.eval()
        classes, _, width = memory.memory.shape
        reservoir = Reservoir(classes, self.config.memory.reservoir, width, self.device)
        drawn = (seed, self.epoch, 1)  # where max_patches bounds a slide, it bounds it here too
        with distributed.together():
            plan, mine = own_batches(self.training)
            with contextlib.closing(self.training.batches(plan, seed=drawn, only=mine, device=self.device)) as batches:
                for batch in batches:
                    with autocast(self.device, self.amp):
                        rows = self.losses(batch).memory_rows
                    if rows is not None:
                        reservoir.add(rows, torch.Generator().manual_seed(_mixed(seed, batch.number)))
        for c, (keys, rows) in enumerate(reservoir.kept):
            reservoir.cut(c, distributed.gather_rows(keys), distributed.gather_rows(rows))
        memory.fill_(*reservoir.rows(), generator=torch.Generator().manual_seed(seed))
        distributed.copy_from_first_(memory.memory, memory.usage)

    # -- choosing an epoch ---------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        """Cross-entropy and AUC (macro one-vs-rest) of the validation slides; NaN where undefined."""
        undefined = {"val_loss": float("nan"), "val_auc": float("nan")}
        if self.validation is None or len(self.validation.slide_ids) == 0:
            return undefined
        _, probs, labels = probabilities(self.model, self.validation, self.device, amp=self.amp)
        probs, labels = probs[labels >= 0], labels[labels >= 0]
        if len(labels) == 0:
            return undefined
        loss = float(-np.log(probs[np.arange(len(labels)), labels].clip(1e-12)).mean())
        if len(np.unique(labels)) < probs.shape[1]:
            return {**undefined, "val_loss": loss}
        truth = np.eye(probs.shape[1], dtype=np.int64)[labels]
        binary = probs.shape[1] == 2
        scores = np.stack([tied(column) for column in probs.T], axis=1)
        auc = roc_auc_score(labels, scores[:, 1]) if binary else roc_auc_score(truth, scores, average="macro")
        return {"val_loss": loss, "val_auc": float(auc)}

    def _judge(self, auc: float, loss: float) -> None:
        """Keep this epoch if it is the best. Warm-up epochs, and those without an AUC, only replace one another."""
        chosen = not np.isnan(auc) and self.epoch >= self.warmup
        better = not chosen or self.best is None or (auc, -loss) > self.best
        if chosen:
            self.schedule.step(auc - _TIE * loss)
            self.best = (auc, -loss) if better else self.best
        self.waited = 0 if better else self.waited + 1
        if better:
            self.kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    # -- state ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is None or not distributed.first():
            return
        write_csv(self.folder / "log.csv", pd.DataFrame(self.log))
        if self.waited == 0:
            save_model(self.folder, self.model, {"epoch": self.epoch - 1, "val_auc": self.best and self.best[0]})
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        write_torch(self.folder / "state.pt", parts | {name: getattr(self, name) for name in _RESUMED})

    def _resume(self, path: Path) -> None:
        state = load_state(path, self.model, self.optimizer, self.schedule)
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict({"state": state.optimizer.state, "param_groups": state.optimizer.param_groups})
        self.schedule.load_state_dict(state.schedule)
        for name in _RESUMED:
            setattr(self, name, getattr(state, name))


def _means(names: Sequence[str], sums: Tensor, steps: int) -> dict[str, float]:
    """Means of terms over steps, by name. Waits for the device."""
    return {name: total / steps for name, total in zip(names, sums.tolist(), strict=True)}


def _mixed(*numbers: int) -> int:
    """A seed of torch that differs for all numbers, such as seed, epoch and rank; zeros at the end don't count."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

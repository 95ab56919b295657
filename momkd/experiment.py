"""From files to a trained, evaluated run: `momkd train`.

Everything that can be wrong with the input is looked at before the first epoch. What is fitted, the choice of genes and
their scaling too, is fitted inside the training part of each fold. Of several ranks each reads the input, one writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from momkd import distributed, env
from momkd.config import Config
from momkd.data import digests
from momkd.data.atomic import is_leftover, make_folder, remove_leftovers, write_csv, write_json
from momkd.data.batches import BagLoader
from momkd.data.classes import LabelOptions
from momkd.data.cohort import Cohort, open_cohort
from momkd.data.genes import OmicsTransform
from momkd.data.lock import LOCK, locked
from momkd.data.omics import Omics, case_classes, read_omics
from momkd.data.outputs import check_outputs
from momkd.data.prefetch import DeviceCache
from momkd.data.splits import Split, check_parts, check_splits, match_splits, read_splits
from momkd.data.tables import Labels, read_labels
from momkd.errors import InputError
from momkd.evaluate import evaluate_run
from momkd.inference import device_cache, none_left, pick_device, probabilities
from momkd.names import check_utf8
from momkd.precision import choose, multiplier, values_of_step
from momkd.predictions import (
    check_predictions,
    choose_thresholds,
    prediction_table,
    read_predictions,
    with_predicted,
)
from momkd.runs import PREDICTIONS, Run, RunInfo, build_model
from momkd.train import Progress, Trainer


class Reporter:
    """Told how a run goes. This one keeps silent; the command line shows a progress bar."""

    def note(self, text: str) -> None:
        """Something a person should know, in one line."""

    def fold_begins(self, fold: int, folds: int, slides: dict[str, int]) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def fold_ends(self, fold: int, log: pd.DataFrame, slides: dict[str, int]) -> None:
        """`slides`: of each part, without those that could not be read."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Read and checked: what a run learns from. `cohort` is None where the genomics are alone."""

    labels: Labels
    splits: list[Split]
    cohort: Cohort | None
    omics: Omics | None

    def usable(self) -> Collection[str]:
        """Slides that can be read or, where the genomics are alone, whose case has a profile."""
        if self.cohort is not None:
            return self.cohort.paths.keys()
        assert self.omics is not None
        return set(self.labels.table.index[self.labels.table["case_id"].isin(self.omics.table.index)])


def read_inputs(
    features: Path | str | None,
    labels: Path | str,
    splits: Path | str,
    *,
    config: Config,
    label: str | None = None,
    omics: Path | str | None = None,
    skip_bad: bool = False,
    leaks: bool = False,
    graphs: Path | str | None = None,
    label_options: LabelOptions | None = None,
    reporter: Reporter | None = None,
    omics_columns: str | Path | Sequence[str] | None = None,
) -> Inputs:
    """Reads labels, splits and omics, and the headers of all feature files; see `train_run` for the arguments."""
    reporter = reporter or Reporter()
    alone = config.model.kind == "omics"
    if alone and omics is None:
        raise InputError("omics: expected a table of profiles for model.kind=omics, got none; give --omics")
    if not alone and features is None:
        raise InputError("features: expected a folder of feature files, got none; give --features")
    table = read_labels(labels, label=label, options=label_options)
    folds, matched = match_splits(read_splits(splits, table.table.index), table, str(splits))
    for text in (table.summary(), *table.notes, *matched):
        reporter.note(text)
    check_splits(folds, table, source=str(splits), leaks=leaks)
    used = {slide for split in folds for part in split.parts().values() for slide in part}
    slides = [slide for slide in table.table.index if slide in used]
    profiles = None
    if omics is not None and config.model.kind != "abmil":
        profiles = read_omics(omics, label=table.name, keep=omics_columns).without_label(case_classes(table, slides))
        for note in profiles.notes:
            reporter.note(note)
        if config.omics.share < 1:
            profiles = _share_of(profiles, config.omics.share, config.train.seed)
        cases = table.table.loc[slides, "case_id"].unique()
        without = [case for case in cases if case not in profiles.table.index]
        if len(without) == len(cases):
            raise InputError(
                f"{profiles.source}: expected profiles of the {len(cases)} cases of {table.source}, got none: they are "
                f"named like {str(profiles.table.index[0])!r} here and {str(cases[0])!r} there; make the ids agree"
            )
        if without:
            what = "left out" if alone else "their slides train without genomics"
            reporter.note(f"{profiles.source}: {len(without)} of {len(cases)} cases have no profile; {what}")
    elif omics is not None:
        reporter.note(f"{omics}: not read, model.kind=abmil learns from slides alone")
    cohort = None
    if not alone:
        assert features is not None
        neighbours = config.model.graph_neighbours
        cohort = open_cohort(
            features, slides, skip_bad=skip_bad, source=table.source, neighbours=neighbours, graphs=graphs
        )
        for text in cohort.notes:
            reporter.note(text)
        for slide, reason in cohort.skipped.items():
            reporter.note(f"skipped {slide}: {reason}")
    return Inputs(table, folds, cohort, profiles)


def train_run(
    features: Path | str | None,
    labels: Path | str,
    splits: Path | str,
    out: Path | str,
    *,
    config: Config,
    label: str | None = None,
    omics: Path | str | None = None,
    folds: Sequence[int] | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    leaks: bool = False,
    device: str | None = None,
    graphs: Path | str | None = None,
    label_options: LabelOptions | None = None,
    reporter: Reporter | None = None,
    omics_columns: str | Path | Sequence[str] | None = None,
) -> Run:
    """Trains a model a fold, predicts their validation and test slides and evaluates them; returns the run.

    Where torchrun started this process with others, or a group of torch.distributed exists, they train together.

    Args:
        features: folder of feature files, one a slide, or a packed store; None for model.kind="omics".
        labels: CSV of slide_id, case_id and the label.
        splits: folder of splits_0.csv, ....
        out: folder of the run; it must not hold one yet, unless `resume`, and no other training may be writing to it.
        config: everything else.
        label: column of the labels.
        omics: table of cases × genes.
        folds: numbers of the splits to train; None takes all.
        resume: go on where a run in `out` was interrupted, or train more of its folds; those that are finished are
            kept. The content of features, labels, splits and omics must be that of the beginning.
        skip_bad: leave out slides that cannot be used, and list them, instead of ending.
        leaks: allow a case in two parts of a split.
        device: such as "cuda:1"; None takes a GPU where there is one.
        graphs: folder where graphs of patches are kept, for the encoder gatv2: read, and written where missing; None
            builds them anew each run.
        label_options: which of two classes is positive, what is missing, which cases there are: see `LabelOptions`.
        reporter: told how it goes, on rank 0.
        omics_columns: columns of `omics` that are genes though they look like clinical metadata or like the label:
            names with commas between them, a file with one a line, "all", or a sequence of names. Others are left out,
            see `momkd.data.gene_columns`.

    Raises:
        InputError: anything wrong with the input, in one line.
        RankError: one of several ranks ended or hangs.
    """
    with distributed.started():
        if reporter is None or not distributed.first():
            reporter = Reporter()
        with distributed.together():
            where = pick_device(device)
            tables = {"--labels": labels, "--omics": omics, "--splits": sorted(Path(splits).glob("splits_*.csv"))}
            check_outputs({"--out": out, "--graphs": graphs}, {"--features": features, **tables}, whole=("--out",))
            check_utf8(out, out, "the folder of a run")
            inputs = read_inputs(
                features,
                labels,
                splits,
                config=config,
                label=label,
                omics=omics,
                skip_bad=skip_bad,
                leaks=leaks,
                graphs=graphs,
                label_options=label_options,
                reporter=reporter,
                omics_columns=omics_columns,
            )
            chosen = list(range(len(inputs.splits))) if folds is None else list(dict.fromkeys(folds))
            if bad := [fold for fold in chosen if not 0 <= fold < len(inputs.splits)]:
                raise InputError(f"fold: expected 0 to {len(inputs.splits) - 1} as in {splits}, got {bad[0]}")
            for fold in chosen:
                for text in check_parts(fold, inputs.splits[fold], inputs.labels, inputs.usable(), str(splits)):
                    reporter.note(text)
            names = {"features": features, "labels": labels, "omics": omics, "splits": splits}
            if inputs.omics is not None and inputs.omics.rules.keep:
                names["omics_columns"] = ",".join(inputs.omics.rules.keep)
            amp = _amp(Path(out), config, where, inputs, resume, reporter)
            info = _describe(inputs, chosen, names)
        amp = all(distributed.gather(amp))
        info = replace(info, precision="bfloat16" if amp else "float32")
        with _opened(Path(out), config, info, resume, reporter) as run:
            if amp:
                by = multiplier(where) or where
                reporter.note(f"products in bfloat16, by {by}; --set train.amp=false computes them in float32")
            kept = None if inputs.cohort is None else device_cache(config.train, where)  # of all folds: the same slides
            for fold in distributed.share([fold for fold in chosen if not run.finished(fold)]):
                _train_fold(run, inputs, fold, where, skip_bad, reporter, kept, amp)
            if distributed.first():
                return _finish(run, inputs)
    return run


def _amp(out: Path, config: Config, device: torch.device, inputs: Inputs, resume: bool, reporter: Reporter) -> bool:
    """Whether to compute in bfloat16: as the run in `out` began, where it goes on, else as `train.amp` says."""
    if resume and (out / "run.json").is_file():
        begun = Run(out)
        if config.train.amp is not True or begun.info.precision != "bfloat16":
            if begun.info.precision == "bfloat16" and not begun.amp(device):
                reporter.note(f"{out}: began in bfloat16, which this CPU has no products for; going on in float32")
            return begun.amp(device)
    cohort, values = inputs.cohort, 0.0
    if cohort is not None:
        values = values_of_step(cohort.sizes.values(), cohort.width, config.train, distributed.size())
    return choose(config.train.amp, device, values)


def _finish(run: Run, inputs: Inputs) -> Run:
    """Predictions of all folds in one table, and their evaluation."""
    if inputs.cohort is not None and inputs.cohort.skipped != run.info.skipped:  # reading found more than the headers
        info = replace(run.info, skipped={**run.info.skipped, **inputs.cohort.skipped})
        run = Run.create(run.folder, run.config, info)
    tables = [read_predictions(run.fold(fold) / PREDICTIONS) for fold in run.info.folds]
    write_csv(run.folder / PREDICTIONS, pd.concat(tables, ignore_index=True))
    evaluate_run(run)
    return run


def _describe(inputs: Inputs, folds: list[int], names: Mapping[str, Path | str | None]) -> RunInfo:
    return RunInfo(
        classes=list(inputs.labels.classes),
        label=inputs.labels.name,
        in_features=inputs.cohort.width if inputs.cohort is not None else 0,
        folds=folds,
        num_splits=len(inputs.splits),
        data={name: None if path is None else str(path) for name, path in names.items()},
        versions={name: version(name) for name in ("momkd", "torch", "numpy", "scikit-learn")},
        skipped=dict(inputs.cohort.skipped) if inputs.cohort is not None else {},
        digests=_digests(inputs) if distributed.first() else {},  # the rank that opens the run compares them
    )


def _digests(inputs: Inputs) -> dict[str, str]:
    """Of the content of each input that the run learns from."""
    used = {slide for split in inputs.splits for part in split.parts().values() for slide in part}
    made = {"labels": digests.of_labels(inputs.labels, sorted(used & set(inputs.labels.table.index)))}
    made["splits"] = digests.of_splits(inputs.splits)
    if inputs.omics is not None:
        made["omics"] = digests.of_omics(inputs.omics)
    if inputs.cohort is not None:
        made["features"] = digests.of_features(inputs.cohort)
    return made


def _share_of(omics: Omics, share: float, seed: int) -> Omics:
    """Profiles of a share of the cases, at least of one; a larger share holds all of a smaller one's."""
    cases = omics.table.index.sort_values()
    kept = np.random.default_rng(seed).permutation(len(cases))[: max(1, round(share * len(cases)))]
    return replace(omics, table=omics.table.loc[cases[np.sort(kept)]])


@contextlib.contextmanager
def _opened(out: Path, config: Config, info: RunInfo, resume: bool, reporter: Reporter) -> Iterator[Run]:
    """The run in `out`, made or gone on with, which nobody else writes to until the end of the block."""
    with contextlib.ExitStack() as held:
        with distributed.together():
            if distributed.first():
                new = not out.is_dir()
                left = held.enter_context(locked(make_folder(out), env.slurm_job()))
                try:
                    run = _open_run(out, config, info, resume)
                except BaseException:
                    held.close()
                    if new:
                        with contextlib.suppress(OSError):
                            out.rmdir()
                    raise
                if left is not None:
                    reporter.note(f"{out}: {left} ended before its time; going on where it stopped")
            else:
                run = Run.described(out, config, info)
        yield run


def _open_run(out: Path, config: Config, info: RunInfo, resume: bool) -> Run:
    if not (out / "run.json").is_file():
        other = [path for path in out.iterdir() if path.name != LOCK and not is_leftover(path.name)]
        if other and not _just_begun(out, other, config, resume):
            raise InputError(f"{out}: expected a new folder, got one with other files; choose another --out")
        remove_leftovers(out)
        return Run.create(out, config, info)
    if not resume:
        raise InputError(f"{out}: expected a new folder, got a run; go on with --resume or choose another --out")
    run = Run(out)
    if config.train.amp == "auto":  # it goes on as it began, see `_amp`
        config = replace(config, train=replace(config.train, amp=run.config.train.amp))
    if run.config != config:
        differing = [
            line for line in config.to_toml().splitlines() if line not in set(run.config.to_toml().splitlines())
        ]
        raise InputError(
            f"{out}: expected the configuration of its config.toml, got {differing[0].split('  #')[0]!r}; "
            "resume with the same settings or choose another --out"
        )
    if run.info.classes != info.classes or run.info.in_features != info.in_features:
        raise InputError(
            f"{out}: expected classes {run.info.classes} and width {run.info.in_features} as when it began, got "
            f"{info.classes} and {info.in_features}; resume with the same data or choose another --out"
        )
    before, now = run.info.digests, info.digests
    began = any(path.name in ("state.pt", PREDICTIONS) for path in out.glob("fold_*/*"))
    if before and began and (others := [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]):
        given = ", ".join(f"{name} {info.data.get(name)}" for name in others)
        raise InputError(
            f"{out}: expected the {' and '.join(others)} that it began with, got others ({given}); resume with the "
            "same content or choose another --out"
        )
    remove_leftovers(out)
    finished = {fold for fold in {*run.info.folds, *info.folds} if run.finished(fold)}
    for fold in finished:
        (run.fold(fold) / "state.pt").unlink(missing_ok=True)
    folds, skipped = sorted(finished | set(info.folds)), {**run.info.skipped, **info.skipped}
    precision = run.info.precision if finished >= set(info.folds) else info.precision
    return Run.create(out, config, replace(info, folds=folds, skipped=skipped, precision=precision))


def _just_begun(out: Path, files: list[Path], config: Config, resume: bool) -> bool:
    """Whether a run of this configuration was killed between its first two files."""
    return resume and files == [out / "config.toml"] and files[0].read_text(encoding="utf-8") == config.to_toml()


def _train_fold(
    run: Run,
    inputs: Inputs,
    fold: int,
    device: torch.device,
    skip_bad: bool,
    reporter: Reporter,
    kept: DeviceCache | None,
    amp: bool,
) -> None:
    config, folder, split = run.config, run.fold(fold), inputs.splits[fold]
    transform = _shared_genes(inputs, split, config, folder)
    skipped = inputs.cohort.skipped if skip_bad and inputs.cohort is not None else None
    before = set(skipped or {})
    loaders = {
        part: _loader(inputs, slides, transform, config, device, skipped, kept, amp)
        for part, slides in split.parts().items()
    }
    with distributed.together():
        if len(loaders["train"].slide_ids) == 0:
            raise InputError(f"splits_{fold}.csv: expected slides in train, got none that can be used; see the notes")
    genes = None if transform is None else len(transform.genes)
    torch.manual_seed(config.train.seed)
    alone = config.model.kind == "omics"
    width = genes if alone and genes is not None else run.info.in_features
    model = build_model(config, width, run.num_classes, None if alone else genes)
    reporter.fold_begins(fold, len(run.info.folds), {part: len(x.slide_ids) for part, x in loaders.items()})
    trainer = Trainer(
        model, config, loaders["train"], loaders["val"], device=device, folder=folder, report=reporter.progress, amp=amp
    )
    model = trainer.run()
    tables = []
    for part in ("val", "test"):
        slides, probs, _ = probabilities(model, loaders[part], device, amp=amp)
        if slides:
            table = prediction_table(inputs.labels.table, slides, probs, run.info.classes, fold=fold, part=part)
            tables.append(table)
        elif part == "test" and split.test:
            reasons = {} if inputs.cohort is None else inputs.cohort.skipped
            with distributed.together():
                raise none_left(f"splits_{fold}.csv: test", split.test, reasons)
    if skipped is not None:
        for found in distributed.gather(skipped):
            skipped.update(found)
        for slide in sorted(set(skipped) - before):
            reporter.note(f"skipped {slide}: {skipped[slide]}")
    with distributed.together():
        if not tables:
            raise InputError(f"splits_{fold}.csv: expected slides in val or test to score, got none; make splits again")
        if distributed.first():
            write_csv(folder / PREDICTIONS, _decided(pd.concat(tables, ignore_index=True), run.info.classes))
            (folder / "state.pt").unlink(missing_ok=True)
    read = {part: sum(slide not in (skipped or ()) for slide in x.slide_ids) for part, x in loaders.items()}
    reporter.fold_ends(fold, pd.DataFrame(trainer.log), read)


def _decided(table: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """The predictions of a fold with the class that its threshold decides on."""
    checked = check_predictions(table, classes)
    thresholds = choose_thresholds(checked, classes, [])
    return with_predicted(table, classes, next(iter(thresholds.values()), 0.5))


def _shared_genes(inputs: Inputs, split: Split, config: Config, folder: Path) -> OmicsTransform | None:
    """What rank 0 fits and writes, on every rank."""
    transform, facts = None, None
    with distributed.together():
        if distributed.first():
            make_folder(folder)
            transform = _fit_genes(inputs, split, config)
        if transform is not None:
            facts = transform.to_dict()
            write_json(folder / "genes.json", facts)
    facts = distributed.share(facts)
    return transform if distributed.first() or facts is None else OmicsTransform.from_dict(facts)


def _fit_genes(inputs: Inputs, split: Split, config: Config) -> OmicsTransform | None:
    """Genes chosen and scaled on the cases of the training part that have a profile."""
    if inputs.omics is None:
        return None
    rows = inputs.labels.table.loc[list(split.train)].drop_duplicates("case_id")
    rows = rows[rows["case_id"].isin(inputs.omics.table.index)]
    if len(rows) == 0:
        raise InputError(f"{inputs.omics.source}: expected profiles of training cases, got none; check the splits")
    options = config.omics
    found = inputs.omics.counts  # of the whole table, for all folds alike
    log: str | bool = {"yes": True, "no": False}.get(options.log, "auto" if found is None else found)
    table = inputs.omics.table.loc[rows["case_id"]]
    return OmicsTransform.fit(
        table,
        rows["label"].to_numpy(np.int64),
        genes=options.genes,
        select=options.select,
        log=log,
        clip=options.clip,
        seed=config.train.seed,
    )


def _loader(
    inputs: Inputs,
    slides: Sequence[str],
    transform: OmicsTransform | None,
    config: Config,
    device: torch.device,
    skipped: dict[str, str] | None,
    kept: DeviceCache | None,
    amp: bool,
) -> BagLoader:
    options, table, cohort = config.train, inputs.labels.table, inputs.cohort
    profiles = None if transform is None else _profiles(inputs, slides, transform)
    read: Callable[[str], Tensor]
    sizes: Mapping[str, int]
    if cohort is not None:
        usable = [slide in cohort.paths for slide in slides]
        read, sizes = cohort.read, cohort.sizes
    else:  # the profile is the only row of its bag
        assert profiles is not None
        usable = [bool(np.isfinite(profile).all()) for profile in profiles]
        rows = {slide: torch.from_numpy(profile)[None] for slide, profile in zip(slides, profiles, strict=True)}
        read, sizes = rows.__getitem__, dict.fromkeys(slides, 1)
    chosen = [slide for slide, use in zip(slides, usable, strict=True) if use]
    return BagLoader(
        chosen,
        table.loc[chosen, "label"].to_numpy(np.int64),
        sizes,
        read,
        None if profiles is None or cohort is None else profiles[usable],
        slides_per_step=options.slides_per_step,
        patch_budget=options.patch_budget,
        bucket=options.bucket,
        max_patches=options.max_patches,
        cache_bytes=int(options.cache_gb * 1e9),
        pin=device.type == "cuda",
        graph=None if cohort is None else cohort.graphs,
        skipped=skipped,
        device_cache=kept,
        read_blocks=None if cohort is None else cohort.blocks,
        dtype=torch.bfloat16 if amp and device.type == "cpu" and cohort is not None else None,  # a GPU casts faster
    )


def _profiles(inputs: Inputs, slides: Sequence[str], transform: OmicsTransform) -> NDArray[np.float32]:
    """(n, G) scaled profiles of the slides' cases; a row of NaN where a case has none."""
    assert inputs.omics is not None
    cases = inputs.labels.table.loc[list(slides), "case_id"].to_numpy(object)
    has = np.array([case in inputs.omics.table.index for case in cases], dtype=bool)
    profiles = np.full((len(slides), len(transform.genes)), np.nan, np.float32)
    if has.any():
        profiles[has] = transform(inputs.omics.table.loc[cases[has]])
    return profiles

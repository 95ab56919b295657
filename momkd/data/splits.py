"""Splits of slides into train, val and test, in CLAM's files; made by case, so that no patient is on two sides."""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from momkd.data.atomic import cannot_write, make_folder, sync_folder, write_csv, write_text
from momkd.data.classes import by_name
from momkd.data.files import existing_folder
from momkd.data.folders import LIST, is_listed, listed
from momkd.data.ids import check_printable, match_ids, matched_note
from momkd.data.outputs import check_replaced
from momkd.data.tables import Labels
from momkd.data.text import is_unnamed, read_table
from momkd.errors import InputError

PARTS = ("train", "val", "test")
_FILE = re.compile(r"splits_(\d+)\.csv")
_FLOAT_ID = re.compile(r"\d+\.0")
_PADDING = ("", "NA", "N/A", "NaN", "nan", "<NA>")  # cells behind the last id of a column


@dataclass(frozen=True)
class Split:
    """One fold: the slide ids of its three parts. `val` and `test` may be empty."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The slides by the name of their part."""
        return {"train": self.train, "val": self.val, "test": self.test}


def read_splits(directory: Path | str, known: Collection[str] = ()) -> list[Split]:
    """Reads splits_0.csv, splits_1.csv, ... of a folder; fold K is item K.

    Each file has the columns train, val and test, of different length. An unnamed index column is ignored, and so is
    the ".0" that pandas puts behind integer ids when it pads a column. Cells that are empty, NA or NaN are padding,
    unless a slide is `known` by that name.

    Raises:
        InputError: no such files, a gap in their numbers, missing or unknown columns, a slide twice.
    """
    folder = existing_folder(directory, "a folder with splits_0.csv", "make it with momkd splits")
    files = sorted((int(match[1]), path) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)))
    if not files:
        raise InputError(f"{folder}: expected splits_0.csv, got no such file; make it with momkd splits")
    for fold, (number, path) in enumerate(files):
        if number != fold:
            raise InputError(
                f"{folder}: expected splits_{fold}.csv, got {path.name} next; number the files from 0, or make the "
                "splits again if writing them was interrupted"
            )
    return [_read_split(path, known) for _, path in files]


def match_splits(splits: Sequence[Split], labels: Labels, source: str = "splits") -> tuple[list[Split], list[str]]:
    """The splits with the ids of the labels, where they differ by endings such as .svs, and notes that say so."""
    every = dict.fromkeys(slide for split in splits for slides in split.parts().values() for slide in slides)
    matched = match_ids(every, labels.table.index)
    if not matched:
        return list(splits), []
    renamed = [
        Split(*(tuple(matched.get(slide, slide) for slide in slides) for slides in split.parts().values()))
        for split in splits
    ]
    return renamed, [matched_note(source, matched, labels.source)]


def check_splits(splits: Sequence[Split], labels: Labels, *, source: str = "splits", leaks: bool = False) -> None:
    """Checks that all slides are in the table of labels, and that no case is in two parts of a fold.

    Args:
        leaks: allow a case in two parts. Its results look better than they are.

    Raises:
        InputError: naming fold, slide or case.
    """
    case_of = labels.table["case_id"].to_dict()
    for fold, split in enumerate(splits):
        part_of: dict[str, tuple[str, str]] = {}  # case -> part, slide
        for part, slides in split.parts().items():
            for slide in slides:
                if slide not in case_of:
                    raise InputError(
                        f"{source}: splits_{fold}.csv: {part}: expected slides of {labels.source}, got {slide!r}; "
                        f"its ids look like {next(iter(case_of), '')!r}: make them agree"
                    )
                other, first = part_of.setdefault(case_of[slide], (part, slide))
                if other != part and not leaks:
                    raise InputError(
                        f"{source}: splits_{fold}.csv: expected each case in one part, got {case_of[slide]!r} in "
                        f"{other} ({first}) and {part} ({slide}); make splits by case with momkd splits"
                    )


def check_parts(fold: int, split: Split, labels: Labels, usable: Collection[str], source: str = "splits") -> list[str]:
    """Checks that a fold can be learned and scored with the slides that are usable; returns notes.

    Raises:
        InputError: train has no slide, no label or one class, or val and test have no slide.
    """
    where = f"{source}: splits_{fold}.csv"
    label_of = labels.table["label"].to_dict()
    parts = {part: [label_of[slide] for slide in slides if slide in usable] for part, slides in split.parts().items()}
    train = Counter(labels.classes[c] for c in parts["train"] if c >= 0)
    if not parts["train"]:
        raise InputError(f"{where}: expected slides in train, got none that can be used; see the notes")
    if not train:
        raise InputError(
            f"{where}: expected slides with a label in train, got none of {len(parts['train'])}; fill in the column "
            f"{labels.name!r} of {labels.source}"
        )
    if len(train) == 1:
        ((name, count),) = train.items()
        raise InputError(
            f"{where}: expected two or more classes in train, got only {name!r} ({count} slides); make the splits "
            "again with momkd splits, or use fewer folds"
        )
    if not parts["val"] and not parts["test"]:
        raise InputError(f"{where}: expected slides in val or test to score, got none; make the splits again")
    notes = [f"{where}: train has no slide of class {name!r}" for name in labels.classes if name not in train]
    if not any(c >= 0 for c in parts["test"]):
        came = "no slide that has a label" if parts["test"] else "no slide"
        notes.append(f"{where}: test has {came}; the fold has no metrics of test slides")
    return notes


def make_splits(labels: Labels, folds: int = 5, seed: int = 0, val_fraction: float = 0.15) -> list[Split]:
    """Splits by case, stratified by class.

    Every labelled case is in the test part of exactly one fold, and in one part of each. The classes share out evenly
    over the folds by cases, then the slides as evenly as that allows. A case whose slides differ in class counts for
    the rarest of them. Cases with no label at all are in train throughout: they can teach but not be scored.

    Args:
        folds: 2 or more, or 1 for a single split that tests on a fifth of the cases.
        val_fraction: share of the cases outside test that go to val, at least one of each class; 0 makes no val.

    Returns:
        One split a fold; the slides of a part are in the order of the table. Which class is positive changes nothing.

    Raises:
        InputError: a class has too few cases.
    """
    if folds < 1 or not 0 <= val_fraction < 1:
        raise InputError(
            f"splits: expected folds >= 1 and 0 <= val_fraction < 1, got {folds} and {val_fraction}; change them"
        )
    groups = 5 if folds == 1 else folds
    labels = _sorted_classes(labels)
    by_class = _cases_by_class(labels, groups, with_val=val_fraction > 0)
    slides_of = Counter(labels.table["case_id"])
    fold_of = _deal(by_class, slides_of, groups, np.random.default_rng(seed))

    splits = []
    for fold in range(folds):
        rng = np.random.default_rng([seed, fold])
        part_of = {case: "test" for case, group in fold_of.items() if group == fold}
        for cases in by_class:
            rest = [case for case in cases if case not in part_of]
            if val_fraction > 0:
                count = min(max(1, round(val_fraction * len(rest))), len(rest) - 1)
                part_of.update((rest[i], "val") for i in rng.permutation(len(rest))[:count])
        parts = labels.table["case_id"].map(lambda case, where=part_of: where.get(case, "train"))
        splits.append(Split(*(tuple(labels.table.index[parts == part]) for part in PARTS)))
    return splits


def write_splits(directory: Path | str, splits: Sequence[Split]) -> None:
    """Writes splits_0.csv, ... as CLAM does: an unnamed index, then train, val and test, padded with empty cells.

    All files are written beside first. splits_0.csv comes last, and an older one is removed before the others are
    replaced: without it no folder reads as splits, so an interruption leaves no part that looks like the whole. Only
    splits that the folder's list of momkd's files holds, unchanged, are replaced.

    Raises:
        InputError: the folder cannot be written, or holds splits of others, or files of more folds, which would be
            read along; or an id would not be read back as it is.
    """
    folder = Path(directory)
    for split in splits:
        _check_ids(folder, split)
    make_folder(folder)
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match and int(match[1]) >= len(splits):
            raise InputError(
                f"{folder}: expected no more than {len(splits)} folds, got an older {path.name}; remove it first"
            )
    names = [f"splits_{fold}.csv" for fold in range(len(splits))]
    check_splits_replaced(folder, len(splits))
    staging = folder / f".splits.{secrets.token_hex(6)}.tmp"
    for left in folder.glob(".splits.*.tmp"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        staging.mkdir()
        for name, split in zip(names, splits, strict=True):
            table = pd.DataFrame({part: pd.Series(slides, dtype=object) for part, slides in split.parts().items()})
            write_csv(staging / name, table, index=True)
        write_text(staging / LIST, listed(folder, [staging / name for name in names]))
        for name in names:  # the list names each file that is there, whenever this ends
            (folder / name).unlink(missing_ok=True)
        for name in (LIST, *reversed(names)):
            os.replace(staging / name, folder / name)
        sync_folder(folder)
    except InputError as error:
        raise InputError(str(error).replace(str(staging), str(folder))) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_splits_replaced(directory: Path | str, folds: int) -> None:
    """Check that momkd wrote the splits that so many new ones would replace. Raises InputError."""
    paths = [Path(directory) / f"splits_{fold}.csv" for fold in range(folds)]
    remedy = "choose another --out, or remove them"
    check_replaced(paths, is_listed, "splits that momkd made", remedy=remedy)


def _check_ids(folder: Path, split: Split) -> None:
    """Raises for ids that `_read_split` would take for padding, strip, or rid of a ".0"."""
    longest = max(map(len, split.parts().values()))
    for part, slides in split.parts().items():
        for slide in slides:
            check_printable(slide, f"{folder}: {part}", "ids")
        odd = [slide for slide in slides if slide in _PADDING or slide != slide.strip()]
        if len(slides) < longest and all(_FLOAT_ID.fullmatch(slide) for slide in slides):
            odd += slides
        if odd:
            raise InputError(f"{folder}: {part}: expected ids that read back from a CSV, got {odd[0]!r}; rename it")


def _read_split(path: Path, known: Collection[str]) -> Split:
    table = read_table(path)
    header, rows = table.header, table.rows
    if missing := [part for part in PARTS if part not in header]:
        raise InputError(f"{path}: expected columns train, val and test, got no {missing[0]!r}; add it")
    if unknown := [name for name in header if name not in PARTS and not is_unnamed(name)]:
        raise InputError(f"{path}: expected columns train, val and test, got also {unknown[0]!r}; remove it")
    for line, cells in rows:
        if len(cells) > len(header):
            raise InputError(f"{path}: line {line}: expected at most {len(header)} cells, got {len(cells)}")
    seen: dict[str, str] = {}  # slide -> part
    parts = []
    for part in PARTS:
        at = header.index(part)
        cells = [cells[at] if at < len(cells) else "" for _, cells in rows]
        slides = [cell for cell in cells if cell and (cell in known or cell not in _PADDING)]
        # pandas turns integers into floats only where it has to pad, so a full column is taken at its word.
        if len(slides) < len(cells) and all(_FLOAT_ID.fullmatch(slide) for slide in slides):
            slides = [slide[:-2] for slide in slides]
        for slide in slides:
            check_printable(slide, f"{path}: {part}", "ids")
            if slide in seen:
                where = f"twice in {part}" if seen[slide] == part else f"in {seen[slide]} and {part}"
                raise InputError(f"{path}: expected each slide once, got {slide!r} {where}; remove one")
            seen[slide] = part
        parts.append(tuple(slides))
    if not parts[0]:
        raise InputError(f"{path}: expected slides in train, got none; make it again with momkd splits")
    return Split(*parts)


def _sorted_classes(labels: Labels) -> Labels:
    """The same labels with the classes sorted by name, integers by value."""
    order = by_name(labels.classes)
    number = np.array([order.index(name) for name in labels.classes] + [-1], dtype=np.int64)  # -1 stays -1
    table = labels.table.assign(label=number[labels.table["label"].to_numpy()])
    return replace(labels, table=table, classes=order)


def _cases_by_class(labels: Labels, groups: int, *, with_val: bool) -> list[list[str]]:
    """The labelled cases of each class, in the order of the table, once there are enough of them."""
    labelled = labels.table[labels.table["label"] >= 0]
    counts = labelled.groupby("label")["case_id"].nunique()
    # rarest first, so that a case of two classes goes where cases are scarce
    rank = {label: place for place, label in enumerate(counts.sort_values(kind="stable").index)}
    rarest = labelled.assign(rank=labelled["label"].map(rank)).sort_values("rank", kind="stable")
    class_of = rarest.drop_duplicates("case_id").set_index("case_id")["label"].to_dict()
    by_class: list[list[str]] = [[] for _ in labels.classes]
    for case in labelled["case_id"].drop_duplicates():
        by_class[class_of[case]].append(case)
    for name, cases in zip(labels.classes, by_class, strict=True):
        left = len(cases) - math.ceil(len(cases) / groups)
        if len(cases) < groups or left < (2 if with_val else 1):
            raise InputError(
                f"{labels.source}: class {name!r}: expected a case for every part of {groups} folds, "
                f"got {len(cases)} cases; use fewer folds or add cases"
            )
    return by_class


def _deal(
    by_class: list[list[str]], slides_of: Mapping[str, int], groups: int, rng: np.random.Generator
) -> dict[str, int]:
    """A group for each case: cases of a class in equal numbers, large cases first to where slides are fewest."""
    fold_of: dict[str, int] = {}
    total = np.zeros(groups, dtype=np.int64)
    for cases in by_class:
        dealt = np.zeros(groups, dtype=np.int64)
        order = sorted(rng.permutation(len(cases)), key=lambda i: -slides_of[cases[i]])
        for i in order:
            luck = rng.permutation(groups)
            group = int(np.lexsort((luck, total, dealt))[0])
            fold_of[cases[i]] = group
            dealt[group] += 1
            total[group] += slides_of[cases[i]]
    return fold_of

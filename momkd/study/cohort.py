"""What a study is of: the user's files, or slides that are simulated, wholly or from real expression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from momkd.data.atomic import make_folder, write_csv
from momkd.data.classes import MISSING, LabelOptions
from momkd.data.ids import case_column
from momkd.data.omics import case_classes, read_omics
from momkd.data.tables import Labels
from momkd.data.text import listed, read_text_table
from momkd.errors import InputError
from momkd.simulate import SimulationConfig, simulate
from momkd.simulate import semisynthetic as semi
from momkd.simulate.write import MARK as SIMULATION
from momkd.simulate.write import NOTE as SIMULATED
from momkd.simulate.write import read_mark

MARK = "study.json"
_WRITTEN = (
    *("runs", "splits", "internal.csv", "external.csv", "results.csv"),
    *("report.md", "index.html", "auc.png", "difference.png"),
)
REAL = "Real slides and labels, as given."


@dataclass(frozen=True)
class StudyCohort:
    """What is studied: files as for `momkd train`, the tasks, and a cohort of other hospitals if there is one.

    Args:
        features, labels, omics: as for `train_run`; omics None leaves out the arms that learn from expression.
        tasks: columns of the labels.
        splits: folder of splits for every seed; None makes them, anew for each seed.
        external_features, external_labels: of other hospitals, with the same columns of labels.
        instances: CSV of slide_id, row and type, the truth about patches, and the type that attention should find; the
            attention of every arm is then compared with it.
        omics_columns: columns of `omics` that stay genes, as for `train_run`.
        note: what data these are; it stands over every table.
        label_options: what the user says of the labels of each task.
    """

    features: Path
    labels: Path
    tasks: tuple[str, ...]
    omics: Path | None = None
    splits: Path | None = None
    external_features: Path | None = None
    external_labels: Path | None = None
    instances: tuple[Path, str] | None = None
    omics_columns: str | None = None
    note: str = REAL
    label_options: Mapping[str, LabelOptions] = field(default_factory=dict)

    def options(self, task: str) -> LabelOptions:
        """What the user says of the labels of a task."""
        return self.label_options.get(task, LabelOptions())

    def external_options(self, task: str) -> LabelOptions:
        """The same for the external cohort, whose classes are those of the task."""
        return replace(self.options(task), classes=None, positive=None)

    def omics_notes(self, tasks: Sequence[Labels]) -> list[str]:
        """Reads the expression for all tasks, before anything is trained, and returns what a user should know of it."""
        if self.omics is None:
            return []
        profiles = read_omics(self.omics, label=self.tasks, keep=self.omics_columns)
        notes = profiles.notes
        for labels in tasks:
            without = profiles.without_label(case_classes(labels))
            notes += [f"{labels.name}: {note}" for note in without.notes if note not in notes]
        return notes


def simulated_cohort(out: Path, dials: dict[str, Any]) -> StudyCohort:
    """Slides, labels and expression simulated into `out`, unless they are there."""
    config = SimulationConfig(**dials)
    if not _is_there(out, config, None):
        simulate(out, config)
    external = out / "external" if config.external_slides else None
    return StudyCohort(
        out / "features",
        out / "labels.csv",
        ("label",),
        out / "omics.csv",
        external_features=external and external / "features",
        external_labels=external and external / "labels.csv",
        instances=(out / "instances.csv", "tumour"),
        note=SIMULATED,
    )


def semisynthetic_cohort(
    out: Path,
    omics: Path,
    labels: Path,
    tasks: Sequence[str],
    dials: dict[str, Any],
    *,
    site: str | None = None,
    omics_columns: str | None = None,
) -> StudyCohort:
    """Slides simulated into `out` from the expression that is given, unless they are there; the labels are real."""
    table = read_text_table(labels, [*tasks, *([site] if site else [])])
    column = case_column(labels, list(table.columns), "", None, None)
    if column is None:
        raise InputError(f"{labels}: expected a column 'case_id', got {listed(list(table.columns))}; name another")
    table = table.rename(columns={column: "case_id"}).set_index("case_id")
    if repeated := table.index[table.index.duplicated()].tolist():
        raise InputError(f"{labels}: expected a row for each case_id, got {repeated[0]!r} again; remove one")
    profiles = read_omics(omics, label=tasks, keep=omics_columns)
    for task in tasks:
        codes = pd.factorize(table[task].where(~table[task].isin(MISSING)))[0]
        profiles = profiles.without_label(dict(zip(table.index, codes.tolist(), strict=True)))
    config = SimulationConfig(**{"programs": semi.PROGRAMS, **dials})
    if not _is_there(out, config, semi.fingerprint(profiles, table, site)):
        semi.simulate_slides(out, profiles, table, config, site=site)
    return StudyCohort(
        out / "features", out / "labels.csv", tuple(tasks), omics, omics_columns=omics_columns, note=semi.NOTE
    )


def _is_there(out: Path, config: SimulationConfig, source: str | None) -> bool:
    """Whether these slides have been simulated already, from the tables with this fingerprint (None: from none)."""
    mark = out / SIMULATION
    if not mark.is_file():
        return False
    told = read_mark(out)
    if told.source != source:
        raise InputError(
            f"{out}: expected the expression, labels and --site that its slides were simulated from, got others; "
            "choose another --out or give the same"
        )
    wanted, made = config.as_dict(), told.config
    if source is not None:
        del wanted["sites"]  # of real hospitals as many as there are
    if differing := [name for name in wanted if made.get(name) != wanted[name]]:
        name = differing[0]
        raise InputError(
            f"{out}: expected slides simulated with {name}={made.get(name)}, got {name}={wanted[name]}; choose another "
            "--out or the same dials"
        )
    return True


def check_folder(out: Path, own: Sequence[Path | None] = ()) -> None:
    """Raise InputError where files in `out` would be replaced that no study wrote; `own` are those of this one."""
    if (out / MARK).is_file():
        return
    if found := [name for name in _WRITTEN if (out / name).exists() and out / name not in own]:
        raise InputError(
            f"{out}: expected a new folder or that of an earlier study, got another with {found[0]!r}; choose another "
            "--out"
        )


def hold_out(cohort: StudyCohort, out: Path, column: str, value: str) -> StudyCohort:
    """The rows of the labels whose `column` is `value` become the external cohort, the others remain."""
    table = read_text_table(cohort.labels, [column])
    held = table[column] == value
    if not held.any() or held.all():
        raise InputError(
            f"hold-out: expected some rows with {column}={value}, got {int(held.sum())} of {len(table)}; it has "
            f"{', '.join(sorted(set(table[column]))[:8])}"
        )
    check_folder(out)
    make_folder(out)
    write_csv(out / "internal.csv", table[~held])
    write_csv(out / "external.csv", table[held])
    return replace(
        cohort,
        labels=out / "internal.csv",
        external_features=cohort.features,
        external_labels=out / "external.csv",
    )

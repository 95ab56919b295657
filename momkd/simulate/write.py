"""A simulated cohort as files: what `momkd simulate` leaves on the disk.

The folder is whole or absent, see `momkd.data.folders`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import msgspec
import numpy as np
import pandas as pd

import momkd
from momkd.data.atomic import write_json, write_text
from momkd.data.folders import whole_folder
from momkd.data.own import read_json
from momkd.data.slides import write_trident
from momkd.data.splits import make_splits, write_splits
from momkd.data.tables import Labels
from momkd.simulate.config import SimulationConfig
from momkd.simulate.model import (
    EXTERNAL,
    INTERNAL,
    TISSUES,
    Case,
    World,
    draw_cases,
    draw_omics,
    draw_sites,
    draw_slides,
    draw_world,
)

NOTE = "Everything here is simulated by momkd: no patient, no slide and no measurement is behind it."

MARK = "simulation.json"  # a folder without it is never replaced
_README = f"""{NOTE}
Results on it say how software behaves, not how medicine does.

features/        one HDF5 file a slide in TRIDENT's layout: features (patches, width), coords (patches, 2)
labels.csv       slide_id, case_id, label, site
omics.csv        one line a case: case_id, then the counts of each gene; cases without expression are absent
splits/          splits_0.csv, ...: train, val and test of each fold, by case
instances.csv    the truth about every patch: slide_id, row in the features, type of tissue
external/        the same from other hospitals, without splits (where it was asked for)
simulation.json  the version of momkd and every dial; the same dials give the same cohort
"""


class Mark(msgspec.Struct):
    """simulation.json: every dial, and the digest of the tables that the slides were simulated from, if any."""

    config: dict[str, int | float | str | bool]
    source: str | None = msgspec.field(default=None, name="from")


def read_mark(folder: Path) -> Mark:
    """What a simulated cohort was made by. Raises InputError where its simulation.json is damaged."""
    return read_json(folder / MARK, Mark, what="the dials of a simulation", remedy="simulate into another folder")


@dataclass(frozen=True)
class SimulatedCohort:
    """Where the files of a cohort lie.

    Args:
        root: the folder of all.
        features: folder of one HDF5 file a slide.
        labels: CSV of slide_id, case_id, label and site.
        omics: CSV of case_id and the counts of each gene.
        splits: folder of splits_0.csv, ...; None for an external cohort.
        instances: CSV of slide_id, row and type, the truth about every patch.
        external: the cohort of other hospitals, or None.
    """

    root: Path
    features: Path
    labels: Path
    omics: Path
    splits: Path | None
    instances: Path
    external: SimulatedCohort | None = None


def simulate(
    out: Path | str,
    config: SimulationConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SimulatedCohort:
    """Simulates a cohort and writes it, whole or not at all.

    Args:
        out: the folder to make. An empty one is taken too.
        config: what to simulate; None is `SimulationConfig()`.
        overwrite: replace a simulation that is already there. Nothing else is ever replaced.
        progress: called with the slides written so far and all of them, after each slide.

    Returns:
        The paths of the files.

    Raises:
        InputError: the folder is not empty, cannot be written or is full, or the cohort is too small for its folds.

    Example:
        >>> cohort = simulate("cohort", SimulationConfig(slides=40, external_slides=0, patches=30, genes=20))
        >>> cohort.labels.name, len(list(cohort.features.iterdir()))
        ('labels.csv', 40)
    """
    config = SimulationConfig() if config is None else config
    shown = Path(out)
    with whole_folder(shown, name="a simulation", mark=MARK, overwrite=overwrite) as temporary:
        _write(temporary, config, progress)
    external = _paths(shown / "external", None, None) if config.external_slides else None
    return _paths(shown, shown / "splits", external)


def _paths(root: Path, splits: Path | None, external: SimulatedCohort | None) -> SimulatedCohort:
    return SimulatedCohort(
        root, root / "features", root / "labels.csv", root / "omics.csv", splits, root / "instances.csv", external
    )


# -- writing -----------------------------------------------------------------------------------------------------


def _write(root: Path, config: SimulationConfig, progress: Callable[[int, int], None] | None) -> None:
    world, done = draw_world(config), 0

    def wrote_slide() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, config.slides + config.external_slides)

    cases = draw_cases(config, world, INTERNAL)
    # First, because this is what can fail for dials that are each in range.
    splits = make_splits(_labels(config, cases), config.folds, config.seed, config.val_fraction)
    write_splits(root / "splits", splits)
    _write_cohort(root, config, world, INTERNAL, cases, wrote_slide)
    if config.external_slides:
        (root / "external").mkdir()
        others = draw_cases(config, world, EXTERNAL)
        _write_cohort(root / "external", config, world, EXTERNAL, others, wrote_slide)
    write_text(root / "README.txt", _README)
    write_json(root / MARK, {"note": NOTE, "momkd": momkd.__version__, "config": config.as_dict()})


def _labels(config: SimulationConfig, cases: list[Case]) -> Labels:
    rows = [(slide_id, case.case_id, case.label) for case in cases for slide_id in case.slide_ids()]
    table = pd.DataFrame(rows, columns=["slide_id", "case_id", "label"]).set_index("slide_id")
    return Labels(table, tuple(str(c) for c in range(config.classes)))


def _write_cohort(
    root: Path, config: SimulationConfig, world: World, cohort: int, cases: list[Case], wrote_slide: Callable[[], None]
) -> None:
    """Case after case, so that a cohort of any size needs the memory of one."""
    sites = draw_sites(config, cohort)
    (root / "features").mkdir()
    genes = ",".join(f"gene{g + 1:05d}" for g in range(config.genes))
    with (
        _csv(root / "labels.csv", "slide_id,case_id,label,site") as labels,
        _csv(root / "omics.csv", f"case_id,{genes}") as omics,
        _csv(root / "instances.csv", "slide_id,row,type") as instances,
    ):
        for case in cases:
            site = sites[case.site]
            if case.has_omics:
                counts = draw_omics(config, world, site, case, cohort).tolist()
                omics.write(f"{case.case_id},{','.join(map(str, counts))}\n")
            for slide_id, slide in draw_slides(config, world, site, case, cohort):
                write_trident(
                    root / "features" / f"{slide_id}.h5",
                    slide.features,
                    slide.coords,
                    patch_size_level0=config.patch_size,
                    encoder="simulated",
                )
                labels.write(f"{slide_id},{case.case_id},{case.label},{site.name}\n")
                names = np.array(TISSUES)[slide.tissue].tolist()
                instances.writelines(f"{slide_id},{row},{name}\n" for row, name in enumerate(names))
                wrote_slide()


@contextlib.contextmanager
def _csv(path: Path, header: str) -> Iterator[TextIO]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(header + "\n")
        yield file

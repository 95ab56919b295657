"""Simulated slides of real expression: what a tumour shows follows the patient's own programs, the labels are real.

The programs are the first principal components of the expression of all cases, each with unit variance; no label takes
part. What is visible of them, and how patches show it, is as in `momkd.simulate.model`:

    visible = visibility · z + sqrt(1 - visibility²) · N(0, I)

So a label can be seen in a slide as far as the programs tell it and as far as they are visible.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.decomposition import PCA

import momkd
from momkd.data.atomic import write_csv, write_json, write_text
from momkd.data.folders import whole_folder
from momkd.data.omics import Omics
from momkd.data.slides import write_trident
from momkd.errors import InputError
from momkd.simulate.config import SimulationConfig
from momkd.simulate.model import INTERNAL, TISSUES, Case, World, draw_sites, draw_slide, draw_world, stream
from momkd.simulate.write import MARK

NOTE = "The expression and the labels are those given; the slides are simulated by momkd from the expression."
PROGRAMS = 24
_CLIP = 5.0  # standard deviations; expression has heavy tails


def simulate_slides(
    out: Path | str,
    omics: Omics,
    labels: pd.DataFrame,
    config: SimulationConfig | None = None,
    *,
    site: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes one simulated slide for every case that has both expression and a row of labels, whole or not at all.

    Args:
        out: the folder to make: features/, labels.csv (slide_id, case_id and the columns of `labels`), instances.csv,
            README.txt, simulation.json.
        omics: the expression.
        labels: index case_id; every column is carried over as it is.
        config: the dials of slides (visibility, patches, features, site_effect and those beside them) and `programs`;
            the others don't matter here. None: 24 programs, the other dials at their defaults.
        site: column of `labels` whose values are hospitals: slides of one share its stain. None: one hospital.
        overwrite: replace a simulation that is already there.
        progress: called with the slides written so far and all of them.

    Returns:
        The folder.

    Raises:
        InputError: no case in both tables, too few for the programs, or the folder cannot be written.
    """
    shown = Path(out)
    config = SimulationConfig(programs=PROGRAMS) if config is None else config
    cases = [case for case in labels.index if case in omics.table.index]
    if len(cases) <= config.programs:
        raise InputError(
            f"{omics.source}: expected more cases with labels than programs={config.programs}, got {len(cases)}; make "
            "the ids agree, or lower programs"
        )
    latent = _programs(omics.table.loc[cases].to_numpy(np.float64), config.programs)
    places = pd.Series("site", index=labels.index) if site is None else labels[site].fillna("unknown").astype(str)
    places = places.loc[cases]
    names = sorted(places.unique())
    config = replace(config, sites=len(names))
    sites, world = dict(zip(names, draw_sites(config, INTERNAL), strict=True)), _orthonormal(draw_world(config))
    table = labels.loc[cases].reset_index(names="case_id")
    table.insert(0, "slide_id", table["case_id"])
    tissues: list[pd.DataFrame] = []
    with whole_folder(shown, name="a simulation", mark=MARK, overwrite=overwrite) as root:
        (root / "features").mkdir()
        for n, (case_id, z) in enumerate(zip(cases, latent, strict=True)):
            rng = stream(config, 5, n)
            hidden = math.sqrt(1 - config.visibility**2) * rng.standard_normal(config.programs)
            case = Case(case_id, -1, 0, 1, 0.0, z, config.visibility * z + hidden, True)
            slide = draw_slide(config, world, sites[places[case_id]], case, rng)
            path = root / "features" / f"{case_id}.h5"
            write_trident(path, slide.features, slide.coords, patch_size_level0=config.patch_size, encoder="simulated")
            rows = {"slide_id": case_id, "row": range(len(slide.tissue)), "type": np.array(TISSUES)[slide.tissue]}
            tissues.append(pd.DataFrame(rows))
            if progress is not None:
                progress(n + 1, len(cases))
        write_csv(root / "labels.csv", table)
        write_csv(root / "instances.csv", pd.concat(tissues, ignore_index=True))
        write_text(root / "README.txt", NOTE + "\n")
        told = {"note": NOTE, "momkd": momkd.__version__, "config": config.as_dict()}
        write_json(root / MARK, {**told, "from": fingerprint(omics, labels, site)})
    return shown


def fingerprint(omics: Omics, labels: pd.DataFrame, site: str | None) -> str:
    """What slides were simulated from, in 64 characters; another table, or another hospital column, gives another."""
    rows = pd.util.hash_pandas_object(omics.table).to_numpy(), pd.util.hash_pandas_object(labels.astype(str)).to_numpy()
    names = [*omics.table.columns, *labels.columns, str(site)]
    return hashlib.sha256(b"".join(r.tobytes() for r in rows) + "\0".join(names).encode()).hexdigest()


def _orthonormal(world: World) -> World:
    """Programs that show independently, where there are dimensions enough: so none hides another."""
    programs, rank = world.programs.shape
    return replace(world, programs=np.linalg.qr(world.programs.T)[0].T) if programs <= rank else world


def _programs(expression: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """(n, count) principal components of unit variance."""
    spread = expression.std(0)
    x = np.clip((expression - expression.mean(0)) / np.where(spread > 0, spread, 1.0), -_CLIP, _CLIP)
    components = PCA(count, svd_solver="full").fit_transform(x)
    return np.asarray(components / components.std(0), np.float64)

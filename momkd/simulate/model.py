"""The model behind `momkd simulate`: what a case is, what its genes say and what its patches show.

A case has P latent tumour programs z ~ N(0, I).

    label       two orthonormal combinations (a, b) of the first half of the programs, with noise:
                (a, b) <- sqrt(1 - label_noise) (a, b) + sqrt(label_noise) N(0, I). Two classes cut a at one threshold;
                more classes are sectors of the plane (a, b), so that they have no order.
    genes       counts ~ Poisson(exp(base + loadings · (z, nuisance) + site + gene_noise · Student t_4 + library size)).
    morphology  visible = visibility · z + sqrt(1 - visibility²) · N(0, I): what the tumour looks like. It has the same
                spread at every visibility, so only what can be learnt from it changes, not how loud it is. (A mere
                amplitude would be regained by averaging over enough patches.)
    patches     c = mean and spread of the tissue type; in tumour, + strength_r (visible + heterogeneity · N(0, I)) D
                for each region r of the tumour; then the site's gain and shift in a stain subspace that overlaps D;
                features = c W + feature_noise · N(0, I), with W of low rank.

Every case and every slide draws from a stream of its own, so more slides never change the earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from momkd.errors import InputError
from momkd.simulate.config import SimulationConfig

Floats = NDArray[np.floating[Any]]

TISSUES = ("stroma", "background", "immune", "tumour")
TUMOUR = TISSUES.index("tumour")
INTERNAL, EXTERNAL = 0, 1  # cohorts

_RANK = 24  # dimensions of morphology
_STAIN_RANK = 6  # of these, the ones that stain and scanner move
_NUISANCE = 4  # co-expression factors that have nothing to do with the label
_SHARES = (0.55, 0.30, 0.15)  # mean shares of stroma, background and immune patches outside the tumour
_FILL = 0.6  # share of the slide's rectangle that is tissue
_MAX_REGIONS = 4
_MIN_PATCHES = 20
_MAX_RATE = 1e7  # counts; a guard against the far tail


@dataclass(frozen=True)
class World:
    """What all cases of a simulation share."""

    label_plane: Floats  # (2, P) orthonormal rows
    base: Floats  # (G,) natural log of the expected count
    loadings: Floats  # (P + nuisance, G)
    tissue_mean: Floats  # (4, R)
    tissue_spread: Floats  # (4, R)
    programs: Floats  # (P, R), the directions D
    stain: Floats  # (stain, R) orthonormal rows
    basis: Floats  # (R, L), W


@dataclass(frozen=True)
class Site:
    """A hospital: its batch effect on genes, and its stain as an affine map in the stain subspace."""

    name: str
    genes: Floats  # (G,)
    gain: Floats  # (stain,)
    shift: Floats  # (stain,)


@dataclass(frozen=True)
class Case:
    """A patient."""

    case_id: str
    label: int
    site: int  # index among the sites of the cohort
    slides: int
    score: float  # of the label, before noise
    latent: Floats  # (P,) z
    visible: Floats  # (P,)
    has_omics: bool

    def slide_ids(self) -> list[str]:
        return [f"{self.case_id}-{k + 1}" for k in range(self.slides)]


@dataclass(frozen=True)
class SlideDraw:
    """One slide and the truth about it."""

    features: Floats  # (N, L)
    coords: NDArray[np.int64]  # (N, 2) level-0 pixels
    tissue: NDArray[np.uint8]  # (N,) index into TISSUES
    region: NDArray[np.int8]  # (N,) region of the tumour, -1 elsewhere


def stream(config: SimulationConfig, *key: int) -> np.random.Generator:
    """A generator that depends on the seed and the key alone."""
    return np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=key))


def draw_world(config: SimulationConfig) -> World:
    """Label rule, gene modules and feature space."""
    p, rank = config.programs, min(_RANK, config.features)
    rng = stream(config, 0, 0)
    voters = max(2, p // 2)
    plane = np.zeros((2, p))
    plane[:, :voters] = np.linalg.qr(rng.standard_normal((voters, 2)))[0].T  # (2, P)

    rng = stream(config, 0, 1)
    base = rng.normal(2.5, 1.3, config.genes)  # (G,)
    loadings = np.zeros((p + _NUISANCE, config.genes))
    module = max(1, config.genes // (2 * p))  # half of the genes belong to a program
    order = rng.permutation(config.genes)
    for factor in range(p + _NUISANCE):
        members = order[factor * module : (factor + 1) * module] if factor < p else rng.permutation(order)[: 2 * module]
        loadings[factor, members] = rng.uniform(0.2, 0.8, len(members)) * rng.choice((-1.0, 1.0), len(members))

    rng = stream(config, 0, 2)
    directions = rng.standard_normal((p, rank))
    return World(
        label_plane=plane,
        base=base,
        loadings=loadings,
        tissue_mean=rng.standard_normal((len(TISSUES), rank)) * 0.8,
        tissue_spread=rng.uniform(0.4, 1.2, (len(TISSUES), rank)),
        programs=directions / np.linalg.norm(directions, axis=1, keepdims=True),
        stain=np.linalg.qr(rng.standard_normal((rank, min(_STAIN_RANK, rank))))[0].T,
        basis=np.linalg.qr(rng.standard_normal((config.features, rank)))[0].T * math.sqrt(config.features / rank),
    )


def draw_sites(config: SimulationConfig, cohort: int) -> list[Site]:
    """The hospitals of a cohort; those of another cohort are other ones."""
    names, sites = ("site", "external"), []
    for index in range(config.external_sites if cohort == EXTERNAL else config.sites):
        rng, size = stream(config, 1, cohort, index), config.site_effect
        width = min(_STAIN_RANK, config.features)
        sites.append(
            Site(
                name=f"{names[cohort]}-{index + 1}",
                genes=0.3 * size * rng.standard_normal(config.genes),
                gain=np.exp(0.2 * size * rng.standard_normal(width)),
                shift=0.5 * size * rng.standard_normal(width),
            )
        )
    return sites


def draw_cases(config: SimulationConfig, world: World, cohort: int) -> list[Case]:
    """As many cases as the slides of the cohort need; the last may own fewer slides than it would."""
    left = config.external_slides if cohort == EXTERNAL else config.slides
    cases: list[Case] = []
    for index in count():
        if left <= 0:
            return cases
        cases.append(_draw_case(config, world, cohort, index, left))
        left -= cases[-1].slides
    raise AssertionError("unreachable")


def _draw_case(config: SimulationConfig, world: World, cohort: int, index: int, left: int) -> Case:
    rng = stream(config, 2, cohort, index)
    z, other = rng.standard_normal((2, config.programs))  # (P,) each
    clean = world.label_plane @ z  # (2,)
    noisy = math.sqrt(1 - config.label_noise) * clean + math.sqrt(config.label_noise) * rng.standard_normal(2)
    label = _label(config, float(noisy[0]), float(noisy[1]))
    several, two, missing, biased, place = rng.random(5)
    own = (2 if two < 0.7 else 3) if several < config.multi_slide else 1
    return Case(
        case_id=f"{'ext' if cohort == EXTERNAL else 'sim'}{index + 1:05d}",
        label=label,
        site=_site(config, cohort, label, biased < config.site_bias, place),
        slides=min(own, left),
        score=float(clean[0]),
        latent=z,
        visible=config.visibility * z + math.sqrt(1 - config.visibility**2) * other,
        has_omics=missing >= config.missing_omics,
    )


def _label(config: SimulationConfig, a: float, b: float) -> int:
    if config.classes == 2:
        return int(a > NormalDist().inv_cdf(1 - config.positive))
    turn = math.atan2(b, a) / (2 * math.pi) % 1.0  # uniform, since a and b are independent with unit variance
    if turn >= config.positive:
        return 0
    return min(1 + int(turn / config.positive * (config.classes - 1)), config.classes - 1)


def _site(config: SimulationConfig, cohort: int, label: int, biased: bool, place: float) -> int:
    """Any site; for a share of the internal cases only those that see this class more often."""
    sites = config.external_sites if cohort == EXTERNAL else config.sites
    choices = range(label % sites, sites, config.classes) if biased and cohort == INTERNAL else range(sites)
    return choices[int(place * len(choices))]


def draw_omics(config: SimulationConfig, world: World, site: Site, case: Case, cohort: int) -> NDArray[np.int64]:
    """Counts (G,) of one case."""
    rng = stream(config, 3, cohort, int(case.case_id[3:]))
    factors = np.concatenate([case.latent, rng.standard_normal(_NUISANCE)])  # (P + nuisance,)
    noise = config.gene_noise * rng.standard_t(4, config.genes)
    rate = np.exp(world.base + factors @ world.loadings + site.genes + noise + 0.3 * rng.standard_normal())
    return rng.poisson(np.minimum(rate, _MAX_RATE))


def draw_slides(
    config: SimulationConfig, world: World, site: Site, case: Case, cohort: int
) -> Iterator[tuple[str, SlideDraw]]:
    """The slides of a case, one after the other."""
    for k, slide_id in enumerate(case.slide_ids()):
        yield slide_id, draw_slide(config, world, site, case, stream(config, 4, cohort, int(case.case_id[3:]), k))


def draw_slide(config: SimulationConfig, world: World, site: Site, case: Case, rng: np.random.Generator) -> SlideDraw:
    """A slide that shows what is visible of the case, at its site."""
    n = round(config.patches * math.exp(config.patches_spread * rng.standard_normal()))
    n = min(max(n, _MIN_PATCHES), config.patches_max)
    cells, tissue = _layout(rng, n, config.tumour_fraction)  # (N, 2), (N,)
    rank = world.tissue_mean.shape[1]
    spread = world.tissue_spread.astype(np.float32)[tissue]
    c = world.tissue_mean[tissue] + spread * rng.standard_normal((n, rank), dtype=np.float32)  # (N, R)

    inside = np.flatnonzero(tissue == TUMOUR)
    regions = int(rng.integers(1, _MAX_REGIONS + 1))
    seeds = cells[rng.choice(inside, regions)]  # (r, 2)
    region = np.full(n, -1, np.int8)
    region[inside] = ((cells[inside, None] - seeds) ** 2).sum(-1).argmin(1)
    h = config.heterogeneity
    strength = config.program_strength * rng.uniform(1 - h, 1 + h, (regions, 1))
    shown = strength * (case.visible + h * rng.standard_normal((regions, config.programs)))  # (r, P)
    c[inside] += (shown @ world.programs)[region[inside]]

    jitter = 0.15 * config.site_effect * rng.standard_normal(len(world.stain))  # staining differs from day to day
    stained = c @ world.stain.T  # (N, stain)
    c += ((site.gain - 1) * stained + site.shift + jitter) @ world.stain
    x = c.astype(np.float32) @ world.basis.astype(np.float32)
    x += np.float32(config.feature_noise) * rng.standard_normal(x.shape, dtype=np.float32)
    with np.errstate(over="ignore"):
        stored = x.astype(config.dtype)
    if not np.isfinite(stored).all():
        raise InputError(
            f"simulation: dtype: expected one that holds values up to {np.abs(x).max():.0f}, got {config.dtype}; "
            "use float32, or lower program_strength, feature_noise or site_effect"
        )
    corner = rng.integers(0, 64, 2) * config.patch_size
    return SlideDraw(stored, cells * config.patch_size + corner, tissue, region)


def _layout(rng: np.random.Generator, n: int, tumour_fraction: float) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Cells (N, 2) as column and row of one piece of tissue in raster order, and their tissue types (N,)."""
    side = math.ceil(math.sqrt(n / _FILL))
    ys, xs = np.mgrid[:side, :side]

    def field() -> Floats:
        smooth = gaussian_filter(rng.standard_normal((side, side)), max(1.0, 0.08 * side), mode="wrap")
        return np.asarray(smooth / smooth.std())

    radius = np.hypot(ys - (side - 1) / 2, xs - (side - 1) / 2) / (side / 2)
    chosen = np.sort(np.argsort(4 * radius - field(), axis=None, kind="stable")[:n])  # row by row
    tissue = np.full(n, TISSUES.index("stroma"), np.uint8)
    tumour = max(1, round(n * tumour_fraction * rng.uniform(0.5, 1.5)))
    outside = rng.dirichlet(20 * np.array(_SHARES)) * (n - tumour)
    free = np.ones(n, bool)
    for name, size in (("tumour", tumour), ("background", round(outside[1])), ("immune", round(outside[2]))):
        wanted = np.where(free, field().ravel()[chosen], -np.inf)
        top = np.argsort(-wanted, kind="stable")[: min(size, int(free.sum()))]
        tissue[top] = TISSUES.index(name)
        free[top] = False
    return np.stack([xs.ravel()[chosen], ys.ravel()[chosen]], axis=1).astype(np.int64), tissue

"""The dials of a simulation: each with its range, its unit and what it does, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from momkd.errors import InputError


def _dial(default: Any, low: float, high: float, unit: str, help: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "unit": unit, "help": help})


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate. `dials()` lists every dial with range, unit and meaning.

    Raises:
        InputError: a dial out of its range; the line says which and what the range is.

    Example:
        >>> SimulationConfig(slides=40, visibility=0.8).visibility
        0.8
    """

    seed: int = _dial(0, 0, 2**63 - 1, "number", "everything follows from it")
    slides: int = _dial(160, 10, 1_000_000, "slides", "size of the cohort; more slides never change the earlier ones")
    external_slides: int = _dial(60, 0, 1_000_000, "slides", "size of the cohort from other hospitals; 0 writes none")
    multi_slide: float = _dial(0.15, 0, 1, "share of cases", "own two or three slides")

    classes: int = _dial(2, 2, 10, "classes", "number of labels")
    positive: float = _dial(0.4, 0.05, 0.95, "share of cases", "not in class 0; the other classes share it equally")
    programs: int = _dial(6, 2, 64, "programs", "independent molecular states of a tumour; half vote on the label")
    label_noise: float = _dial(0.06, 0, 1, "share of variance", "of the label's score that no program explains")

    genes: int = _dial(500, 16, 100_000, "genes", "in the expression table; half of them follow a program")
    gene_noise: float = _dial(0.5, 0, 5, "natural log", "spread of a gene that nothing explains (Student t, 4 degrees)")
    missing_omics: float = _dial(0.1, 0, 1, "share of cases", "have no expression")

    visibility: float = _dial(
        0.6, 0, 1, "correlation", "of what a tumour looks like with its programs: 0 nothing, 1 as much as genes know"
    )
    program_strength: float = _dial(
        1.0, 0, 100, "spreads", "of a tumour patch by one program, against 0.4 to 1.2 within a tissue type"
    )
    heterogeneity: float = _dial(
        0.5, 0, 1, "share", "by which regions of a tumour differ in strength and direction of their programs"
    )
    tumour_fraction: float = _dial(
        0.2, 0.01, 0.6, "share of patches", "of the tumour, on average; slides vary from half of it to 1.5 times"
    )

    features: int = _dial(128, 8, 8192, "columns", "width of the feature vectors")
    feature_noise: float = _dial(0.5, 0, 100, "spreads", "of a feature that means nothing, against about 1 that does")
    dtype: str = field(
        default="float16", metadata={"unit": "type", "help": "of the stored features: float16 or float32"}
    )
    patches: int = _dial(300, 20, 1_000_000, "patches", "median of a slide")
    patches_spread: float = _dial(0.5, 0, 3, "natural log", "spread of the number of patches")
    patches_max: int = _dial(3000, 20, 1_000_000, "patches", "most that a slide has; the least is 20")
    patch_size: int = _dial(512, 1, 65_536, "level-0 pixels", "side of a patch; patches abut")

    sites: int = _dial(5, 1, 1000, "hospitals", "of the cohort")
    external_sites: int = _dial(3, 1, 1000, "hospitals", "of the external cohort, none in common")
    site_effect: float = _dial(1.0, 0, 10, "factor", "on stain (shift 0.5, gain 20 %) and batch effect of genes (0.3)")
    site_bias: float = _dial(0.2, 0, 1, "share of cases", "that sit at hospitals chosen by class; external ones don't")

    folds: int = _dial(5, 2, 100, "folds", "of the cross-validation")
    val_fraction: float = _dial(0.15, 0.01, 0.9, "share", "of the cases outside the test part that validate")

    def __post_init__(self) -> None:
        for dial in fields(self):
            value, meta = getattr(self, dial.name), dial.metadata
            if dial.name == "dtype":
                good, wanted = value in ("float16", "float32"), "float16 or float32"
            else:
                whole = dial.type == "int"
                kinds = (int,) if whole else (int, float)
                good = type(value) in kinds and meta["low"] <= value <= meta["high"]
                wanted = f"{'a whole number' if whole else 'a number'} from {meta['low']} to {meta['high']}"
            if not good:
                raise InputError(
                    f"simulation: {dial.name}: expected {wanted} ({meta['unit']}), got {value!r}; change it"
                )
        if self.patches_max < self.patches:
            raise InputError(
                f"simulation: patches_max: expected at least the median patches={self.patches}, "
                f"got {self.patches_max}; raise it"
            )
        if self.genes < 2 * self.programs:
            raise InputError(
                f"simulation: genes: expected at least 2 a program ({2 * self.programs}), got {self.genes}; "
                "simulate more genes or fewer programs"
            )
        if self.slides < 4 * self.folds:
            raise InputError(
                f"simulation: slides: expected at least 4 a fold ({4 * self.folds}), got {self.slides}; "
                "simulate more slides or fewer folds"
            )

    def as_dict(self) -> dict[str, Any]:
        """Every dial by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def dials(cls) -> list[tuple[str, Any, str, str]]:
        """(name, default, unit and range, meaning) of every dial."""
        listed = []
        for dial in fields(cls):
            meta = dial.metadata
            span = f", {meta['low']} to {meta['high']}" if "low" in meta else ""
            listed.append((dial.name, dial.default, meta["unit"] + span, meta["help"]))
        return listed

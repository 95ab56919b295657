"""Simulated cohorts: slides, labels and genes whose truth is known, to try everything without a patient's data."""

from typing import TYPE_CHECKING

from momkd._lazy import lazily
from momkd.simulate.config import SimulationConfig

if TYPE_CHECKING:
    from momkd.simulate.write import SimulatedCohort, simulate

__all__ = ["SimulatedCohort", "SimulationConfig", "simulate"]

__getattr__, __dir__ = lazily(__name__, dict.fromkeys(("SimulatedCohort", "simulate"), "momkd.simulate.write"))

"""Simulated cohorts: slides, labels and genes whose truth is known, to try everything without a patient's data."""

from momkd.simulate.config import SimulationConfig
from momkd.simulate.write import SimulatedCohort, simulate

__all__ = ["SimulatedCohort", "SimulationConfig", "simulate"]

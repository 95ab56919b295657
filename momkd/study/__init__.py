"""Studies: arms side by side on a cohort, by repeated cross-validation, with intervals; see `momkd study`."""

from momkd.study.arms import ARMS, REFERENCE, Arm, choose_arms
from momkd.study.cohort import StudyCohort, hold_out, semisynthetic_cohort, simulated_cohort
from momkd.study.report import study_table, write_study_report
from momkd.study.results import study_results
from momkd.study.run import Study, run_study

__all__ = [
    "ARMS",
    "REFERENCE",
    "Arm",
    "Study",
    "StudyCohort",
    "choose_arms",
    "hold_out",
    "run_study",
    "semisynthetic_cohort",
    "simulated_cohort",
    "study_results",
    "study_table",
    "write_study_report",
]

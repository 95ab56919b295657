"""Assembled models: MoMKD, the WSI-only baseline and the genomics-only teacher, trained by the same loop."""

from momkd.models.abmil import ABMIL
from momkd.models.base import MemoryRows, MILModel, Prediction, TrainingStep
from momkd.models.blocks import SlideInBlocks
from momkd.models.distillation import BatchDistillation
from momkd.models.momkd import MoMKD
from momkd.models.omics import OmicsClassifier

__all__ = [
    "ABMIL",
    "BatchDistillation",
    "MILModel",
    "MemoryRows",
    "MoMKD",
    "OmicsClassifier",
    "Prediction",
    "SlideInBlocks",
    "TrainingStep",
]

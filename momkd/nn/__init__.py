"""Modules: parameters and buffers around `momkd.functional`."""

from momkd.nn.memory import MemoryBank, MemoryGuidedPool, SoftAngleLoss
from momkd.nn.omics import OmicsDecoder, OmicsEncoder
from momkd.nn.pooling import GatedAttentionPool

__all__ = [
    "GatedAttentionPool",
    "MemoryBank",
    "MemoryGuidedPool",
    "OmicsDecoder",
    "OmicsEncoder",
    "SoftAngleLoss",
]

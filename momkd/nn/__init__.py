"""Modules: parameters and buffers around `momkd.functional`."""

from momkd.nn.graph import GATv2Layer, GraphEncoder
from momkd.nn.memory import GatedMemoryPool, MemoryBank, MemoryGuidedPool, SoftAngleLoss
from momkd.nn.omics import OmicsDecoder, OmicsEncoder
from momkd.nn.pooling import GatedAttentionPool

__all__ = [
    "GATv2Layer",
    "GatedAttentionPool",
    "GatedMemoryPool",
    "GraphEncoder",
    "MemoryBank",
    "MemoryGuidedPool",
    "OmicsDecoder",
    "OmicsEncoder",
    "SoftAngleLoss",
]

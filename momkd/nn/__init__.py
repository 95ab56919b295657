"""Modules: parameters and buffers around `momkd.functional`."""

from momkd.nn.graph import GATv2Layer, GraphEncoder
from momkd.nn.memory import MemoryBank, SoftAngleLoss
from momkd.nn.omics import OmicsDecoder, OmicsEncoder
from momkd.nn.pooling import GatedAttentionPool, GatedMemoryPool, MemoryGuidedPool

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

"""The public functions: they check their arguments, say what is wrong in one line, and call an op."""

from momkd.functional.graph import graph_attention
from momkd.functional.memory import (
    ema_accumulate,
    ema_apply_,
    ema_scatter_,
    memory_similarity,
    reseed_,
    soft_angle_loss,
    spherical_kmeans,
)
from momkd.functional.pooling import (
    attention_pool,
    gated_attention_pool,
    gated_attention_scores,
    memory_guided_pool,
)

__all__ = [
    "attention_pool",
    "ema_accumulate",
    "ema_apply_",
    "ema_scatter_",
    "gated_attention_pool",
    "gated_attention_scores",
    "graph_attention",
    "memory_guided_pool",
    "memory_similarity",
    "reseed_",
    "soft_angle_loss",
    "spherical_kmeans",
]

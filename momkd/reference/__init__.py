"""The definition of every op in plain torch: differentiable, any device, any float dtype up to float64.

These functions are what each kernel is compared with, and they are the `torch` backend. An op with a hand-written
backward has its formulas here too, checked against autograd through the forward.
"""

from momkd.reference.attention_pool import attention_pool, attention_pool_backward
from momkd.reference.ema_scatter import ema_accumulate, ema_apply_, ema_scatter_, reseed_
from momkd.reference.gated_attention_pool import (
    gated_attention_pool,
    gated_attention_pool_backward,
    gated_attention_scores,
    gated_attention_scores_backward,
)
from momkd.reference.graph_attention import graph_attention, graph_attention_backward
from momkd.reference.memory_guided_pool import memory_guided_pool, memory_guided_pool_backward
from momkd.reference.memory_similarity import memory_similarity, memory_similarity_backward
from momkd.reference.philox import edge_dropout_mask, gate_dropout_masks, philox4x32
from momkd.reference.soft_angle_loss import soft_angle_loss, soft_angle_loss_backward
from momkd.reference.spherical_kmeans import spherical_kmeans

__all__ = [
    "attention_pool",
    "attention_pool_backward",
    "edge_dropout_mask",
    "ema_accumulate",
    "ema_apply_",
    "ema_scatter_",
    "gate_dropout_masks",
    "gated_attention_pool",
    "gated_attention_pool_backward",
    "gated_attention_scores",
    "gated_attention_scores_backward",
    "graph_attention",
    "graph_attention_backward",
    "memory_guided_pool",
    "memory_guided_pool_backward",
    "memory_similarity",
    "memory_similarity_backward",
    "philox4x32",
    "reseed_",
    "soft_angle_loss",
    "soft_angle_loss_backward",
    "spherical_kmeans",
]

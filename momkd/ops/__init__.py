"""The ops as `torch.library` custom ops: the only place where one is registered.

Importing this package defines `torch.ops.momkd.*` with fake (shape) and autograd registrations. Arguments are taken as
valid; `momkd.functional` is the public face.
"""

from momkd.ops.attention_pool import attention_pool
from momkd.ops.ema_scatter import ema_accumulate, ema_apply_, ema_scatter_
from momkd.ops.gated_attention_pool import gated_attention_pool, gated_attention_scores
from momkd.ops.graph_attention import graph_attention
from momkd.ops.memory_guided_pool import memory_guided_pool
from momkd.ops.memory_similarity import memory_similarity
from momkd.ops.soft_angle_loss import soft_angle_loss

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
    "soft_angle_loss",
]

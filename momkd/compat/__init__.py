"""Drop-ins for other MIL code, one module a project, and `accelerate`, which swaps them into models that exist.

A drop-in has its project's constructor arguments, parameter names, `forward` and return values, and is computed by
momkd's ops; beside what the project takes, each takes `Bags`.
"""

from momkd.compat import attention_deep_mil, clam, dsmil, dtfd, eva, mil_lab, momkd_reference, torchmil, trident
from momkd.compat._accelerate import Left, Report, Swap, accelerate, restore

__all__ = [
    "Left",
    "Report",
    "Swap",
    "accelerate",
    "attention_deep_mil",
    "clam",
    "dsmil",
    "dtfd",
    "eva",
    "mil_lab",
    "momkd_reference",
    "restore",
    "torchmil",
    "trident",
]

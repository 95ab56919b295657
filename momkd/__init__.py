"""momkd: kernels for multiple-instance learning on whole-slide images, and momentum memory knowledge distillation.

Everything but `doctor` is loaded when it is first asked for: `momkd --help` imports no torch.
"""

from typing import TYPE_CHECKING

from momkd._lazy import lazily
from momkd.doctor import doctor  # at once: a lazy one would give way to the module of its name after first use

if TYPE_CHECKING:
    from momkd import compat, functional, graph, models, nn, ops, reference
    from momkd._version import __version__ as __version__
    from momkd.bags import Bags
    from momkd.budget import gate_memory
    from momkd.gpu import tune

__all__ = ["Bags", "compat", "doctor", "functional", "gate_memory", "graph", "models", "nn", "ops", "reference", "tune"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        **{name: f"momkd.{name}" for name in ("compat", "functional", "graph", "models", "nn", "ops", "reference")},
        "Bags": "momkd.bags",
        "gate_memory": "momkd.budget",
        "tune": "momkd.gpu",
        "__version__": "momkd._version",
    },
)

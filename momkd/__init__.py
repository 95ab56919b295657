"""momkd: kernels for multiple-instance learning on whole-slide images, and momentum memory knowledge distillation."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from momkd.bags import Bags
from momkd.budget import gate_memory
from momkd.doctor import doctor  # at once: a lazy one would give way to the module of its name after first use
from momkd.gpu import tune

if TYPE_CHECKING:
    from momkd import compat, functional, graph, models, nn, ops, reference

try:
    __version__ = version("momkd")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["Bags", "compat", "doctor", "functional", "gate_memory", "graph", "models", "nn", "ops", "reference", "tune"]

_SUBMODULES = {"compat", "functional", "graph", "models", "nn", "ops", "reference"}


def __getattr__(name: str) -> Any:
    """Load submodules at first use, so that `import momkd` is quick."""
    if name in _SUBMODULES:
        return import_module(f"momkd.{name}")
    raise AttributeError(f"module 'momkd' has no attribute {name!r}")

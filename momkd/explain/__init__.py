"""What a trained model looks at: attention over slides, and the patches that its prototypes stand for."""

from momkd.explain.run import Explained, explain_run
from momkd.explain.view import Options

__all__ = ["Explained", "Options", "explain_run"]

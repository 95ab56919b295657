"""Other people's MIL models: their checkpoints and signatures, computed by momkd."""

from momkd.compat import momkd_reference

__all__ = ["momkd_reference"]

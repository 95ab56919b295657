"""The command line. Exit codes: 0 done, 2 bad input with one clear line, 1 a bug of momkd."""

from momkd.cli import learning, preparing  # the commands add themselves
from momkd.cli.common import app, one_clear_line

__all__ = ["app", "learning", "main", "preparing"]


def main() -> None:
    """The `momkd` command."""
    preparing.register_simulate()
    with one_clear_line():
        app(prog_name="momkd")

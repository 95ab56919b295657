"""The version of the installed package, which takes longer to look up than all else that `import momkd` does."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("momkd")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

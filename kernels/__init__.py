"""Triton kernels and their launch arithmetic, installed as `momkd.kernels`.

The folder lies beside `momkd` in the repository, and `kernels` is another project's name on PyPI: an import under
any other name than `momkd.kernels` is a mistake and is refused.
"""

if __name__ != "momkd.kernels":
    raise ImportError(
        f"this package is `momkd.kernels`, not `{__name__}`: install momkd (`pip install -e .` in the repository) and "
        "`import momkd.kernels`; for the PyPI project `kernels`, run outside momkd's repository"
    )

"""How close is right: the tolerances of the library, in one place.

float32: relative L2 error against float64 of at most 1e-5 forward and 1e-4 for gradients. Half precision: at most twice
the error of plain torch in that precision, and a cosine of at least 0.999 for gradients.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

FORWARD = 1e-5
GRADIENT = 1e-4
HALVES = (torch.float16, torch.bfloat16)

# Bag sizes that break kernels: empty, one row, block edges, one giant among tiny ones, nothing at all.
RAGGED: dict[str, tuple[int, ...]] = {
    "mixed": (0, 1, 15, 16, 17, 0, 127, 128, 129, 3, 0),
    "one row": (1,),
    "one empty": (0,),
    "no bags": (),
    "giant": (1, 1, 2000, 1, 0, 1),
    "many tiny": tuple(i % 3 for i in range(70)),
}


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def relative(got: Tensor, want: Tensor) -> float:
    """|got − want| / |want| in float64; the absolute error where want is zero."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error, size = (got.detach().double() - want.detach().double()).norm().item(), want.detach().double().norm().item()
    return error / size if size > 0 else error


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str = "result") -> None:
    error = relative(got, want)
    assert error <= tolerance, f"{name}: relative L2 error {error:.2e}, allowed {tolerance:.0e}"


def assert_half(got: Tensor, want: Tensor, plain: Tensor, name: str = "result") -> None:
    """`plain` is what torch gives in the same low precision."""
    allowed = 2 * relative(plain, want) + 1e-7
    error = relative(got, want)
    assert error <= allowed, f"{name}: relative L2 error {error:.2e}, allowed twice plain torch's: {allowed:.2e}"


def cosine(got: Tensor, want: Tensor) -> float:
    a, b = got.double().flatten(), want.double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))


def sparse(rows: int, gap: int, width: int) -> Tensor:
    """(rows, width) float32, `gap` elements apart, in a file of holes that is deleted at once."""
    with tempfile.NamedTemporaryFile() as file:
        size = (rows - 1) * gap + width
        file.truncate(size * 4)
        flat = torch.from_file(file.name, shared=True, size=size, dtype=torch.float32)
    return flat.as_strided((rows, width), (gap, 1))

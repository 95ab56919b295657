"""What a row of the fuzz suite is, and the mutations that most of them share."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBERS = (0, 1, 2, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)

WORK = "work"  # beside the file that is used: a folder where using it may write

Mutate = Callable[[Path, random.Random, "list[bytes]"], bytes]


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A few of: bits, bytes, numbers, cuts, gaps, zeros, repeats, pieces of another file."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not made:
            break
        # Headers are at the ends of most formats.
        near = rng.choice((len(made), len(made), min(len(made), 600)))
        at = rng.randrange(near) if rng.random() < 0.8 else len(made) - 1 - rng.randrange(near)
        size = rng.choice((1, 2, 4, 8, 64, 512))
        match rng.randrange(9):
            case 0:
                made[at] ^= 1 << rng.randrange(8)
            case 1:
                made[at] = rng.randrange(256)
            case 2 | 3:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(NUMBERS) % 256**width
                made[at : at + width] = number.to_bytes(width, rng.choice(("little", "little", "big")))
            case 4:
                del made[at:]
            case 5:
                del made[at : at + size]
            case 6:
                made[at : at + size] = bytes(size)
            case 7:
                made[at:at] = made[at : at + size]
            case _:
                other = rng.choice(others)
                start = rng.randrange(len(other)) if other else 0
                made[at : at + size] = other[start : start + size]
    return bytes(made)


def mutated(path: Path, rng: random.Random, others: list[bytes]) -> bytes:
    """The bytes of a good file after `mutate`."""
    return mutate(path.read_bytes(), rng, others)


@dataclass(frozen=True)
class Kind:
    """A family of files: each case is one of them, mutated, and used.

    Args:
        make: writes good files, and hostile ones that are whole, into a folder; what they need may lie beside it.
        use: reads one, and asserts that what it gives is valid; anything but an InputError of one line is a fault.
        cases: how many the tests run. The first are the files as they were made.
        mutate: (a file as made, random numbers, the bytes of all of them) -> the bytes to try.
    """

    make: Callable[[Path], None]
    use: Callable[[Path], None]
    cases: int
    mutate: Mutate = mutated

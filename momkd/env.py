"""Every environment variable that momkd reads at run time.

MOMKD_BACKEND: the backend for every op that has it, instead of the best that can run: triton, cuda, native or torch.
    An op without that backend keeps its own choice (`momkd doctor` shows it); an op that has it but cannot run it here
    raises with the reason.
MOMKD_ISA: the instruction set of the native CPU kernels, instead of the best that this processor has: baseline, avx2 or
    avx512, as far as they were compiled. Read when the kernels are first used; for tests and measurements.
MOMKD_TUNE: with 1, Triton kernels time a few ways to cut their work at their first use in a shape (`momkd.tune`).
MOMKD_GATE_MEMORY: bytes that a call of the gate may keep for its backward (`momkd.gate_memory`); 0 keeps nothing.
MOMKD_CACHE_DIR: the folder of what was found so and of kernels compiled by NVRTC, by default ~/.cache/momkd.
MOMKD_RANK_TIMEOUT: seconds after which a rank of a distributed training gives up waiting for the others; 1800, and
    300 until they have come.
TRITON_INTERPRET: Triton's own; with 1 its kernels run in Python on the CPU, slowly, to look at their numbers.
WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: as torchrun sets them for each process (torch reads more).
SLURM_JOB_ID: as SLURM sets it, and keeps it when it puts a job into the queue again.
OMP_NUM_THREADS and the like: set for the processes that a study starts (`child_threads`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from momkd.errors import InputError


def backend_override() -> str | None:
    """MOMKD_BACKEND, or None when unset or empty."""
    return os.environ.get("MOMKD_BACKEND", "").strip().lower() or None


def instruction_set() -> str | None:
    """Return MOMKD_ISA, or None when unset or empty."""
    return os.environ.get("MOMKD_ISA", "").strip().lower() or None


def triton_interpreted() -> bool:
    """TRITON_INTERPRET, as Triton reads it."""
    return _switched_on("TRITON_INTERPRET")


def tuning_asked() -> bool:
    """MOMKD_TUNE."""
    return _switched_on("MOMKD_TUNE")


def gate_memory() -> int | None:
    """Return MOMKD_GATE_MEMORY, or None when unset or empty."""
    return (
        _count("MOMKD_GATE_MEMORY", -1, least=0, most=2**62)
        if os.environ.get("MOMKD_GATE_MEMORY", "").strip()
        else None
    )


def cache_folder() -> Path | None:
    """MOMKD_CACHE_DIR, or the folder for momkd among the user's caches; None where there is no home."""
    return _cache_folder(os.environ.get("MOMKD_CACHE_DIR", ""), os.path.expanduser("~"))


@cache  # every call of a Triton kernel asks
def _cache_folder(given: str, home: str) -> Path | None:
    if given := given.strip():
        return Path(os.path.expanduser(given))  # Path.expanduser raises where there is no such user
    return None if home == "~" else Path(home) / ".cache" / "momkd"


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return _count("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Which of them this is."""
    return _count("RANK", 0, least=0)


def local_rank() -> int:
    """Which of those on this machine."""
    return _count("LOCAL_RANK", 0, least=0)


def rank_timeout() -> int:
    """MOMKD_RANK_TIMEOUT."""
    return _count("MOMKD_RANK_TIMEOUT", 1800, least=1, most=10**7)


def join_timeout() -> int:
    """Seconds that a rank waits for the others to come: MOMKD_RANK_TIMEOUT where it is set, else 300."""
    return rank_timeout() if os.environ.get("MOMKD_RANK_TIMEOUT", "").strip() else 300


def meeting_point() -> str:
    """MASTER_ADDR:MASTER_PORT, where ranks meet, once they and RANK are such that ranks can meet.

    Raises:
        InputError: naming the variable.
    """
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():
            raise InputError(
                f"{name}: expected it beside WORLD_SIZE={world_size()}, as torchrun sets it, got nothing; start with "
                "torchrun, or unset WORLD_SIZE"
            )
    if rank() >= world_size():
        raise InputError(
            f"RANK: expected less than WORLD_SIZE={world_size()}, got {rank()}; start with torchrun, or correct it"
        )
    return f"{os.environ['MASTER_ADDR'].strip()}:{_count('MASTER_PORT', 0, least=0, most=65535)}"


def slurm_job() -> str | None:
    """SLURM_JOB_ID, or None outside of SLURM."""
    return os.environ.get("SLURM_JOB_ID", "").strip() or None


@contextmanager
def child_threads(count: int) -> Iterator[None]:
    """Processes that start inside the block are told to use so many threads, before they import anything."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _switched_on(name: str) -> bool:
    text = os.environ.get(name, "")
    return text != "" and text.strip().lower() in ("1", "true", "yes", "on", "y")


def _count(name: str, default: int, *, least: int, most: int = 2**31 - 1) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or len(text) > 20 or not least <= int(text) <= most:
        to = "" if most == 2**31 - 1 else f" to {most}"
        raise InputError(f"{name}: expected a whole number from {least}{to}, got {text[:80]!r}; unset it or correct it")
    return int(text)

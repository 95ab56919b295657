"""The CUDA kernels on the CPU: csrc/cuda compiled by a C++ compiler over tests/cpp, thread by thread.

What it shows is numbers, barriers that are missing (results that depend on the schedule), exchanges that not all
threads of a warp reach, copies that are read before they are waited for, and writes behind the shared memory.
It shows nothing of speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from momkd import cuda

ROOT = Path(__file__).resolve().parents[1]
FORWARD, REVERSE, SHUFFLED = 0, 1, (2, 3)  # even ones do asynchronous copies late, odd ones at once


def compiler() -> str | None:
    return next((found for name in ("g++", "c++") if (found := shutil.which(name))), None)


@cache
def library() -> ctypes.CDLL:
    """Built once for each state of the sources, in the folder of temporary files."""
    sources = [*sorted((ROOT / "tests" / "cpp").iterdir()), *sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"momkd-emulated-{os.getuid()}-{state}.so"
    if not built.is_file():
        unfinished = built.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Werror"]
        includes = [f"-I{ROOT / 'tests'}", f"-I{ROOT / 'csrc'}", "-Wno-unknown-pragmas"]
        command = [str(compiler()), *flags, *includes, str(ROOT / "tests/cpp/emulated_ema.cpp"), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(unfinished, built)
    loaded = ctypes.CDLL(str(built))
    loaded.emulate.restype = ctypes.c_char_p
    return loaded


class Emulator:
    """Takes the place of `momkd.cuda.start`, for tensors on the CPU."""

    def __init__(self) -> None:
        self.schedule = FORWARD
        self.started: list[str] = []

    def __call__(self, name: str, task: bytes, blocks: int, threads: int, shared: int, device: torch.device) -> None:
        self.started.append(name)
        wrong = library().emulate(name.encode(), task, blocks, threads, shared, self.schedule)
        assert not wrong, f"{name}: {wrong.decode()}"


def install(patch: pytest.MonkeyPatch) -> Emulator:
    """From here on the CUDA kernels run on CPU tensors."""
    if compiler() is None:
        pytest.skip("the CUDA kernels are emulated by a C++ compiler, and there is none")
    emulator = Emulator()

    def can_run(op: str, args: Sequence[Tensor | None] = ()) -> tuple[bool, str]:
        reason = cuda.unfit(*[t for t in args if t is not None][:2]) if args else ""
        return not reason, reason or "emulated"

    patch.setattr(cuda, "start", emulator)
    patch.setattr(cuda, "can_run", can_run)
    return emulator

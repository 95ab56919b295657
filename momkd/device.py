"""Where models run: the one meaning of `--device`."""

from __future__ import annotations

import re

import torch

from momkd import distributed, env
from momkd.errors import InputError


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or a GPU where there is one, else the CPU. Of several ranks each has a GPU of its own.

    Args:
        name: "cpu", "cuda" or "cuda:1"; AMD's GPUs are cuda too. None chooses.

    Raises:
        InputError: a device that is not here; the line says which are.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = name.strip().lower() if name is not None else ("cuda" if gpus else "cpu")
    wanted = "cpu" if wanted == "cpu:0" else wanted
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", wanted, re.ASCII)
    index = None if match is None or match[1] is None else int(match[1])
    if match is None or (wanted != "cpu" and (index or 0) >= gpus):
        here = ", ".join(["cpu", *(f"cuda:{n}" for n in range(gpus))])
        why = "" if gpus else " (torch finds no GPU; momkd doctor says why)"
        raise InputError(f"device: expected one of {here}, got {wanted[:80]!r}{why}; choose one or leave it out")
    if distributed.size() == 1 or wanted == "cpu":
        return torch.device(wanted)
    if index is not None:
        raise InputError(
            f"device: expected cuda or cpu with several ranks, got {name}; each takes the GPU of its number"
        )
    if env.local_rank() >= gpus:
        raise InputError(
            f"device: expected a GPU for each rank of a machine, got {gpus} GPUs and rank number {env.local_rank()}; "
            "start fewer (--nproc-per-node), or give --device cpu"
        )
    return torch.device("cuda", env.local_rank())

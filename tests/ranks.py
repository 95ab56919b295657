"""Runs a function in several processes that form a group of torch.distributed, as on several machines.

    run_ranks(tmp_path, 2, train_here, folder=...)

Each rank calls the function with the keywords, and what it returns comes back by torch.save. The ranks meet at a file,
so no port is chosen; and nothing ends the others when one dies, as torchrun would.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn  # before there is a group, as momkd.distributed.started does and says why

from tests.processes import start


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int  # negative: the signal
    stderr: str
    value: Any  # what the function returned, or None


def run_ranks(
    folder: Path, ranks: int, function: Callable[..., Any], *, timeout: float = 30, limit: float = 240, **given: Any
) -> list[Ended]:
    """Calls `function` on every rank.

    Args:
        folder: empty, for the meeting and the results.
        ranks: how many.
        function: of a module's top level.
        timeout: of a collective, in seconds.
        limit: after which the test fails, in seconds.
        given: keywords of the function.
    """
    started = [start(_rank, folder, rank, ranks, timeout, function, given) for rank in range(ranks)]
    try:
        codes = [process.wait(limit) for process in started]
    finally:
        for process in started:
            process.kill()
    results = [folder / f"result{rank}.pt" for rank in range(ranks)]
    values = [torch.load(path) if path.is_file() else None for path in results]
    return [Ended(code, process.stderr, value) for code, process, value in zip(codes, started, values, strict=True)]


def _rank(folder: Path, rank: int, ranks: int, timeout: float, function: Callable[..., Any], given: Any) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    torch.save(function(**given), folder / f"result{rank}.pt")
    gc.collect()
    torch.distributed.destroy_process_group()

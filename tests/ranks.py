"""Runs a function in several processes that form a group of torch.distributed, as on several machines.

    run_ranks(tmp_path, 2, "tests.test_distributed:train_here", folder=...)

Each rank calls the function with the keywords, which travel as JSON, and what it returns comes back by torch.save. The
ranks meet at a file, so no port is chosen; and nothing ends the others when one dies, as torchrun would.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int  # negative: the signal
    stderr: str
    value: Any  # what the function returned, or None


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_ranks(
    folder: Path, ranks: int, function: str, *, timeout: float = 30, limit: float = 240, **given: Any
) -> list[Ended]:
    """Calls `module:function` on every rank.

    Args:
        folder: empty, for the meeting and the results.
        ranks: how many.
        function: by name.
        timeout: of a collective, in seconds.
        limit: after which the test fails, in seconds.
        given: keywords of the function.
    """
    started = []
    for rank in range(ranks):
        line = [sys.executable, "-m", "tests.ranks", function, str(folder), str(rank), str(ranks), str(timeout)]
        line.append(json.dumps(given))
        started.append(subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT))
    try:
        errors = [process.communicate(timeout=limit)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    results = [folder / f"result{rank}.pt" for rank in range(ranks)]
    values = [torch.load(path) if path.is_file() else None for path in results]
    return [Ended(p.returncode, e, value) for p, e, value in zip(started, errors, values, strict=True)]


def main() -> None:
    function, folder, rank, ranks, timeout, given = sys.argv[1:]
    torch.set_num_threads(1)
    importlib.import_module(
        "torch.distributed.nn"
    )  # before there is a group, as momkd.distributed.started does and says why

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=float(timeout)),
    )
    module, _, name = function.partition(":")
    value = getattr(importlib.import_module(module), name)(**json.loads(given))
    torch.save(value, Path(folder) / f"result{rank}.pt")
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

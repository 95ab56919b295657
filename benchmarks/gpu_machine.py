"""The machine that `benchmarks.gpu_figures` measures on, and how calls become figures there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, relative
from benchmarks.measure import copy_rate, peak_bytes, product_rate, synchronize, timings

Call = Callable[[], object]
Figures = dict[str, Any]


class Item(NamedTuple):
    section: str
    name: str
    run: Callable[[], Figures]


@dataclass
class Machine:
    """What is measured on, and how large."""

    device: str
    tiny: bool = False  # a rehearsal: sizes of a few hundred rows
    plain_product: float = 0.0  # operations a second of (N, 1024) by (1024, 512), once measured

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 11

    def rows(self, full: int) -> int:
        return min(full, 200) if self.tiny else full

    def copy(self) -> float:
        return copy_rate(self.device, 1 if self.tiny else 0)

    def product(self, dtype: torch.dtype) -> float:
        return product_rate(self.device, dtype, 64 if self.tiny else 0)


def last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def measured(
    m: Machine, calls: Mapping[str, Call], work: tuple[float, float], dtype: torch.dtype, *, rounds: int = 0
) -> Figures:
    """Figures of each call, the first is ours; a peer that fails is named and left out."""
    mine = next(iter(calls))
    figures: Figures = {"forms": {}}
    able: dict[str, Call] = {}
    for name, call in calls.items():
        began = time.perf_counter()
        try:
            call()
            synchronize(m.device)
        except Exception as error:
            if name == mine:
                raise
            figures["forms"][name] = {"failed": last_line(error)}
            continue
        able[name] = call
        figures["forms"][name] = {"first call s": time.perf_counter() - began}
    for name, taken in timings(able, m.device, rounds=rounds or m.rounds).items():
        figures["forms"][name] |= {"ms": 1e3 * taken.device, "wall ms": 1e3 * taken.wall, "host us": 1e6 * taken.host}
        figures["forms"][name]["peak MB"] = peak_bytes(able[name], m.device) / 1e6
    ours = figures["forms"][mine]
    seconds, (operations, moved) = ours["ms"] / 1e3, work
    figures["TFLOP/s"], figures["GB/s"] = operations / seconds / 1e12, moved / seconds / 1e9
    figures["attained"] = max(operations / m.product(dtype), moved / m.copy()) / seconds
    for key, unit in (("times as fast as", "ms"), ("times as fast until the end as", "wall ms")):
        figures[key] = {name: figures["forms"][name][unit] / ours[unit] for name in able if name != mine}
    return figures


def errors_of_forms(case: Case, figures: Figures) -> None:
    """Write into the figures how far each form that could run is from float64."""
    with torch.no_grad():
        want = case.exact(*(leaf.double() for leaf in case.leaves))
        for name, form in case.forms.items():
            if "failed" not in figures["forms"][name]:
                figures["forms"][name]["relative error"] = relative(form(), want)


def forward_only(form: Callable[[], Tensor]) -> Call:
    def run() -> Tensor:
        with torch.no_grad():
            return form()

    return run

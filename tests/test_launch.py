"""Kernels are started on the device of their tensors; the device is entered only where it is another one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

from momkd.reference.gated_attention_pool import GateParameters

pytest.importorskip("triton")
common = pytest.importorskip("momkd.kernels._common")


class Kernel:
    """Records the grids that it is started with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Kernel:
        self.grids.append(grid)
        return self

    def __call__(self, *args: object, **meta: object) -> None:
        pass


@pytest.mark.parametrize(("current", "entered"), [(0, ["cuda:1"]), (1, [])])
def test_the_device_is_entered_where_it_is_another(
    current: int, entered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        seen.append(str(wanted))
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:1")
    kernel = Kernel()
    common.launch(kernel, (2,), 5, x)
    common.launch(kernel, (0,), x)
    assert kernel.grids == [(2,)]
    assert seen == entered


def test_host_arithmetic() -> None:
    assert [common.next_power_of_2(n) for n in (1, 2, 3, 4, 5, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 2048]
    assert [common.cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("chip", "able"),
    [("sm_70", False), ("sm_72", False), ("sm_75", True), ("sm_90", True), ("sm_100", True), ("gfx", False)],
)
def test_the_fast_tanh_is_used_where_the_chip_has_it(chip: str, able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere ptxas refuses the kernel."""
    gate = importlib.import_module("momkd.kernels._gate")
    monkeypatch.setattr(gate, "chip", lambda device: chip)
    monkeypatch.setattr(gate, "_INTERPRETED", False)
    x, w = torch.ones(2, 4, dtype=torch.float16), torch.ones(3, 4)
    parameters = GateParameters(w, None, w, None, w[:1, :3], None)
    assert gate.gate_of(x, parameters, 0.0, None).flags["FAST"] is able
    assert gate.gate_of(x.float(), parameters, 0.0, None).flags["FAST"] is False

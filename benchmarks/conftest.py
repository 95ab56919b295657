"""Options of the benchmarks, and what machine they ran on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import momkd


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="momkd: larger shapes, for a machine with time and memory")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    report = momkd.doctor(show=False).as_dict()
    machine_info["momkd"] = {"versions": report["versions"], "devices": report["devices"]}
    machine_info["threads"] = torch.get_num_threads()

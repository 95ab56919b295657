"""What a profiler is told of each launch: Triton's Proton calls these hooks with the kernel's arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from momkd import gpu
from tests import aot
from tests.aot_cases import CASES, HALF, LENGTHS, ROWS, SINGLE, Case

if reason := aot.unavailable():
    pytest.skip(reason, allow_module_level=True)


def told(case: Case) -> dict[str, list[dict[str, Any]]]:
    """What the hooks of all launches say, by kernel."""
    found: dict[str, list[dict[str, Any]]] = {}
    for launch in aot.record(case, "sm_90"):
        arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
        name = launch.kernel.__name__
        said = launch.kernel.launch_metadata((1, 1, 1), SimpleNamespace(name=name), arguments)
        found.setdefault(name, []).append(said)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_launch_says_its_work(case: Case) -> None:
    for name, launches in told(case).items():
        for said in launches:
            assert said["name"] == name
            assert said["bytes"] > 0
            (operations,) = (value for key, value in said.items() if key in ("flops16", "flops32"))
            assert operations > 0 or name == "attention_kernel"


def test_operations_and_bytes_of_the_gate() -> None:
    n, width, hidden, bags = ROWS, 1024, 256, len(LENGTHS)
    said = told(Case("gated_attention_pool", HALF, {"L": width, "D": hidden, "H": 1}))
    (forward,), (gradient,) = said["gated_attention_pool_fwd_kernel"], said["gate_gradient_kernel"]
    assert forward["flops16"] == 2 * n * (2 * width * hidden + hidden + width)
    assert gradient["flops16"] == 2 * n * hidden * (2 * width + 2)
    weights = 2 * (hidden * width + hidden) + hidden + 1
    rows_and_weights = 2 * (n * width + weights)
    assert forward["bytes"] - rows_and_weights >= 4 * (n + bags + 1)  # scores, offsets, and what tiles leave
    # Of the pooling's two launches one reads the features, the other adds to their gradient.
    scores, values = said["pool_backward_kernel"]
    assert scores["flops16"] == values["flops16"] == 2 * n * width
    assert values["bytes"] - scores["bytes"] == n * width * 2 - 4 * n


@pytest.mark.parametrize(("dtype", "key"), [(HALF, "flops16"), (SINGLE, "flops32")])
def test_absent_tensors_are_not_counted(dtype: torch.dtype, key: str) -> None:
    """Without the gate, dropout and gradient of the features, other tensors stand in their places."""
    sizes = {"L": 64, "D": 32, "H": 1}
    gated = told(Case("gated_attention_pool", dtype, sizes))["gated_attention_pool_fwd_kernel"][0]
    plain = told(Case("gated_attention_pool", dtype, sizes | {"ungated": True}))["gated_attention_pool_fwd_kernel"][0]
    assert gated["bytes"] - plain["bytes"] == dtype.itemsize * (64 * 32 + 32)
    assert gated[key] - plain[key] == 2 * ROWS * 64 * 32


def test_a_chunk_of_rows_counts_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gated_attention_pool", SINGLE, {"L": 64, "D": 32, "H": 1})
    (whole,) = told(case)["gate_gradient_kernel"]
    monkeypatch.setattr(gpu.kernels("gated_attention_pool"), "WORKSPACE", 1)
    parts = told(case)["gate_gradient_kernel"]
    assert len(parts) > 1
    assert sum(part["flops32"] for part in parts) == whole["flops32"]
    assert parts[0]["bytes"] > parts[-1]["bytes"]

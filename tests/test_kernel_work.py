"""What a profiler is told of each launch: Triton's Proton calls these hooks with the kernel's arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from momkd import gpu
from tests import aot, aot_cases
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
            assert operations > 0 or name in ("attention_kernel", "pack_gate_kernel")


def test_operations_and_bytes_of_the_gate() -> None:
    n, width, hidden, bags = ROWS, 1024, 256, len(LENGTHS)
    sizes = {"L": width, "D": hidden, "H": 1}
    said = told(Case("gated_attention_pool", HALF, sizes | {"kept": True}))
    (scores,), (gradient,) = said["gate_scores_kernel"], said["gate_gradient_kernel"]
    assert scores["flops16"] == 2 * n * hidden
    assert gradient["flops16"] == 2 * n * hidden * 2
    products, small = 2 * n * 2 * hidden, 2 * (3 * hidden + 1)  # two biases, w_a and b_a
    assert scores["bytes"] == products + small + 4 * n
    (pack,) = said["pack_gate_kernel"][1:]  # the second is backward's
    assert pack["bytes"] == 2 * 2 * (2 * hidden * width)
    parts = 4 * 3 * hidden
    assert gradient["bytes"] == 2 * products + small - 2 + 4 * n + parts
    # Not kept, products are made again where their gradients will lie: as many bytes.
    (again,) = told(Case("gated_attention_pool", HALF, sizes))["gate_gradient_kernel"]
    assert again == gradient
    # Of the pooling's two launches one reads the features, the other adds to their gradient.
    dots, values = said["pool_backward_kernel"]
    assert dots["flops16"] == values["flops16"] == 2 * n * width
    tiles = said["bag_sums_kernel"][0]["flops32"]
    assert values["bytes"] - dots["bytes"] == n * width * 2 - 4 * n - 4 * tiles
    (sums,), (softmax,) = said["bag_sums_kernel"], said["score_gradient_kernel"]
    assert sums["bytes"] == 4 * (tiles + 2 * bags + 1)
    assert softmax["flops32"] == 2 * n
    assert softmax["bytes"] == 4 * (3 * n + bags + 2 * bags + bags + 1)  # Σ α g · v, stats and offsets of bags


@pytest.mark.parametrize(("dtype", "key"), [(HALF, "flops16"), (SINGLE, "flops32")])
def test_absent_tensors_are_not_counted(dtype: torch.dtype, key: str) -> None:
    """Without the gate, dropout and gradient of the features, other tensors stand in their places."""
    sizes = {"L": 64, "D": 32, "H": 1}
    gated = told(Case("gated_attention_pool", dtype, sizes))["gate_scores_kernel"][0]
    plain = told(Case("gated_attention_pool", dtype, sizes | {"ungated": True}))["gate_scores_kernel"][0]
    assert gated["bytes"] - plain["bytes"] == dtype.itemsize * (ROWS * 32 + 32)
    assert gated[key] == plain[key]


def test_chunks_of_rows_count_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_cases, "LENGTHS", (2000, 500))
    monkeypatch.setattr(aot_cases, "ROWS", 2500)
    case = Case("gated_attention_pool", SINGLE, {"L": 64, "D": 32, "H": 1})
    whole = told(case)
    monkeypatch.setattr(gpu.kernels("gated_attention_pool"), "WORKSPACE", 1)
    parts = told(case)
    for kernel in ("gate_scores_kernel", "gate_gradient_kernel"):
        assert len(parts[kernel]) == 3
        assert sum(part["flops32"] for part in parts[kernel]) == whole[kernel][0]["flops32"]
        assert parts[kernel][0]["bytes"] > parts[kernel][-1]["bytes"]

"""memory_guided_pool forward and backward against its definition and against eager torch as one would write it.

Floor: z and values read forward and again backward, their gradients written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.bags import bag_of_each_row, pool_flattened, ragged
from benchmarks.cases import Case
from benchmarks.measure import compare, must_agree, on_each_device, require
from momkd import Bags, dispatch, reference
from momkd import functional as F

C, K, S, WIDTH = 2, 16, 64, 512


def eager(z: Tensor, values: Tensor, memory: Tensor, index: Tensor, temperature: Tensor) -> Tensor:
    cosines = torch.nn.functional.normalize(z, dim=1) @ memory.flatten(0, 1).T
    nearest = cosines.view(-1, C, K).amax(2)
    return pool_flattened(values, (nearest[:, 1] - nearest[:, 0]) / temperature, index)


def make_case(bags: Bags) -> Case:
    """The op and its peers on these bags; z, values and the temperature get gradients."""
    device, n = bags.features.device, bags.num_rows
    values, z = bags.features.requires_grad_(), torch.randn(n, S, device=device).requires_grad_()
    memory = torch.nn.functional.normalize(torch.randn(C, K, S, device=device), dim=-1)
    temperature = torch.tensor(0.2, device=device, requires_grad=True)
    index, given = bag_of_each_row(bags), (z, values, memory, bags.offsets, temperature)

    def exact(z: Tensor, values: Tensor, temperature: Tensor) -> Tensor:
        return reference.memory_guided_pool(z, values, memory.double(), bags.offsets, temperature, False)[0]

    return Case(
        {
            "momkd": lambda: F.memory_guided_pool(*given)[0],
            "reference": lambda: F.memory_guided_pool(*given, backend="torch")[0],
            "eager": lambda: eager(z, values, memory, index, temperature),
        },
        (z, values, temperature),
        exact,
        (2 * n * C * K * S + 4 * 2 * n * WIDTH, 3 * (z.nbytes + values.nbytes)),
        facts={"patches": n, "backend": dispatch.choose("memory_guided_pool", None, given)},
    )


@on_each_device
def test_memory_guided_pool(benchmark: Any, full: bool, device: str) -> None:
    require(device)
    case = make_case(ragged(device, 13_000 if full or device == "cuda" else 500, WIDTH, torch.float32))
    want = case.exact(*(leaf.detach().double() for leaf in case.leaves))
    must_agree(case.forms["momkd"](), want, 1e-5)
    compare(benchmark, device, case.steps(), work=case.work, **case.facts)

"""Under autocast, the ops that begin with a product take the dtype that torch's own product takes."""

from __future__ import annotations

import pytest
import torch

from momkd import functional as F
from momkd.graph import knn
from tests.ops.cases import OFFSETS

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_features_follow_torch(dtype: torch.dtype, lower: torch.dtype) -> None:
    x, weight, a = torch.randn(7, 4, dtype=dtype), torch.randn(3, 4), torch.randn(1, 3)
    edges = knn(torch.rand(7, 2), 3)
    with torch.autocast("cpu", lower):
        want = torch.nn.functional.linear(x, weight.to(dtype)).dtype
        pooled = F.gated_attention_pool(x, OFFSETS, weight, None, weight, None, a, None)
        passed = F.graph_attention(x, x, torch.randn(2, 2), edges)
    assert pooled.dtype == passed.dtype == want
    assert want == (torch.float64 if dtype == torch.float64 else lower)


def test_float64_features_take_parameters_as_they_are() -> None:
    x, weight, a = torch.randn(7, 4).double(), torch.randn(3, 4), torch.randn(1, 3)
    want = F.gated_attention_pool(x, OFFSETS, weight, None, weight, None, a, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.gated_attention_pool(x, OFFSETS, weight, None, weight, None, a, None), want)

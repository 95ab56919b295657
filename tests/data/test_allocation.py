"""Memory that runs out names slides, patches and what to lower."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from momkd.data.allocation import READING, TRAINING, memory_for
from momkd.data.batches import BagLoader
from momkd.errors import InputError

ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_one_line_names_slides_and_remedy(error: Exception) -> None:
    with pytest.raises(InputError) as caught, memory_for(["a", "b", "c", "d"], 900, "train on", TRAINING, "cuda:0"):
        raise error
    assert str(caught.value) == (
        "4 slides ('a', 'b', 'c', ...): expected memory of cuda:0 to train on 900 patches, got none left; lower "
        "train.patch_budget or train.max_patches, model.hidden_features"
    )
    one = r"slide 'a': .* lower train.max_patches, model.hidden_features$"
    with pytest.raises(InputError, match=one), memory_for(["a"], 900, "train on", TRAINING):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes"), ValueError("out of memory")):
        with pytest.raises(type(error), match=str(error)), memory_for(["a"], 1, "read", READING):
            raise error


def test_a_slide_that_does_not_fit_is_named_or_skipped() -> None:
    def read(slide: str) -> torch.Tensor:
        if slide == "giant":
            np.empty((1 << 60,), np.float32)
        return torch.ones(3, 2)

    sizes = {"giant": 1 << 40, "small": 3}
    for skipped in (None, {}):
        loader = BagLoader(["giant", "small"], np.array([0, 1]), sizes, read, skipped=skipped)
        if skipped is None:
            with pytest.raises(InputError, match="slide 'giant': expected memory of cpu to read 1099511627776 patches"):
                list(loader.batches(loader.once()))
        else:
            assert [batch.slide_ids for batch in loader.batches(loader.once())] == [("small",)]
            assert "giant" in skipped

"""Slides in blocks: the same as whole, in the memory of a block."""

from __future__ import annotations

import pytest
import torch

from momkd import Bags
from momkd.models import ABMIL, BatchDistillation, MILModel, MoMKD, SlideInBlocks
from tests.processes import start

MODELS = {
    "abmil": lambda: ABMIL(24, hidden_features=16, gate_features=8),
    "abmil, three classes": lambda: ABMIL(24, 3, hidden_features=16, gate_features=8, branch="per_class"),
    "distill": lambda: BatchDistillation(24, hidden_features=16, gate_features=8),
    **{
        f"momkd, {pooling}, {classes} classes": lambda pooling=pooling, classes=classes: MoMKD(
            24, classes, pooling=pooling, hidden_features=16, gate_features=8, projection_features=6, slots=3
        )
        for pooling in ("memory", "gated", "both")
        for classes in (2, 3)
    },
    "momkd, identity": lambda: MoMKD(24, encoder="identity", pooling="both", gate_features=8, slots=3),
}  # fmt: skip


def made(name: str) -> MILModel:
    model: MILModel = MODELS[name]().double().eval()
    if model.memory is not None:
        model.memory.memory.copy_(torch.randn_like(model.memory.memory))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 1, 300, 13), (64,)])
@torch.no_grad()
def test_blocks_are_the_whole(name: str, sizes: tuple[int, ...]) -> None:
    model = made(name)
    blocks = [torch.randn(n, 24, dtype=torch.float64) * 10 ** (i - 1) for i, n in enumerate(sizes)]  # uneven scores
    whole = model(Bags.from_list([torch.cat(blocks)]))
    seen = SlideInBlocks(model)
    for block in blocks:
        seen.add(block)
    got = seen.prediction()
    torch.testing.assert_close(got.logits, whole.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.attention, whole.attention, rtol=1e-5, atol=1e-7, check_dtype=False)
    assert (got.slots is None) == (whole.slots is None)
    assert got.slots is None or torch.equal(got.slots, whole.slots)


@torch.no_grad()
def test_projections() -> None:
    model = made("momkd, both, 2 classes")
    blocks = torch.randn(200, 24, dtype=torch.float64).split(60)
    whole = model.project(Bags.from_list([torch.cat(blocks)]))
    seen = SlideInBlocks(model, projected=True)
    for block in blocks:
        seen.add(block)
    got = seen.projections()
    torch.testing.assert_close(got.patches, whole.patches)
    torch.testing.assert_close(got.slides, whole.slides, rtol=1e-5, atol=1e-6)
    not_kept = SlideInBlocks(model)
    not_kept.add(blocks[0])
    with pytest.raises(ValueError, match="expected a MoMKD and projected=True"):
        not_kept.projections()


def test_no_block() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        SlideInBlocks(made("abmil")).prediction()


def test_a_score_far_above_all_others() -> None:
    """The exponentials of a block may be too large or too small for any float; only their differences count."""
    model = made("abmil")
    with torch.no_grad():
        model.pool.attention_w.weight.mul_(1e4)
    slide = torch.randn(90, 24, dtype=torch.float64)
    seen = SlideInBlocks(model)
    for block in slide.split(30):
        seen.add(block)
    torch.testing.assert_close(seen.prediction().logits, model(Bags.from_list([slide])).logits, rtol=1e-5, atol=1e-6)


def peak(blocks: int) -> None:
    import resource

    torch.manual_seed(0)
    model = MoMKD(16, pooling="both", hidden_features=256, gate_features=16, projection_features=8).eval()
    block, seen = torch.randn(50_000, 16), SlideInBlocks(model)
    seen.add(block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(blocks - 1):
        seen.add(block)
    assert seen.prediction().attention.shape == (50_000 * blocks, 1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_memory_is_that_of_a_block() -> None:
    process = start(peak, 8)  # 400,000 patches
    assert process.wait() == 0, process.stderr
    assert int(process.stdout) < 150_000  # kilobytes; whole it would be 360 MB more for the encoder's output alone

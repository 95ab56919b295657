"""CLAM's options: instance loss, features, attention alone, labels of several bags."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from momkd import Bags
from momkd.compat import clam
from momkd.reference import mil
from tests.compare import FORWARD, GRADIENT, assert_close

KINDS = [clam.CLAM_SB, clam.CLAM_MB]


def made(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(embed_dim=12, n_classes=3, k_sample=4, **options).eval()


def exact_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subtyping", [False, True])
def test_instance_loss(kind: Any, subtyping: bool) -> None:
    """Of one bag and of two (their mean), with gradients; labels and predictions of the chosen patches."""
    model = made(kind, subtyping=subtyping)
    bags, labels = [torch.randn(40, 12), torch.randn(9, 12)], torch.tensor([2, 0])
    exact = exact_of(model)
    want = [
        mil.clam_instance_loss(exact, mil.clam(exact, x.double()), int(y), 4, subtyping)
        for x, y in zip(bags, labels, strict=True)
    ]
    *_, one = model(bags[0], label=labels[:1], instance_eval=True)
    assert_close(one["instance_loss"], want[0], FORWARD)
    judged = 8 + 2 * 4 * subtyping
    assert one["inst_preds"].shape == one["inst_labels"].shape == (judged,)
    assert isinstance(one["inst_labels"], np.ndarray)
    assert one["inst_labels"].sum() == 4, "k positive ones, of the bag's own class"
    *_, both = model(Bags.from_list(bags), label=labels, instance_eval=True, return_features=True)
    assert_close(both["instance_loss"], sum(want) / 2, FORWARD)
    assert both["inst_preds"].shape == (2 * judged,)
    assert both["features"].shape == (2, 1 if kind is clam.CLAM_SB else 3, 512)
    both["instance_loss"].backward()
    (sum(want) / 2).backward()
    for n, p in model.named_parameters():
        if exact[n].grad is not None and exact[n].grad.norm() > 0:
            assert_close(p.grad, exact[n].grad, GRADIENT, n)
    assert model.attention_net[0].weight.grad.norm() > 0


def test_own_loss_and_targets() -> None:
    model = made(clam.CLAM_SB, instance_loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    attention, h = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.3, 0.8, 0.7, 0.05, 0.6]), torch.randn(9, 512)
    classifier = nn.Linear(512, 2)
    loss, preds, targets = model.inst_eval(attention, h, classifier)
    order = [1, 5, 6, 8, 7, 0, 3, 4]
    assert targets.tolist() == [1] * 4 + [0] * 4
    assert torch.equal(preds, classifier(h[order]).argmax(1))
    assert_close(loss, nn.functional.cross_entropy(classifier(h[order]), targets, reduction="sum"), FORWARD)
    _, preds, targets = model.inst_eval_out(attention[None], h, classifier)
    assert targets.tolist() == [0] * 4
    assert torch.equal(preds, classifier(h[order[:4]]).argmax(1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out(kind: Any) -> None:
    model, x = made(kind), torch.randn(20, 12)
    logits, prob, label, a_raw, results = model(x)
    assert results == {}
    assert logits.shape == prob.shape == (1, 3)
    assert torch.equal(prob, torch.softmax(logits, 1))
    assert torch.equal(label, logits.argmax(1, keepdim=True))
    assert_close(model(x, attention_only=True), a_raw, FORWARD)
    a_raw.sum().backward()
    assert model.attention_net[3].attention_a[0].weight.grad.norm() > 0, "the raw scores carry gradient"
    ragged = model(Bags.from_list([x, x[:1]]))
    assert ragged[0].shape == (2, 3)
    assert ragged[2].shape == (2, 1)
    assert ragged[3].shape[1] == 21
    assert_close(ragged[0][0], logits[0], FORWARD)


def test_the_parts_of_the_stack_work_alone() -> None:
    model, x = made(clam.CLAM_SB), torch.randn(5, 12)
    scores, h = model.attention_net(x)
    assert_close(scores.T, model(x)[3], FORWARD)
    assert h.shape == (5, 512)


@pytest.mark.parametrize(
    ("x", "label", "told"),
    [
        (
            torch.randn(9, 12),
            None,
            r"label: expected \(1,\) int64, a class for each bag, beside instance_eval, got none",
        ),
        (torch.randn(9, 12), torch.tensor([0, 1]), r"label: expected \(1,\).*got \(2,\)"),
        (torch.randn(9, 12), torch.tensor([3]), r"label: expected classes from 0 to 2, got \[3\]"),
        (torch.randn(3, 12), torch.tensor([0]), "at least k_sample = 4 patches in a bag, got 3 in bag 0"),
    ],
)
def test_bad_input(x: torch.Tensor, label: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        made(clam.CLAM_SB)(x, label=label, instance_eval=True)

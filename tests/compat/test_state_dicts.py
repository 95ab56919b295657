"""State dicts that no checkpoint should hold: one line each, of every loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from momkd.compat import clam, momkd_reference, torchmil
from momkd.compat.state_dicts import check_state_dict
from momkd.errors import InputError
from momkd.models import MoMKD

WIDTHS: list[dict[str, int]] = [
    {},
    {"classifier_features": 32},
    {"heads": 4, "slots": 3, "projection_features": 5, "hidden_features": 12},
    {"omics_features": 6, "omics_embedding": 7, "omics_hidden": 9, "omics_decoder_hidden": 10},
]
HOSTILE: dict[str, tuple[Any, str]] = {
    "number": (torch.tensor(3.0), r"(?:expected|got) .*\(\)"),
    "list": ([1.0], "expected a tensor, got a list"),
    "sparse": (torch.eye(8).to_sparse(), "expected a dense tensor, got a sparse or nested one"),
    "nested": (
        torch.nested.nested_tensor([torch.ones(3), torch.ones(5)], layout=torch.jagged),
        "got a sparse or nested one",
    ),
    "quantised": (torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8), "got a quantised one"),
    "meta": (torch.ones(8, device="meta"), "got one without"),
    "expanded": (torch.zeros(1).expand(10**5, 10**5), r"got \(100000, 100000\) expanded from 4 bytes"),
}


def released(**widths: int) -> MoMKD:
    options: dict[str, Any] = {"encoder": "gatv2", "hidden_features": 8, "update": "gradient", **widths}
    return MoMKD(8, shared_projector=False, **options)


@pytest.mark.parametrize("widths", WIDTHS)
def test_every_width_is_taken_from_the_checkpoint(widths: dict[str, int]) -> None:
    state = momkd_reference.dump(released(**widths))
    again = momkd_reference.dump(momkd_reference.load(state))
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize(
    "load",
    [
        lambda name, value: momkd_reference.load(momkd_reference.dump(released()) | {"wsi_encoder.ln1.bias": value}),
        lambda name, value: clam.CLAM_SB().load_state_dict({"attention_net.0.bias": value}, strict=False),
        lambda name, value: torchmil.ABMIL((8,)).load_state_dict({"pool.fc1.module.bias": value}, strict=False),
    ],
    ids=["released", "CLAM", "torchmil"],
)
def test_hostile_tensors_are_named(kind: str, load: Callable[[str, Any], object]) -> None:
    value, message = HOSTILE[kind]
    with pytest.raises(InputError, match=message) as caught:
        load(kind, value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("bank", ["mem_neg", "module.mem_pos"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cluster_size", torch.full((1, 16), float("nan")), "expected finite values, got NaN or infinity"),
        ("cluster_size", torch.ones(16), r"expected \(1, 16\), got \(16,\)"),
        ("initted", torch.tensor([float("inf")]), "expected finite values, got NaN or infinity"),
        ("initted", torch.zeros(0), r"expected \(1,\), got \(0,\)"),
        ("initted", torch.tensor(1j), "expected a tensor of floating-point numbers, got complex64"),
        (
            "embed_avg",
            torch.ones(1, 16, 64, dtype=torch.complex64),
            "expected a tensor of floating-point numbers, got",
        ),
        ("embed_avg", torch.ones(1, 15, 64), r"expected \(1, 16, 64\), got \(1, 15, 64\)"),
        ("codebook_mean", torch.tensor([float("nan")]), "expected finite values, got NaN or infinity"),
    ],
)
def test_what_a_codebook_carries_is_checked_too(bank: str, name: str, value: torch.Tensor, message: str) -> None:
    """Though `load` makes no use of it: it tells that the file is broken."""
    state = momkd_reference.dump(released())
    if bank.startswith("module."):
        state = {f"module.{key}": tensor for key, tensor in state.items()}
    for whole in (torch.tensor(True), torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.int64)):
        momkd_reference.load(state | {f"{bank}._codebook.initted": whole})
    with pytest.raises(InputError, match=rf"{bank[-7:]}\._codebook\.{name}: {message}"):
        momkd_reference.load(state | {f"{bank}._codebook.{name}": value})


def test_what_is_no_state_dict() -> None:
    deep: Any = ()
    for _ in range(60):
        deep = (deep, deep)
    for value, message in (
        ([1], "expected a state dict, got list"),
        ({1: torch.ones(1)}, "got a name of type int"),
        ({("a", 1): torch.ones(1)}, "got a name of type tuple"),
        ({"a": deep}, "a: expected a tensor, got a tuple"),
        ({"a\n\x1b[31m": 1}, r"'a\\n\\x1b\[31m': expected a tensor"),
        ({"w": torch.ones(3, dtype=torch.int64)}, "w: expected a tensor of floating-point numbers, got int64"),
        ({"w": torch.tensor([1e300], dtype=torch.float64)}, "w: expected values that float32 holds, got larger ones"),
        ({"w": torch.tensor([1.0, float("nan")])}, "w: expected finite values, got NaN or infinity"),
    ):
        with pytest.raises(InputError, match=message):
            check_state_dict(value)
    with pytest.raises(InputError, match="got a name of type int"):
        clam.CLAM_SB().load_state_dict({3: torch.ones(1)})  # type: ignore[dict-item]


def test_banks_of_unequal_length_and_empty_widths() -> None:
    state = momkd_reference.dump(released())
    with pytest.raises(InputError, match=r"mem_neg._codebook.embed: expected \(1, 16, 64\), got \(1, 3, 64\)"):
        momkd_reference.load(state | {"mem_neg._codebook.embed": torch.zeros(1, 3, 64)})
    with pytest.raises(InputError, match=r"mem_pos._codebook.embed: expected 3 dimensions, none of them 0"):
        momkd_reference.load(state | {"mem_pos._codebook.embed": torch.zeros(1, 0, 64)})
    with pytest.raises(InputError, match="expected a width that 3 heads divide, got 8"):
        momkd_reference.load(state | {"wsi_encoder.gat1.att": torch.zeros(1, 3, 4)})

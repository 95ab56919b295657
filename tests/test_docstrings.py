"""The examples in docstrings are run, so that they stay true."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import momkd
from momkd import functional, nn

PUBLIC = (
    *("momkd.bags", "momkd.functional", "momkd.nn", "momkd.simulate", "momkd.doctor", "momkd.gpu", "momkd.data.atomic"),
    *(f"momkd.compat.{name}" for name in ("clam", "mil_lab", "torchmil", "attention_deep_mil", "dtfd", "eva")),
    *("momkd.compat", "momkd.compat.trident", "momkd.compat.dsmil"),
)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def defined() -> Iterator[tuple[str, ModuleType, Any]]:
    """What the public modules offer: name, the module that the user imports it from, and the thing itself."""
    for module in map(importlib.import_module, PUBLIC):
        for name in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]):
            thing = getattr(module, name)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith(module.__name__):
                yield f"{module.__name__}.{name}", module, thing


def examples() -> Iterator[tuple[str, doctest.DocTest]]:
    """Also those of methods. An example sees torch, momkd and the names that its module offers, and no more."""
    finder = doctest.DocTestFinder()
    for name, module, thing in defined():
        offered = {n: getattr(module, n) for n in getattr(module, "__all__", [thing.__name__])}
        for test in finder.find(thing, name, module=inspect.getmodule(thing)):
            test.globs = {"torch": torch, "momkd": momkd, **offered}
            if test.examples:
                yield test.name, test


EXAMPLES = dict(examples())


def run(test: doctest.DocTest) -> tuple[int, str]:
    """How many examples failed, and what the runner says of them."""
    torch.manual_seed(0)
    told = io.StringIO()
    return doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(test, out=told.write).failed, told.getvalue()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    failed, told = run(EXAMPLES[name])
    assert not failed, told


def test_the_public_functions_and_modules_have_one() -> None:
    """But for the halves of an update and those that continue one that is shown."""
    without = {"ema_accumulate", "ema_apply_", "reseed_", "spherical_kmeans"}
    for name in set(functional.__all__) - without:
        assert f"momkd.functional.{name}" in EXAMPLES, name
    for name in nn.__all__:
        assert f"momkd.nn.{name}" in EXAMPLES, name
    for name in ("momkd.bags.Bags", "momkd.gpu.tune", "momkd.simulate.simulate", "momkd.simulate.SimulationConfig"):
        assert name in EXAMPLES


def test_a_wrong_example_is_noticed() -> None:
    parse = doctest.DocTestParser().get_doctest
    wrong = parse(">>> torch.ones(2).sum().item()\n3.0\n", {"torch": torch}, "wrong", None, 0)
    failed, told = run(wrong)
    assert failed == 1
    assert "Expected:\n    3.0\nGot:\n    2.0" in told
    skipped = parse(">>> nothing()  # doctest: +SKIP\n", {}, "skipped", None, 0)
    assert run(skipped) == (0, "")

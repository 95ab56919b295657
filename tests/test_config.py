"""Configuration: presets, TOML, settings of the command line, and what each says of a wrong value."""

from __future__ import annotations

from pathlib import Path

import pytest

from momkd.config import _USUAL, PRESETS, Config, describe_options, read_config
from momkd.errors import InputError


def test_toml_gives_the_same_configuration_back() -> None:
    changed = Config().with_settings(["memory.momentum=0.995", "train.epochs=3", "train.balanced=false"])
    for config in (Config(), changed):
        assert Config.from_toml(config.to_toml()) == config


def test_every_option_is_described_in_toml() -> None:
    text = Config().to_toml()
    assert set(_USUAL.values()) <= {key.partition(".")[2] for key, *_ in describe_options()}
    for key, _, allowed, meaning in describe_options():
        assert key.partition(".")[2] in text
        assert meaning in text
        assert allowed


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = Config.preset(name)
    assert config.model.kind == {"abmil": "abmil", "omics": "omics"}.get(name, "momkd")


def test_later_settings_win_and_values_take_the_type_of_the_option() -> None:
    config = Config().with_settings(["loss.tau=4", "loss.tau=6", "model.encoder=identity", "memory.momentum=none"])
    assert config.loss.tau == 6.0
    assert type(config.loss.tau) is float
    assert config.model.encoder == "identity"
    assert config.memory.momentum is None
    assert Config().with_settings(["loss.tau=6"]) == Config().with_settings(["loss.tau=6.0"])


def test_a_file_over_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[train]\nepochs = 7\n", encoding="utf-8")
    config = read_config(path, base=Config.preset("abmil"))
    assert (config.train.epochs, config.model.kind) == (7, "abmil")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("memory.momentun=0.9", "unknown option 'memory.momentun'; did you mean 'memory.momentum'?"),
        ("train.lr=1e39", "unknown option 'train.lr'; did you mean 'train.learning_rate'?"),
        ("train.batch_size=8", "unknown option 'train.batch_size'; did you mean 'train.slides_per_step'?"),
        ("memory.epochs=3", "unknown option 'memory.epochs'; did you mean 'train.epochs'?"),
        (
            "memori.slots=3",
            "unknown section 'memori'; expected model, memory, omics, loss, train; did you mean 'memory'?",
        ),
        ("epochs=3", "expected section.key=value such as memory.momentum=0.995, got 'epochs=3'"),
        ("train.epochs", "expected section.key=value"),
        ("train.epochs=2\nx=1", r"--set: expected one section.key=value, got lines 'train.epochs=2\nx=1'; give --set"),
        ("train.epochs=2\r\n[x]", "--set: expected one section.key=value, got lines"),
        ("train.epochs=0.5", "train.epochs: expected a whole number from 1 to 100000, got 0.5"),
        ("train.epochs=0", "train.epochs: expected a whole number from 1 to 100000, got 0"),
        ("train.epochs=true", "train.epochs: expected a whole number from 1 to 100000, got True"),
        ("train.epochs=none", "train.epochs: expected a whole number from 1 to 100000, got None"),
        ("memory.momentum=1.5", "memory.momentum: expected a number from 0 to 1, got 1.5"),
        ("memory.adaptive=1", "memory.adaptive: expected true or false, got 1"),
        ("memory.momentum=nan", "memory.momentum: expected a number from 0 to 1, got nan"),
        ("train.balanced=maybe", "train.balanced: expected true or false, got 'maybe'"),
        ("model.pooling=gate", "model.pooling: expected memory or gated or both, got 'gate'; did you mean 'gated'?"),
        ("model.pooling=[1]", "model.pooling: expected memory or gated or both, got [1]"),
    ],
)
def test_wrong_settings(setting: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Config().with_settings([setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("update", ["gradient", "fixed"])
def test_only_a_memory_moved_by_momentum_is_adaptive(update: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'[memory]\nupdate = "{update}"\n', encoding="utf-8")
    other = read_config(path)
    with pytest.raises(InputError, match=rf"memory.adaptive: expected memory.update = momentum .*, got '{update}'; "):
        other.with_settings(["memory.adaptive=true"])
    assert other.with_settings(["memory.adaptive=true", "memory.update=momentum"]).memory.adaptive
    assert not Config().memory.adaptive


def test_wrong_files(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    for text, message in (
        ("[train\n", "expected TOML, got"),
        ("train = 3\n", r"train: expected a section \[train\], got 3"),
        ("[train]\nepoch = 3\n", "own.toml: unknown option 'train.epoch'; did you mean 'train.epochs'?"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_config(path)
    with pytest.raises(InputError, match="expected a TOML configuration"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(
        InputError, match=r"expected one of paper, fast, abmil, omics, got 'fats'; did you mean 'fast'\?"
    ):
        Config.preset("fats")

"""The configuration of a training run: typed, checked, one dataclass a section, to and from TOML.

Every option has its range and its meaning beside it. What a preset, a TOML file or `--set key=value` names must exist:
an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from momkd.data.own import read_bytes, short, why
from momkd.data.raw import one_line
from momkd.errors import InputError
from momkd.patients import RULES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _number(default: float | None, low: float, high: float, help: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def _choice(default: str, choices: Sequence[str], help: str) -> Any:
    return field(default=default, metadata={"choices": tuple(choices), "help": help})


def _switch(default: bool | str, help: str, *others: str) -> Any:
    """True, false or one of some words."""
    return field(default=default, metadata={"help": help, "others": others})


@dataclass(frozen=True)
class ModelConfig:
    kind: str = _choice(
        "momkd",
        ("momkd", "abmil", "omics", "distill"),
        "momkd; abmil is the slide alone; omics is the genomics tower alone; distill matches both inside a batch",
    )
    encoder: str = _choice(
        "mlp", ("mlp", "identity", "gatv2"), "of the patches: mlp is Linear, LayerNorm, GELU; gatv2 sees neighbours"
    )
    heads: int = _number(2, 1, 64, "of gatv2; divides hidden_features")
    neighbours: int = _number(8, 1, 64, "k of the graph of patches that gatv2 sees")
    attention_dropout: float = _number(0.5, 0, 0.99, "of the attention between patches, in gatv2")
    encoder_dropout: float = _number(0.25, 0, 0.99, "of what gatv2 adds to its residual")
    pooling: str = _choice("both", ("memory", "gated", "both"), "attention by the memory, a gate, or the sum")
    branch: str = _choice("positive", ("positive", "per_class"), "one attention, or one a class (always so for C > 2)")
    hidden_features: int = _number(512, 1, 65_536, "D, width of an encoded patch")
    gate_features: int = _number(256, 1, 65_536, "width of the gate, where pooling is gated or both")
    match: str = _choice("mse", ("mse", "contrastive"), "what distill draws together, and how")
    projection_features: int = _number(64, 1, 4096, "S, length of a prototype")
    shared_projector: bool = _switch(True, "patches and pooled slides share one projector")
    temperature: float = _number(0.2, 0.01, 2, "of the attention at the start; it is learnt")
    dropout: float = _number(0.5, 0, 0.99, "in the classifier")
    classifier_features: int = _number(128, 1, 65_536, "width between the layers of the classifier")

    @property
    def graph_neighbours(self) -> int | None:
        """k of the graph of patches, or None where the encoder wants none."""
        return self.neighbours if self.encoder == "gatv2" and self.kind != "omics" else None


@dataclass(frozen=True)
class MemoryConfig:
    update: str = _choice("momentum", ("momentum", "gradient", "fixed"), "what moves the memory; fixed: nothing does")
    rows: str = _choice(
        "slide", ("slide", "patch", "attention"), "what is scattered into it: pooled slides, patches, attended patches"
    )
    slots: int = _number(16, 1, 1024, "K, prototypes a class")
    rho: float = _number(0.5, 0, 1, "share of the genomics in what a slide brings to the memory")
    half_life: float = _number(
        2.0, 1e-3, 1e6, "epochs after which half of the memory is new; gives m where it is unset"
    )
    momentum: float | None = _number(None, 0, 1, "m of every step; unset: from half_life")
    warmup: int = _number(1, 0, 1000, "epochs of mean pooling after which the memory is filled by clustering")
    reservoir: int = _number(4096, 1, 10_000_000, "rows of a class kept for that, at most")
    coupled: bool = _switch(False, "one soft-angle loss of both modalities' mean: gradients cross. For ablation")
    reseed_below: float | None = _number(None, 0, 1, "usage under which a slot is given a row of its class")
    adaptive: bool = _switch(False, "slots grow and shrink each epoch, by usage and slides a slot; wants momentum")


@dataclass(frozen=True)
class OmicsConfig:
    genes: int = _number(768, 1, 1_000_000, "kept, chosen inside the training part")
    select: str = _choice("importance", ("importance", "variance", "all"), "by gradient-boosted trees, or variance")
    log: str = _choice("auto", ("auto", "yes", "no"), "log2(x + 1); auto: where the table looks like counts")
    clip: float = _number(5.0, 0.1, 1000, "standard deviations at which a value is cut")
    features: int = _number(512, 1, 65_536, "width of the embedding of a profile")
    hidden_features: int = _number(512, 1, 65_536, "width of the tower between")
    decoder_features: int | None = _number(None, 1, 65_536, "that of its decoder; unset: the same")
    dropout: float = _number(0.25, 0, 0.99, "in the tower")
    share: float = _number(1.0, 0, 1, "of the cases whose profile is used, drawn by train.seed: for learning curves")


@dataclass(frozen=True)
class LossConfig:
    classification: float = _number(0.5, 0, 1000, "weight of the cross-entropy")
    memory: float = _number(0.1, 0, 1000, "weight of the distance to the nearest prototype of the class")
    soft_angle_omics: float = _number(0.05, 0, 1000, "weight of the soft-angle loss of the genomics")
    soft_angle_slide: float = _number(0.02, 0, 1000, "weight of the soft-angle loss of the slide")
    reconstruction: float = _number(0.05, 0, 1000, "weight of the reconstruction of the profile")
    assignment: float = _number(0.0, 0, 1000, "weight of the assignment to slots that genomics teach; 0: none")
    assignment_tau: float = _number(10.0, 1e-3, 1e4, "sharpness of that assignment")
    pairing: float = _number(
        0.0, 0, 1000, "weight of the distance of a slide to its own genomics, which don't move; 0: none"
    )
    alignment: float = _number(0.2, 0, 1000, "weight of what distill matches")
    teacher: float = _number(0.5, 0, 1000, "weight of the cross-entropy of the genomics in distill")
    margin: float = _number(0.3, -2, 2, "of the soft-angle losses, in units of cosine")
    tau: float = _number(5.0, 1e-3, 1e4, "sharpness of their soft maximum over slots")
    beta: float = _number(20.0, 1e-3, 1e4, "sharpness of their hinge")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = _number(60, 1, 100_000, "at most")
    slides_per_step: int = _number(16, 1, 100_000, "at most; a step also ends at patch_budget")
    patch_budget: int = _number(200_000, 1, 2**31 - 1, "patches of a step; a larger slide is a step of its own")
    bucket: int = _number(0, 0, 1_000_000, "slides sorted by size before they are joined into steps; 0: as drawn")
    max_patches: int = _number(0, 0, 2**31 - 1, "of a slide while training, drawn anew each time; 0: all")
    accumulate: int = _number(1, 1, 10_000, "steps whose gradients are added before the optimizer moves")
    learning_rate: float = _number(2e-4, 0, 10, "of AdamW")
    weight_decay: float = _number(1e-4, 0, 10, "of AdamW")
    clip_norm: float = _number(1.0, 0, 1e9, "largest norm of the gradient; 0: not clipped")
    plateau_patience: int = _number(5, 0, 100_000, "epochs without a better validation score before the rate falls")
    plateau_factor: float = _number(0.2, 1e-3, 0.999, "by which it falls")
    patience: int = _number(15, 1, 100_000, "epochs without a better validation score before training ends")
    balanced: bool = _switch(True, "draw slides so that all classes are equally frequent")
    amp: bool | str = _switch("auto", "bfloat16 matrix products; auto: where they are faster, else float32", "auto")
    cache_gb: float = _number(4.0, 0, 1e6, "of features kept in memory between epochs")
    device_cache_gb: float = _number(0.0, 0, 1e6, "of features kept on the GPU instead, the first slides that fit")
    seed: int = _number(0, 0, 2**32 - 1, "of weights, order and dropout")
    patients: str = _choice("mean", RULES, "how a patient's slides are joined, for metrics and predictions by patient")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run apart from its data.

    Example:
        >>> Config.preset("fast").with_settings(["memory.momentum=0.995"]).memory.momentum
        0.995
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    omics: OmicsConfig = field(default_factory=OmicsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for key, value, meta, kind in self._options():
            _check(key, value, meta, kind)
        if self.memory.adaptive and self.memory.update != "momentum":
            raise InputError(
                f"memory.adaptive: expected memory.update = momentum beside it, got {self.memory.update!r}; "
                "set one of them otherwise"
            )

    @classmethod
    def preset(cls, name: str) -> Config:
        """A named configuration: one of `PRESETS`."""
        if name not in PRESETS:
            raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}{_near(name, list(PRESETS))}")
        return cls().with_settings([f"{key}={value}" for key, value in PRESETS[name].items()])

    @classmethod
    def from_toml(cls, text: str, *, source: str = "config", base: Config | None = None) -> Config:
        """Sections and keys of TOML over `base` (the defaults). Raises InputError, naming `source` and the key."""
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # of a number of thousands of digits too
            raise InputError(f"{source}: expected TOML, got {why(error)}; mend the file") from error
        return (base or cls())._replaced(table, source)

    def with_settings(self, settings: Sequence[str]) -> Config:
        """Apply `section.key=value` at once, the later ones over the earlier; a value is read as the option's type."""
        table: dict[str, dict[str, Any]] = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            section, dot, name = key.strip().partition(".")
            if not equals or not dot:
                raise InputError(f"--set: expected section.key=value such as memory.momentum=0.995, got {setting!r}")
            if len(setting.strip().splitlines()) > 1:
                raise InputError(
                    f"--set: expected one section.key=value, got lines {setting!r:.80}; give --set for each"
                )
            table.setdefault(section, {})[name] = _parsed(text.strip())
        return self._replaced(table, "--set")

    def to_toml(self) -> str:
        """Every option that is set, with its meaning as a comment; `from_toml` reads it back."""
        lines: list[str] = []
        for section in fields(self):
            lines.append(f"[{section.name}]")
            values = getattr(self, section.name)
            for option in fields(values):
                value, help_text = getattr(values, option.name), option.metadata["help"]
                if value is None:
                    lines.append(f"# {option.name} is unset: {help_text}")
                else:
                    lines.append(f"{option.name} = {json.dumps(value)}  # {help_text}")
            lines.append("")
        return "\n".join(lines)

    def _options(self) -> Iterator[tuple[str, Any, Mapping[str, Any], str]]:
        for section in fields(self):
            values = getattr(self, section.name)
            for option in fields(values):
                key = f"{section.name}.{option.name}"
                yield key, getattr(values, option.name), option.metadata, str(option.type)

    def _replaced(self, table: Mapping[str, Any], source: str) -> Config:
        known = [key for key, *_ in self._options()]
        changes: dict[str, Any] = {}
        for section, values in table.items():
            names = [f.name for f in fields(self)]
            if section not in names:
                raise InputError(
                    f"{source}: unknown section {short(section)}; expected {', '.join(names)}{_near(section, names)}"
                )
            if not isinstance(values, Mapping):
                raise InputError(f"{source}: {section}: expected a section [{section}], got {short(values)}")
            for name in values:
                key = f"{section}.{name}"
                if key not in known:
                    same_name = [k for k in known if k.endswith(f".{_USUAL.get(name, name)}")]
                    hint = f"; did you mean {same_name[0]!r}?" if same_name else _near(key, known)
                    raise InputError(
                        f"{source}: unknown option {short(key)}{hint or '; see config.toml of a run for all'}"
                    )
            old = getattr(self, section)
            changes[section] = replace(old, **{n: _widened(v, old, n) for n, v in values.items()})
        try:
            return replace(self, **changes)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


# What others call the options, for the message of an unknown one.
_USUAL = {
    **{"lr": "learning_rate", "wd": "weight_decay", "seeds": "seed", "max_epochs": "epochs", "num_epochs": "epochs"},
    **dict.fromkeys(("bs", "batch", "batch_size"), "slides_per_step"),
    **dict.fromkeys(("clip", "grad_clip", "max_norm"), "clip_norm"),
    **dict.fromkeys(("accum", "grad_accum", "gradient_accumulation"), "accumulate"),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        **{"model.kind": "momkd", "model.encoder": "gatv2", "model.pooling": "memory", "memory.update": "momentum"},
        "loss.soft_angle_slide": 0.2,
    },
    "fast": {"model.kind": "momkd", "model.encoder": "mlp", "model.pooling": "both"},
    "abmil": {"model.kind": "abmil", "model.encoder": "mlp", "model.pooling": "gated"},
    "omics": {"model.kind": "omics"},
}


def describe_options() -> list[tuple[str, Any, str, str]]:
    """(section.key, default, what it may be, meaning) of every option."""
    described = []
    for key, value, meta, _ in Config()._options():
        if "choices" in meta:
            allowed = " or ".join(meta["choices"])
        elif "low" in meta:
            allowed = f"{meta['low']:g} to {meta['high']:g}"
        else:
            allowed = " or ".join([*meta["others"], "true", "false"])
        described.append((key, value, allowed, meta["help"]))
    return described


def _check(key: str, value: Any, meta: Mapping[str, Any], kind: str) -> None:
    if value is None and "None" in kind:
        return
    if "choices" in meta:
        if value not in meta["choices"]:
            near = _near(str(value), meta["choices"])
            raise InputError(f"{key}: expected {' or '.join(meta['choices'])}, got {short(value)}{near}")
    elif "low" in meta:
        whole = kind.startswith("int")
        right_kind = type(value) is int or (not whole and type(value) is float)
        if not right_kind or not meta["low"] <= value <= meta["high"]:
            what = "a whole number" if whole else "a number"
            raise InputError(f"{key}: expected {what} from {meta['low']:g} to {meta['high']:g}, got {short(value)}")
    elif type(value) is not bool and value not in meta["others"]:
        expected = " or ".join([*meta["others"], "true", "false"])
        raise InputError(f"{key}: expected {expected}, got {short(value)}")


def _widened(value: Any, section: Any, name: str) -> Any:
    """An integer where a float belongs is that float, so that equal configurations are equal."""
    kind = next(str(f.type) for f in fields(section) if f.name == name)
    return float(value) if type(value) is int and kind.startswith("float") and abs(value) < 2**53 else value


def _parsed(text: str) -> Any:
    """A word of the command line as TOML would read it; what is no TOML value is text."""
    if text.lower() in ("none", "unset"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # of a number of thousands of digits too
        lowered = text.lower()
        return lowered == "true" if lowered in ("true", "false") else text


def _near(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def read_config(path: Path | str, *, base: Config | None = None) -> Config:
    """Reads a TOML file over `base`. Raises InputError where it is missing or wrong."""
    what, remedy = "a TOML configuration", "check the path"
    try:
        text = read_bytes(path, what, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected {what}, got {one_line(error)}; write it as UTF-8") from error
    return Config.from_toml(text, source=str(path), base=base)

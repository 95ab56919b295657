"""The arms of a study: what is compared, each as settings over one base configuration."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from momkd.config import Config
from momkd.errors import InputError

REFERENCE = "momkd"  # the arm that the others are compared with
_PUBLISHED = ("model.pooling=memory", "loss.soft_angle_slide=0.2")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: short, of a folder and of `--arms`.
        title: in tables.
        preset: that the settings stand on.
        settings: `section.key=value` over the preset.
        omics: whether it is given expression to learn from, where there is some.
        needs_omics: whether it is left out where there is none.
        slides: whether it learns from slides; where it does not, it bounds what there is to distil.
    """

    name: str
    title: str
    preset: str = "fast"
    settings: tuple[str, ...] = ()
    omics: bool = True
    needs_omics: bool = False
    slides: bool = True

    def config(self, settings: Sequence[str], seed: int) -> Config:
        """Preset, then the settings of the study, then those of the arm."""
        return Config.preset(self.preset).with_settings([*settings, *self.settings, f"train.seed={seed}"])


ARMS = {
    arm.name: arm
    for arm in (
        Arm("abmil", "Slides alone, gated attention (ABMIL)", "abmil", omics=False),
        Arm("memory", "Slides alone, gate and momentum memory", omics=False),
        Arm(
            "mse",
            "Batch-local: features matched (MSE)",
            settings=("model.kind=distill", "model.match=mse"),
            needs_omics=True,
        ),
        Arm(
            "contrastive",
            "Batch-local: contrastive alignment",
            settings=("model.kind=distill", "model.match=contrastive"),
            needs_omics=True,
        ),
        Arm("fixed", "MoMKD, fixed memory", settings=("memory.update=fixed",)),
        Arm("momkd", "MoMKD, momentum memory", needs_omics=True),  # without expression it is the memory's arm
        Arm("published", "MoMKD as published: attention by the memory alone", settings=_PUBLISHED, needs_omics=True),
        Arm("published-fixed", "The same, fixed memory", settings=(*_PUBLISHED, "memory.update=fixed")),
        Arm("gradient", "MoMKD, memory by gradient", settings=("memory.update=gradient",)),
        Arm("no-reconstruction", "MoMKD without reconstruction", settings=("loss.reconstruction=0",), needs_omics=True),
        Arm("coupled", "MoMKD without decoupling", settings=("memory.coupled=true",), needs_omics=True),
        Arm("omics", "Expression alone (teacher; not available at inference)", "omics", needs_omics=True, slides=False),
    )
}


def choose_arms(names: Sequence[str] | None, extra: Sequence[str] = ()) -> list[Arm]:
    """The named arms, all of them by default, then those that `NAME=section.key=value,...` adds to MoMKD.

    Raises:
        InputError: a name that is none or comes twice, or an addition that is not of that form.
    """
    chosen = []
    for name in ARMS if names is None else names:
        if name not in ARMS:
            near = difflib.get_close_matches(name, ARMS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"arms: expected some of {', '.join(ARMS)}, got {name!r}{hint}")
        chosen.append(ARMS[name])
    for text in extra:
        name, equals, settings = text.partition("=")
        if not equals or not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or "=" not in settings:
            raise InputError(
                f"arm: expected NAME=section.key=value,section.key=value such as k4=memory.slots=4, got {text!r}"
            )
        changes = tuple(settings.split(","))
        arm = Arm(name, f"MoMKD, {', '.join(changes)}", settings=changes)
        arm.config((), 0)  # an unknown option is told before anything is trained
        chosen.append(arm)
    if repeated := [arm.name for i, arm in enumerate(chosen) if arm.name in {a.name for a in chosen[:i]}]:
        raise InputError(f"arms: expected each name once, got {repeated[0]!r} twice; rename one")
    return chosen

"""Loading: old names become new ones, strays are dropped with a message, a wrong shape is named with its key."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from momkd.compat.state_dicts import check_state_dict
from momkd.errors import InputError


class DropIn(nn.Module):
    """The base of all drop-ins: a module that takes its project's checkpoints unchanged.

    `RENAMES` are patterns of key beginnings and what they become (`module.`, which wrappers for several devices write,
    goes everywhere); `STRAYS` are patterns of whole keys that no parameter answers to. Both see keys below this
    module's own prefix.
    """

    RENAMES: ClassVar[tuple[tuple[str, str], ...]] = ()
    STRAYS: ClassVar[tuple[str, ...]] = ()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, once what is given is a state dict; see `check_state_dict`."""
        check_state_dict(state_dict, finite=False)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        _rename(state_dict, prefix, ((r"module\.", ""), *self.RENAMES))
        _drop(state_dict, prefix, self)
        _check_shapes(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _rename(state: MutableMapping[str, Any], prefix: str, renames: tuple[tuple[str, str], ...]) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        for pattern, new in renames:
            name = re.sub(f"^{pattern}", new, name)
        if prefix + name != key:
            state[prefix + name] = state.pop(key)


def _drop(state: MutableMapping[str, Any], prefix: str, module: DropIn) -> None:
    own = {prefix + name for name in module.state_dict(keep_vars=True)}
    others = [key for key in state if key.startswith(prefix) and key not in own]
    dropped = [key for key in others if any(re.fullmatch(s, key[len(prefix) :]) for s in module.STRAYS)]
    for key in dropped:
        del state[key]
    if dropped:
        names = ", ".join(dropped)
        warnings.warn(f"{type(module).__name__}: left out of the checkpoint, as no parameter: {names}", stacklevel=2)


def _check_shapes(state: MutableMapping[str, Any], prefix: str, module: nn.Module) -> None:
    for name, own in module.state_dict(keep_vars=True).items():
        given = state.get(prefix + name)
        if not isinstance(given, Tensor) or torch.nn.parameter.is_lazy(own) or given.shape == own.shape:
            continue
        raise InputError(
            f"checkpoint: {prefix + name}: expected {tuple(own.shape)} as {type(module).__name__} was made, "
            f"got {tuple(given.shape)}; make the model with the sizes that the checkpoint was trained with"
        )

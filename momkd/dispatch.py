"""Which backend runs an op: `can_run` answers with a reason, `choose` takes the quickest or the one that was named.

Each backend says beside its kernels what it can run and for what it is preferred (`native`, `gpu`, `cuda`); here the
question is asked, by the ops, the public functions, and the drop-ins for other projects alike.

A backend that is not there is never an import error, only a reason. A named backend runs or raises; nothing is
swapped silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from momkd import cuda, env, gpu, native
from momkd.errors import BackendError, InputError

BACKENDS = ("triton", "cuda", "native", "torch")

# What each op tells of itself, in the order in which it gives its tensors.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "gated_attention_pool": ("x", "offsets", "w_v", "w_u", "w_a"),
    "gated_attention_scores": ("x", "w_v", "w_u", "w_a"),
    "memory_similarity": ("z", "memory"),
}

# The backends that hold each op, best first. `torch` is the reference and runs everywhere.
OPS: dict[str, tuple[str, ...]] = {
    "gated_attention_pool": ("triton", "native", "torch"),
    "gated_attention_scores": ("triton", "native", "torch"),
    "attention_pool": ("triton", "native", "torch"),
    "memory_similarity": ("triton", "native", "torch"),
    "memory_guided_pool": ("triton", "native", "torch"),
    "soft_angle_loss": ("triton", "native", "torch"),
    "graph_attention": ("triton", "native", "torch"),
    "ema_accumulate": ("cuda", "native", "torch"),
    "ema_apply_": ("cuda", "native", "torch"),
    "ema_scatter_": ("cuda", "native", "torch"),
}


def _known(
    word: str, words: Sequence[str], what: str, error: type[ValueError] = ValueError, otherwise: str = ""
) -> None:
    if word not in words:
        near = difflib.get_close_matches(word[:80], words, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else otherwise
        raise error(f"{what}: expected one of {', '.join(words)}, got {word[:80]!r}{hint}")


def can_run(op: str, backend: str, args: Sequence[Tensor | None] = ()) -> tuple[bool, str]:
    """Whether `backend` can run `op` on these tensors, and why or why not.

    Without tensors the answer is about this installation: whether the backend is there at all.
    """
    _known(op, tuple(OPS), "op")
    _known(backend, BACKENDS, "backend")
    return _can_run(op, backend, args)


def _can_run(op: str, backend: str, args: Sequence[Tensor | None]) -> tuple[bool, str]:
    if backend not in OPS[op]:
        return False, f"no {backend} kernel for {op} in this version"
    if backend == "native":
        return native.can_run(op, args)
    if backend == "cuda":
        return cuda.can_run(op, args)
    if backend == "triton":
        return gpu.can_run(op, args)
    return True, "runs on every device"


def choose(op: str, backend: str | None, args: Sequence[Tensor | None], **facts: Any) -> str:
    """The backend to use: the named one, MOMKD_BACKEND, or the first that can run and is preferred for such a call.

    Args:
        op, backend: names; None or "" leaves the choice.
        args: the tensors of the call.
        facts: what else a preference may hang on, by name, such as `reduce`.

    Raises:
        BackendError: the named backend cannot run here; the message says why and what could.
    """
    named = backend or None
    if named is None:
        override = env.backend_override()
        if override is not None:
            _known(override, BACKENDS, "MOMKD_BACKEND", InputError, "; unset it or correct it")
            named = override if override in OPS[op] else None
    if named is None:
        usable = (name for name in OPS[op] if name == "torch" or _can_run(op, name, args)[0])
        return next(name for name in usable if _is_preferred(op, name, args, facts))
    able, reason = can_run(op, named, args)
    if not able:
        others = [name for name in OPS[op] if can_run(op, name, args)[0]]
        raise BackendError(f"{op}: backend {named!r} cannot run: {reason}; available here: {', '.join(others)}")
    return named


def _is_preferred(op: str, backend: str, args: Sequence[Tensor | None], facts: Mapping[str, Any]) -> bool:
    """Whether `backend`, which can run this call, is quicker than those after it; always so for the last, `torch`."""
    rule = gpu.PREFERENCES.get(op) if backend == "triton" and args else None
    return rule is None or rule(**_by_name(op, args), **facts)


def plain_form(op: str, backend: str | None, args: Sequence[Tensor | None]) -> bool:
    """Whether plain torch, differentiated by autograd, is quicker than the native kernel, which could run this call."""
    rule = native.PLAIN_IS_QUICKER.get(op)
    if rule is None or backend or env.backend_override() is not None or not native.can_run(op, args)[0]:
        return False
    return rule(**_by_name(op, args))


def _by_name(op: str, args: Sequence[Tensor | None]) -> dict[str, Any]:
    return dict(zip(ARGUMENTS[op], args))  # noqa: B905 (callers may leave the last ones out)

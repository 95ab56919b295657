"""`accelerate` finds models of other projects inside any module and lets momkd's ops compute them; `restore` undoes it.

A model that is found keeps its parameters, its name and its hooks; its class becomes a subclass of its own whose
`forward` is that of the drop-in. Before that, both forwards see the same random inputs, and a model whose numbers
differ is left alone: a layout tells what a model looks like, not what it computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from momkd.compat._gate import GATED, UNGATED, ScoreBlock, find_block, read
from momkd.compat._layouts import GATES, LAYOUTS, Call, Layout
from momkd.compat._load import DropIn
from momkd.errors import InputError

# How far apart two computations of the same model may be, by dtype, relative to the size of the result.
AGREES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Swap:
    """A module that momkd computes now: its name in the model ("" is the model itself), class, layout, and a note."""

    name: str
    type: str
    layout: str
    note: str


@dataclass(frozen=True)
class Left:
    """A module that looked like one, left as it was, and why."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; `str()` of it is for reading."""

    swapped: tuple[Swap, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"swapped  {s.name or '(the model)'}: {s.type}, {s.layout}; {s.note}" for s in self.swapped]
        lines += [f"left     {s.name or '(the model)'}: {s.type}; {s.reason}" for s in self.left]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Let momkd's ops compute the MIL models inside `model`, in place.

    Models are found by the names and shapes of their parts, whatever library or file they come from. So are gates whose
    softmax is in a forward of one's own: their scores are then made by `gated_attention_scores`, and they return what
    they returned before. Parameters stay
    the same objects, so that optimizers, hooks and distributed wrappers stay valid; `state_dict`, `copy.deepcopy` and
    pickling work as before. What is swapped also takes `Bags`. Dropout is read from the model's own modules.

    Args:
        model: any module: a model itself, or one that holds models, compiled or wrapped for distributed training.

    Returns:
        What was swapped, and what looked like a model and was left, with the reason.

    Raises:
        InputError: there is nothing that could be swapped; the message lists what was looked for.

    Example:
        >>> model = momkd.compat.torchmil.ABMIL(in_shape=(32,))  # a drop-in: there is nothing to gain
        >>> accelerate(model)
        Traceback (most recent call last):
        momkd.errors.InputError: accelerate: expected a model ...
    """
    swapped: list[Swap] = []
    left: list[Left] = []
    done: list[str] = []  # names of what momkd computes
    for name, module in list(model.named_modules()):
        if isinstance(module, (DropIn, ScoreBlock)) or _layout_of(module) is not None:
            done.append(name)
            left.append(Left(name, type(module).__name__, "computed by momkd already"))
        elif not any(_inside(name, outer) for outer in done):
            result = _try(name, module)
            if isinstance(result, Swap):
                done.append(name)
                swapped.append(result)
            elif result is not None:
                left.append(result)
    report = Report(tuple(swapped), tuple(s for s in left if not _covered(s, done)))
    if not swapped and not any(_layout_of(m) is not None for m in model.modules()):
        looked = "; ".join(f"{layout.name} ({', '.join(layout.marks)})" for layout in LAYOUTS)
        looked += f"; a gate alone ({'; '.join([*(', '.join(names) for names in GATED), *UNGATED])})"
        found = f"\nwhat came near:\n{report}" if report.left else ""
        raise InputError(
            f"accelerate: expected a model with a part that momkd can compute, got {type(model).__name__} with none; "
            f"looked for, by their attributes: {looked}{found}"
        )
    return report


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo `accelerate` in place; returns the names of the modules that compute by themselves again.

    Example:
        >>> restore(torch.nn.Linear(2, 2))
        ()
    """
    names = []
    for name, module in model.named_modules():
        if _layout_of(module) is not None:
            module.__class__ = type(module).__bases__[0]
            names.append(name)
    return tuple(names)


def _inside(name: str, outer: str) -> bool:
    return outer == "" or name == outer or name.startswith(f"{outer}.")


def _covered(left: Left, done: list[str]) -> bool:
    """Whether it is a part of something that momkd computes."""
    return any(_inside(left.name, outer) and left.name != outer for outer in done)


def _try(name: str, module: nn.Module) -> Swap | Left | None:
    reasons: dict[str, str] = {}  # the first layout by what speaks against it
    kind = type(module).__name__
    layouts = _near(module, LAYOUTS) or (_near(module, GATES) if _tanh(module) else [])
    for layout in layouts:
        reason = _why_not(module, layout)
        if reason is None:
            told = [r for r in map(read, layout.blocks(module)) if isinstance(r, str)]
            note = f"scores by torch ({told[0]}), pooled by attention_pool" if told else "one op where that is quicker"
            note = note if layout.blocks(module) else "pooled by attention_pool"
            module.__class__ = _subclass(type(module), layout.name)
            return Swap(name, kind, layout.name, note)
        reasons.setdefault(reason, layout.name)
    told = [f"looks like {layout}, but {reason}" for reason, layout in reasons.items()]
    return Left(name, kind, "; ".join(told)) if told else None


def _near(module: nn.Module, layouts: Iterable[Layout]) -> list[Layout]:
    """The layouts whose attributes the module has."""
    return [layout for layout in layouts if all(_has(module, mark) for mark in layout.marks)]


def _has(module: nn.Module, mark: str) -> bool:
    try:
        attrgetter(mark)(module)
    except AttributeError:
        return False
    return True


def _tanh(module: nn.Module) -> bool:
    block = find_block(module)
    return block is not None and any(isinstance(m, nn.Tanh) for m in block.value)


def _why_not(module: nn.Module, layout: Layout) -> str | None:
    """Why the methods of the layout can't take the place of this module's own; None where they can."""
    parameters = list(module.parameters())
    if any(torch.nn.parameter.is_lazy(p) or p.is_meta for p in parameters):
        return "its parameters are not made yet; run it once before"
    reason = layout.unfit(module)
    if reason is not None:
        return reason
    for name, method in layout.methods.items():
        own, ours = (list(inspect.signature(m).parameters) for m in (getattr(type(module), name), method))
        if own != ours and not (layout.any_name and len(own) == 2):
            wanted = "one argument" if layout.any_name else f"({', '.join(ours)})"
            return f"its {name} takes ({', '.join(own)}), not {wanted}"
        if name in vars(module):
            return f"its {name} was replaced on the object itself"
    return _disagreement(module, layout)


def _disagreement(module: nn.Module, layout: Layout) -> str | None:
    """Both forwards on the same random inputs, in eval mode: what differs, or None."""
    like = next(module.parameters())
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    name, method = next(iter(layout.methods.items()))
    training = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            for arguments in layout.probe(module, draw):
                reason = _compare(getattr(type(module), name), method, module, arguments)
                if reason is not None:
                    return f"its {name} gives other numbers: {reason}"
    except Exception as error:
        return f"a trial of its {name} ended in {type(error).__name__}: {error}"
    finally:
        for each, was in training:
            each.training = was
    return None


def _compare(own: Callable[..., Any], ours: Callable[..., Any], module: nn.Module, call: Call) -> str | None:
    args, options = call
    results = [f(module, *args, **options) for f in (own, ours)]
    if type(results[0]) is not type(results[1]):
        return f"a {type(results[0]).__name__}, momkd's a {type(results[1]).__name__}"
    want, got = (list(_tensors(result)) for result in results)
    if [t.shape for t in want] != [t.shape for t in got]:
        return f"shapes {[tuple(t.shape) for t in want]}, momkd's {[tuple(t.shape) for t in got]}"
    for w, g in zip(want, got, strict=True):
        if w.is_floating_point():
            error = float((w.double() - g.double()).norm() / w.double().norm().clamp_min(1e-12))
            if not error <= AGREES[w.dtype]:
                return f"relative difference {error:.1e}"
    return None


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of what a forward returns, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list, dict)):
        for each in result.values() if isinstance(result, dict) else result:
            yield from _tensors(each)


# -- the class of a swapped module ---------------------------------------------------------------------------------


def _layout_of(module: nn.Module) -> str | None:
    """The layout that a module was swapped as."""
    return vars(type(module)).get("_momkd_layout")


_made: dict[tuple[Any, str], Any] = {}


def _subclass(original: type[nn.Module], layout: str) -> Any:
    """The subclass of a model's own class that computes by momkd; of the same name."""
    key = (original, layout)
    if key not in _made:
        _made[key] = _make(original, layout)
    return _made[key]


def _make(original: Any, layout: str) -> Any:
    methods = next(known.methods for known in (*LAYOUTS, *GATES) if known.name == layout)
    body = {
        **methods,
        "_momkd_layout": layout,
        "__reduce_ex__": _reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original)(original.__name__, (original,), body)  # its metaclass, which may be that of ABC


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """For copying and pickling: the class cannot be found by its name, but made again from the original one."""
    getstate: Any = getattr(self, "__getstate__", None)  # Python 3.10 has none
    state = self.__dict__ if getstate is None else getstate()
    return _rebuild, (type(self).__bases__[0], _layout_of(self)), state


def _rebuild(original: type[nn.Module], layout: str) -> nn.Module:
    made = original.__new__(original)
    made.__class__ = _subclass(original, layout)
    return made

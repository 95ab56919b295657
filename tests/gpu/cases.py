"""Every op that has a gradient, as a case: inputs, the call of momkd, the float64 reference, and plain torch.

Rows that a memory is asked about are sums of one slot of each class, in differing shares, and little noise: so the
nearest slot and the strongest rival are the same in half precision, and gradients can be compared. Values of
`memory_guided_pool` follow the class too, so that the gradient of the temperature is no sum that cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from momkd import functional as F
from momkd import graph, reference
from momkd.graph import Edges
from momkd.reference.gated_attention_pool import GateParameters
from tests.compare import offsets_of
from tests.gpu import plain

MARGIN, TAU, BETA, SLOPE = 0.3, 5.0, 20.0, 0.2
Outputs = tuple[Tensor, ...]


class Case(NamedTuple):
    """One op on some inputs. `call`, `exact` and `plain` take the tensors, and return the same outputs."""

    op: str
    names: tuple[str, ...]  # of the tensors
    tensors: list[Tensor]  # those that want a gradient
    call: Callable[..., Outputs]  # momkd
    exact: Callable[..., Outputs]  # the reference, to be given float64
    plain: Callable[..., Outputs]  # torch, in the type of the inputs
    asked: list[Tensor | None]  # what dispatch is shown
    differentiable: int = 1  # how many of the outputs, counted from the first, have a gradient


class Inputs:
    """Random inputs by a seed, drawn on the CPU, so that every device sees the same."""

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.lengths, self.dtype, self.device = tuple(lengths), dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = sum(lengths)
        self.offsets = offsets_of(lengths).to(device)
        self.seed = torch.tensor((3 << 32) + 5 + seed, device=device)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def labels(self, classes: int) -> Tensor:
        return torch.randint(-1, classes, (self.rows,), generator=self.generator).to(self.device)

    def memory(self, classes: int, slots: int, length: int) -> Tensor:
        """Slots at right angles where there is room for that; not of unit length."""
        drawn = torch.randn(max(classes * slots, length), length, generator=self.generator)
        if classes * slots <= length:
            drawn = torch.linalg.qr(drawn)[0]
        drawn = torch.nn.functional.normalize(drawn[: classes * slots], dim=1).view(classes, slots, length)
        size = 0.5 + torch.rand(classes, slots, 1, generator=self.generator)
        return (drawn * size).contiguous().to(self.device, self.dtype)

    def near(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, S) near one slot of each class, and the share (N, C) that each class has."""
        classes, slots, length = memory.shape
        bank = torch.nn.functional.normalize(memory.cpu().float(), dim=-1)
        picked = torch.randint(0, slots, (self.rows, classes), generator=self.generator)
        order = torch.rand(self.rows, classes, generator=self.generator).argsort(1)
        shares = torch.linspace(0.5, 1.5, classes)[order]
        rows = (shares[:, :, None] * bank[torch.arange(classes), picked]).sum(1)
        gap = 1 / max(1, classes - 1)  # of neighbouring shares: noise must not bring two of them near each other
        rows += 0.02 * gap * torch.randn(self.rows, length, generator=self.generator)
        return rows.to(self.device, self.dtype), shares.to(self.device)

    def edges(self) -> Edges:
        """Eight random neighbours a node inside its bag, duplicates among them, and one that hears from a whole bag."""
        pairs, first = [torch.zeros(2, 0, dtype=torch.int64)], 0
        for n in self.lengths:
            if n:
                targets = torch.arange(n).repeat(8)
                pairs.append(first + torch.stack([torch.randint(0, n, (8 * n,), generator=self.generator), targets]))
                pairs.append(first + torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.int64)]))
            first += n
        return graph.from_edge_index(torch.cat(pairs, 1), self.rows).to(self.device)


def gated_attention_pool(
    given: Inputs,
    width: int = 1024,
    hidden: int = 256,
    heads: int = 1,
    p: float = 0.0,
    gated: bool = True,
    biased: bool = False,
    backend: str | None = None,
) -> Case:
    """biased: with score_bias, the last of the tensors."""
    names, tensors = _gate(given, width, hidden, heads, gated)
    asked = _asked_of_gate(tensors, gated)
    if biased:
        names, tensors = (*names, "score_bias"), [*tensors, given.normal(given.rows, heads)]

    def split(w: Sequence[Tensor]) -> tuple[GateParameters, Tensor | None]:
        return (_parameters(w[:-1], gated), w[-1]) if biased else (_parameters(w, gated), None)

    def call(x: Tensor, *w: Tensor) -> Outputs:
        gate, bias = split(w)
        options = {"dropout_p": p, "seed": given.seed, "return_scores": True, "backend": backend}
        return F.gated_attention_pool(x, given.offsets, *gate, score_bias=bias, **options)

    def exact(x: Tensor, *w: Tensor) -> Outputs:
        gate, bias = split(w)
        return reference.gated_attention_pool(x, given.offsets, gate, p, given.seed, bias)[:2]

    def in_torch(x: Tensor, *w: Tensor) -> Outputs:
        gate, bias = split(w)
        return plain.gated_attention_pool(x, given.lengths, *gate, p, given.seed, bias)

    return Case(
        "gated_attention_pool",
        names,
        tensors,
        call,
        exact,
        in_torch,
        [asked[0], given.offsets, *asked[1:]],
        differentiable=2,
    )


def gated_attention_scores(
    given: Inputs,
    width: int = 1024,
    hidden: int = 256,
    heads: int = 1,
    p: float = 0.0,
    gated: bool = True,
    backend: str | None = None,
) -> Case:
    names, tensors = _gate(given, width, hidden, heads, gated)
    options = {"dropout_p": p, "seed": given.seed, "backend": backend}
    return Case(
        "gated_attention_scores",
        names,
        tensors,
        lambda x, *w: (F.gated_attention_scores(x, *_parameters(w, gated), **options),),
        lambda x, *w: reference.gated_attention_scores(x, _parameters(w, gated), p, given.seed)[:1],
        lambda x, *w: (plain.gated_attention_scores(x, *_parameters(w, gated), p, given.seed),),
        _asked_of_gate(tensors, gated),
    )


def _gate(given: Inputs, width: int, hidden: int, heads: int, gated: bool) -> tuple[tuple[str, ...], list[Tensor]]:
    """Names and tensors: the rows and the parameters of a gate."""
    names = ("x", "w_v", "b_v", "w_u", "b_u", "w_a", "b_a")
    shapes = [(hidden, width), (hidden,), (hidden, width), (hidden,), (heads, hidden), (heads,)]
    tensors = [given.normal(given.rows, width), *(given.normal(*s, scale=s[-1] ** -0.5) for s in shapes)]
    return (names, tensors) if gated else (names[:3] + names[5:], tensors[:3] + tensors[5:])


def _parameters(w: Sequence[Tensor], gated: bool) -> GateParameters:
    return GateParameters(*w) if gated else GateParameters(w[0], w[1], None, None, w[2], w[3])


def _asked_of_gate(tensors: Sequence[Tensor], gated: bool) -> list[Tensor | None]:
    return [tensors[0], tensors[1], tensors[3] if gated else None, tensors[-2]]


def attention_pool(given: Inputs, width: int = 1024, heads: int = 1, backend: str | None = None) -> Case:
    tensors = [given.normal(given.rows, width), given.normal(given.rows, heads)]
    return Case(
        "attention_pool",
        ("values", "scores"),
        tensors,
        lambda v, s: (F.attention_pool(v, s, given.offsets, backend=backend),),
        lambda v, s: reference.attention_pool(v, s, given.offsets)[:1],
        lambda v, s: plain.softmax_pool(s, v, given.lengths)[:1],
        [*tensors, given.offsets],
    )


def memory_similarity(
    given: Inputs,
    sizes: tuple[int, int, int] = (2, 16, 64),
    reduce: str = "max",
    learned: bool = True,
    backend: str | None = None,
) -> Case:
    memory = given.memory(*sizes)
    z, _ = given.near(memory)
    names, tensors = (("z", "memory"), [z, memory]) if learned else (("z",), [z])

    def bank(z: Tensor, rest: Sequence[Tensor]) -> Tensor:
        return rest[0] if rest else memory.to(z.dtype)

    return Case(
        "memory_similarity",
        names,
        tensors,
        lambda z, *m: F.memory_similarity(z, bank(z, m), reduce=reduce, tau=TAU, backend=backend)[:1],
        lambda z, *m: reference.memory_similarity(z, bank(z, m), reduce, TAU)[:1],
        lambda z, *m: (plain.memory_similarity(z, bank(z, m), reduce, TAU),),
        [z, memory],
    )


def soft_angle_loss(
    given: Inputs, sizes: tuple[int, int, int] = (2, 16, 64), learned: bool = True, backend: str | None = None
) -> Case:
    memory = given.memory(*sizes)
    (z, _), labels = given.near(memory), given.labels(sizes[0])
    names, tensors = (("z", "memory"), [z, memory]) if learned else (("z",), [z])

    def bank(z: Tensor, rest: Sequence[Tensor]) -> Tensor:
        return rest[0] if rest else memory.to(z.dtype)

    options = {"margin": MARGIN, "tau": TAU, "beta": BETA, "reduction": "none", "backend": backend}
    return Case(
        "soft_angle_loss",
        names,
        tensors,
        lambda z, *m: (F.soft_angle_loss(z, bank(z, m), labels, **options),),
        lambda z, *m: (reference.soft_angle_loss(z, bank(z, m), labels, MARGIN, TAU, BETA),),
        lambda z, *m: (plain.soft_angle_loss(z, bank(z, m), labels, MARGIN, TAU, BETA),),
        [z, memory, labels],
    )


def memory_guided_pool(
    given: Inputs,
    sizes: tuple[int, int, int] = (2, 16, 64),
    width: int = 512,
    branch: str = "positive",
    backend: str | None = None,
) -> Case:
    memory, per_class = given.memory(*sizes), branch == "per_class" or sizes[0] > 2
    z, shares = given.near(memory)
    values = given.normal(given.rows, width) + 0.5 * (shares[:, 1:2] - shares[:, 0:1]).to(given.dtype)
    temperature = torch.tensor(0.3, device=given.device)
    return Case(
        "memory_guided_pool",
        ("z", "values", "temperature"),
        [z, values, temperature],
        lambda z, v, t: F.memory_guided_pool(
            z, v, memory.to(z.dtype), given.offsets, t, branch=branch, backend=backend
        )[:2],
        lambda z, v, t: reference.memory_guided_pool(z, v, memory.to(z.dtype), given.offsets, t, per_class)[:2],
        lambda z, v, t: plain.memory_guided_pool(z, v, memory.to(z.dtype), given.lengths, t, per_class),
        [z, values, memory, given.offsets, temperature],
    )


def graph_attention(
    given: Inputs, heads: int = 2, width: int = 256, p: float = 0.0, backend: str | None = None
) -> Case:
    edges, att = given.edges(), given.normal(heads, width, scale=width**-0.5)
    tensors = [given.normal(given.rows, heads * width), given.normal(given.rows, heads * width), att]
    options = {"negative_slope": SLOPE, "dropout_p": p, "seed": given.seed, "backend": backend}
    return Case(
        "graph_attention",
        ("x_l", "x_r", "att"),
        tensors,
        lambda x_l, x_r, a: (F.graph_attention(x_l, x_r, a, edges, **options),),
        lambda x_l, x_r, a: reference.graph_attention(x_l, x_r, a, edges, SLOPE, p, given.seed)[:1],
        lambda x_l, x_r, a: (plain.graph_attention(x_l, x_r, a, edges, SLOPE, p, given.seed),),
        [*tensors, edges.offsets],
    )

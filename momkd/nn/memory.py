"""The memory as modules: the bank of prototypes, and the soft-angle loss against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from momkd import functional

UPDATES = ("momentum", "gradient")

# When `wanted_slots` changes K, and to what: see there.
SLIDES_PER_SLOT = 8  # at least: a prototype stands for several slides
EVEN, UNEVEN = 0.8, 0.5  # effective slots over K from which all are needed, and under which some are not
MOST_SLOTS = 256  # that it grows to
_APART = 0.1  # tangent of the angle between a slot and the one that splits off


class MemoryBank(nn.Module):
    """C classes of K prototypes of length S, where both modalities of a slide meet.

    `momentum`: the memory is a buffer of unit vectors, moved only by `update_` (an exponential moving average) and
    never by a gradient. `gradient`: it is a parameter that the optimizer steps; its vectors need not be unit.

    Before `fill_` the memory is zero: every cosine is 0, so attention guided by it is the mean of the bag.

    Args:
        num_classes: C, at least 2.
        slots: K, prototypes a class.
        features: S, the length of a prototype.
        update: "momentum" or "gradient".
        adaptive: K may change: `load_state_dict` takes the K of what it loads. For "momentum" alone.

    Attributes:
        memory: (C, K, S) float32, buffer or parameter; `resize_` puts another in its place.
        usage: (C, K) float32, moving average of the mass that a slot receives an update.

    Raises:
        ValueError: a size under 1, fewer than two classes, an unknown `update`, or an adaptive "gradient".

    Source: MoMKD (arXiv 2602.21395), momentum memory.

    Example:
        >>> bank = momkd.nn.MemoryBank(2, 4, 8)
        >>> bank.fill_(torch.randn(100, 8), torch.arange(100) % 2)
        >>> assignments = bank.update_(torch.randn(6, 8), torch.tensor([0, 1, 1, 0, -1, 1]), momentum=0.99)
        >>> bank.memory.norm(dim=-1).allclose(torch.ones(2, 4))
        True
    """

    memory: Tensor
    usage: Tensor

    def __init__(
        self,
        num_classes: int,
        slots: int = 16,
        features: int = 64,
        *,
        update: str = "momentum",
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2 or slots < 1 or features < 1:
            raise ValueError(
                "MemoryBank: expected num_classes >= 2, slots >= 1, features >= 1, "
                f"got {num_classes}, {slots}, {features}"
            )
        if update not in UPDATES:
            raise ValueError(f"update: expected {' or '.join(map(repr, UPDATES))}, got {update!r}")
        if adaptive and update != "momentum":
            raise ValueError(f"adaptive: expected update='momentum', got {update!r}, whose K the optimizer knows")
        self.update, self.adaptive = update, adaptive
        memory = torch.zeros(num_classes, slots, features, dtype=torch.float32)
        if update == "gradient":
            self.memory = nn.Parameter(memory)
        else:
            self.register_buffer("memory", memory)
        self.register_buffer("usage", torch.zeros(num_classes, slots, dtype=torch.float32))

    @property
    def num_classes(self) -> int:
        return self.memory.shape[0]

    @property
    def slots(self) -> int:
        return self.memory.shape[1]

    @property
    def is_filled(self) -> bool:
        """Whether any prototype is set. Waits for the device."""
        return bool((self.memory != 0).any())

    # -- changing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fill_(
        self, rows: Tensor, row_class: Tensor, *, iterations: int = 20, generator: torch.Generator | None = None
    ) -> None:
        """Set every prototype by spherical k-means of the rows of its class; usage starts even.

        Args:
            rows: (N, S) any float dtype.
            row_class: (N,) int64; −1 skips the row. A class without rows gets random directions.
            iterations: of Lloyd.
            generator: of the seeding, on the CPU.
        """
        for c in range(self.num_classes):
            own = rows[row_class == c].float()
            self.memory[c] = functional.spherical_kmeans(own, self.slots, iterations, generator)
        self.usage.fill_(1.0 / self.slots)

    @torch.no_grad()
    def update_(
        self,
        rows: Tensor,
        row_class: Tensor,
        *,
        momentum: float,
        weights: Tensor | None = None,
        reseed_below: float | None = None,
        generator: torch.Generator | None = None,
        reduce: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor | None:
        """Move the memory by momentum; see `momkd.functional.ema_scatter_`. Returns the assignments (N,) int32.

        With `update="gradient"` nothing is moved and None is returned: there the optimizer does it.

        Args:
            rows, row_class, momentum, weights, reseed_below, generator: as in `ema_scatter_`.
            reduce: adds up in place, over the ranks of a distributed training, the sums (C, K, S) and the mass (C, K)
                that each gathered from its own rows. All then hold the same memory; assignments are not returned, and
                `reseed_below`, which draws from the rows of one rank, is refused.
        """
        if self.update == "gradient":
            return None
        if reduce is not None:
            if reseed_below is not None:
                raise ValueError(f"reseed_below: expected None where reduce is given, got {reseed_below}")
            sums, mass = functional.ema_accumulate(self.memory, rows, row_class, weights=weights)
            reduce(sums, mass)
            functional.ema_apply_(self.memory, self.usage, sums, mass, momentum=momentum)
            return None
        return functional.ema_scatter_(
            self.memory,
            self.usage,
            rows,
            row_class,
            momentum=momentum,
            weights=weights,
            reseed_below=reseed_below,
            generator=generator,
        )

    # -- how many slots ------------------------------------------------------------------------------------------

    def effective_slots(self) -> Tensor:
        """exp of the entropy of the usage of each class: K where all slots are used alike, 1 where one takes all.

        Returns:
            (C,) float64 on the CPU; K for a class that nothing has used. Waits for the device.
        """
        usage = self.usage.detach().cpu().double()
        total = usage.sum(1, keepdim=True)
        share = torch.where(total > 0, usage / total, torch.full_like(usage, 1.0 / self.slots))
        effective: Tensor = torch.special.entr(share).sum(1).exp()
        return effective

    def wanted_slots(self, slides: int) -> int:
        """The K that usage asks for: a quarter more slots, a quarter fewer, or as many as there are.

        More, up to 256, where every class uses its slots evenly (effective slots ≥ 0.8 K) and the slides allow it (at
        least 2 · 8 a slot). Fewer, down to 2, where every class leaves half of them idle (effective slots ≤ 0.5 K), or
        where there are under 8 slides a slot, of which a prototype could mean but one or two. A step is ⌊K / 4⌋ slots,
        at least one; the two bounds of either kind lie so far apart that no step calls for its undoing.

        Args:
            slides: that the smallest class trains on.
        """
        slots, effective = self.slots, self.effective_slots()
        step, enough = max(1, slots // 4), slots * SLIDES_PER_SLOT
        even, idle = bool((effective >= EVEN * slots).all()), bool((effective <= UNEVEN * slots).all())
        if slides < enough or idle:
            least = 2 if idle else max(2, slides // SLIDES_PER_SLOT)
            return min(slots, max(least, slots - step))
        if even and slides >= 2 * enough:
            return max(slots, min(MOST_SLOTS, slots + step))
        return slots

    @torch.no_grad()
    def resize_(self, slots: int, *, generator: torch.Generator | None = None) -> None:
        """Give every class another number of slots: split the most used, or drop the least used.

        A slot that splits keeps its vector; its child is normalise(vector + 0.1 · t), t a random unit vector
        perpendicular to it, and each has half of its usage. A slot that is dropped leaves its usage to the kept one of
        the largest cosine. All others keep vector and usage bit for bit, and their order; children come last.

        Args:
            slots: the new K, 1 to 2K.
            generator: of the children, on the CPU: with the same one, every device makes the same.

        Raises:
            ValueError: another number, a memory that is not filled, or one that the optimizer steps.
        """
        if self.update != "momentum" or not self.is_filled:
            came = "one not filled; call fill_ first" if self.update == "momentum" else f"update={self.update!r}"
            raise ValueError(f"resize_: expected a filled memory moved by momentum, got {came}")
        if not 1 <= slots <= 2 * self.slots:
            raise ValueError(f"resize_: expected 1 to 2K = {2 * self.slots} slots, got {slots}")
        memory, usage, device = self.memory.cpu(), self.usage.cpu(), self.memory.device
        order = usage.sort(dim=1, descending=True, stable=True).indices  # (C, K): of equal ones the lowest first
        if slots >= self.slots:
            split = order[:, : slots - self.slots]
            usage = usage.scatter(1, split, usage.gather(1, split) / 2)
            memory = torch.cat([memory, _beside(_take(memory, split), generator)], 1)
            usage = torch.cat([usage, usage.gather(1, split)], 1)
        else:
            kept, dropped = order[:, :slots].sort(1).values, order[:, slots:]
            heirs = (_take(memory, dropped) @ _take(memory, kept).mT).argmax(2)
            usage = usage.gather(1, kept).scatter_add(1, heirs, usage.gather(1, dropped))
            memory = _take(memory, kept)
        self.memory, self.usage = memory.to(device), usage.to(device)

    def shapes_in(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, tuple[int, ...]]:
        """Shapes that the memory's tensors in a state must have, by their names there.

        Its own; but an adaptive memory takes the K that it finds, from 1 to 256 or to its own where that is more.
        """
        classes, slots, features = self.memory.shape
        held = state.get(f"{prefix}memory")
        if self.adaptive and held is not None and held.ndim == 3 and 1 <= held.shape[1] <= max(slots, MOST_SLOTS):
            slots = held.shape[1]
        return {f"{prefix}memory": (classes, slots, features), f"{prefix}usage": (classes, slots)}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        memory, usage = self.shapes_in(state_dict, prefix).values()
        if memory != self.memory.shape:
            self.memory, self.usage = self.memory.new_zeros(memory), self.usage.new_zeros(usage)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # -- reading -------------------------------------------------------------------------------------------------

    def commitment_loss(self, z: Tensor, row_class: Tensor) -> Tensor:
        """How far rows lie from the nearest prototype of their own class; no gradient reaches the memory.

        momentum: mean over rows of 1 − cos(z_i, M[y_i, k_i]). gradient: mean over rows and columns of (z_i − q_i)², q_i
        the prototype nearest by Euclidean distance.

        Args:
            z: (N, S) any float dtype.
            row_class: (N,) int64; −1 leaves the row out.

        Returns:
            A scalar; 0 where no row counts.
        """
        memory = self.memory.detach()
        counted = row_class >= 0
        z = torch.where(counted[:, None], z, torch.zeros_like(z))  # or a NaN left out would still reach the gradient
        own = row_class.clamp_min(0)
        if self.update == "momentum":
            similarity, _ = functional.memory_similarity(z, memory)
            loss = 1 - similarity.gather(1, own[:, None])[:, 0]
        else:
            z = z.float()
            distance = (z * z).sum(1)[:, None, None] - 2 * torch.einsum("ns,cks->nck", z, memory) + (memory**2).sum(2)
            nearest = distance.gather(1, own[:, None, None].expand(-1, 1, distance.shape[2]))[:, 0].argmin(1)
            loss = (z - memory[own, nearest]).square().mean(1)
        return torch.where(counted, loss, torch.zeros_like(loss)).sum() / counted.sum().clamp_min(1)

    def assignment_loss(self, z: Tensor, target: Tensor, counted: Tensor, *, tau: float) -> Tensor:
        """How far rows are from their targets in the soft assignment over all slots: Kullback-Leibler divergence.

        p_i = softmax over the C·K slots of τ · cos(z_i, M), q_i the same of target_i; mean of Σ q_i log(q_i / p_i). The
        gradient reaches z alone.

        Args:
            z, target: (B, S) any float dtype.
            counted: (B,) bool; the other rows are left out.
            tau: sharpness, > 0.

        Returns:
            A scalar; 0 where no row counts.
        """
        slots = nn.functional.normalize(self.memory.detach().flatten(0, 1), dim=1, eps=1e-12)  # (C·K, S)

        def log_assignment(rows: Tensor) -> Tensor:
            rows = torch.where(counted[:, None], rows, torch.zeros_like(rows)).float()
            return torch.log_softmax(tau * nn.functional.normalize(rows, dim=1, eps=1e-12) @ slots.T, dim=1)

        p, q = log_assignment(z), log_assignment(target.detach())
        each = (q.exp() * (q - p)).sum(1)  # (B,)
        return torch.where(counted, each, torch.zeros_like(each)).sum() / counted.sum().clamp_min(1)

    def orthogonality_loss(self, row_class: Tensor) -> Tensor:
        """Mean over labelled rows of 10 · (Σ_ij cos²(e_i, e_j) / K² − 1/K) of the bank of the row's class.

        Keeps the prototypes of a class apart where gradients move them (`update="gradient"`).
        """
        unit = nn.functional.normalize(self.memory, dim=-1, eps=1e-12)
        slots = unit.shape[1]
        cosines = unit @ unit.transpose(1, 2)  # (C, K, K)
        each = 10.0 * (cosines.square().sum((1, 2)) / slots**2 - 1.0 / slots)  # (C,)
        share = torch.zeros_like(each).index_add_(0, row_class.clamp_min(0), (row_class >= 0).to(each.dtype))
        return (each * share).sum() / share.sum().clamp_min(1)

    def extra_repr(self) -> str:
        classes, slots, features = self.memory.shape
        return f"num_classes={classes}, slots={slots}, features={features}, update={self.update!r}"


def _take(memory: Tensor, which: Tensor) -> Tensor:
    """memory (C, K, S), which (C, n) -> their vectors (C, n, S)."""
    return memory.gather(1, which[..., None].expand(-1, -1, memory.shape[2]))


def _beside(unit: Tensor, generator: torch.Generator | None) -> Tensor:
    """Unit vectors (..., S) a little aside of these, in random directions. On the CPU."""
    noise = torch.randn(unit.shape, generator=generator, dtype=unit.dtype)
    tangent = noise - (noise * unit).sum(-1, keepdim=True) * unit
    return nn.functional.normalize(unit + _APART * nn.functional.normalize(tangent, dim=-1), dim=-1)


class SoftAngleLoss(nn.Module):
    """`momkd.functional.soft_angle_loss` with its numbers fixed, mean over labelled rows.

    Args:
        margin: in units of cosine.
        tau: sharpness of the soft maximum over slots.
        beta: sharpness of the hinge.

    Example:
        >>> momkd.nn.SoftAngleLoss()(torch.randn(3, 8), torch.randn(2, 4, 8), torch.tensor([0, 1, -1])).shape
        torch.Size([])
    """

    def __init__(self, margin: float = 0.3, tau: float = 5.0, beta: float = 20.0) -> None:
        super().__init__()
        self.margin, self.tau, self.beta = margin, tau, beta

    def forward(self, z: Tensor, memory: Tensor, labels: Tensor) -> Tensor:
        """z (B, S), memory (C, K, S), labels (B,) with −1 for none -> scalar."""
        return functional.soft_angle_loss(z, memory, labels, margin=self.margin, tau=self.tau, beta=self.beta)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, tau={self.tau}, beta={self.beta}"

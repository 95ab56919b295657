"""Pooling of ragged bags: gated attention, given scores, and attention guided by a memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from momkd import budget, dispatch, ops
from momkd.bags import Bags
from momkd.functional import _plain
from momkd.functional import _validate as check


def gated_attention_pool(
    x: Tensor | Bags,
    offsets: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    *,
    score_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_scores: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated attention pooling of every bag, in one call and without padding.

    s_ih = w_a[h] · (tanh(W_v x_i + b_v) ⊙ σ(W_u x_i + b_u)) + b_a[h] + score_bias_ih; α = softmax of s over the bag,
    per branch h; out[b, h] = Σ_i α_ih x_i.

    Args:
        x: (N, L) patch features of all bags, any float dtype; or `Bags`, which bring their offsets.
        offsets: (B + 1,) int32, bag b owns rows offsets[b] to offsets[b + 1]; see `Bags.offsets`. None beside `Bags`.
        w_v, b_v: (D, L) and (D,), the tanh branch; a bias may be None.
        w_u, b_u: (D, L) and (D,), the σ branch; `w_u=None` is the ungated form.
        w_a, b_a: (H, D) and (H,), one row a branch of attention.
        score_bias: (N, H) any float dtype, added to the scores before the softmax: what else tells how much a patch
            counts, such as its likeness to a memory. −inf hides a patch.
        dropout_p: probability of dropping a value of tanh(·) and, apart from it, of σ(·); 0 ≤ p < 1.
        seed: of the dropout: an int or an int64 scalar tensor; None draws one from torch's generator.
        return_scores: also return the scores before softmax, with `score_bias` in them, for heatmaps and instance
            losses.
        backend: None for the best that can run, or a name of `momkd.dispatch.BACKENDS`.

    Returns:
        (B, H, L) in the dtype of x; an empty bag gives zeros. With `return_scores` also (N, H), in float32 (float64 for
        a float64 x). Gradients reach x, the weights, the biases and score_bias, and come from both results.

    Raises:
        ValueError: an argument does not fit; the message says what was expected and what came.
        BackendError: the named backend cannot run here, with the reason.

    Source: Ilse, Tomczak and Welling, ICML 2018, equations 7 to 9; dropout and branches as in CLAM (Lu et al. 2021).

    Example:
        >>> bags = momkd.Bags.from_list([torch.randn(70, 32), torch.randn(500, 32)])
        >>> w_v, w_u, w_a = torch.randn(16, 32), torch.randn(16, 32), torch.randn(1, 16)
        >>> out = gated_attention_pool(bags, None, w_v, None, w_u, None, w_a, None)
        >>> out.shape
        torch.Size([2, 1, 32])
    """
    x, offsets = _ragged("x", x, offsets)
    check.shape("x", x, (None, None), "(N, L)")
    check.offsets(offsets, x.shape[0])
    gate = _gate_of(x, w_v, b_v, w_u, b_u, w_a, b_a, dropout_p)
    check.same_device("x", x, offsets=offsets, score_bias=score_bias)
    if score_bias is not None:
        check.shape("score_bias", score_bias, (x.shape[0], w_a.shape[0]), "(N, H)")
        check.floating("score_bias", score_bias)
    if score_bias is None and _plain_is_quicker("gated_attention_pool", gate, offsets, dropout_p, backend):
        scores = _plain.gate(*gate)  # type: ignore[arg-type]
        pooled = _plain.pool_one_bag(gate[0], scores)  # type: ignore[arg-type]
        return (pooled, scores) if return_scores else pooled
    pooled, scores, *_ = ops.gated_attention_pool(
        gate[0], offsets, *gate[1:], score_bias, *_gate_options(gate, dropout_p, seed), backend or ""
    )
    return (pooled, scores) if return_scores else pooled


def gated_attention_scores(
    x: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The gate of `gated_attention_pool` alone, for a model whose softmax is its own.

    s_ih = w_a[h] · (tanh(W_v x_i + b_v) ⊙ σ(W_u x_i + b_u)) + b_a[h].

    Args:
        x: (N, L) patch features, any float dtype.
        w_v, b_v, w_u, b_u, w_a, b_a, dropout_p, seed, backend: as in `gated_attention_pool`.

    Returns:
        (N, H) scores before any softmax, in float32 (float64 for a float64 x). Gradients reach x, weights and biases.

    Raises:
        ValueError, BackendError: as in `gated_attention_pool`.

    Source: Ilse, Tomczak and Welling, ICML 2018, equation 9.

    Example:
        >>> w_v, w_u, w_a = torch.randn(16, 32), torch.randn(16, 32), torch.randn(1, 16)
        >>> gated_attention_scores(torch.randn(70, 32), w_v, None, w_u, None, w_a, None).shape
        torch.Size([70, 1])
    """
    check.shape("x", x, (None, None), "(N, L)")
    gate = _gate_of(x, w_v, b_v, w_u, b_u, w_a, b_a, dropout_p)
    if _plain_is_quicker("gated_attention_scores", gate, None, dropout_p, backend):
        return _plain.gate(*gate)  # type: ignore[arg-type]
    scores: Tensor = ops.gated_attention_scores(*gate, *_gate_options(gate, dropout_p, seed), backend or "")[0]
    return scores


def _gate_of(
    x: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_u: Tensor | None,
    b_u: Tensor | None,
    w_a: Tensor,
    b_a: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor | None, ...]:
    """The features and the parameters of a gate, checked, and cast where autocast is on."""
    check.fraction("dropout_p", dropout_p, below_one=True)
    check.floating("x", x)
    check.shape("w_v", w_v, (None, x.shape[1]), "(D, L)")
    hidden = w_v.shape[0]
    check.shape("w_a", w_a, (None, hidden), "(H, D)")
    if w_u is None and b_u is not None:
        raise ValueError("b_u: expected None, because w_u is None (the ungated form), got a tensor")
    if w_u is not None:
        check.shape("w_u", w_u, (hidden, x.shape[1]), "(D, L)")
    for name, bias, size, words in (
        ("b_v", b_v, hidden, "(D,)"),
        ("b_u", b_u, hidden, "(D,)"),
        ("b_a", b_a, w_a.shape[0], "(H,)"),
    ):
        if bias is not None:
            check.shape(name, bias, (size,), words)
    check.same_device("x", x, w_v=w_v, b_v=b_v, w_u=w_u, b_u=b_u, w_a=w_a, b_a=b_a)
    return check.autocast(x, w_v, b_v, w_u, b_u, w_a, b_a)


def _plain_is_quicker(
    op: str, gate: Sequence[Tensor | None], offsets: Tensor | None, dropout_p: float, backend: str | None
) -> bool:
    """Whether torch's own functions do: without dropout, whose bits are ours, on a bag with patches, on a CPU."""
    x, w_v, _, w_u, _, w_a, _ = gate
    assert x is not None
    if dropout_p > 0 or x.shape[0] == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if any(t is not None and t.dtype != x.dtype for t in gate):  # torch's product takes one dtype
        return False
    args = (x, w_v, w_u, w_a) if offsets is None else (x, offsets, w_v, w_u, w_a)
    return dispatch.plain_form(op, backend, args)


def _gate_options(
    gate: Sequence[Tensor | None], dropout_p: float, seed: int | Tensor | None
) -> tuple[float, Tensor | None, int]:
    """dropout_p, the seed of the dropout, and how many bytes may be kept for backward."""
    x = gate[0]
    assert x is not None
    drawn = check.seed(seed, x.device) if dropout_p > 0 else None
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in gate)
    return dropout_p, drawn, budget.asked() if wanted else 0


def _ragged(name: str, rows: Tensor | Bags, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows and their offsets, which come from `Bags` or beside a tensor."""
    if isinstance(rows, Bags):
        if offsets is not None:
            raise ValueError(f"offsets: expected None, because {name} is Bags, which bring their own, got a tensor")
        return rows.features, rows.offsets
    if offsets is None:
        raise ValueError(f"offsets: expected int32 (B+1,) beside a tensor {name}, got None; or pass Bags as {name}")
    return rows, offsets


def attention_pool(
    values: Tensor | Bags, scores: Tensor, offsets: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Softmax of given scores over every bag, and the weighted sum of its rows.

    α_ih = exp(scores_ih) / Σ_j exp(scores_jh) over the bag; out[b, h] = Σ_i α_ih values_i. For any head that computes
    its own scores.

    Args:
        values: (N, L) any float dtype; or `Bags`, which bring their offsets.
        scores: (N, H) any float dtype; −inf hides a row.
        offsets: (B + 1,) int32. None beside `Bags`.
        backend: None for the best that can run, or a name of `momkd.dispatch.BACKENDS`.

    Returns:
        (B, H, L) in the dtype of values; zeros for an empty bag and for one whose scores are all −inf. Gradients reach
        values and scores.

    Raises:
        ValueError, BackendError: as in `gated_attention_pool`.

    Example:
        >>> offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> attention_pool(torch.randn(5, 8), torch.randn(5, 2), offsets).shape
        torch.Size([2, 2, 8])
    """
    values, offsets = _ragged("values", values, offsets)
    check.shape("values", values, (None, None), "(N, L)")
    check.floating("values", values)
    check.shape("scores", scores, (values.shape[0], None), "(N, H)")
    check.floating("scores", scores)
    check.offsets(offsets, values.shape[0])
    check.same_device("values", values, scores=scores, offsets=offsets)
    pooled: Tensor = ops.attention_pool(values, scores, offsets, backend or "")[0]
    return pooled


def memory_guided_pool(
    z: Tensor,
    values: Tensor | Bags,
    memory: Tensor,
    offsets: Tensor | None,
    temperature: float | Tensor,
    *,
    branch: str = "positive",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool every bag with attention that follows the memory: patches that look like one class and not like another.

    s_ic = max_k cos(z_i, M_ck). `positive`, for two classes: score_i = (s_i1 − s_i0) / temperature. `per_class`, and
    always for more than two: score_ic = (s_ic − max_{c' ≠ c} s_ic') / temperature, one branch a class. Then softmax
    over the bag and the weighted sum of values.

    Args:
        z: (N, S) projections of the patches, any float dtype, normalised inside.
        values: (N, L) what is pooled, any float dtype; or `Bags`, which bring their offsets.
        memory: (C, K, S) prototypes, C ≥ 2, normalised inside; a constant here, no gradient reaches it.
        offsets: (B + 1,) int32. None beside `Bags`.
        temperature: > 0, a number or a scalar tensor that may want a gradient.
        branch: "positive" or "per_class".
        backend: None for the best that can run, or a name of `momkd.dispatch.BACKENDS`.

    Returns:
        pooled (B, H, L) in the dtype of values (zeros for an empty bag), attention (N, H) summing to one in each bag,
        and the nearest slot of each class (N, C) int32; H = 1 or C. Gradients reach z, values and temperature through
        pooled; the attention is a result to look at. Where its gradient is wanted, take `memory_similarity` and
        `attention_pool`.

    Raises:
        ValueError, BackendError: as in `gated_attention_pool`.

    Source: MoMKD (arXiv 2602.21395), memory-guided attention.

    Example:
        >>> z, values, memory = torch.randn(9, 4), torch.randn(9, 32), torch.randn(2, 3, 4)
        >>> offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
        >>> pooled, attention, slots = memory_guided_pool(z, values, memory, offsets, 0.2)
        >>> pooled.shape, attention.shape, slots.shape
        (torch.Size([2, 1, 32]), torch.Size([9, 1]), torch.Size([9, 2]))
    """
    values, offsets = _ragged("values", values, offsets)
    check.shape("z", z, (None, None), "(N, S)")
    check.floating("z", z)
    check.shape("values", values, (z.shape[0], None), "(N, L)")
    check.floating("values", values)
    check.memory(memory, z.shape[1])
    if memory.shape[0] < 2:
        raise ValueError(f"memory: expected at least 2 classes (C, K, S), got {tuple(memory.shape)}")
    check.offsets(offsets, z.shape[0])
    check.choice("branch", branch, ("positive", "per_class"))
    if not isinstance(temperature, Tensor):
        check.positive("temperature", temperature)
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        temperature = torch.full((), temperature, dtype=dtype, device=z.device)
    elif temperature.numel() != 1:
        raise ValueError(f"temperature: expected a number or a scalar tensor, got {tuple(temperature.shape)}")
    check.same_device("z", z, values=values, memory=memory, offsets=offsets, temperature=temperature)
    per_class = branch == "per_class" or memory.shape[0] > 2
    result: tuple[Tensor, Tensor, Tensor] = ops.memory_guided_pool(
        z, values, memory.detach(), offsets, temperature, per_class, backend or ""
    )
    return result

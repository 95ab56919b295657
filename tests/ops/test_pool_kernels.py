"""What only the Triton kernels of pooling can get wrong: alignment, addresses, edges of bags, heads, NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from momkd import dispatch, reference
from momkd import functional as F
from momkd.reference.gated_attention_pool import GateParameters
from tests.compare import FORWARD, GRADIENT, assert_close, offsets_of, relative, sparse

able, reason = dispatch.can_run("attention_pool", "triton", (torch.zeros(1),))
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not able, reason=f"Triton: {reason}; TRITON_INTERPRET=1 runs kernels on the CPU"),
]
EDGES = (0, 1, 15, 16, 17, 0, 63, 64, 65, 1, 0)


def attend(values: Tensor, scores: Tensor, offsets: Tensor) -> list[Tensor]:
    """Pooled, and the gradients of values and scores."""
    v, s = (t.detach().requires_grad_() for t in (values, scores))
    pooled = F.attention_pool(v, s, offsets, backend="triton")
    return [pooled, *torch.autograd.grad(pooled.square().sum(), (v, s))]


def gate(width: int, heads: int) -> list[Tensor | None]:
    shapes = [(9, width), (9,), (9, width), (9,), (heads, 9), (heads,)]
    return [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]


@pytest.mark.parametrize("heads", [1, 2])
def test_rows_that_lie_further_apart_than_32_bits_reach(heads: int) -> None:
    """Row 5 begins 2.5 · 2^31 elements behind row 0."""
    far, near, scores = sparse(6, 1 << 30, 24), torch.randn(6, 24), torch.randn(6, heads)
    far.copy_(near)
    results = [attend(rows, scores, offsets_of((2, 4))) for rows in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("heads", [1, 16, 17])
@pytest.mark.parametrize("width", [20, 129])
def test_bags_at_the_edges_of_tiles(heads: int, width: int) -> None:
    torch.manual_seed(0)
    n = sum(EDGES)
    values, scores = torch.randn(n, width), 3 * torch.randn(n, heads)
    v, s = (t.double().requires_grad_() for t in (values, scores))
    want, _ = reference.attention_pool(v, s, offsets_of(EDGES))
    wanted = [want, *torch.autograd.grad(want.square().sum(), (v, s))]
    got = attend(values, scores, offsets_of(EDGES))
    for mine, exact, tolerance in zip(got, wanted, (FORWARD, GRADIENT, GRADIENT), strict=True):
        assert_close(mine, exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_row_alone_in_its_bag_has_no_gradient_of_its_score(heads: int, dtype: torch.dtype) -> None:
    """Exactly: its weight is 1 whatever the score."""
    torch.manual_seed(0)
    lengths = (1, 40, 1, 0, 1)
    values, scores = torch.randn(sum(lengths), 300).to(dtype), 3 * torch.randn(sum(lengths), heads)
    _, d_values, d_scores = attend(values, scores, offsets_of(lengths))
    alone = [0, 41, 42]
    assert (d_scores[alone] == 0).all()
    assert (d_scores[1:41] != 0).any()
    assert (d_values[alone] != 0).any()


# -- alignment: a wrong promise to the compiler gives wrong rows -------------------------------------------------


def views(width: int) -> dict[str, Tensor]:
    """The same width, rows that begin at multiples of different powers of two."""
    wide = torch.randn(70, width + 40)
    return {
        "whole": torch.randn(70, width),
        "rows a little apart": wide[:, :width],
        "from column 4": wide[:, 4 : width + 4],
        "from column 1": wide[:, 1 : width + 1],
        "from row 3": torch.randn(80, width)[3:73],
        "odd distance": torch.randn(70, width + 1)[:, :width],
        "every second column": torch.randn(70, 2 * width)[:, ::2],
        "transposed": torch.randn(width, 70).T,
        "one row, repeated": torch.randn(1, width).expand(70, width),
    }


@pytest.mark.parametrize("width", [20, 21])
def test_views_are_read_as_they_lie(width: int) -> None:
    torch.manual_seed(0)
    offsets, scores, given = offsets_of((3, 0, 30)), torch.randn(33, 2), gate(width, 2)
    memory = torch.randn(2, 5, width)
    for name, whole in views(width).items():
        x = whole[:33] if name != "transposed" else whole.T[:, :33].T
        calls: list[Callable[[Tensor], Tensor]] = [lambda x: F.attention_pool(x, scores, offsets, backend="triton")]
        calls += [
            lambda x: F.gated_attention_pool(x, offsets, *given, backend="triton"),
            lambda x: F.memory_guided_pool(x, x, memory, offsets, 0.2, backend="triton")[0],
        ]
        for call in calls:
            results = []
            for rows in (x, x.contiguous()):
                leaf = rows.detach().requires_grad_()
                out = call(leaf)
                results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
            for mine, plain in zip(*results, strict=True):
                assert_close(mine, plain, 1e-6, name)


def test_alignment_is_true() -> None:
    from momkd.kernels._common import alignment

    for width in (16, 20, 18, 21, 500, 1):
        for name, x in views(width).items():
            if x.stride(1) == 1:
                found = alignment(x)
                begins = [row.data_ptr() // 4 for row in x] + [row.data_ptr() // 4 + width for row in x]
                assert all(begin % found == 0 for begin in begins), name
                assert found in (1, 2, 4, 8, 16)
    assert alignment(torch.empty(7, 500)) == math.gcd(16, 500) == 4
    assert alignment(torch.empty(7, 1024)[:, :512]) == 16
    assert alignment(torch.empty(7, 1024)[:, 2:514]) == 2
    assert alignment(torch.empty(7, 1001)[:, :1000]) == 1


# -- what is not finite stays where it is ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["values", "scores"])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_bad_row_at_the_edge_of_a_tile_leaves_other_bags_alone(bad: float, where: str, heads: int) -> None:
    """Bags of 64 rows and more share no tile with their neighbours, but lie right beside them in memory."""
    torch.manual_seed(0)
    lengths = (64, 16, 1, 65, 17)
    offsets, bag = offsets_of(lengths), torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    values, scores = torch.randn(len(bag), 20), torch.randn(len(bag), heads)
    clean = attend(values, scores, offsets)
    for row in (79, 80, 81):  # the last row of a bag, one alone, and the first of a bag
        spoilt = {"values": values.clone(), "scores": scores.clone()}
        spoilt[where][row] = bad
        got = attend(**spoilt, offsets=offsets)
        others = torch.arange(5) != bag[row]
        assert torch.equal(got[0][others], clean[0][others])
        assert all(torch.equal(a[others[bag]], b[others[bag]]) for a, b in zip(got[1:], clean[1:], strict=True))
        if bad == -math.inf and where == "scores":  # a row that is hidden; alone in its bag, it leaves zeros
            assert got[0].isfinite().all()
        else:
            assert not got[0][~others].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("heads", [1, 16])
def test_a_bad_row_of_the_gate_leaves_other_bags_alone(bad: float, heads: int) -> None:
    torch.manual_seed(0)
    lengths = (17, 0, 1, 16, 31)
    offsets, bag = offsets_of(lengths), torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    x, given = torch.randn(len(bag), 12), gate(12, heads)

    def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        pooled = F.gated_attention_pool(leaf, offsets, *given, backend="triton")
        return pooled.detach(), torch.autograd.grad(pooled.square().sum(), leaf)[0]

    clean = gradients(x)
    for row in (17, 33):
        spoilt = x.clone()
        spoilt[row] = bad
        got = gradients(spoilt)
        others = torch.arange(5) != bag[row]
        assert torch.equal(got[0][others], clean[0][others])
        assert torch.equal(got[1][others[bag]], clean[1][others[bag]])
        assert not got[0][~others].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("branch", ["positive", "per_class"])
@pytest.mark.parametrize("where", ["z", "values"])
def test_a_bad_row_of_guided_pooling_leaves_other_bags_alone(bad: float, branch: str, where: str) -> None:
    torch.manual_seed(0)
    lengths = (33, 1, 16, 0, 20)
    offsets, bag = offsets_of(lengths), torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    memory = torch.randn(3 if branch == "per_class" else 2, 5, 8)

    def gradients(z: Tensor, values: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (z, values)]
        pooled, attention, _ = F.memory_guided_pool(*leaves, memory, offsets, 0.2, branch=branch, backend="triton")
        return [pooled.detach(), attention.detach(), *torch.autograd.grad(pooled.square().sum(), leaves)]

    given = {"z": torch.randn(len(bag), 8), "values": torch.randn(len(bag), 12)}
    clean = gradients(**given)
    for row in (33, 34):
        spoilt = {name: t.clone() for name, t in given.items()}
        spoilt[where][row] = bad
        got = gradients(**spoilt)
        others = torch.arange(5) != bag[row]
        assert torch.equal(got[0][others], clean[0][others])
        assert all(torch.equal(a[others[bag]], b[others[bag]]) for a, b in zip(got[1:], clean[1:], strict=True))
        assert not got[0][~others].isfinite().all()


# -- small weights in float16 --------------------------------------------------------------------------------------


def assert_as_rounded(got: Tensor, want: Tensor) -> None:
    """The error is at most twice that of rounding the exact result to the type of `got`."""
    assert relative(got, want) <= 2 * relative(want.to(got.dtype), want)


@pytest.mark.parametrize("heads", [1, 2, 17])
def test_small_weights_keep_their_digits_in_float16(heads: int) -> None:
    """The first row has most of the weight, others about 1e-6, as in a bag of a million: float16 has 17 values there.

    The gradient is as large as a scaler makes it.
    """
    torch.manual_seed(0)
    scores, offsets = torch.randn(201, heads), offsets_of((201,))
    scores[0] = math.log(1e6)
    values, grad = torch.randn(201, 40).half(), (1000 * torch.randn(1, heads, 40)).half()
    results = []
    for as_type in (lambda t: t, Tensor.double):
        leaf = as_type(values).clone().requires_grad_()
        backend = "triton" if leaf.dtype == torch.float16 else "torch"
        pooled = F.attention_pool(leaf, as_type(scores), offsets, backend=backend)
        results.append(torch.autograd.grad(pooled, leaf, as_type(grad))[0])
    got, want = results
    assert_as_rounded(got[1:], want[1:])


def test_small_weights_of_guided_pooling_keep_their_digits_in_float16() -> None:
    """Three rows lie on the prototype of a class each, and have its weight; the others are nearly apart from all."""
    torch.manual_seed(0)
    memory = torch.eye(8)[:3, None].contiguous()
    z = torch.cat([torch.eye(8)[:3], 0.01 * torch.eye(8)[:3].repeat(66, 1) + torch.eye(8)[7]]).half()
    values, grad = torch.randn(201, 40).half(), (1000 * torch.randn(1, 3, 40)).half()
    leaf, offsets = values.clone().requires_grad_(), offsets_of((201,))
    pooled, attention, _ = F.memory_guided_pool(z, leaf, memory, offsets, 0.07, branch="per_class", backend="triton")
    assert attention[3:].max() < 1e-5
    got = torch.autograd.grad(pooled, leaf, grad)[0]
    want = torch.einsum("ih,hl->il", attention.double(), grad[0].double())
    assert_as_rounded(got[3:], want[3:])


# -- float32 products --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowed", "expected"), [(False, "ieee"), (True, "tf32")])
def test_float32_products_follow_the_switch_of_torch(
    allowed: bool,
    expected: str,
    tf32_switches: dict[str, Callable[[bool], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from momkd.kernels import _common, attention_pool, gated_attention_pool, memory_guided_pool, segment_pool

    tf32_switches["older"](allowed)
    assert _common.precision(torch.float32) == expected
    assert _common.precision(torch.bfloat16) == _common.precision(torch.float16) == "tf32"
    seen: list[str] = []

    def launch(kernel: object, grid: object, *args: object, **meta: object) -> None:
        seen.extend(str(value) for name, value in meta.items() if name.endswith("PRECISION"))
        _common.launch(kernel, grid, *args, **meta)

    for module in (attention_pool, gated_attention_pool, memory_guided_pool, segment_pool):
        monkeypatch.setattr(module, "launch", launch)
    x, offsets = torch.randn(5, 4, requires_grad=True), offsets_of((2, 3))
    F.attention_pool(x, x[:, :2], offsets, backend="triton").sum().backward()
    F.gated_attention_pool(x, offsets, *gate(4, 2), backend="triton").sum().backward()
    F.memory_guided_pool(x, x, torch.randn(2, 3, 4), offsets, 0.2, backend="triton")[0].sum().backward()
    assert len(seen) >= 8
    assert set(seen) == {expected}


def test_gate_parameters_as_views() -> None:
    """Transposed, strided and offset weights are read as what they say."""
    torch.manual_seed(0)
    x, offsets = torch.randn(20, 12), offsets_of((7, 13))
    plain = gate(12, 2)
    w_v, b_v, w_u, b_u, w_a, b_a = plain
    odd = [
        w_v.T.contiguous().T,
        torch.stack([b_v, b_v], 1)[:, 0],
        torch.cat([torch.zeros(1), w_u.flatten()])[1:].view(9, 12),
        b_u,
        torch.cat([w_a, w_a], 1)[:, :9],
        b_a,
    ]
    got, want = (F.gated_attention_pool(x, offsets, *w, backend="triton") for w in (odd, plain))
    assert torch.equal(got, want)
    exact = GateParameters(*(p.double() for p in plain))
    assert_close(got, reference.gated_attention_pool(x.double(), offsets, exact)[0], FORWARD)

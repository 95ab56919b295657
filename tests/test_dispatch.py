"""A named backend runs or says why not; nothing is swapped silently."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from momkd import dispatch, env, native, ops
from momkd import functional as F
from momkd.errors import BackendError, InputError
from momkd.graph import knn

MISSING = "the extension momkd._C is not there"


@pytest.fixture
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOMKD_BACKEND", raising=False)


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: (None, MISSING))


@pytest.fixture
def extension() -> None:
    pytest.importorskip("momkd._C", reason="momkd._C is not built: install momkd with a C++ compiler")


def bank(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """memory, usage, z, row_class"""
    memory = torch.nn.functional.normalize(torch.randn(2, 3, 4), dim=-1)
    return memory, torch.zeros(2, 3), torch.randn(7, 4).to(dtype), torch.arange(7) % 2


OFFSETS = torch.tensor([0, 3, 7], dtype=torch.int32)
CALLS: dict[str, Callable[[str | None], object]] = {
    "gated_attention_pool": lambda name: F.gated_attention_pool(
        torch.randn(7, 4), OFFSETS, torch.randn(3, 4), None, None, None, torch.randn(1, 3), None, backend=name
    ),
    "gated_attention_scores": lambda name: F.gated_attention_scores(
        torch.randn(7, 4), torch.randn(3, 4), None, None, None, torch.randn(1, 3), None, backend=name
    ),
    "attention_pool": lambda name: F.attention_pool(torch.randn(7, 4), torch.randn(7, 2), OFFSETS, backend=name),
    "memory_similarity": lambda name: F.memory_similarity(torch.randn(7, 4), bank()[0], backend=name),
    "memory_guided_pool": lambda name: F.memory_guided_pool(
        torch.randn(7, 4), torch.randn(7, 5), bank()[0], OFFSETS, 0.2, backend=name
    ),
    "soft_angle_loss": lambda name: F.soft_angle_loss(torch.randn(7, 4), bank()[0], torch.arange(7) % 2, backend=name),
    "graph_attention": lambda name: F.graph_attention(
        torch.randn(7, 8), torch.randn(7, 8), torch.randn(2, 4), knn(torch.rand(7, 2), 3), backend=name
    ),
    "ema_accumulate": lambda name: F.ema_accumulate(bank()[0], *bank()[2:], backend=name),
    "ema_apply_": lambda name: F.ema_apply_(*bank()[:2], bank()[0], torch.ones(2, 3), momentum=0.9, backend=name),
    "ema_scatter_": lambda name: F.ema_scatter_(*bank(), momentum=0.9, backend=name),
}


def test_every_op_is_listed_and_held_by_torch() -> None:
    assert set(CALLS) == set(dispatch.OPS) == set(ops.__all__)
    for backends in dispatch.OPS.values():
        assert set(backends) <= set(dispatch.BACKENDS)
        assert backends[-1] == "torch", "what runs everywhere comes last"


@pytest.mark.usefixtures("no_override")
@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_a_named_backend_runs_or_says_why_not(op: str, backend: str) -> None:
    """On CPU tensors: the reason is about the installation, the version or the device."""
    able, reason = dispatch.can_run(op, backend, (torch.zeros(1, 1, 1),))
    assert reason
    if able:
        assert dispatch.choose(op, backend, ()) == backend
        CALLS[op](backend)
        return
    with pytest.raises(BackendError) as caught:
        CALLS[op](backend)
    message = str(caught.value)
    assert message.startswith(f"{op}: backend {backend!r} cannot run: ")
    assert "; available here: " in message
    assert message.endswith("torch")
    assert not isinstance(caught.value, InputError)


@pytest.mark.usefixtures("no_override", "extension")
def test_the_best_that_can_run_is_taken() -> None:
    memory, usage, z, row_class = bank()
    args = (memory, z, usage, row_class, None)
    assert dispatch.choose("ema_scatter_", None, args) == "native"
    assert dispatch.choose("ema_scatter_", "", args) == "native"
    assert dispatch.choose("ema_scatter_", "torch", args) == "torch"
    assert dispatch.choose("ema_scatter_", None, (memory, z.double(), usage, row_class, None)) == "torch"
    assert dispatch.choose("ema_scatter_", None, (memory.to("meta"), z, usage, row_class, None)) == "torch"
    assert dispatch.choose("attention_pool", None, (z, z)) == ("triton" if env.triton_interpreted() else "native")
    assert dispatch.choose("attention_pool", None, (z.double(), z.double())) == "torch"


@pytest.mark.usefixtures("extension")
def test_why_native_cannot_run() -> None:
    memory, _, z, row_class = bank()
    cases = [
        ((memory.to("meta"), z), "runs on the CPU, the tensors are on meta"),
        ((memory, z, row_class.to("meta")), "runs on the CPU, the tensors are on meta"),
        ((memory, z.double()), "takes float32, float16 and bfloat16, got float64"),
        ((memory.double(), z), r"takes a contiguous float32 memory, got torch.float64 with strides \(12, 4, 1\)"),
        (
            (memory.transpose(0, 1), z),
            r"takes a contiguous float32 memory, got torch.float32 with strides \(4, 12, 1\)",
        ),
    ]
    for args, reason in cases:
        assert not dispatch.can_run("ema_scatter_", "native", args)[0]
        with pytest.raises(BackendError, match=f"cannot run: {reason}; available here: torch"):
            dispatch.choose("ema_scatter_", "native", args)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert dispatch.can_run("ema_scatter_", "native", (memory, z.to(dtype), None))[0]
    assert dispatch.can_run("ema_scatter_", "native") == (True, "CPU tensors")


@pytest.mark.usefixtures("no_override", "no_extension")
def test_without_the_extension() -> None:
    memory, usage, z, row_class = bank()
    assert dispatch.can_run("ema_scatter_", "native") == (False, MISSING)
    with pytest.raises(BackendError, match=f"backend 'native' cannot run: {MISSING}; available here: torch"):
        F.ema_scatter_(memory, usage, z, row_class, momentum=0.9, backend="native")
    assert (usage == 0).all(), "nothing was changed"
    F.ema_scatter_(memory, usage, z, row_class, momentum=0.9)
    assert (usage > 0).any()


@pytest.fixture
def fresh_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    native.extension.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native.extension.cache_clear()


def test_an_extension_that_cannot_be_imported_is_a_reason(fresh_extension: pytest.MonkeyPatch) -> None:
    fresh_extension.setitem(sys.modules, "momkd._C", None)
    module, reason = native.extension()
    assert module is None
    assert "momkd._C is not installed" in reason
    assert "reinstall with a C++ compiler" in reason
    assert native.extension() == (None, reason)


# -- MOMKD_BACKEND -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "read"), [(None, None), ("", None), ("  ", None), ("torch", "torch"), (" Native ", "native")]
)
def test_the_variable_is_read(text: str | None, read: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOMKD_BACKEND", raising=False)
    if text is not None:
        monkeypatch.setenv("MOMKD_BACKEND", text)
    assert env.backend_override() == read


def test_the_variable_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMKD_BACKEND", "torch")
    assert all(dispatch.choose(op, None, ()) == "torch" for op in dispatch.OPS)
    monkeypatch.delenv("MOMKD_BACKEND")
    best = dispatch.choose("soft_angle_loss", None, ())
    monkeypatch.setenv("MOMKD_BACKEND", "cuda")
    assert dispatch.choose("soft_angle_loss", None, ()) == best, "an op without it keeps its own choice"
    with pytest.raises(BackendError, match="no cuda kernel for soft_angle_loss in this version"):
        dispatch.choose("soft_angle_loss", "cuda", ())  # but not where the caller names it


@pytest.mark.usefixtures("extension")
def test_the_caller_comes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMKD_BACKEND", "torch")
    assert dispatch.choose("ema_scatter_", "native", ()) == "native"
    monkeypatch.setenv("MOMKD_BACKEND", "native")
    assert dispatch.choose("ema_scatter_", None, ()) == "native"
    memory, usage, z, row_class = bank(torch.float64)
    with pytest.raises(BackendError, match="takes float32, float16 and bfloat16"):
        F.ema_scatter_(memory, usage, z, row_class, momentum=0.9)


@pytest.mark.usefixtures("no_extension")
def test_a_variable_that_cannot_be_met_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMKD_BACKEND", "native")
    with pytest.raises(BackendError, match=MISSING):
        CALLS["ema_scatter_"](None)


# -- wrong words -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_override")
def test_suggestions(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="backend: expected one of triton, cuda, native, torch, got 'tritn'; did you mean"
    ):
        CALLS["attention_pool"]("tritn")
    with pytest.raises(ValueError, match=r"got 'qqq'$"):
        CALLS["attention_pool"]("qqq")
    with pytest.raises(ValueError, match=r"op: expected one of .*, got 'attentionpool'; did you mean 'attention_pool'"):
        dispatch.can_run("attentionpool", "torch")
    monkeypatch.setenv("MOMKD_BACKEND", "torhc")
    with pytest.raises(ValueError, match=r"MOMKD_BACKEND: expected one of .*, got 'torhc'; did you mean 'torch'"):
        CALLS["soft_angle_loss"](None)


# -- what the Triton kernels don't take --------------------------------------------------------------------------


def gate(features: int = 4, hidden: int = 3, heads: int = 1) -> tuple[Tensor | None, ...]:
    """What gated_attention_pool gives to dispatch; of no size in memory."""
    shapes = (7, features), (3,), (hidden, features), (hidden, features), (heads, hidden)
    return tuple(torch.zeros(1).expand(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"heads": 17}, "takes 1 to 16 heads, got 17"),
        ({"heads": 0}, "takes 1 to 16 heads, got 0"),
        ({"hidden": 32_769}, "takes 1 to 32768 hidden features, got 32769"),
        ({"features": 65_536}, "takes 1 to 65535 features, got 65536"),
        ({"features": 0}, "takes 1 to 65535 features, got 0"),
    ],
)
def test_sizes_that_the_gate_kernels_do_not_take(
    sizes: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOMKD_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = gate(**sizes)
    assert dispatch.can_run("gated_attention_pool", "triton", args) == (False, reason)
    assert dispatch.choose("gated_attention_pool", None, args) in ("native", "torch")
    with pytest.raises(BackendError, match=f"cannot run: {reason}; available here: .*torch"):
        dispatch.choose("gated_attention_pool", "triton", args)


def test_sizes_at_the_limits_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.can_run("gated_attention_pool", "triton", gate(65_535, 32_768, 16))[0]
    assert dispatch.can_run("attention_pool", "triton", (torch.zeros(2, 3), torch.zeros(2, 32)))[0]
    assert dispatch.can_run("attention_pool", "triton", (torch.zeros(2, 3), torch.zeros(2, 33))) == (
        False,
        "takes 1 to 32 heads, got 33",
    )


@pytest.mark.parametrize("size", [17, 33])
def test_more_heads_than_the_kernels_take_fall_to_the_next_backend(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOMKD_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, w, a = torch.randn(7, 4), torch.randn(3, 4), torch.randn(size, 3, requires_grad=True)

    def pooled(backend: str | None) -> Tensor:
        return F.gated_attention_pool(x, OFFSETS, w, None, w, None, a, None, backend=backend)

    torch.testing.assert_close(pooled(None), pooled("torch"))
    pooled(None).sum().backward()
    assert a.grad is not None
    if size == 33:
        scores = torch.randn(7, size)
        mine, plain = (F.attention_pool(x, scores, OFFSETS, backend=name) for name in (None, "torch"))
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("interpreted", [True, False])
def test_tensors_elsewhere_or_apart_are_a_reason(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    on = [torch.device("cpu"), torch.device("meta"), torch.device("cuda:0"), torch.device("cuda:1")]
    cpu, meta, first, second = (SimpleNamespace(device=device, is_floating_point=lambda: False) for device in on)

    def reason(*args: object) -> str:
        able, why = dispatch.can_run("attention_pool", "triton", args)  # type: ignore[arg-type]
        assert not able
        return why

    if interpreted:
        assert reason(meta) == reason(cpu, meta) == "TRITON_INTERPRET runs kernels on the CPU, the tensors are on meta"
        assert reason(first).endswith("the tensors are on cuda:0")
    else:
        assert reason(cpu) == reason(first, cpu) == "runs on a GPU, the tensors are on cpu"
        assert reason(first, second) == "takes tensors of one device, got cuda:0 and cuda:1"


def test_tensors_on_two_devices_are_an_error_that_says_what_to_do() -> None:
    x = torch.randn(7, 4)
    with pytest.raises(ValueError, match=r"w_v: expected on cpu like x, got meta; use w_v.to\(x.device\)"):
        F.gated_attention_pool(x, OFFSETS, torch.randn(3, 4, device="meta"), None, None, None, torch.randn(1, 3), None)
    with pytest.raises(ValueError, match="scores: expected on cpu like values, got meta"):
        F.attention_pool(x, torch.randn(7, 1, device="meta"), OFFSETS)
    with pytest.raises(ValueError, match="memory: expected on cpu like z, got meta"):
        F.memory_similarity(x, torch.randn(2, 3, 4, device="meta"))

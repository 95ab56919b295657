"""Tuning of tiles: nothing unless asked, the quickest by a timer that the test holds, and what is kept on disk."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import momkd
from momkd import env, gpu
from momkd import functional as F
from tests.compare import offsets_of

pytest.importorskip("triton")
tuning = pytest.importorskip("momkd.kernels._tuning")
CPU = torch.device("cpu")
TILES = (tuning.Tiles(64, 128), tuning.Tiles(32, 64), tuning.Tiles(16, 32))


class Timer:
    """Says that the call number `best` is the quickest, and counts."""

    def __init__(self, best: int) -> None:
        self.best, self.calls = best, 0

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return 1.0 if self.calls - 1 == self.best else 2.0


def nothing(_: object) -> None:
    pass


def choose(store: Any, key: str = "op | cpu") -> Any:
    return store.choose(key, TILES, nothing, CPU)


def test_nothing_is_timed_unless_asked(tmp_path: Path) -> None:
    store = tuning.Store(tmp_path)
    assert choose(store) == TILES[0]
    assert not list(tmp_path.iterdir())


def test_the_quickest_is_kept_here_and_on_disk(tmp_path: Path) -> None:
    timer = Timer(best=1)
    store = tuning.Store(tmp_path / "made" / "when needed", timer)
    tried: list[Any] = []
    assert store.choose("a", TILES, tried.append, CPU) == TILES[1]
    assert tried == list(TILES)
    assert choose(store, "a") == TILES[1]
    assert timer.calls == 3, "what is known is not timed again"
    later = tuning.Store(tmp_path / "made" / "when needed")
    assert choose(later, "a") == TILES[1]
    assert choose(later, "b") == TILES[0], "of another shape nothing is known"


def test_two_stores_keep_what_the_other_wrote(tmp_path: Path) -> None:
    one, other = tuning.Store(tmp_path, Timer(1)), tuning.Store(tmp_path, Timer(2))
    assert choose(other, "unknown yet") == TILES[2]
    choose(one, "a")
    other.measure = Timer(2)
    choose(other, "b")
    later = tuning.Store(tmp_path)
    assert [choose(later, key) for key in ("unknown yet", "a", "b")] == [TILES[2], TILES[1], TILES[2]]
    assert {path.name for path in tmp_path.iterdir()} == {tuning.FILE, f"{tuning.FILE}.lock"}


def test_many_processes_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, torch; from momkd.kernels import _tuning as t; "
        "s = t.Store(pathlib.Path(sys.argv[1]), lambda call: 1.0); "
        "[s.choose(f'{sys.argv[2]} {i}', (t.Tiles(64, 64), t.Tiles(32, 32)), print, torch.device('cpu')) "
        "for i in range(20)]"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert len(json.loads((tmp_path / tuning.FILE).read_text())["tiles"]) == 60


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "tiles": 3}', '{"format": 1, "tiles": [1, 2]}', "\udcff"],
)
def test_a_damaged_file_is_a_warning_and_is_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / tuning.FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match="cannot be read"):
        assert choose(tuning.Store(tmp_path)) == TILES[0]
    with pytest.warns(UserWarning, match="cannot be read"):
        assert choose(tuning.Store(tmp_path, Timer(1))) == TILES[1]
    assert choose(tuning.Store(tmp_path)) == TILES[1]


@pytest.mark.parametrize("value", [[1, 2, 3, 4], "quick", None, [64], {"rows": 64}, [[64, 128, 4, 2]]])
def test_what_is_no_candidate_is_not_taken(value: object, tmp_path: Path) -> None:
    (tmp_path / tuning.FILE).write_text(json.dumps({"format": tuning.FORMAT, "tiles": {"op | cpu": value}}))
    assert choose(tuning.Store(tmp_path)) == TILES[0]


def test_a_file_of_another_format_is_left_unread(tmp_path: Path) -> None:
    (tmp_path / tuning.FILE).write_text(json.dumps({"format": 99, "tiles": {"op | cpu": list(TILES[2])}}))
    assert choose(tuning.Store(tmp_path)) == TILES[0]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = tuning.Store(tmp_path / "file" / "folder", Timer(1))
    with pytest.warns(UserWarning, match="cannot be (read|written).*MOMKD_CACHE_DIR"):
        assert choose(store) == TILES[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(store) == TILES[1], "in memory it is kept"


def test_tiles_that_a_card_has_no_room_for_are_passed_over() -> None:
    from triton.runtime.errors import OutOfResources

    def run(tiles: Any) -> None:
        if tiles == TILES[0]:
            raise OutOfResources(2, 1, "shared memory")

    assert tuning.Store(None, lambda call: call() or 1.0).choose("a", TILES, run, CPU) == TILES[1]


def test_a_candidate_that_fails_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    def run(tiles: Any) -> None:
        if tiles == TILES[1]:
            raise RuntimeError("no such instruction")

    store = tuning.Store(tmp_path, lambda call: call() or 1.0)
    with pytest.warns(UserWarning, match=r"tuning a passes over Tiles\(rows=32.*RuntimeError: no such instruction"):
        assert store.choose("a", TILES, run, CPU) == TILES[0]
    assert choose(tuning.Store(tmp_path), "a") == TILES[0]


def test_a_default_that_fails_raises(tmp_path: Path) -> None:
    def run(tiles: Any) -> None:
        if tiles == TILES[0]:
            raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        tuning.Store(tmp_path, lambda call: call() or 1.0).choose("a", TILES, run, CPU)
    assert not list(tmp_path.iterdir())


def test_keys_hold_buckets_and_never_lengths() -> None:
    def key(rows: int, dtype: torch.dtype = torch.float32, *sizes: int) -> str:
        return str(tuning.key_of("op", torch.empty(rows, 8, dtype=dtype), sizes or (8, 1)))

    assert key(1025) == key(1500) == key(2048) != key(2049)
    assert key(0) == key(1)
    assert len({key(5), key(5, torch.float16), key(5, torch.float32, 8, 2)}) == 3
    import triton

    assert triton.__version__ in key(1)


def test_defaults_by_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(3, 1024, dtype=torch.bfloat16)
    rows, columns = {}, {}
    for chip in ("sm_80", "sm_89", "sm_90", "sm_120", "gfx942"):
        monkeypatch.setattr(tuning, "CHIP", chip)
        rows[chip] = tuning.MEMORY.fitted(x, 512, 256)[0].rows
        columns[chip] = tuning.POOL.fitted(x, 1024, 4, 4)[0].columns
    assert rows == {"sm_80": 32, "sm_89": 32, "sm_90": 64, "sm_120": 32, "gfx942": 64}
    assert columns == {"sm_80": 64, "sm_89": 64, "sm_90": 128, "sm_120": 64, "gfx942": 64}


# -- asked for by the user ---------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache lies here, and the timer prefers what comes second."""
    monkeypatch.setenv("MOMKD_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MOMKD_TUNE", raising=False)
    monkeypatch.setattr(gpu, "seconds", lambda call: (call(), next(numbers))[1])
    numbers = iter([2.0, 1.0, 2.0, 2.0] * 100)
    yield tmp_path
    tuning.STORE.configure(None, None)


def kept(folder: Path) -> dict[str, Any]:
    path = folder / tuning.FILE
    return dict(json.loads(path.read_text())["tiles"]) if path.exists() else {}


@pytest.mark.skipif(not env.triton_interpreted(), reason="TRITON_INTERPRET=1 runs kernels on the CPU")
def test_every_op_is_tuned_and_stays_right(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, offsets = torch.randn(20, 40), offsets_of((3, 0, 17))
    w, a, memory, t = torch.randn(40, 40), torch.randn(2, 40), torch.randn(2, 40, 40), torch.tensor(0.2)
    labels = torch.arange(20) % 2
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "attention_pool": lambda x: F.attention_pool(x, x[:, :2], offsets),
        "gated_attention_pool": lambda x: F.gated_attention_pool(x, offsets, w, None, w, None, a, None),
        "memory_similarity": lambda x: F.memory_similarity(x, memory, reduce="lse")[0],
        "memory_guided_pool": lambda x: F.memory_guided_pool(x, x, memory, offsets, t)[0],
        "soft_angle_loss": lambda x: F.soft_angle_loss(x, memory, labels),
    }

    on_memory = {"memory_similarity", "memory_guided_pool", "soft_angle_loss"}
    alone = on_memory if len(tuning.MEMORY.single) == 1 else set()  # by Triton before 3.6: there is nothing to choose
    first_of = {"gated_attention_pool": "gate_scores"}  # where the op is not the name of what is tuned

    def results(call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        out.square().sum().backward()
        return [out.detach(), leaf.grad]

    for name, call in calls.items():
        name = first_of.get(name, name)
        monkeypatch.setattr(tuning, "CHIP", "sm_90")  # one with room for several ways to cut a kernel
        plain = results(call)
        assert not any(key.startswith(name) for key in kept(here)), "nobody asked"
        with momkd.tune():
            tuned = results(call)
        assert any(key.startswith(name) for key in kept(here)) == (name not in alone)
        monkeypatch.setattr(gpu, "seconds", None)  # would raise
        again = results(call)
        monkeypatch.undo()
        monkeypatch.setenv("MOMKD_CACHE_DIR", str(here))
        numbers = iter([2.0, 1.0, 2.0, 2.0] * 100)
        monkeypatch.setattr(gpu, "seconds", lambda call, numbers=numbers: (call(), next(numbers))[1])
        for a_, b, c in zip(plain, tuned, again, strict=True):
            torch.testing.assert_close(b, a_, rtol=1e-4, atol=1e-5)
            assert torch.equal(b, c)
    tables = {key.split(" | ")[0].split()[0] for key in kept(here)}
    wanted = {"pool_backward", "gate_gradient", "memory_similarity_backward", "soft_angle_loss_backward"}
    assert {table for table in wanted if table.removesuffix("_backward") not in alone} <= tables


@pytest.mark.parametrize(("text", "asked"), [(None, False), ("", False), ("0", False), ("1", True), ("On", True)])
def test_the_variables(text: str | None, asked: bool, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        monkeypatch.setenv("MOMKD_TUNE", text)
    gpu.kernels("attention_pool")
    assert tuning.STORE.folder == here
    assert (tuning.STORE.measure is not None) == asked
    with momkd.tune(), momkd.tune():
        gpu.kernels("attention_pool")
        assert tuning.STORE.measure is not None
    gpu.kernels("attention_pool")
    assert (tuning.STORE.measure is not None) == asked


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMKD_CACHE_DIR", "~/elsewhere")
    assert env.cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("MOMKD_CACHE_DIR")
    assert env.cache_folder() == Path.home() / ".cache" / "momkd"
    monkeypatch.setenv("HOME", "/another")
    assert env.cache_folder() == Path("/another/.cache/momkd")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where there is no home
    assert env.cache_folder() is None


def test_seconds_is_a_median_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 100.0, 0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0, 0.0, 50.0])
    monkeypatch.setattr("momkd.gpu.time.perf_counter", lambda: next(times))
    assert gpu.seconds(lambda: None) == 3.0


class Device:
    """A GPU with a queue: calls and waits cost its time, launching costs the host's; events tell the device's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.busy_until = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(device.host, device.busy_until)

            def elapsed_time(self, end: Event) -> float:
                return 1000 * (end.at - self.at)

        monkeypatch.setattr(env, "triton_interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.run(cycles / 2e9))
        monkeypatch.setattr("momkd.gpu.time.perf_counter", lambda: self.host)

    def synchronize(self) -> None:
        self.host = max(self.host, self.busy_until)

    def run(self, seconds: float) -> None:
        self.busy_until = max(self.host, self.busy_until) + seconds

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.run(device)


@pytest.mark.parametrize(("host", "device"), [(1e-3, 1e-5), (1e-5, 1e-3), (1e-4, 1e-4)])
def test_seconds_of_a_gpu_are_those_of_its_kernels(host: float, device: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_ = Device(monkeypatch)
    calls = []

    def call() -> None:
        calls.append(1)
        for _ in range(3):
            gpu_.launch(host, device)

    assert gpu.seconds(call, repeats=4) == pytest.approx(3 * device)
    assert len(calls) == 6

"""What starts the CUDA kernels: `momkd._cuda` where its code runs on the GPU, else NVRTC, else nothing, with a reason.

Neither a GPU nor CuPy is needed: both are replaced by stand-ins that behave as they do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from momkd import cuda, dispatch
from momkd.cuda import ema, nvrtc
from momkd.errors import BackendError

HOPPER = (9, 0)


class Extension:
    """`momkd._cuda` as it was built, on a machine with some driver."""

    def __init__(self, archs: list[int], built: str = "13.0", driver: int = 13000, task: int = ema.TASK_BYTES) -> None:
        self.archs, self.built, self.driver, self.task = archs, built, driver, task

    def build_info(self) -> dict[str, Any]:
        return {"archs": self.archs, "cuda": self.built, "version": "0.1.0"}

    def driver_version(self) -> int:
        return self.driver

    def device_count(self) -> int:
        return int(self.driver // 1000 >= int(self.built.partition(".")[0]))

    def task_bytes(self) -> int:
        return self.task


class Nvrtc:
    """NVRTC as CuPy binds it."""

    def __init__(self, archs: tuple[int, ...] = (75, 80, 86, 90, 100), version: tuple[int, int] = (13, 0)) -> None:
        self.archs, self.version = archs, version
        self.compiled: list[str] = []

    def getVersion(self) -> tuple[int, int]:
        return self.version

    def getSupportedArchs(self) -> tuple[int, ...]:
        return self.archs

    def createProgram(self, source: str, name: str, headers: list[bytes], names: list[bytes]) -> int:
        assert "ema_rows_float32_shared_kernel" in source
        assert len(headers) == len(names) == len(nvrtc.HEADERS)
        return 1

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:
        self.compiled.append(options[-1])

    def getCUBIN(self, program: int) -> bytes:
        return b"\x7fELF" + self.compiled[-1].encode()

    def destroyProgram(self, program: int) -> None:
        pass


class Gpu:
    """The driver and the runtime as CuPy binds them: a call without a context fails, and so does a start with more
    shared memory than the function is allowed at that moment."""

    def __init__(self) -> None:
        self.context = threading.local()
        self.allowed: list[tuple[int, int]] = []
        self.loaded: list[bytes] = []
        self.started: list[int] = []
        self.devices = 2

    def getDeviceCount(self) -> int:
        if not self.devices:
            raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is\ninsufficient")
        return self.devices

    def setDevice(self, device: int) -> None:
        self.context.device = device

    def deviceGetAttribute(self, attribute: int, device: int) -> int:
        return {97: 232448}[attribute]

    def _check(self) -> int:
        if not hasattr(self.context, "device"):
            raise RuntimeError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
        return int(self.context.device)

    def moduleLoadData(self, image: bytes) -> int:
        self._check()
        self.loaded.append(image)
        return len(self.loaded)

    def moduleGetFunction(self, module: int, name: str) -> int:
        return 100 * (1 + self._check()) + len(name)

    def funcGetAttribute(self, attribute: int, function: int) -> int:
        return {1: 1024}[attribute]

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        self._check()
        self.allowed.append((function, value))

    def launchKernel(self, function: int, *arguments: int) -> None:
        self._check()
        allowed = [value for each, value in self.allowed if each == function]
        if not allowed or arguments[6] > allowed[-1]:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.started.append(function)


def forget() -> None:
    for known in (nvrtc.unusable, nvrtc._module, nvrtc._function, cuda._unusable, cuda._capability):
        known.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    forget()
    yield
    forget()


def install(
    patch: pytest.MonkeyPatch, extension: Extension | None, compiler: Nvrtc | None, capability: tuple[int, int] = HOPPER
) -> Gpu:
    """From here on this machine has such a GPU, extension and NVRTC."""
    gpu = Gpu()
    patch.setattr(cuda, "extension", lambda: (extension, "built" if extension else "momkd._cuda is not installed"))
    patch.setattr(nvrtc, "library", lambda: (compiler, "loaded" if compiler else "CuPy is not installed"))
    patch.setattr(nvrtc, "_driver", lambda: gpu)
    patch.setattr(nvrtc, "_runtime", lambda: gpu)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return gpu


# --- which of them


FITS = {
    "its own architecture": (Extension([80, 90]), (9, 0)),
    "machine code of an earlier minor version": (Extension([80, 90]), (8, 6)),
    "PTX for a GPU that came later": (Extension([80, 90]), (12, 0)),
    "a newer driver": (Extension([80, 90], "12.4", 13000), (9, 0)),
    "an older minor version of the driver": (Extension([90], "13.1", 13000), (9, 0)),
}


@pytest.mark.parametrize("name", FITS)
def test_an_extension_that_fits_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension, capability = FITS[name]
    install(monkeypatch, extension, Nvrtc(), capability)
    assert cuda.launcher(capability) == (extension, "by momkd._cuda")
    assert dispatch.can_run("ema_scatter_", "cuda") == (True, "tensors on a GPU, by momkd._cuda")


UNFIT = {
    "the driver is too old": (
        Extension([90], "13.0", 12080),
        HOPPER,
        "built with CUDA 13.0 and finds a driver for CUDA 12.8 and no GPU",
    ),
    "there is no driver": (Extension([90], "13.0", 0), HOPPER, "finds no driver and no GPU"),
    "only later minor versions": (Extension([86, 89]), (8, 0), "MOMKD_CUDA_ARCHS=86;89, this GPU needs 80"),
    "other major versions": (Extension([80, 100]), HOPPER, "MOMKD_CUDA_ARCHS=80;100, this GPU needs 90"),
    "the driver can't read such PTX": (
        Extension([80], "13.1", 13000),
        HOPPER,
        "MOMKD_CUDA_ARCHS=80, this GPU needs 90",
    ),
    "other sources": (Extension([90], task=ema.TASK_BYTES - 8), HOPPER, "built from other sources"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_extension_that_cannot_run_gives_way_to_nvrtc(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension, capability, reason = UNFIT[name]
    install(monkeypatch, extension, Nvrtc(), capability)
    assert cuda.launcher(capability) == (nvrtc, "by NVRTC through CuPy")
    assert dispatch.can_run("ema_scatter_", "cuda") == (True, "tensors on a GPU, by NVRTC through CuPy")
    forget()
    install(monkeypatch, extension, None, capability)
    able, why = dispatch.can_run("ema_scatter_", "cuda")
    assert not able
    assert reason in why
    assert "CuPy is not installed" in why
    with pytest.raises(BackendError, match=r"CuPy is not installed; .* available here: .*torch"):
        dispatch.choose("ema_scatter_", "cuda", ())
    assert dispatch.choose("ema_scatter_", None, ()) != "cuda"
    with pytest.raises(RuntimeError, match="CuPy is not installed"):
        cuda.start("ema_apply_kernel", bytes(ema.TASK_BYTES), 1, 32, 0, torch.device("cuda", 0))


def test_nvrtc_that_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None, Nvrtc(), (13, 0))
    able, why = dispatch.can_run("ema_scatter_", "cuda")
    assert not able
    assert "NVRTC 13.0 knows no architecture for compute capability 13.0" in why
    gpu = install(monkeypatch, None, Nvrtc())
    gpu.devices = 0
    forget()
    able, why = dispatch.can_run("ema_scatter_", "cuda")
    assert not able
    assert "CuPy can use no GPU: cudaErrorInsufficientDriver: CUDA driver version is insufficient" in why


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), 80), ((8, 7), 86), ((8, 9), 86), ((9, 0), 90), ((10, 3), 100), ((7, 0), None), ((12, 0), None)],
)
def test_nvrtc_falls_back_within_the_major_version(
    capability: tuple[int, int], arch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "library", lambda: (Nvrtc(), "loaded"))
    assert nvrtc.target(capability) == arch


def test_architectures_that_the_real_nvrtc_knows() -> None:
    if nvrtc.library()[0] is None:
        pytest.skip(nvrtc.library()[1])
    assert nvrtc.target((8, 0)) == 80
    assert nvrtc.target((9, 0)) == 90
    assert nvrtc.target((9, 9)) == 90
    assert nvrtc.target((99, 0)) is None


# --- what NVRTC compiled is kept


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOMKD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cuda"


def test_machine_code_is_kept_for_later_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Nvrtc()
    monkeypatch.setattr(nvrtc, "library", lambda: (compiler, "loaded"))
    first = nvrtc.compiled(90)
    assert nvrtc.compiled(90) == first == b"\x7fELF--gpu-architecture=sm_90"
    assert len(compiler.compiled) == 1
    assert nvrtc.compiled(80) != first
    compiler.version = (13, 1)
    nvrtc.compiled(90)
    monkeypatch.setattr(nvrtc, "_texts", lambda: (b"ema_rows_float32_shared_kernel", [b""] * len(nvrtc.HEADERS)))
    nvrtc.compiled(90)
    assert len(compiler.compiled) == 4
    assert len(list(folder.iterdir())) == 4
    assert all(path.suffix == ".cubin" and not path.name.startswith(".") for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"half", None])
def test_a_broken_file_of_the_cache_is_replaced(
    folder: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Nvrtc()
    monkeypatch.setattr(nvrtc, "library", lambda: (compiler, "loaded"))
    code = nvrtc.compiled(90)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if content is None else content)
    assert nvrtc.compiled(90) == code
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Nvrtc()
    monkeypatch.setattr(nvrtc, "library", lambda: (compiler, "loaded"))
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MOMKD_CACHE_DIR", str(tmp_path / "file"))
    assert nvrtc.compiled(90) == nvrtc.compiled(90)
    assert len(compiler.compiled) == 2
    monkeypatch.setattr(nvrtc.env, "cache_folder", lambda: None)
    nvrtc.compiled(90)
    assert len(compiler.compiled) == 3


# --- starting through NVRTC


def start(name: str, shared: int, device: int = 0) -> None:
    nvrtc.launch(name, bytes(ema.TASK_BYTES), 1, 32, shared, device, 0)


def test_a_new_thread_gets_a_context_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install(monkeypatch, None, Nvrtc())
    errors: list[BaseException] = []

    def work() -> None:
        try:
            start("ema_apply_kernel", 0, 1)
        except BaseException as error:
            errors.append(error)

    for _ in range(2):  # the second finds the kernels loaded
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert errors == []
    assert len(gpu.started) == 2
    assert len(gpu.loaded) == 1


def test_shared_memory_is_allowed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install(monkeypatch, None, Nvrtc())

    def work() -> None:
        for shared in (50_000, 1000, 231_424, 0):
            for device in (0, 1):
                start("ema_reduce_kernel", shared, device)
                start("ema_rows_float32_shared_kernel", shared, device)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu.started) == 4 * 4 * 4
    assert len(gpu.loaded) == 2
    assert len(gpu.allowed) == len(set(gpu.allowed)) == 4
    assert {value for _, value in gpu.allowed} == {232448 - 1024}
    with pytest.raises(RuntimeError, match=r"ema_reduce_kernel: 231425 bytes of shared memory, .* at most 231424"):
        start("ema_reduce_kernel", 231_425)

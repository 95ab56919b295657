"""csrc/cuda compiled at first use by NVRTC, and started through CuPy's binding of the driver."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import os
import secrets
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

from momkd import env

HEADERS = ("cuda/ema_task.cuh", "cuda/ema_runs.cuh", "cuda/rows.cuh")
OPTIONS = ("--std=c++17",)
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
_SHARED_OF_A_BLOCK = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin
_ELF = b"\x7fELF"
_loading = threading.Lock()


def sources() -> Path:
    """Return the folder csrc: packed as momkd/csrc, and beside momkd in a checkout."""
    package = Path(__file__).resolve().parents[1]
    found = [folder for folder in (package / "csrc", package.parent / "csrc") if (folder / "cuda").is_dir()]
    if not found:
        raise RuntimeError(f"the CUDA sources of momkd are missing: expected {package / 'csrc' / 'cuda'}")
    return found[0]


@cache
def library() -> tuple[Any, str]:
    """Return NVRTC as CuPy binds it, or None and why it cannot be loaded."""
    try:
        nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
        nvrtc.getVersion()
    except ModuleNotFoundError:
        return None, "CuPy is not installed"
    except Exception as error:  # CuPy has an error of its own for a library that it can't find
        return None, f"NVRTC cannot be loaded: {' '.join(str(error).split())}"
    return nvrtc, "loaded"


def target(capability: tuple[int, int]) -> int | None:
    """Return the architecture to compile for: the highest that NVRTC knows of this major version, up to the minor."""
    nvrtc, _ = library()
    major, minor = capability
    known = nvrtc.getSupportedArchs() if nvrtc is not None else ()
    return max((arch for arch in known if arch // 10 == major and arch <= 10 * major + minor), default=None)


@cache
def unusable(capability: tuple[int, int]) -> str:
    """Return why NVRTC and CuPy can't start kernels on a GPU of this compute capability; empty if they can."""
    nvrtc, reason = library()
    if nvrtc is None:
        return reason
    if target(capability) is None:
        version = ".".join(map(str, nvrtc.getVersion()))
        return f"NVRTC {version} knows no architecture for compute capability {capability[0]}.{capability[1]}"
    try:
        _runtime().getDeviceCount()
    except Exception as error:  # such as a driver that is older than CuPy's runtime
        return f"CuPy can use no GPU: {' '.join(str(error).split())}"
    return ""


def compile(arch: int) -> bytes:
    """Return machine code of csrc/cuda/ema_scatter.cuh for an architecture such as 90. Needs no GPU.

    Raises:
        RuntimeError: NVRTC is not there, or what it says of the source.
    """
    nvrtc, reason = library()
    if nvrtc is None:
        raise RuntimeError(reason)
    main, headers = _texts()
    program = nvrtc.createProgram(main.decode(), "ema_scatter.cuh", headers, [name.encode() for name in HEADERS])
    try:
        nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture=sm_{arch}"))
        return bytes(nvrtc.getCUBIN(program))
    except Exception as error:
        raise RuntimeError(f"NVRTC: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def compiled(arch: int) -> bytes:
    """Return what `compile` returns, kept for later processes in the folder of caches (MOMKD_CACHE_DIR)."""
    folder = env.cache_folder()
    nvrtc, _ = library()
    if folder is None or nvrtc is None:
        return compile(arch)
    main, headers = _texts()
    parts = [
        *OPTIONS,
        str(arch),
        str(nvrtc.getVersion()),
        *(hashlib.sha256(text).hexdigest() for text in (main, *headers)),
    ]
    path = folder / "cuda" / f"sm_{arch}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}.cubin"
    with contextlib.suppress(OSError):
        digest, code = (whole := path.read_bytes())[:32], whole[32:]
        if code.startswith(_ELF) and hashlib.sha256(code).digest() == digest:
            return code
    code = compile(arch)
    _keep(path, hashlib.sha256(code).digest() + code)
    return code


def _keep(path: Path, content: bytes) -> None:
    """Write a file of the cache whole or not at all. A folder that can't be written costs a compilation each time."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _texts() -> tuple[bytes, list[bytes]]:
    folder = sources()
    return (folder / "cuda" / "ema_scatter.cuh").read_bytes(), [(folder / header).read_bytes() for header in HEADERS]


def _driver() -> Any:
    return importlib.import_module("cupy_backends.cuda.api.driver")


def _runtime() -> Any:
    return importlib.import_module("cupy_backends.cuda.api.runtime")


@cache
def _module(device: int) -> int:
    """Return the kernels, loaded into the context of a device."""
    arch = target(torch.cuda.get_device_capability(device))
    if arch is None:
        raise RuntimeError(unusable(torch.cuda.get_device_capability(device)))
    return int(_driver().moduleLoadData(compiled(arch)))


@cache
def _function(name: str, device: int) -> tuple[int, int]:
    """Return a kernel on a device and the bytes of shared memory that its blocks may take: all that the GPU has.

    They are allowed once, here: an amount set at each launch could be lowered by another thread just before it.
    """
    driver = _driver()
    function = int(driver.moduleGetFunction(_module(device), name))
    most = _runtime().deviceGetAttribute(_SHARED_OF_A_BLOCK, device) - driver.funcGetAttribute(_STATIC_SHARED, function)
    driver.funcSetAttribute(function, _MAX_DYNAMIC_SHARED, most)
    return function, most


def launch(name: str, task: bytes, blocks: int, threads: int, shared: int, device: int, stream: int) -> None:
    """Start a kernel on a stream of a device. Every call of the driver is checked."""
    _runtime().setDevice(device)  # the driver's calls need a context, which a new thread may not have
    with _loading:
        function, most = _function(name, device)
    if shared > most:
        raise RuntimeError(f"{name}: {shared} bytes of shared memory, a block of this GPU has at most {most}")
    argument = ctypes.create_string_buffer(task, len(task))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    _driver().launchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(arguments), 0)

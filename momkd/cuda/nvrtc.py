"""csrc/cuda compiled at first use by NVRTC, and started through CuPy's binding of the driver."""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

HEADERS = ("cuda/rows.cuh",)
OPTIONS = ("--std=c++17",)
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def sources() -> Path:
    """The folder csrc: packed as momkd/csrc, and beside momkd in a checkout."""
    package = Path(__file__).resolve().parents[1]
    found = [folder for folder in (package / "csrc", package.parent / "csrc") if (folder / "cuda").is_dir()]
    if not found:
        raise RuntimeError(f"the CUDA sources of momkd are missing: expected {package / 'csrc' / 'cuda'}")
    return found[0]


@cache
def library() -> tuple[Any, str]:
    """NVRTC as CuPy binds it, or None and why it cannot be loaded."""
    try:
        nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
        nvrtc.getVersion()
    except ModuleNotFoundError:
        return None, "CuPy is not installed"
    except Exception as error:  # CuPy has an error of its own for a library that it can't find
        return None, f"NVRTC cannot be loaded: {' '.join(str(error).split())}"
    return nvrtc, "loaded"


def compile(arch: int) -> bytes:
    """Machine code of csrc/cuda/ema_scatter.cuh for an architecture such as 90. Needs no GPU.

    Raises:
        RuntimeError: NVRTC is not there, or what it says of the source.
    """
    folder = sources()
    nvrtc, reason = library()
    if nvrtc is None:
        raise RuntimeError(reason)
    headers = [(folder / header).read_bytes() for header in HEADERS]
    main = (folder / "cuda" / "ema_scatter.cuh").read_text(encoding="utf-8")
    program = nvrtc.createProgram(main, "ema_scatter.cuh", headers, [name.encode() for name in HEADERS])
    try:
        nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture=sm_{arch}"))
        return bytes(nvrtc.getCUBIN(program))
    except Exception as error:
        raise RuntimeError(f"NVRTC: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


@cache
def _module(device: int) -> int:
    """The kernels, loaded into the context of a device."""
    major, minor = torch.cuda.get_device_capability(device)
    driver: Any = importlib.import_module("cupy_backends.cuda.api.driver")
    return int(driver.moduleLoadData(compile(10 * major + minor)))


@cache
def _function(name: str, device: int) -> int:
    driver: Any = importlib.import_module("cupy_backends.cuda.api.driver")
    return int(driver.moduleGetFunction(_module(device), name))


def launch(name: str, task: bytes, blocks: int, threads: int, shared: int, device: int, stream: int) -> None:
    """Starts a kernel on a stream of a device, which is the current one. Every call of the driver is checked."""
    driver: Any = importlib.import_module("cupy_backends.cuda.api.driver")
    function = _function(name, device)
    argument = ctypes.create_string_buffer(task, len(task))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    driver.funcSetAttribute(function, _MAX_DYNAMIC_SHARED, shared)
    driver.launchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(arguments), 0)

"""Reads compiled kernels: registers, spills, tensor-core instructions and loads, and what ptxas warns of."""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from tests.aot_cases import Case


class Chip(NamedTuple):
    """A target of Triton, and the most shared memory that a program may ask for."""

    backend: str
    arch: int | str
    warp: int
    shared: int


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163 * 1024),
    "sm_89": Chip("cuda", 89, 32, 99 * 1024),
    "sm_90": Chip("cuda", 90, 32, 227 * 1024),
    "sm_100": Chip("cuda", 100, 32, 227 * 1024),
    "gfx942": Chip("hip", "gfx942", 64, 64 * 1024),
}
# From sm_90 on, the system keeps 1 KiB of each program, which cuobjdump counts and the limits above don't.
_RESERVED_SHARED = 1024


@dataclass
class Report:
    """What one compilation became. Bytes of spills and stack are those of one thread."""

    kernel: str
    case: str
    arch: str
    warps: int
    stages: int
    parameters: tuple[str, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()
    error: str = ""
    registers: int = 0
    shared: int = 0
    spills: int = 0
    stack: int = 0
    scalar_spills: int = 0  # gfx942: scalar registers kept in lanes of vector registers
    dots: list[tuple[int, int, int, str]] = field(default_factory=list)  # products: M, N, K, type of the operands
    tensor: dict[str, int] = field(default_factory=dict)  # tensor-core instructions
    loads: dict[int, int] = field(default_factory=dict)  # global loads by width in bits
    stores: dict[int, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # of ptxas: matrix instructions that wait for one another

    def tensor_families(self) -> dict[str, int]:
        """Counts without shapes and types: HGMMA.64x16x16.F32.BF16 is HGMMA."""
        return self._counted(1)

    def tensor_shapes(self) -> dict[str, int]:
        """Counts without types: HGMMA.64x16x16.F32.BF16 is HGMMA.64x16x16."""
        return self._counted(2)

    def _counted(self, parts: int) -> dict[str, int]:
        names: Counter[str] = Counter()
        for name, count in self.tensor.items():
            names["v_mfma" if name.startswith("v_mfma") else ".".join(name.split(".")[:parts])] += count
        return dict(names)


def cuobjdump() -> str:
    from triton import knobs

    try:
        return str(knobs.nvidia.cuobjdump.path)
    except RuntimeError:  # Triton's word for "not found"
        return ""


_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)\S* \* tensor<\d+x(\d+)x")
_SASS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")
_GCN = re.compile(r"^\s+((?:v_mfma|global_load|buffer_load|flat_load|global_store|buffer_store|flat_store)\w*)", re.M)
_GCN_META = re.compile(r"^\s+\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size): +(\d+)", re.M)
_GCN_LDS = re.compile(r"^\s+\.group_segment_fixed_size: +(\d+)", re.M)
_SASS_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_GCN_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}


def dots(ttir: str) -> list[tuple[int, int, int, str]]:
    return [(int(m), int(n), int(k), dtype) for m, k, dtype, n in _DOT.findall(ttir)]


def _sass_width(opcode: str) -> int:
    return next((_SASS_WIDTHS[part] for part in opcode.split(".") if part in _SASS_WIDTHS), 32)


@cache
def _machine_code(cubin: bytes, function: str) -> str:
    """Resources and instructions in words; the same cubin is often asked about, and its reader is slow."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        chosen = ["-fun", function] if function else []
        command = [cuobjdump(), "--dump-resource-usage", "-sass", *chosen, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_cubin(cubin: bytes, report: Report, function: str = "") -> None:
    """Fills in what the machine code says, of one function where the cubin holds several."""
    text = _machine_code(cubin, function)
    usage = {name: int(value) for name, value in _RESOURCES.findall(text)}
    reserved = _RESERVED_SHARED if report.arch not in ("sm_80", "sm_89") else 0
    report.registers = usage["REG"]
    report.shared += max(0, usage["SHARED"] - reserved)
    report.stack = usage["STACK"] + usage["LOCAL"]
    opcodes = Counter(_SASS.findall(text))
    tensor, loads, stores = Counter[str](), Counter[int](), Counter[int]()
    for opcode, count in opcodes.items():
        family = opcode.split(".")[0]
        if family.endswith("MMA"):
            tensor[opcode] += count
        elif family in ("LDG", "LDGSTS"):
            loads[_sass_width(opcode)] += count
        elif family == "STG":
            stores[_sass_width(opcode)] += count
        elif family == "STL":  # ptxas counts the bytes of its spill stores in the same way
            report.spills += count * _sass_width(opcode) // 8
    report.tensor, report.loads, report.stores = dict(tensor), dict(loads), dict(stores)
    if not opcodes:
        raise RuntimeError(f"{report.kernel} on {report.arch}: cuobjdump gave no instructions")


def read_amdgcn(text: str, report: Report) -> None:
    meta = {name: int(value) for name, value in _GCN_META.findall(text)}
    report.registers = meta["vgpr_count"]
    report.spills, report.scalar_spills = 4 * meta["vgpr_spill_count"], meta["sgpr_spill_count"]
    report.stack = meta["private_segment_fixed_size"]
    report.shared += sum(map(int, _GCN_LDS.findall(text)))
    tensor, loads, stores = Counter[str](), Counter[int](), Counter[int]()
    for opcode, count in Counter(_GCN.findall(text)).items():
        if opcode.startswith("v_mfma"):
            tensor[opcode] += count
        else:
            width = next((bits for name, bits in _GCN_WIDTHS.items() if name in opcode.split("_")), 8)
            (loads if "_load" in opcode else stores)[width] += count
    report.tensor, report.loads, report.stores = dict(tensor), dict(loads), dict(stores)


# --- what ptxas warns of

_SERIALISED = re.compile(r"\(C75\d\d\).*")
_said = threading.local()  # .log: what ptxas wrote in this thread, or None


@contextmanager
def hear_ptxas() -> Iterator[None]:
    """Inside, what ptxas writes is kept, for each thread apart; Triton looks at it only where ptxas fails."""
    from triton.backends.nvidia import compiler

    def run(command: Any, *args: Any, **kwargs: Any) -> Any:
        done = subprocess.run(command, *args, **kwargs)
        if log := getattr(kwargs.get("stderr"), "name", None):
            with open(log, encoding="utf-8") as file:
                _said.log = file.read()
        return done

    compiler.subprocess = SimpleNamespace(**vars(subprocess) | {"run": run})
    try:
        yield
    finally:
        compiler.subprocess = subprocess


def ptxas_warnings(ptx: str, backend: Any, options: dict[str, Any], arch: int) -> tuple[str, ...]:
    """Warnings C75.. (matrix instructions are run one by one) of the compilation that this thread just did.

    Where Triton's cache had the result, ptxas has written nothing, and is asked again where such instructions are.
    """
    log, _said.log = getattr(_said, "log", None), None
    if log is None and ("wgmma." in ptx or "tcgen05." in ptx):
        backend.make_cubin(ptx, {}, backend.parse_options(dict(options)), arch)
        log, _said.log = _said.log, None
        assert log is not None, "Triton runs ptxas in another way than `hear_ptxas` knows"
    return tuple(dict.fromkeys(_SERIALISED.findall(log or "")))

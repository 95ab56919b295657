"""What momkd can do on this machine: each op, each backend and why it runs or does not, and the versions of all parts.

Importing this is cheap and starts nothing; only `doctor` itself imports torch, Triton and CuPy, and looks for devices.
"""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import IO, Any

import momkd
from momkd import env
from momkd.errors import BackendError


@dataclass(frozen=True)
class BackendState:
    """Whether a backend can run an op in this installation, and why or why not."""

    op: str
    backend: str
    runs: bool
    reason: str


@dataclass(frozen=True, repr=False)
class Report:
    """What `doctor` found.

    Args:
        versions: of momkd, python, torch and numpy, and of triton and cupy or why they are missing.
        devices: one line a GPU, or one line why there is none.
        extensions: "momkd._C" and "momkd._cuda": `built`, `reason`, and what the build says of itself.
        threads: that the CPU kernels use.
        bfloat16: what the CPU has for bfloat16 products, which `train.amp` takes; "" where it has nothing.
        override: MOMKD_BACKEND, or None.
        backends: every op with every backend.
        defaults: the backend that each op takes where the tensors allow it, or why none.
    """

    versions: Mapping[str, str]
    devices: tuple[str, ...]
    extensions: Mapping[str, Mapping[str, Any]]
    threads: int
    bfloat16: str
    override: str | None
    backends: tuple[BackendState, ...]
    defaults: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        plain = asdict(self)
        return plain | {"devices": list(self.devices), "backends": [asdict(state) for state in self.backends]}

    def __repr__(self) -> str:
        running = sum(state.runs for state in self.backends)
        return f"Report(momkd {self.versions['momkd']}, {len(self.defaults)} ops, {running} kernels can run here)"


def doctor(file: IO[str] | None = None, *, show: bool = True) -> Report:
    """Looks at this machine and prints what momkd can do on it.

    Args:
        file: where to print; None is the standard output.
        show: False prints nothing.

    Returns:
        What was printed, as data; `as_dict()` is ready for JSON.

    Example:
        >>> report = doctor(show=False)
        >>> [state.backend for state in report.backends if state.op == "attention_pool" and state.runs][-1]
        'torch'
    """
    import torch

    from momkd import dispatch
    from momkd.precision import multiplier

    report = Report(
        versions={
            "momkd": momkd.__version__,
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
            "cupy": _version("cupy"),
        },
        devices=_devices(),
        extensions={"momkd._C": _cpu_extension(), "momkd._cuda": _cuda_extension()},
        threads=torch.get_num_threads(),
        bfloat16=multiplier(torch.device("cpu")),
        override=env.backend_override(),
        backends=tuple(
            BackendState(op, backend, *dispatch.can_run(op, backend))
            for op in dispatch.OPS
            for backend in dispatch.BACKENDS
        ),
        defaults={op: _default(op) for op in dispatch.OPS},
    )
    if show:
        _print(report, file)
    return report


# -- looking -----------------------------------------------------------------------------------------------------


def _version(name: str) -> str:
    """The version of a package, or why it cannot be imported: a broken one must not stop the report."""
    try:
        return str(import_module(name).__version__)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"cannot be imported: {_line(error)}"
    except Exception as error:
        return f"cannot be imported: {_line(error)}"


def _devices() -> tuple[str, ...]:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return ("no GPU: torch is built for the CPU alone",)
    with warnings.catch_warnings(record=True) as caught:  # a driver that is too old is a warning of torch's
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            found = [torch.cuda.get_device_properties(i) for i in range(count)]
        except Exception as error:
            return (f"no GPU can be used: {_line(error)}",)
    if not found:
        why = _line(caught[0].message) if caught else "no driver or no device"
        return (f"no GPU: {why}",)
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    return tuple(
        f"cuda:{i} {p.name}, {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB, {kind}" for i, p in enumerate(found)
    )


def _cpu_extension() -> dict[str, Any]:
    from momkd import native

    module, reason = native.extension()
    return _described(module) if module is not None else {"built": False, "reason": reason}


def _cuda_extension() -> dict[str, Any]:
    try:
        return _described(import_module("momkd._cuda"))
    except ModuleNotFoundError as error:
        if error.name != "momkd._cuda":
            return {"built": False, "reason": _line(error)}
        reason = "momkd was installed with no nvcc or with MOMKD_NO_CUDA=1; set CUDA_HOME and install it again"
        return {"built": False, "reason": reason}
    except Exception as error:
        return {"built": True, "reason": f"cannot be imported: {_line(error)}"}


def _described(module: Any) -> dict[str, Any]:
    info = dict(module.build_info())
    same = info["version"] == momkd.__version__
    reason = "built" if same else f"built for momkd {info['version']}, this is {momkd.__version__}: install it again"
    return {"built": True, "reason": reason, **info}


def _default(op: str) -> str:
    from momkd import dispatch

    try:
        return dispatch.choose(op, None, ())
    except (BackendError, ValueError) as error:  # MOMKD_BACKEND names one that cannot run, or none at all
        return f"none: {_line(error)}"


def _line(error: object) -> str:
    """The text of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# -- showing -----------------------------------------------------------------------------------------------------


def _print(report: Report, file: IO[str] | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from momkd import dispatch
    from momkd.terminal import show, terminal

    console = terminal(file=file or sys.stdout)
    if not console.is_terminal:
        console.width = 120

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, version in report.versions.items():
        facts.add_row(name, Text(version))
    for number, device in enumerate(report.devices):
        facts.add_row("" if number else "devices", Text(device))
    for name, info in report.extensions.items():
        told = [f"{key} {_shown(value)}" for key, value in info.items() if key not in ("built", "reason", "version")]
        facts.add_row(name, Text(", ".join([info["reason"], *told])))
    facts.add_row("threads", str(report.threads))
    facts.add_row("bfloat16 on CPU", report.bfloat16 or "no products in 16 bits: train.amp=auto computes in float32")
    facts.add_row("MOMKD_BACKEND", Text(report.override or "not set"))

    ops = Table(title="Backends, best first", title_justify="left", header_style="bold")
    for header in ("op", "backend", "runs", "why"):
        ops.add_column(header, overflow="fold")
    for op, default in report.defaults.items():
        states = sorted((s for s in report.backends if s.op == op), key=lambda state: _rank(op, state.backend))
        for row, state in enumerate(states):
            runs, style = ("default" if state.backend == default else "yes", "green") if state.runs else ("no", "dim")
            cells = (Text("" if row else op, "bold"), Text(state.backend, style), Text(runs, style), Text(state.reason))
            ops.add_row(*cells, end_section=row == len(states) - 1)
        if default not in dispatch.BACKENDS:
            ops.add_row("", "", Text("no", "red"), Text(default, "red"), end_section=True)
    for part in (facts, "", ops):
        show(part, console=console)


def _rank(op: str, backend: str) -> int:
    from momkd import dispatch

    held = dispatch.OPS[op]
    return held.index(backend) if backend in held else len(held)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

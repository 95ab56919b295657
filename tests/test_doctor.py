"""The doctor: complete, plain data, and of use where parts are missing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import momkd
from momkd import dispatch, native
from momkd.doctor import Report, doctor

module = sys.modules["momkd.doctor"]


def test_every_op_and_backend_with_a_reason() -> None:
    report = doctor(show=False)
    pairs = [(state.op, state.backend) for state in report.backends]
    assert pairs == [(op, backend) for op in dispatch.OPS for backend in dispatch.BACKENDS]
    for state in report.backends:
        assert (state.runs, state.reason) == dispatch.can_run(state.op, state.backend)
        assert state.reason
    assert report.defaults == {op: dispatch.choose(op, None, ()) for op in dispatch.OPS}
    assert report.versions["momkd"] == momkd.__version__
    assert report.versions["torch"] == torch.__version__
    assert set(report.versions) == {"momkd", "python", "torch", "numpy", "triton", "cupy"}


def test_it_is_plain_data() -> None:
    report = doctor(show=False)
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain == report.as_dict()
    assert set(plain["extensions"]) == {"momkd._C", "momkd._cuda"}
    assert {"op", "backend", "runs", "reason"} == set(plain["backends"][0])
    assert "\n" not in repr(report)


def test_it_prints_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(momkd.doctor(show=False), Report)
    assert capsys.readouterr().out == ""
    assert isinstance(momkd.doctor(), Report)
    printed = capsys.readouterr().out
    file = io.StringIO()
    momkd.doctor(file)
    assert file.getvalue() == printed
    assert capsys.readouterr().out == ""
    for word in (*dispatch.OPS, *dispatch.BACKENDS, momkd.__version__, torch.__version__, "momkd._C", "default"):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert "\x1b" not in printed, "no colours in a file"


def test_the_name_stays_the_function_after_its_module_was_imported() -> None:
    code = "import momkd; momkd.doctor(show=False); import momkd.doctor; momkd.doctor(show=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_triton_cupy_and_extensions() -> None:
    code = """
import sys
for name in ("triton", "cupy", "momkd._C", "momkd._cuda"):
    sys.modules[name] = None
import momkd
report = momkd.doctor()
assert report.versions["triton"] == report.versions["cupy"] == "not installed", report.versions
assert not report.extensions["momkd._C"]["built"]
assert not any(state.runs for state in report.backends if state.backend != "torch")
assert set(report.defaults.values()) == {"torch"}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reinstall with a C++ compiler" in done.stdout.replace("\n", " ")


def test_a_package_that_is_broken_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "triton":
            raise OSError("libtriton.so:\n  undefined symbol")
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock")
        if name == "momkd._cuda":
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return SimpleNamespace(__version__="9")

    monkeypatch.setattr(module, "import_module", broken)
    report = doctor(io.StringIO())
    assert report.versions["triton"] == "cannot be imported: libtriton.so: undefined symbol"
    assert report.versions["cupy"] == "cannot be imported: No module named 'fastrlock'"
    assert "libcudart.so.13" in report.extensions["momkd._cuda"]["reason"]


def test_why_the_cuda_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(module, "import_module", missing)
    extension = doctor(show=False).extensions["momkd._cuda"]
    assert extension == {
        "built": False,
        "reason": "momkd was installed with no nvcc or with MOMKD_NO_CUDA=1; set CUDA_HOME and install it again",
    }


def test_what_the_native_build_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _C = pytest.importorskip("momkd._C", reason="momkd._C is not built: install momkd with a C++ compiler")
    told = doctor(show=False).extensions["momkd._C"]
    assert told == {"built": True, "reason": "built", **_C.build_info()}
    assert {"isa", "openmp", "compiler"} <= set(told)
    stale = SimpleNamespace(build_info=lambda: {"version": "0.0.1"})
    monkeypatch.setattr(native, "extension", lambda: (stale, "built"))
    reason = doctor(show=False).extensions["momkd._C"]["reason"]
    assert reason == f"built for momkd 0.0.1, this is {momkd.__version__}: install it again"


def test_the_override_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMKD_BACKEND", "torch")
    report = doctor(show=False)
    assert report.override == "torch"
    assert set(report.defaults.values()) == {"torch"}
    monkeypatch.setattr(native, "extension", lambda: (None, "momkd._C went missing"))
    monkeypatch.setenv("MOMKD_BACKEND", "native")
    file = io.StringIO()
    assert "none: ema_scatter_: backend 'native' cannot run" in doctor(file).defaults["ema_scatter_"]
    assert "momkd._C went missing" in file.getvalue()
    monkeypatch.setenv("MOMKD_BACKEND", "nativ")
    assert "did you mean 'native'?" in doctor(io.StringIO()).defaults["ema_scatter_"]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert doctor(show=False).devices == ("no GPU: torch is built for the CPU alone",)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor(show=False).devices == ("no GPU: no driver or no device",)

    def old_driver() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old\n(found version 1)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    assert doctor(show=False).devices == ("no GPU: The NVIDIA driver on your system is too old (found version 1)",)

    gpu = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    file = io.StringIO()
    assert doctor(file).devices == ("cuda:0 H100, 9.0, 80 GiB, CUDA 13.0", "cuda:1 H100, 9.0, 80 GiB, CUDA 13.0")
    assert "cuda:1 H100" in file.getvalue()

    def lost(_: int) -> Any:
        raise RuntimeError("CUDA error: the GPU fell off the bus")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    assert doctor(show=False).devices == ("no GPU can be used: CUDA error: the GPU fell off the bus",)

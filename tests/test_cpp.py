"""tests/cpp/*.cpp: what of csrc can be checked only from C++, compiled by the C++ compiler and run."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CXX = shlex.split(os.environ.get("CXX", "").strip() or "c++")
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="csrc/ is not here"),
    pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"no C++ compiler ({CXX[0]})"),
]


def run(folder: Path, *arguments: str) -> str:
    """Compile a program and run it; its output."""
    program = folder / "check"
    command = [*CXX, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *arguments]
    built = subprocess.run([*command, "-o", str(program)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("isa", FLAGS)
def test_mathematics_on_vectors(tmp_path: Path, isa: str) -> None:
    """Halves to the bit, all of them; exp, sigmoid and tanh against libm in double over the float32 numbers."""
    if isa != "baseline":
        module = pytest.importorskip("momkd._C")
        before = module.build_info()["isa"]
        try:
            module.use_isa(isa)
        except ValueError as error:
            pytest.skip(str(error))
        module.use_isa(before)
        assert platform.machine().lower() in ("x86_64", "amd64")
    # Unused are those functions of simd.h that no check needs.
    output = run(tmp_path, *FLAGS[isa], "-Wno-unused-function", "tests/cpp/simd_check.cpp")
    assert "units in the last place" in output


def test_how_the_ema_cuts_its_rows(tmp_path: Path) -> None:
    kernels = ["-DMOMKD_ISA=baseline", "csrc/cpu/ema_scatter_rows.cpp", "csrc/cpu/isa.cpp"]
    assert run(tmp_path, "tests/cpp/ema_check.cpp", *kernels) == ""


def test_shared_memory_is_allowed_once_for_each_kernel_and_gpu(tmp_path: Path) -> None:
    """CUDA's runtime is replaced by one that counts; eight threads start kernels."""
    (tmp_path / "cuda_runtime_api.h").write_text('#include "cpp/counting_cuda_runtime.h"\n')
    flags = [f"-I{tmp_path}", f"-I{ROOT / 'tests'}", "-pthread", "-D__CUDA_ARCH_LIST__=800,900", "-Wno-unknown-pragmas"]
    assert run(tmp_path, *flags, "tests/cpp/launch_check.cpp") == ""

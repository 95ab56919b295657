"""Building and packing: what setup.py promises, in copies of the tree. No network is needed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from momkd.cuda import ema

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources alone: nothing built in it, as in a fresh clone."""
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("csrc", "kernels", "momkd"):
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=built)
    for name in COPIED:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


def python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the MOMKD_ variables and the compiler of the caller cleared, but for those named here."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MOMKD_") and k != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env={**clean, **variables}, capture_output=True, text=True)


def run(*arguments: str, cwd: Path, **variables: str) -> str:
    done = python(*arguments, cwd=cwd, **variables)
    assert done.returncode == 0, f"{arguments} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def needs_compiler() -> None:
    for module in ("pybind11", "ninja"):
        pytest.importorskip(module, reason=f"building momkd._C again needs {module}: pip install -e '.[test]'")
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler on this machine")


def compiled(output: str) -> list[str]:
    """The object files that ninja made."""
    return re.findall(r"^\[\d+/\d+\] (?:C\+\+|CUDA) (\S+)$", output, re.MULTILINE)


def test_kernels_is_refused_under_another_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    done = python("-c", "import kernels", cwd=tmp_path)
    assert done.returncode != 0
    assert "ImportError: this package is `momkd.kernels`, not `kernels`" in done.stderr


def test_installed_kernels(tmp_path: Path) -> None:
    pytest.importorskip("momkd.kernels", reason="momkd is not installed: pip install -e .")
    assert "kernels" in run("-c", "import momkd.kernels; print(momkd.kernels.__file__)", cwd=tmp_path)


def test_the_extension_needs_no_torch(tmp_path: Path) -> None:
    extension = pytest.importorskip("momkd._C", reason="momkd._C is not built: install momkd with a C++ compiler")
    for file in [extension.__file__, *Path(extension.__file__).parent.glob("_cuda*.so")]:
        name = "momkd." + Path(file).name.partition(".")[0]
        code = (
            "import importlib.util, sys; "
            f"spec = importlib.util.spec_from_file_location({name!r}, {str(file)!r}); "
            "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
            "print(module.build_info()['version'], 'torch' in sys.modules)"
        )
        version = run("-c", "import importlib.metadata as m; print(m.version('momkd'))", cwd=tmp_path).strip()
        assert run("-c", code, cwd=tmp_path).split() == [version, "False"]


def test_cuda_module_works_without_a_driver() -> None:
    cuda = pytest.importorskip("momkd._cuda", reason="momkd._cuda is not built: no nvcc when momkd was installed")
    archs = cuda.build_info()["archs"]
    assert archs == sorted(archs) != []
    assert cuda.device_count() >= 0
    assert cuda.driver_version() >= 0
    assert cuda.task_bytes() == ema.TASK_BYTES
    launch = {"blocks": 1, "threads": 32, "shared_bytes": 0, "stream": 0}
    with pytest.raises(RuntimeError, match="cudaSetDevice: "):
        cuda.launch("ema_apply_kernel", bytes(ema.TASK_BYTES), device=10_000, **launch)
    with pytest.raises(ValueError, match="there is no kernel ema"):
        cuda.launch("ema", bytes(ema.TASK_BYTES), device=0, **launch)
    with pytest.raises(ValueError, match=f"task: expected {ema.TASK_BYTES} bytes, got {ema.TASK_BYTES - 1}"):
        cuda.launch("ema_apply_kernel", bytes(ema.TASK_BYTES - 1), device=0, **launch)


@pytest.mark.slow
def test_rebuilds_are_incremental(tree: Path) -> None:
    needs_compiler()

    def build() -> str:
        return run("setup.py", "build_ext", "--inplace", cwd=tree, MOMKD_NO_CUDA="1")

    first = compiled(build())
    assert "csrc/bindings_cpu.o" in first
    assert len(list((tree / "momkd").glob("_C*.so"))) == 1
    again = build()
    assert "ninja: no work to do" in again
    assert compiled(again) == []
    source = tree / "csrc" / "cpu" / "isa.cpp"
    source.write_text(source.read_text() + "\n// changed\n")
    assert compiled(build()) == ["csrc/cpu/isa.o"]
    header = tree / "csrc" / "cpu" / "ema_scatter_rows.h"
    header.write_text(header.read_text() + "\n// changed\n")
    expected = [f for f in first if "ema_scatter" in f]  # by their depfiles, and not the bindings
    assert sorted(compiled(build())) == sorted(expected)


def test_a_missing_compiler_is_said_in_one_paragraph(tree: Path) -> None:
    for module in ("pybind11", "ninja"):
        pytest.importorskip(module, reason=f"setup.py needs {module}: pip install -e '.[test]'")
    done = python("setup.py", "build_ext", "--inplace", cwd=tree, CXX="/nowhere/c++", MOMKD_NO_CUDA="1")
    assert done.returncode != 0
    assert "CXX is '/nowhere/c++', which is not there" in done.stderr
    assert "MOMKD_NO_EXT=1 pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["ninja", "pybind11"])
def test_a_missing_build_requirement_is_said_in_one_paragraph(tree: Path, package: str) -> None:
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = ['setup.py', 'build_ext', '--inplace']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = python("-c", code, cwd=tree, MOMKD_NO_CUDA="1")
    assert done.returncode != 0
    assert f"the package {package} is missing; run: pip install ninja pybind11" in done.stderr
    assert "MOMKD_NO_EXT=1 pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with a C++ compiler and an nvcc that do nothing but write down how they were called, to be quick."""
    for module in ("ninja", "pybind11"):
        pytest.importorskip(module, reason=f"setup.py needs {module}: pip install -e '.[test]'")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cxx", "nvcc"):  # an output and an empty depfile, whatever is asked
        (folder / name).write_text(
            f'#!/bin/sh\necho "$*" >> {folder}/{name}.log\n[ "$1" = --list-gpu-arch ] && echo compute_80 && exit 0\n'
            'all="$*"\nwhile [ $# -gt 0 ]; do\n  [ "$1" = -MF ] && : > "$2"\n'
            '  [ "$1" = -o ] && echo "$all" > "$2"\n  shift\ndone\n'
        )
        (folder / name).chmod(0o755)
    return folder


def build(tree: Path, tools: Path, **variables: str) -> str:
    variables = {"CXX": str(tools / "cxx"), "CUDA_HOME": str(tools.parent), **variables}
    return run("setup.py", "build_ext", "--inplace", cwd=tree, **variables)


def built(tree: Path) -> dict[str, str]:
    """The modules in place, and the calls that linked them."""
    return {file.name.partition(".")[0]: file.read_text() for file in (tree / "momkd").glob("*.so")}


def test_a_failing_nvcc_leaves_the_cpu_module(tree: Path, tools: Path) -> None:
    """Also: MOMKD_REQUIRE_CUDA makes it an error."""
    (tools / "nvcc").write_text('#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo compute_80 && exit 0\nexit 1\n')
    (tree / "momkd" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("of an earlier build")
    output = build(tree, tools)
    assert "WARNING: momkd: nvcc could not build momkd._cuda" in output
    assert set(built(tree)) == {"_C"}
    variables = {"CXX": str(tools / "cxx"), "CUDA_HOME": str(tools.parent), "MOMKD_REQUIRE_CUDA": "1"}
    done = python("setup.py", "build_ext", "--inplace", cwd=tree, **variables)
    assert done.returncode != 0
    assert "momkd._cuda can't be built" in done.stderr


def test_a_build_after_a_sanitized_one_is_an_ordinary_one(tree: Path, tools: Path) -> None:
    """Also: sanitizers leave CUDA out, and say so where it is required."""
    build(tree, tools)
    assert set(built(tree)) == {"_C", "_cuda"}
    assert "-fsanitize=address" not in built(tree)["_C"]
    (tools / "nvcc.log").unlink()
    build(tree, tools, MOMKD_SANITIZE="address")
    assert set(built(tree)) == {"_C"}
    assert "-fsanitize=address" in built(tree)["_C"]
    assert not (tools / "nvcc.log").exists()
    build(tree, tools)
    assert set(built(tree)) == {"_C", "_cuda"}
    assert "-fsanitize=address" not in built(tree)["_C"]
    required = {"MOMKD_SANITIZE": "address", "MOMKD_REQUIRE_CUDA": "1", "CXX": str(tools / "cxx")}
    done = python("setup.py", "build_ext", "--inplace", cwd=tree, **required)
    assert "MOMKD_REQUIRE_CUDA is set, but MOMKD_SANITIZE leaves momkd._cuda out" in done.stderr


def test_nvcc_takes_the_compiler_and_the_flags_of_the_linker(tree: Path, tools: Path) -> None:
    build(tree, tools, CXX=f"{tools / 'cxx'} -m64", LDFLAGS="-Wl,-rpath,/opt/lib -L/opt/lib")
    calls = [line for line in (tools / "nvcc.log").read_text().splitlines() if "--list-gpu-arch" not in line]
    assert len(calls) == 2
    for call in calls:
        assert f"-ccbin {tools / 'cxx'} -Xcompiler=-m64" in call
    assert "-Xcompiler=-Wl\\,-rpath\\,/opt/lib -Xcompiler=-L/opt/lib" in built(tree)["_cuda"]
    assert "-Wl,-rpath,/opt/lib -L/opt/lib" in built(tree)["_C"]


def test_the_highest_architecture_is_the_one_for_later_gpus(tree: Path, tools: Path) -> None:
    """In whatever order they are named: `momkd.cuda` counts on it."""
    build(tree, tools, MOMKD_CUDA_ARCHS="100;80 80,9.0")
    codes = re.findall(r"-gencode=arch=(\w+),code=(\w+)", (tools / "nvcc.log").read_text().splitlines()[0])
    assert codes == [(f"compute_{a}", f"sm_{a}") for a in (80, 90, 100)] + [("compute_100", "compute_100")]
    done = python("setup.py", "build_ext", "--inplace", cwd=tree, CUDA_HOME=str(tools.parent), MOMKD_CUDA_ARCHS="90a")
    assert "MOMKD_CUDA_ARCHS='90a': expected numbers such as '80;90;100'" in done.stderr


def test_a_deleted_module_is_not_packed_again(tree: Path) -> None:
    def packed() -> set[str]:
        run("setup.py", "-q", "build", cwd=tree, MOMKD_NO_EXT="1")
        (folder,) = (tree / "build").glob("lib*")
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*.py")}

    assert {"momkd/demo.py", "momkd/kernels/_common.py"} <= packed()
    (tree / "momkd" / "demo.py").unlink()
    (tree / "kernels" / "_common.py").unlink()
    (tree / "momkd" / "kernels" / "_common.py").unlink(missing_ok=True)  # a link to it in a checkout, a copy here
    assert not {"momkd/demo.py", "momkd/kernels/_common.py"} & packed()
    assert "momkd/__init__.py" in packed()


@pytest.mark.slow
def test_pure_python_wheel(tree: Path, tmp_path: Path) -> None:
    arguments = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(tmp_path), "."]
    # by its metadata: to import it warns, and fails, where another test has imported Python's own distutils
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("packing momkd needs setuptools 77 or newer")
    run(*arguments, cwd=tree, MOMKD_NO_EXT="1", CXX="/nowhere/c++")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"momkd/__init__.py", "momkd/py.typed", "momkd/kernels/__init__.py"} <= set(names)
    for source in (tree / "kernels").glob("*.py"):
        assert f"momkd/kernels/{source.name}" in names
    for source in (tree / "momkd").rglob("*.py"):
        assert source.relative_to(tree).as_posix() in names
    assert not [n for n in names if n.endswith(".so") or n.startswith(("kernels/", "tests/"))]


@pytest.mark.slow
def test_source_archive_holds_what_a_build_needs(tree: Path, tmp_path: Path) -> None:
    run("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("csrc", "kernels", "momkd"):
        for source in (tree / folder).rglob("*"):
            if source.is_file():
                assert source.relative_to(tree).as_posix() in names
    assert {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE"} <= names
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc"))]

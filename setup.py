"""Build momkd: Python packages, `momkd._C` (C++, always) and `momkd._cuda` (where nvcc is found).

The sources are compiled by ninja from a `build.ninja` written here, into build/<platform>-<python>/, a folder that
outlives pip's temporary ones: a second build does nothing, a changed file costs one object. Neither module sees
torch's headers, so the build environment is setuptools, pybind11 and ninja.

Environment: CXX, CXXFLAGS, LDFLAGS; CUDA_HOME; MOMKD_NO_EXT=1 (pure Python); MOMKD_NO_CUDA=1 (no `_cuda`);
MOMKD_REQUIRE_CUDA=1 (fail rather than go without `_cuda`); MOMKD_CUDA_ARCHS ("80;90;100"); MOMKD_SANITIZE
("address,undefined": `_C` with these sanitizers of the compiler, in a build folder of its own, and no `_cuda`).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("MOMKD_SANITIZE", "").strip()
BUILD = (
    ROOT
    / "build"
    / "-".join([sysconfig.get_platform(), sys.implementation.cache_tag, *filter(None, SANITIZE.split(","))])
)
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
DEFAULT_ARCHS = "80;90;100"


def sources(*patterns: str, but: str = "") -> list[str]:
    """The files in csrc/ that match, as ninja wants them: relative to the root, always in the same order."""
    found = {path for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}")} - set(ROOT.glob(f"csrc/{but}"))
    return [path.relative_to(ROOT).as_posix() for path in sorted(found)]


ISA_SOURCES = sources("cpu/*_rows.cpp")  # compiled once for each instruction set, chosen at run time
AMX_SOURCES = sources("cpu/amx.cpp")
CPU_SOURCES = [
    s for s in sources("bindings_*.cpp", "cpu/*.cpp", but="bindings_cuda.cpp") if s not in ISA_SOURCES + AMX_SOURCES
]
CUDA_SOURCES = sources("bindings_cuda.cpp", "cuda/*.cu")

X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
# The matrix unit, for Linux alone: the system must be asked for it.
AMX = [*X86_ISAS["avx512"], "-mamx-tile", "-mamx-bf16"]


def flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "no", "off", "false")


class Toolchain:
    """The C++ compiler and what it can do; leaves with one clear paragraph where it can't build an extension."""

    def __init__(self) -> None:
        for package in ("ninja", "pybind11"):
            if importlib.util.find_spec(package) is None:
                give_up(f"the package {package} is missing; run: pip install ninja pybind11")
        named = os.environ.get("CXX", "").strip()
        candidates = [named] if named else ["c++", "g++", "clang++"]
        commands = [shlex.split(c) for c in candidates]
        self.cxx = next((c for c in commands if shutil.which(c[0])), [])
        self.named = self.cxx if named else []
        if not self.cxx:
            what = f"CXX is {named!r}, which is not there" if named else "none of c++, g++ and clang++ is on PATH"
            give_up(f"a C++17 compiler is missing ({what}); install one, for instance by `apt install g++`")
        self.python = sysconfig.get_path("include")
        if not Path(self.python, "Python.h").is_file():
            give_up(f"Python's headers are missing ({self.python}/Python.h); install python3-dev or python3-devel")
        if not self.compiles("int main() { return 0; }", ["-std=c++17"]):
            give_up(f"{' '.join(self.cxx)} can't compile and link a C++17 program:\n{self.error}")
        self.openmp = next((f for f in (["-fopenmp"],) if self.compiles(OPENMP_PROGRAM, f)), [])
        if not self.openmp:
            print("momkd: the compiler has no OpenMP; the native CPU kernels will use one thread", file=sys.stderr)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        self.isas = {
            name: flags for name, flags in X86_ISAS.items() if not flags or (x86 and self.compiles("", ["-c", *flags]))
        }
        self.amx = AMX if x86 and sys.platform == "linux" and self.compiles(AMX_PROGRAM, ["-c", *AMX]) else []

    def compiles(self, program: str, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "try.cpp")
            source.write_text(program)
            command = [*self.cxx, *flags, str(source), "-o", str(Path(folder, "try"))]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        self.error = done.stderr.strip()
        return done.returncode == 0


AMX_PROGRAM = "#include <immintrin.h>\nvoid f() { _tile_dpbf16ps(0, 1, 2); }"
OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }"


def give_up(reason: str) -> None:
    raise SystemExit(
        f"\nmomkd: the native extension momkd._C can't be built: {reason}. To install without it, in pure Python (the "
        "same results, slower on the CPU), run: MOMKD_NO_EXT=1 pip install ...\n"
    )


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "").strip()
    return (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None) or shutil.which("nvcc")


def cuda_archs(nvcc: str) -> list[str]:
    """["80", "90", ...]: what MOMKD_CUDA_ARCHS asks for, or of the default what this nvcc knows."""
    asked = os.environ.get("MOMKD_CUDA_ARCHS", "").strip()
    archs = [a.replace(".", "") for a in re.split(r"[;,\s]+", asked or DEFAULT_ARCHS) if a]
    if not asked:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = re.findall(r"compute_(\d+)", listed)
        archs = [a for a in archs if not known or a in known] or known[-1:]
    if not all(re.fullmatch(r"\d+", a) for a in archs):  # 90a and 100f would run on those GPUs alone
        raise SystemExit(f"momkd: MOMKD_CUDA_ARCHS={asked!r}: expected numbers such as '80;90;100'")
    return sorted(set(archs), key=int)


def gencode(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the last for those that come after it."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def for_host_compiler(flags: list[str]) -> list[str]:
    """The flags as nvcc hands them on; it takes a comma for the end of one."""
    return ["-Xcompiler=" + flag.replace(",", "\\,") for flag in flags]


def host_compiler(cxx: list[str]) -> list[str]:
    """nvcc's flags for the compiler that CXX names, which may stand behind a launcher such as ccache."""
    programs = [word for word in cxx if not word.startswith("-")]
    flags = [word for word in cxx if word.startswith("-")]
    return ["-ccbin", programs[-1], *for_host_compiler(flags)] if programs else []


def staged_pybind11() -> Path:
    """A copy of pybind11's headers in the build folder.

    pip's isolated environment has another path each time: using it would compile everything anew.
    """
    import pybind11

    include = BUILD / f"pybind11-{pybind11.__version__}"
    if not include.is_dir():
        unfinished = include.with_suffix(f".{os.getpid()}")
        shutil.copytree(Path(pybind11.get_include()), unfinished, dirs_exist_ok=True)
        os.replace(unfinished, include)
    return include


def write_ninja(tools: Toolchain, version: str, nvcc: str | None) -> None:
    """build.ninja with one target for each module; rewritten only when it would differ."""
    from io import StringIO

    from ninja.ninja_syntax import Writer, escape

    def words(arguments: list[str]) -> str:
        return escape(shlex.join(arguments))

    sanitize = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
    environment = {name: shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS")}
    shared = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi"]
    system = ["-isystem", str(staged_pybind11()), "-isystem", tools.python]
    link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
    if SANITIZE:
        shared = [*shared, *sanitize, "-O1", "-g", "-fno-omit-frame-pointer"]
    cxxflags = [*shared, *tools.openmp, f"-I{ROOT / 'csrc'}", *system, *environment["CXXFLAGS"]]

    text = StringIO()
    n = Writer(text, width=10_000)
    n.comment("Written by setup.py.")
    n.variable("ninja_required_version", "1.5")
    n.variable("cxx", words(tools.cxx))
    n.variable("cxxflags", words(cxxflags))
    n.variable("ldflags", words([*link, *tools.openmp, *sanitize, *environment["LDFLAGS"]]))
    depfile = {"depfile": "$out.d", "deps": "gcc"}
    n.rule("cxx", "$cxx $cxxflags $extra -MMD -MF $out.d -c $in -o $out", description="C++ $out", **depfile)
    n.rule("link", "$cxx $in $ldflags -o $out", description="link $out")

    def compile_cxx(source: str, extra: list[str], tag: str = "") -> str:
        target = f"{Path(source).with_suffix('')}{tag}.o"
        n.build(target, "cxx", escape(str(ROOT / source)), variables={"extra": words(extra)})
        return target

    stamp = [f'-DMOMKD_VERSION="{version}"']
    isas = [f"-DMOMKD_HAVE_{name.upper()}" for name in [*tools.isas, *(["amx"] if tools.amx else [])]]
    objects = [compile_cxx(source, [*stamp, *isas]) for source in CPU_SOURCES]
    objects += [compile_cxx(source, [*isas, *tools.amx]) for source in AMX_SOURCES]
    for source in ISA_SOURCES:
        for name, flags in tools.isas.items():
            objects.append(compile_cxx(source, [*flags, f"-DMOMKD_ISA={name}"], f".{name}"))
    n.build(f"_C{SUFFIX}", "link", objects)

    if nvcc:
        # nvcc's own driver links: it knows where the static runtime lies.
        hidden = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "--threads=0"]
        n.variable("nvcc", words([nvcc, *host_compiler(tools.named)]))
        n.variable("nvccflags", words([*hidden, *gencode(cuda_archs(nvcc)), f"-I{ROOT / 'csrc'}"]))
        n.rule("cuda", "$nvcc $nvccflags -MMD -MF $out.d -c $in -o $out", description="CUDA $out", **depfile)
        n.variable("nvccldflags", words(for_host_compiler(environment["LDFLAGS"])))
        n.rule("link_cuda", "$nvcc -shared -cudart=static $in $nvccldflags -o $out", description="link $out")
        objects = []
        for source in CUDA_SOURCES:
            if source.endswith(".cpp"):
                objects.append(compile_cxx(source, stamp))
            else:
                objects.append(f"{Path(source).with_suffix('')}.cu.o")
                n.build(objects[-1], "cuda", escape(str(ROOT / source)))
        n.build(f"_cuda{SUFFIX}", "link_cuda", objects)

    path = BUILD / "build.ninja"
    if not path.is_file() or path.read_text() != text.getvalue():
        path.write_text(text.getvalue())


def run_ninja(*arguments: str) -> bool:
    import ninja

    command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(BUILD), *arguments]
    sys.stdout.flush()
    return subprocess.run(command).returncode == 0


class NinjaBuild(build_ext):
    """build_ext that leaves compiling to ninja and only copies the modules to where setuptools wants them."""

    def run(self) -> None:
        self.into_source = self.inplace  # setuptools clears the attribute while it builds
        super().run()

    def build_extensions(self) -> None:
        tools = Toolchain()
        nvcc = None if flag("MOMKD_NO_CUDA") or SANITIZE else find_nvcc()
        if not nvcc and flag("MOMKD_REQUIRE_CUDA"):
            without = next((name for name in ("MOMKD_NO_CUDA", "MOMKD_SANITIZE") if flag(name)), "")
            reason = f"{without} leaves momkd._cuda out" if without else "there is no nvcc on PATH or in CUDA_HOME/bin"
            raise SystemExit(f"momkd: MOMKD_REQUIRE_CUDA is set, but {reason}")
        BUILD.mkdir(parents=True, exist_ok=True)
        write_ninja(tools, self.distribution.get_version(), nvcc)
        wanted = [f"_C{SUFFIX}", *([f"_cuda{SUFFIX}"] if nvcc else [])]
        complete = run_ninja("-k", "0", *wanted)  # go on after an error: `_cuda` may fail where `_C` does not
        if not complete and not run_ninja(f"_C{SUFFIX}"):
            give_up("the compiler's messages are above")
        if not complete and flag("MOMKD_REQUIRE_CUDA"):
            raise SystemExit("momkd: momkd._cuda can't be built (nvcc's messages are above)")
        if not complete:
            print(
                "\nWARNING: momkd: nvcc could not build momkd._cuda (its messages are above). The installation goes on "
                "without it; MOMKD_NO_CUDA=1 skips the attempt, MOMKD_REQUIRE_CUDA=1 makes it an error.\n",
                file=sys.stderr,
            )
        built = {"momkd._C", *(["momkd._cuda"] if nvcc and complete else [])}
        for extension in self.extensions:
            if extension.name in built:
                self.place(extension.name)
            else:
                self.discard(extension)
        self.extensions = [e for e in self.extensions if e.name in built]

    def place(self, name: str) -> None:
        target = Path(self.get_ext_fullpath(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        # Without its time: setuptools takes a module over only if it is newer than the one of the build before, which
        # may have had other flags.
        shutil.copy(BUILD / f"{name.rpartition('.')[2]}{SUFFIX}", unfinished)
        os.replace(unfinished, target)

    def discard(self, extension: Extension) -> None:
        """Remove what an earlier build left, so that no stale module is packed or imported."""
        in_source, in_build = self._get_inplace_equivalent(self.get_finalized_command("build_py"), extension)
        Path(in_build).unlink(missing_ok=True)
        if self.into_source:
            Path(in_source).unlink(missing_ok=True)


class FreshBuildPy(build_py):
    """build_py into an empty folder: build/lib holds modules that were deleted since, and they would be packed."""

    def run(self) -> None:
        folder = Path(self.build_lib).resolve()
        if not self.editable_mode and folder != ROOT:
            shutil.rmtree(folder / "momkd", ignore_errors=True)
        super().run()


extensions = [Extension("momkd._C", CPU_SOURCES + ISA_SOURCES), Extension("momkd._cuda", CUDA_SOURCES, optional=True)]

setup(
    # `kernels` is another project's name: here it is only ever the package momkd.kernels.
    packages=[*find_packages(str(ROOT), include=["momkd", "momkd.*"]), "momkd.kernels", "momkd.csrc.cuda"],
    package_dir={"momkd": "momkd", "momkd.kernels": "kernels", "momkd.csrc.cuda": "csrc/cuda"},
    package_data={"momkd.csrc.cuda": ["*.cuh"]},  # for NVRTC
    ext_modules=[] if flag("MOMKD_NO_EXT") else extensions,
    cmdclass={"build_ext": NinjaBuild, "build_py": FreshBuildPy},
)

"""Compiles every Triton kernel ahead of time, as its launcher would start it, and reads the machine code.

    python -m tests.aot [--arch sm_90]... [--op attention_pool]... [--json FILE]

No GPU and no driver are needed. The launchers run on CPU tensors (`tests.aot_cases`); what they would have started goes
through Triton's own argument binding and compiler for each architecture, and its disassembler gives the counts.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from momkd import env, gpu
from tests.aot_cases import CASES, OPS, Case, start
from tests.aot_read import CHIPS, Chip, Report, cuobjdump, dots, hear_ptxas, ptxas_warnings, read_amdgcn, read_cubin


class Launch(NamedTuple):
    """What a launcher would have started."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class Job:
    """One distinct compilation, and the cases that need it."""

    fn: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    arch: str
    cases: list[Case]
    key: tuple[str, ...]  # the same for the same compilation


def unavailable() -> str:
    """Why nothing can be compiled here, or nothing."""
    if env.triton_interpreted():
        return "TRITON_INTERPRET is set: jitted functions are interpreted and cannot be compiled; unset it"
    if gpu.triton()[0] is None:
        return gpu.triton()[1]
    if not Path(cuobjdump()).is_file():
        return "this Triton comes without cuobjdump"
    return ""


def left_out(arch: str) -> str:
    """Why nothing can be compiled for this chip here, or nothing. Triton 3.4 needs ROCm's ld.lld for AMD's code."""
    if CHIPS[arch].backend == "hip":
        from triton.backends.amd.compiler import HIPBackend

        try:
            getattr(HIPBackend, "path_to_rocm_lld", lambda: None)()
        except Exception as error:  # that is what it raises
            return f"{arch}: {error}"
    return ""


# --- what would be started


@contextmanager
def _recording(arch: str, candidate: int) -> Iterator[list[Launch]]:
    """Every launcher records what it would start on this chip with this candidate of its tiles, and starts nothing."""
    from momkd.kernels import _common, _tuning

    original, launches = _common.launch, list[Launch]()

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **meta: Any):
        if 0 not in grid:
            launches.append(Launch(kernel, args, {"num_warps": num_warps, "num_stages": num_stages, **meta}))

    _replace_launch(original, record)
    _tuning.CHIP, _tuning.CANDIDATE = arch, candidate
    try:
        yield launches
    finally:
        _tuning.CHIP = _tuning.CANDIDATE = None
        _replace_launch(record, original)


def _replace_launch(old: Callable[..., None], new: Callable[..., None]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("momkd.kernels.") and getattr(module, "launch", None) is old:
            module.launch = new


def record(case: Case, arch: str, candidate: int = 0) -> list[Launch]:
    """The kernels that the case would start, in order."""
    module = gpu.kernels(case.op)
    with _recording(arch, candidate) as launches:
        start(module, case)
    if not launches:
        raise RuntimeError(f"{case}: nothing was started through momkd.kernels._common.launch")
    return launches


def present(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """The cases whose kernels exist, and the ops that have none yet."""
    found = {op: importlib.util.find_spec(f"momkd.kernels.{op}") is not None for op in {c.op for c in cases}}
    return [c for c in cases if found[c.op]], sorted(op for op, is_there in found.items() if not is_there)


# --- from a launch to a compilation


class _NoDriver:
    """Stands where Triton asks its driver for the target; `warmup` needs no more."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.chip.backend, self.chip.arch, self.chip.warp)

    def get_current_device(self) -> str:
        return f"{self.chip.arch}"  # a key of the kernels' caches

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _bound_for(chip: Chip, hook: Callable[..., bool]) -> Iterator[None]:
    """Inside, `kernel.warmup` binds and specialises its arguments for the chip, shows the hook, and builds nothing."""
    from triton import knobs
    from triton.runtime import driver

    before = dict(vars(driver))
    driver.set_active(_NoDriver(chip))
    try:
        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = hook
            yield
    finally:
        vars(driver).update(before)


def distinct(launches: Sequence[tuple[Case, Launch]], archs: Sequence[str]) -> list[Job]:
    """The distinct compilations of these launches, with Triton's own types, constants and attributes of arguments."""
    jobs: dict[tuple[str, ...], Job] = {}
    for arch in archs:
        for case, launch in launches:
            names = launch.kernel.arg_names
            options = {k: v for k, v in launch.options.items() if k not in names}

            def hook(*, key: str, fn: Any, compile: dict[str, Any], arch=arch, case=case, options=options, **_: Any):
                own = (arch, fn.module, fn.name, str(key))
                job = Job(
                    fn.jit_function,
                    *(compile["signature"], compile["constants"], compile["configs"][0]),
                    options,
                    arch,
                    [],
                    own,
                )
                known = jobs.setdefault(own, job).cases
                if case not in known:
                    known.append(case)
                return True

            with _bound_for(CHIPS[arch], hook):
                launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    return list(jobs.values())


@contextmanager
def _one_parser_at_a_time() -> Iterator[None]:
    """Threads parse one after the other: Python 3.11 counts the depth of all their syntax trees as one (gh-106905)."""
    parse, alone = ast.parse, Lock()

    def parse_alone(*args: Any, **kwargs: Any) -> ast.AST:
        with alone:
            return parse(*args, **kwargs)

    ast.parse = parse_alone  # type: ignore[assignment]
    try:
        yield
    finally:
        ast.parse = parse


def compile_job(job: Job) -> Report:
    """Compiles (or finds in Triton's cache) and reads; a failure is told in the report."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend

    names = job.fn.arg_names
    constants = {names[path[0]]: value for path, value in job.constants.items() if len(path) == 1}
    report = Report(
        kernel=job.fn.__name__,
        case=_named(job),
        arch=job.arch,
        warps=job.options["num_warps"],
        stages=job.options["num_stages"],
        parameters=tuple(names),
        constants=constants,
        cases=tuple(job.cases),
    )
    chip = CHIPS[job.arch]
    source = ASTSource(job.fn, job.signature, job.constants, job.attributes)
    target = GPUTarget(chip.backend, chip.arch, chip.warp)
    try:
        compiled = compile(source, target=target, options=dict(job.options))
    except Exception as error:
        report.error = f"{type(error).__name__}: {error}"
        return report
    report.shared = compiled.metadata.shared
    report.dots = dots(compiled.asm["ttir"])
    if chip.backend == "cuda":
        read_cubin(compiled.asm["cubin"], report)
        report.warnings = ptxas_warnings(compiled.asm["ptx"], make_backend(target), job.options, int(chip.arch))
    else:
        read_amdgcn(compiled.asm["amdgcn"], report)
    return report


def _named(job: Job) -> str:
    others = f" (+{len(job.cases) - 1})" if len(job.cases) > 1 else ""
    return f"{job.cases[0]}{others}"


def compile_all(
    cases: Sequence[Case],
    archs: Sequence[str],
    show_progress: bool = False,
    candidates: int = 1,
    known: dict[tuple[str, ...], Report] | None = None,
) -> list[Report]:
    """The reports of all distinct compilations with the first `candidates` of the tiles, in the order of the cases.

    `known`: reports of earlier calls, which are not made again; those made are added.

    Triton lets go of the GIL where it works."""
    jobs: list[Job] = []
    broken: list[Report] = []
    for arch in archs:
        launches: list[tuple[Case, Launch]] = []
        for case in cases:
            try:
                for candidate in range(candidates):
                    launches += [(case, launch) for launch in record(case, arch, candidate)]
            except Exception as error:
                why = f"the launcher raised {type(error).__name__}: {error}"
                broken.append(Report("", f"{case}", arch, 0, 0, cases=(case,), error=why))
        jobs += distinct(launches, [arch])
    with _one_parser_at_a_time(), hear_ptxas(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        known = {} if known is None else known
        futures = {job.key: pool.submit(compile_job, job) for job in jobs if job.key not in known}
        done: Iterable[Any] = as_completed(futures.values())
        if show_progress:
            done = track(done, "compiling", total=len(futures), console=Console(stderr=True))
        for _ in done:
            pass
    known |= {key: future.result() for key, future in futures.items()}
    return [*(replace(known[job.key], case=_named(job), cases=tuple(job.cases)) for job in jobs), *broken]


# --- the command


def problem(report: Report) -> str:
    """Why the kernel can't run on its chip, or runs its matrix instructions one by one; or nothing."""
    limit = CHIPS[report.arch].shared
    too_much = f"{report.shared} bytes of shared memory, the chip has {limit}" if report.shared > limit else ""
    return report.error or too_much or "; ".join(f"ptxas: {warning}" for warning in report.warnings)


def table(reports: Iterable[Report]) -> Table:
    shown = Table("kernel", "case", "arch", "warps/\nstages", title="Ahead of time, by reading the machine code")
    for name in ("registers", "shared", "spills", "stack"):
        shown.add_column(name, justify="right")
    shown.add_column("tensor cores")
    shown.add_column("widest\nload", justify="right")
    for r in reports:
        start = (r.kernel, r.case, r.arch, f"{r.warps}/{r.stages}")
        if r.error:
            shown.add_row(*start, "failed")
            continue
        bad = "[red]{}[/red]"
        numbers = (
            str(r.registers),
            (bad if problem(r) else "{}").format(r.shared),
            (bad if r.spills else "{}").format(r.spills),
            (bad if r.stack else "{}").format(r.stack),
        )
        tensor = ", ".join(f"{count} {name}" for name, count in sorted(r.tensor_shapes().items()))
        shown.add_row(*start, *numbers, tensor or "-", str(max(r.loads, default=0)))
    return shown


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    arch: Annotated[list[str] | None, typer.Option("--arch", help=f"{', '.join(CHIPS)}; may be repeated.")] = None,
    op: Annotated[list[str] | None, typer.Option("--op", help=f"{', '.join(OPS)}; may be repeated.")] = None,
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="So many tiles an op, the default first.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was read there.")] = None,
) -> None:
    """Compile all kernels for these architectures and show what they became. Exit 1 where one could not run."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    archs, ops = arch or list(CHIPS), op or list(OPS)
    unknown = [f"--arch {a}: expected {', '.join(CHIPS)}" for a in archs if a not in CHIPS]
    unknown += [f"--op {o}: expected {', '.join(OPS)}" for o in ops if o not in OPS]
    if reason := next(iter(unknown), "") or unavailable():
        errors.print(reason, markup=False)
        raise typer.Exit(2)
    cases, missing = present([case for case in CASES if case.op in ops])
    skipped = [f"{name}: skipped, there is no momkd.kernels.{name}" for name in missing]
    skipped += [f"skipped, {reason}" for a in archs if (reason := left_out(a))]
    for line in skipped:
        errors.print(line, markup=False)
    archs = [a for a in archs if not left_out(a)]
    if not archs:
        raise typer.Exit(2)
    reports = compile_all(cases, archs, show_progress=True, candidates=candidates)
    out = Console()
    Console(width=None if out.is_terminal else 180).print(table(reports))
    if json_file:
        rows = [{k: v for k, v in asdict(r).items() if k != "cases"} | {"cases": [*map(str, r.cases)]} for r in reports]
        json_file.write_text(json.dumps(rows, indent=1, default=str) + "\n")
    problems = [f"{r.kernel}, {r.case}, {r.arch}: {problem(r)}" for r in reports if problem(r)]
    for line in problems:
        errors.print(line, markup=False)
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    app()

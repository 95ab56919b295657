"""Readers against damaged and hostile files: `python -m tests.fuzz KIND --cases N --seed S`.

Each case is a good file that was mutated, and momkd reads it: to something valid, or to an InputError of one line.
Anything else, a case that takes too long, or memory above the limit is printed, and the exit code is 1. A crash ends
the process: `test_fuzz.py` starts it, so that a crash in a library is a failed test and not the end of the tests.

The modules of this package hold the kinds of files, each with how many cases the tests run: see `kinds.Kind`.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

from momkd.errors import InputError
from tests.fuzz.kinds import WORK, Kind

SECONDS = 10  # a case may take
MEGABYTES = 1500  # of address space that reading may take beyond what is there after the imports
GROWTH = 400  # megabytes of resident memory that all cases together may add


def _gathered() -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for module in pkgutil.iter_modules(__path__, "tests.fuzz."):
        if not module.name.endswith(("__main__", ".kinds")):
            kinds |= importlib.import_module(module.name).KINDS
    return kinds


KINDS = _gathered()


def resident() -> int:
    """Megabytes at most so far."""
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) // 1024


def limit_memory() -> None:
    import resource

    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def too_long(*_: object) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def main(kind: str, cases: int, seed: int) -> int:
    tried = KINDS[kind]
    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    (root / "good").mkdir()
    tried.make(root / "good")
    files = sorted(path for path in (root / "good").iterdir() if path.is_file())
    contents = [path.read_bytes() for path in files]
    warnings.simplefilter("ignore")
    limit_memory()
    signal.signal(signal.SIGALRM, too_long)
    before, bad, refused = resident(), 0, 0
    there = {path.name for path in root.iterdir()}
    for case in range(cases):
        rng = random.Random(f"{kind} {seed} {case}")
        path = files[case % len(files)]
        as_made = case < len(files)  # first each as it is
        data = path.read_bytes() if as_made else tried.mutate(path, rng, contents)
        target = root / path.name
        target.write_bytes(data)
        print(case, flush=True)  # what a crash or a hang can be told by
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            tried.use(target)
        except InputError as error:
            refused += 1
            if len(str(error).splitlines()) != 1:
                bad += 1
                print(f"{kind} case {case} of {path.name}: more than one line: {error!r}", file=sys.stderr)
        except BaseException as error:
            bad += 1
            print(f"{kind} case {case} of {path.name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            target.unlink(missing_ok=True)
    made = {path.name for path in root.iterdir()} - there - {WORK}
    if made:
        bad += 1
        print(f"{kind}: something was written or executed: {sorted(made)}", file=sys.stderr)
    grown = resident() - before
    if grown > GROWTH:
        bad += 1
        print(f"{kind}: {grown} MB more were resident", file=sys.stderr)
    print(f"{cases} cases, {refused} refused, {bad} bad, {grown} MB", flush=True)
    shutil.rmtree(root)
    return 1 if bad else 0

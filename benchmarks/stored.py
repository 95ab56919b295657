"""Stored benchmark results in one form, whichever program wrote them.

`pytest benchmarks/ --benchmark-json=FILE` keeps its figures in `extra_info`; `python -m benchmarks.gpu_figures` keeps
them by section, item, pass and form. Both become `Result`, under the names that `extra_info` has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer

RESULTS = Path(__file__).parent / "results"
WRITERS = "`pytest benchmarks/ --benchmark-json=FILE` or `python -m benchmarks.gpu_figures --out DIR`"
TIMES, PEAK, SECONDS = "times as fast as ", "peak MB of ", "seconds of "
UNTIL, HOST = "seconds until the end of ", "host µs of "
SHARE, LEFT_OUT = "share of the plain product's rate", "not compared"
FLOOR = "matrix products"  # part of our own call, no peer of it
VARIES = 0.05  # of a time whose spread was not stored
WRONG, ALLOWED = 10.0, 0.02  # times as far from float64 as momkd, and at least this far: a wrong result
PASSES = {"forward": ", fwd", "forward and backward": ", fwd+bwd"}


class Result(NamedTuple):
    """One benchmark of one file."""

    name: str  # gated_attention_pool[cpu-fwd]
    where: str  # what it ran on
    median: float  # seconds of momkd
    spread: float  # interquartile range over the median
    info: dict[str, Any]

    def _by_form(self, prefix: str) -> dict[str, float]:
        return {k.removeprefix(prefix): float(v) for k, v in self.info.items() if k.startswith(prefix)}

    def peers(self) -> dict[str, float]:
        """How many times as fast momkd is as each peer, on its device."""
        return self._by_form(TIMES)

    def peers_until_the_end(self) -> dict[str, float]:
        """How many times as fast momkd is as each peer until the device has finished; empty where that wasn't timed."""
        mine, *others = self._by_form(UNTIL).items() or [("", 1.0)]
        return {name: seconds / mine[1] for name, seconds in others}

    def memory(self) -> dict[str, float]:
        """Peak megabytes above what was held before, of momkd first."""
        return self._by_form(PEAK)

    def times(self) -> dict[str, float]:
        """Seconds of momkd: one figure without a name, or on a GPU that of the device and that until the end."""
        until = self._by_form(UNTIL)
        if not until:
            return {"": self.median}
        mine = next(iter(until))
        return {"device": float(self.info[SECONDS + mine]), "until the end": until[mine]}

    def host(self) -> float | None:
        """Microseconds of the host a call of momkd."""
        return next(iter(self._by_form(HOST).values()), None)


class Run(NamedTuple):
    """One file."""

    path: Path
    conditions: str
    results: list[Result]
    growth: dict[str, dict[int, float]]  # seconds by number of patches
    notes: Sequence[str] = ()  # sentences about the whole run
    folder: tuple[str, ...] = ()  # where its report belongs beside others


def read(path: Path) -> Run:
    """Read one file.

    Raises:
        typer.BadParameter: the file is of neither kind; the message says what was expected.
    """
    run = _parsed(path)
    if run is None:
        raise typer.BadParameter(f"{path}: expected what {WRITERS} writes, got JSON without their keys")
    return run


def runs(given: Sequence[Path]) -> list[Run]:
    """Read the files that were named and those in folders; all stored ones where nothing was named.

    Folders may hold JSON of other kinds, which is passed over.
    """
    found: list[Run] = []
    for path in given or [RESULTS]:
        if path.is_dir():
            found += [run for file in sorted(path.rglob("*.json")) if (run := _parsed(file)) is not None]
        else:
            found.append(read(path))
    if not found:
        raise typer.BadParameter(f"no results in {', '.join(map(str, given or [RESULTS]))}; make some by {WRITERS}")
    return found


def _parsed(path: Path) -> Run | None:
    """Return the run of a file, or None where its JSON is of another kind."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        keys = set(held) if isinstance(held, dict) else set()
        for wanted, reader in READERS.items():
            if wanted <= keys:
                return reader(path, held)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise typer.BadParameter(f"{path}: expected what {WRITERS} writes, got {found}") from error
    return None


def _versions(versions: dict[str, str], commit: str, dirty: bool, date: str) -> list[str]:
    words = [
        f"{name} {versions[name]}" for name in ("momkd", "torch", "triton", "cuda", "python") if versions.get(name)
    ]
    return [*words, f"commit {commit[:10]}{' with changes' if dirty else ''}", date]


def _of_pytest(path: Path, held: dict[str, Any]) -> Run:
    machine, commit = held["machine_info"], held.get("commit_info") or {}
    known = machine.get("momkd", {})
    gpus = [d["name"] for d in known.get("devices", []) if isinstance(d, dict) and "name" in d]
    cpu = f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine.get('threads', '?')} threads"
    words = _versions(
        known.get("versions", {}),
        str(commit.get("id", "unknown")),
        bool(commit.get("dirty")),
        str(held["datetime"])[:10],
    )
    results = [_pytest_result(entry, cpu) for entry in held["benchmarks"]]
    grown = {r.name: r.info["growth"] for r in results if "growth" in r.info}
    growth = {name: {int(n): float(s) for n, s in points.items()} for name, points in grown.items()}
    folder = path.resolve().with_suffix("").parts[-2:]
    return Run(path, "; ".join([*gpus, cpu, *words]), results, growth, folder=folder)


def _pytest_result(entry: dict[str, Any], cpu: str) -> Result:
    stats, info = entry["stats"], entry["extra_info"]
    device = info.get("device", "cpu")
    median = float(stats["median"])
    return Result(
        entry["name"].removeprefix("test_"),
        cpu if device == "cpu" else device,
        median,
        float(stats["iqr"]) / median if median else 0.0,
        info,
    )


def _of_figures(path: Path, held: dict[str, Any]) -> Run:
    about = held["conditions"]
    stored = re.search(r"\d{4}-\d\d-\d\d", path.resolve().parent.name)  # older files don't hold their date
    date = about.get("date") or (stored.group() if stored else "date unknown")
    known = str(about["commit"])
    commit = "unknown" if known.startswith("unknown") else known
    words = _versions(about["versions"], commit, False, date)
    if about.get("tiny"):
        words.append("a rehearsal: its figures say nothing")
    doubtful = _wrong_anywhere(held["sections"])
    results: list[Result] = []
    rates: list[str] = []
    failed: list[str] = []
    for section, made in held["sections"].items():
        for name, item in made.items():
            if "failed" in item:
                failed.append(f"{section}: {name} failed: {item['failed']}.")
            elif parts := _passes(item):
                for way, part in parts.items():
                    info = {k: v for k, v in item.items() if not isinstance(v, dict)} | _figures_info(
                        item, part, doubtful
                    )
                    seconds = info[SECONDS + next(iter(part["forms"]))]
                    results.append(Result(_title(section, name, way), about["device"], seconds, VARIES, info))
            else:
                label = name if section == "ceilings" else f"{section}, {name}"
                rates += [f"{label} {_rate(item[unit])} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in item]
    results.sort(key=_order)
    if held.get("left out"):
        failed.append(f"Left out for want of time: {', '.join(held['left out'])}.")
    notes = [*([f"Rates: {'; '.join(rates)}."] if rates else []), *failed]
    conditions = "; ".join([str(about["device"]), *words])
    return Run(path, conditions, results, _growth(results), notes, path.resolve().with_suffix("").parts[-3:])


def _passes(item: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of each pass of an item: "" where it has but one; none where it is a rate."""
    ways = {way: part for way, part in item.items() if isinstance(part, dict) and "forms" in part}
    return ways or ({"": item} if "forms" in item else {})


def _title(section: str, name: str, way: str) -> str:
    if section == "peers":
        return f"gated_attention_pool{PASSES.get(name, ': ' + name)}"
    return name if section == "ops" else f"{section}: {name}{PASSES.get(way, '')}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def wrong_peers(item: dict[str, Any], part: dict[str, Any]) -> list[str]:
    """Return the peers whose stored error is far above that of momkd; a NaN is wrong too."""
    (_, ours), *peers = part["forms"].items()
    limit = max(WRONG * ours.get("relative error", item.get("relative error", 0.0)), ALLOWED)
    return [name for name, form in peers if "failed" not in form and not form.get("relative error", 0.0) <= limit]


def _wrong_anywhere(sections: dict[str, Any]) -> set[str]:
    parts = [(item, part) for made in sections.values() for item in made.values() for part in _passes(item).values()]
    return {name for item, part in parts for name in wrong_peers(item, part)}


def _figures_info(item: dict[str, Any], part: dict[str, Any], doubtful: set[str]) -> dict[str, Any]:
    """Return the figures of one pass under the names of `extra_info`.

    A peer that failed or was wrong has no figures there, nor one of `doubtful` whose error was not stored.
    """
    ours = next(iter(part["forms"].values()))
    info: dict[str, Any] = {key: part[key] for key in ("attained", SHARE) if key in part}
    info["patches"] = next((item[key] for key in ("patches", "rows", "nodes") if key in item), None)
    info[LEFT_OUT] = {}
    wrong = wrong_peers(item, part)
    for name, form in part["forms"].items():
        if "failed" in form:
            info[LEFT_OUT][name] = f"failed ({form['failed']})"
        elif name in wrong:
            info[LEFT_OUT][name] = "wrong result, not compared"
        elif name in doubtful and "relative error" not in form:
            info[LEFT_OUT][name] = "wrong elsewhere in this run and not checked here, not compared"
        elif name == FLOOR:
            info[SHARE] = form["ms"] / ours["ms"]
        else:
            info[SECONDS + name], info[UNTIL + name] = form["ms"] / 1e3, form["wall ms"] / 1e3
            info[HOST + name], info[PEAK + name] = form["host us"], form["peak MB"]
            if name in part.get("times as fast as", {}):
                info[TIMES + name] = part["times as fast as"][name]
    if why := item.get("without the peer"):
        info[LEFT_OUT]["the peer"] = f"failed ({why})"
    return info


def _order(result: Result) -> tuple[bool, bool, int, int, int]:
    """What has peers comes first, then sizes from few patches to many; passes stay as they are."""
    if result.peers_until_the_end():
        return False, False, 0, 0, 0
    varied = " bags, L=" not in result.name
    info = result.info
    return True, varied, info.get("L", 0), info.get("bags", 0), 0 if varied else info.get("patches", 0)


def _growth(results: Sequence[Result], width: int = 1024, bags: int = 32) -> dict[str, dict[int, float]]:
    """Return times of the gate against the number of patches, for one width and number of bags."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        size = f"patches, {bags} bags, L={width},"
        if size not in result.name:
            continue
        section, _, _ = result.name.partition(":")
        way = result.name.rpartition(size)[2].strip()
        for kind, seconds in result.times().items():
            label = f"{section}, L={width}, {bags} bags, {way}, {kind}"
            found.setdefault(label, {})[result.info["patches"]] = seconds
    return {label: dict(sorted(points.items())) for label, points in found.items() if len(points) > 1}


READERS: dict[frozenset[str], Callable[[Path, dict[str, Any]], Run]] = {
    frozenset({"machine_info", "benchmarks"}): _of_pytest,
    frozenset({"conditions", "sections"}): _of_figures,
}

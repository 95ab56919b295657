"""What stored results say: `python -m benchmarks.report [RESULTS...] [--out DIR] [--against OTHER]`.

RESULTS are files that `pytest benchmarks/ --benchmark-json=FILE` wrote, or folders of them; without any, those under
benchmarks/results/. Every figure comes from the files. DIR then holds report.md and the plots, each in light and dark:
speed-up over each peer, growth with the number of patches, peak memory. `--against` sets two results side by side and
says faster or slower only beyond what either measurement varied by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
TIMES, PEAK, SECONDS = "times as fast as ", "peak MB of ", "seconds of "
THEMES = {"light": ("white", "#222222"), "dark": ("#0d1117", "#e6edf3")}
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
LEAST = 0.05  # of a time: less is never called a difference


class Result(NamedTuple):
    """One benchmark of one file."""

    name: str  # gated_attention_pool[cpu-fwd]
    where: str  # what it ran on
    median: float  # seconds of momkd
    spread: float  # interquartile range over the median
    info: dict[str, Any]

    def peers(self) -> dict[str, float]:
        """How many times as fast momkd is as each peer."""
        return {k.removeprefix(TIMES): float(v) for k, v in self.info.items() if k.startswith(TIMES)}

    def memory(self) -> dict[str, float]:
        """Peak megabytes above what was held before, of momkd first."""
        return {k.removeprefix(PEAK): float(v) for k, v in self.info.items() if k.startswith(PEAK)}


class Run(NamedTuple):
    """One file."""

    path: Path
    conditions: str
    results: list[Result]


def read(path: Path) -> Run:
    """One file of pytest-benchmark.

    Raises:
        typer.BadParameter: the file is none of those; the message says what was expected.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        machine, commit = held["machine_info"], held.get("commit_info") or {}
        known = machine.get("momkd", {})
        gpus = [d["name"] for d in known.get("devices", []) if isinstance(d, dict) and "name" in d]
        cpu = f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine.get('threads', '?')} threads"
        versions = known.get("versions", {})
        words = [f"{n} {versions[n]}" for n in ("momkd", "torch", "triton", "cuda", "python") if versions.get(n)]
        dirty = " with changes" if commit.get("dirty") else ""
        words += [f"commit {str(commit.get('id', 'unknown'))[:10]}{dirty}", str(held["datetime"])[:10]]
        results = [_result(entry, cpu) for entry in held["benchmarks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise typer.BadParameter(
            f"{path}: expected what `pytest benchmarks/ --benchmark-json=FILE` writes, got {found}"
        ) from error
    return Run(path, "; ".join([*(gpus or []), cpu, *words]), results)


def _result(entry: dict[str, Any], cpu: str) -> Result:
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


def files(given: Sequence[Path]) -> list[Path]:
    """The files that were named, and those in folders; all stored ones where nothing was named."""
    found = [p for path in (given or [RESULTS]) for p in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    if not found:
        raise typer.BadParameter(
            f"no results in {', '.join(map(str, given or [RESULTS]))}; "
            "make some by `pytest benchmarks/ --benchmark-json=FILE`"
        )
    return found


def duration(seconds: float) -> str:
    """Seconds with three figures and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


HEAD = ("benchmark", "patches", "backend", "time", "times as fast as", "attained", "peak MB, least of the peers'")


def rows(run: Run) -> Iterator[tuple[str, ...]]:
    """A line of the table for each benchmark that has peers or a floor."""
    for result in run.results:
        info, memory, peers = result.info, result.memory(), result.peers()
        if not peers and "attained" not in info:
            continue
        mine, *others = memory.values() if memory else (math.nan,)
        yield (
            result.name,
            f"{info.get('patches', info.get('rows', '')):,}" if info.get("patches", info.get("rows")) else "",
            str(info.get("backend", "")),
            duration(result.median),
            "\n".join(f"{name} {ratio:.2f}" for name, ratio in peers.items()),
            f"{100 * info['attained']:.0f} %" if "attained" in info else "",
            f"{mine:.1f}, {min(others):.1f}" if others else "",
        )


def growth(run: Run) -> dict[str, dict[int, float]]:
    """Seconds by number of patches, for each benchmark of growth."""
    found = {r.name: r.info["growth"] for r in run.results if "growth" in r.info}
    return {name: {int(n): float(s) for n, s in points.items()} for name, points in found.items()}


def markdown(run: Run) -> str:
    """The table, the slopes of growth, and the conditions beneath."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row).replace("\n", ", ") + " |" for row in rows(run)]
    for result in run.results:
        if "slope of time" in result.info:
            info = result.info
            lines.append(
                f"\n{result.name}: time grows with the {info['slope of time']:.2f}th power of the patches, "
                f"{info['nanoseconds a patch']:.3g} ns and {info['bytes a patch']:.3g} bytes a patch."
            )
        if "one giant / equal bags" in result.info:
            ratio = result.info["one giant / equal bags"]
            lines.append(f"\n{result.name}: one giant bag takes {ratio:.2f} times as long as equal bags.")
    return "\n".join([*lines, "", f"{run.conditions}.", ""])


def draw(run: Run, out: Path) -> list[Path]:
    """The plots that this run has figures for."""
    from matplotlib.figure import Figure

    made = []
    compared = [(r.name, r.peers()) for r in run.results if r.peers()]
    stored = [(r.name, r.memory()) for r in run.results if len(r.memory()) > 1]
    for theme, (paper, ink) in THEMES.items():

        def figure(width: float, height: float, paper: str = paper, ink: str = ink) -> tuple[Any, Any]:
            made_figure = Figure(figsize=(width, height), layout="constrained", facecolor=paper)
            axes = made_figure.add_subplot(facecolor=paper)
            axes.tick_params(colors=ink, which="both")
            for side, spine in axes.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(ink)
            for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
                label.set_color(ink)
            return made_figure, axes

        def save(drawn: Any, name: str, theme: str = theme, ink: str = ink) -> None:
            drawn.supxlabel(run.conditions, fontsize=6, color=ink)
            path = out / f"{name}-{theme}.svg"
            drawn.savefig(path)
            made.append(path)

        if compared:
            bars = [(f"{name}: {peer}", ratio) for name, peers in compared for peer, ratio in peers.items()]
            drawn, axes = figure(8, 0.8 + 0.24 * len(bars))
            names, ratios = zip(*reversed(bars), strict=True)
            axes.barh(names, ratios, color=[COLOURS[0] if r >= 1 else COLOURS[1] for r in ratios])
            axes.axvline(1, color=ink, linewidth=0.8)
            axes.tick_params(labelsize=7)
            axes.set_xscale("log")
            axes.set_xlabel("times as fast as")
            save(drawn, "speedup")
        if lines := growth(run):
            drawn, axes = figure(6, 4)
            for (name, points), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
                axes.loglog(list(points), list(points.values()), marker="o", markersize=3, color=colour, label=name)
            axes.set_xlabel("patches")
            axes.set_ylabel("seconds")
            axes.legend(fontsize=7, frameon=False, labelcolor=ink)
            save(drawn, "growth")
        if stored:
            drawn, axes = figure(8, 0.8 + 0.3 * len(stored))
            for i, (_, held) in enumerate(reversed(stored)):
                mine, *others = held.values()
                axes.plot([mine, *others], [i] * len(held), "o", color=COLOURS[1], markersize=4)
                axes.plot([mine], [i], "o", color=COLOURS[0], markersize=6)
            axes.set_yticks(range(len(stored)), [name for name, _ in reversed(stored)], fontsize=7)
            axes.set_xscale("log")
            axes.set_xlabel("peak MB above what was there: momkd large and blue, its peers small and red")
            save(drawn, "memory")
    return made


def compare(new: Run, old: Run) -> Iterator[tuple[str, str, str, str]]:
    """Name, both times, and what can be said of them, for the benchmarks that both hold on the same device."""
    before = {(r.name, r.where): r for r in old.results}
    for result in new.results:
        other = before.get((result.name, result.where))
        if other is None:
            continue
        noise = max(LEAST, 2 * math.hypot(result.spread, other.spread))
        change = math.log(result.median / other.median)
        verdict = f"no difference beyond noise ({100 * noise:.0f} %)"
        if abs(change) > math.log1p(noise):
            times = math.exp(abs(change))
            verdict = f"{times:.2f} times {'slower' if change > 0 else 'faster'}"
        yield result.name, duration(other.median), duration(result.median), verdict


def shown(head: Sequence[str], body: Iterator[tuple[str, ...]], title: str) -> Table:
    table = Table(*head, title=title, title_justify="left")
    for row in body:
        table.add_row(*map(escape, row))
    return table


def main(
    results: Annotated[list[Path] | None, typer.Argument(help="Files or folders of stored results.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and the plots.")] = None,
    against: Annotated[Path | None, typer.Option(help="An older file, to set side by side with the first.")] = None,
) -> None:
    """The table and plots of stored benchmark results."""
    console = Console()
    runs = [read(path) for path in files(results or [])]
    if against is not None:
        body = list(compare(runs[0], read(against)))
        if not body:
            raise typer.BadParameter(f"{against} and {runs[0].path} hold no benchmark of the same name and device")
        console.print(shown(("benchmark", "before", "now", "verdict"), iter(body), f"{runs[0].path} against {against}"))
        return
    for run in runs:
        table = shown(HEAD, rows(run), f"{run.path}: {run.conditions}")
        console.print(table if table.row_count else f"{run.path} holds no comparison with a peer.")
        if out is not None:
            folder = out if len(runs) == 1 else out / run.path.parent.name / run.path.stem
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.md").write_text(markdown(run), encoding="utf-8")
            drawn = draw(run, folder)
            console.print(f"Wrote {folder / 'report.md'} and {len(drawn)} plots.")


if __name__ == "__main__":
    typer.run(main)

"""What stored results say: `python -m benchmarks.report [RESULTS...] [--out DIR] [--against OTHER]`.

RESULTS are files that `pytest benchmarks/ --benchmark-json=FILE` or `python -m benchmarks.gpu_figures` wrote, or
folders of them; without any, those under benchmarks/results/. Every figure comes from the files. DIR then holds
report.md and the plots, each in light and dark: speed-up over each peer, growth with the number of patches, peak
memory. A peer whose result was wrong is named, not compared. `--against` sets two results side by side and says faster
or slower only beyond what either measurement varied by itself; where a file doesn't store that, 5 % are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.plots import draw, pictures
from benchmarks.stored import LEFT_OUT, SHARE, Result, Run, read, runs

LEAST = 0.05  # of a time: less is never called a difference


def duration(seconds: float) -> str:
    """Seconds with three figures and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


HEAD = ("benchmark", "patches", "backend", "time", "times as fast as", "attained", "peak MB, least of the peers'")
GPU_HEAD = (
    *HEAD[:3],
    "device time",
    "host µs a call",
    "times as fast as, device time",
    "until the end, where it differs",
    "attained",
    "of the plain product",
    HEAD[-1],
)
LEGEND = (
    "Device time is that between two events of the GPU, host µs those until a call returned, the end that of both. "
    "Attained: the time at the rates of a large copy and a large product, as a share of the device time. "
    "Of the plain product: the rate beside that of the matrix product alone. Ops are timed forward and backward."
)


def on_gpu(run: Run) -> bool:
    """Whether the run tells the device's time from that of the host."""
    return any(len(result.times()) > 1 for result in run.results)


def head(run: Run) -> tuple[str, ...]:
    return GPU_HEAD if on_gpu(run) else HEAD


def rows(run: Run) -> Iterator[tuple[str, ...]]:
    """A line of the table for each benchmark that has peers or a floor."""
    gpu = on_gpu(run)
    for result in run.results:
        info, peers, until = result.info, result.peers(), result.peers_until_the_end()
        if not peers and not until and "attained" not in info:
            continue
        patches = info.get("patches", info.get("rows"))
        seconds, host = next(iter(result.times().values())), result.host()
        differing = {name: ratio for name, ratio in until.items() if _differ(ratio, peers.get(name))}
        left_out = [f"{name}: {why}" for name, why in info.get(LEFT_OUT, {}).items()]
        timed = ["" if host is None else f"{host:,.0f}"] if gpu else []
        wall = [_ratios(differing)] if gpu else []
        share = [_percent(info.get(SHARE))] if gpu else []
        yield (
            result.name,
            f"{patches:,}" if patches else "",
            str(info.get("backend", "")),
            duration(seconds),
            *timed,
            "\n".join([*filter(None, [_ratios(peers)]), *left_out]),
            *wall,
            _percent(info.get("attained")),
            *share,
            _memory(result),
        )


def _differ(ratio: float, other: float | None) -> bool:
    return other is None or abs(math.log(ratio / other)) > math.log1p(LEAST)


def _ratios(peers: dict[str, float]) -> str:
    return "\n".join(f"{name} {ratio:.2f}" for name, ratio in peers.items())


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _memory(result: Result) -> str:
    if not result.memory():
        return ""
    mine, *others = result.memory().values()
    return ", ".join(f"{megabytes:.1f}" for megabytes in (mine, *([min(others)] if others else [])))


def markdown(run: Run) -> str:
    """The table, the slopes of growth, and the conditions beneath."""
    lines = ["| " + " | ".join(head(run)) + " |", "|" + "---|" * len(head(run))]
    apart = "; " if on_gpu(run) else ", "
    lines += ["| " + " | ".join(row).replace("\n", apart) + " |" for row in rows(run)]
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
    notes = [line for note in ([LEGEND] if on_gpu(run) else []) + list(run.notes) for line in ("", note)]
    return "\n".join([*lines, *notes, "", f"{run.conditions}.", ""])


def compare(new: Run, old: Run) -> Iterator[tuple[str, str, str, str]]:
    """Name, both times, and what can be said of them, for the benchmarks that both hold on the same device."""
    before = {(r.name, r.where): r for r in old.results}
    for result in new.results:
        other = before.get((result.name, result.where))
        if other is None:
            continue
        noise = max(LEAST, 2 * math.hypot(result.spread, other.spread))
        now, then = result.times(), other.times()
        for kind in (each for each in now if each in then):
            change = math.log(now[kind] / then[kind])
            verdict = f"no difference beyond noise ({100 * noise:.0f} %)"
            if abs(change) > math.log1p(noise):
                verdict = f"{math.exp(abs(change)):.2f} times {'slower' if change > 0 else 'faster'}"
            name = f"{result.name}, {kind}" if kind else result.name
            yield name, duration(then[kind]), duration(now[kind]), verdict


def shown(names: Sequence[str], body: Iterator[tuple[str, ...]], title: str) -> Table:
    table = Table(*names, title=title, title_justify="left")
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
    found = runs(results or [])
    if against is not None:
        body = list(compare(found[0], read(against)))
        if not body:
            raise typer.BadParameter(f"{against} and {found[0].path} hold no benchmark of the same name and device")
        console.print(
            shown(("benchmark", "before", "now", "verdict"), iter(body), f"{found[0].path} against {against}")
        )
        return
    for run in found:
        table = shown(head(run), rows(run), f"{run.path}: {run.conditions}")
        console.print(table if table.row_count else f"{run.path} holds no comparison with a peer.")
        if out is not None:
            folder = out if len(found) == 1 else out.joinpath(*run.folder)
            folder.mkdir(parents=True, exist_ok=True)
            drawn = draw(run, folder)
            (folder / "report.md").write_text(markdown(run) + pictures(drawn), encoding="utf-8")
            console.print(f"Wrote {folder / 'report.md'} and {len(drawn)} plots.")


if __name__ == "__main__":
    typer.run(main)

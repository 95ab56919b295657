"""Plots of stored benchmark results, each in light and dark: speed-up, growth, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.stored import Run

THEMES = {"light": ("white", "#222222"), "dark": ("#0d1117", "#e6edf3")}
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
NAMES = {
    "speedup": "How many times as fast momkd is as each peer",
    "growth": "Time against the number of patches",
    "memory": "Peak memory of momkd and of its peers",
}


def draw(run: Run, out: Path) -> list[Path]:
    """The plots that this run has figures for."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    made = []
    compared = [(r.name, r.peers()) for r in run.results if r.peers()]
    compared += [
        (f"{r.name}, until the end", r.peers_until_the_end())
        for r in run.results
        if r.peers_until_the_end() and not r.peers()
    ]
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
            with rc_context({"svg.hashsalt": name}):  # the same figures make the same file
                drawn.savefig(path, metadata={"Date": None})
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
        if lines := run.growth:
            drawn, axes = figure(6, 4)
            for (name, points), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
                axes.loglog(list(points), list(points.values()), marker="o", markersize=3, color=colour, label=name)
            axes.set_xlabel("patches")
            axes.set_ylabel("seconds")
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=7, frameon=False, labelcolor=ink)
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


def pictures(drawn: list[Path]) -> str:
    """Markdown that shows the plots, each as the reader's theme asks."""
    lines = []
    for name, meaning in NAMES.items():
        if any(path.name == f"{name}-light.svg" for path in drawn):
            lines += [
                "",
                "<picture>",
                f'  <source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">',
                f'  <img src="{name}-light.svg" alt="{meaning}">',
                "</picture>",
            ]
    return "\n".join([*lines, ""]) if lines else ""

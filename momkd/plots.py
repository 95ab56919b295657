"""Figures: ROC curves, intervals, attention maps, training curves, prototypes.

Figures are drawn with matplotlib's objects, never through pyplot: nothing global changes, and no display is needed.
The colours are those of Okabe and Ito, which colour-blind readers can tell apart; line styles repeat the distinction.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve

from momkd.bootstrap import Floats
from momkd.data.atomic import atomic_write
from momkd.errors import InputError
from momkd.metrics import evaluate_predictions
from momkd.predictions import check_predictions
from momkd.ties import tied

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "P", "X", "^", "v")
_FORMATS = (".png", ".pdf", ".svg")
_MAX_CELLS = 4_000_000  # of an image of the patch grid; more are drawn square by square
_GREY = "#666666"


def plot_roc(
    arms: Mapping[str, pd.DataFrame],
    classes: Sequence[str],
    path: Path | str,
    *,
    part: str = "test",
    title: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Path:
    """ROC curve of each arm: the mean over folds, with the folds as thin lines; macro one-vs-rest for C > 2.

    Args:
        arms: {name: predictions}, columns as in `evaluate_predictions`.
        classes: the C class names.
        path: .png, .pdf or .svg.
        part: "test" or "external".
        title: above the figure; by default it names the part.
        bootstrap, seed: of the intervals in the legend.

    Returns:
        The path.

    Raises:
        InputError: an arm's table is wrong, or no fold of it has every class.
    """
    labels = {name: _plain(textwrap.fill(name, 44)) for name in arms}  # long names must not leave the figure
    lines = sum(label.count("\n") + 1 for label in labels.values())
    figure, axes = _figure(5.4, 5.6 + 0.2 * lines)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, zorder=1)
    grid = np.linspace(0, 1, 501)
    for i, (name, predictions) in enumerate(arms.items()):
        curves = _roc_folds(predictions, classes, part, name, grid)  # (folds, 501)
        auc = evaluate_predictions(predictions, classes, bootstrap=bootstrap, seed=seed, source=name)[part]["auc"]
        colour = COLOURS[i % len(COLOURS)]
        for curve in curves if len(curves) > 1 else ():
            axes.plot(grid, curve, color=colour, linewidth=0.8, alpha=0.3, zorder=2)
        label = f"{labels[name]}: {estimate_text(auc)}"
        style = STYLES[i % len(STYLES)]
        axes.plot(grid, curves.mean(axis=0), color=colour, linewidth=2, linestyle=style, label=label, zorder=3)
    kind = "one against the rest, mean over classes" if len(classes) > 2 else f"positive: {_plain(classes[1])}"
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="False positive rate", ylabel=f"True positive rate ({kind})")
    axes.set_title(_plain(textwrap.fill(title or _roc_title(part, classes), 60)), loc="left")
    figure.legend(loc="outside lower center", frameon=False, title="AUC, mean over folds (95 % interval)", fontsize=9)
    return _save(figure, path)


def _roc_title(part: str, classes: Sequence[str]) -> str:
    return f"ROC, {part} slides" + (f", positive class {classes[1]}" if len(classes) == 2 else "")


def plot_attention(
    coords: ArrayLike, attention: ArrayLike, path: Path | str, *, patch_size: float, title: str | None = None
) -> Path:
    """Attention map: every patch a square coloured by the percentile rank of its attention; no patch, no colour.

    Args:
        coords: (N, 2) x, y of the upper left corners in level-0 pixels, on a grid or not; N may be 0.
        attention: (N,) finite.
        path: .png, .pdf or .svg.
        patch_size: side of a square in level-0 pixels.
        title: above the map.

    Returns:
        The path.

    Raises:
        InputError: shapes don't fit, a number is not finite, or patch_size is not positive.
    """
    xy, score = np.asarray(coords, dtype=np.float64), np.asarray(attention, dtype=np.float64)
    if score.ndim != 1 or xy.shape != (score.shape[0], 2):
        raise InputError(f"attention map: expected coords (N, 2) and attention (N,), got {xy.shape} and {score.shape}")
    if not (np.isfinite(xy).all() and np.isfinite(score).all() and math.isfinite(patch_size) and patch_size > 0):
        raise InputError(
            f"attention map: expected finite numbers and a positive patch_size, got patch_size {patch_size}"
        )
    low, high = (xy.min(axis=0), xy.max(axis=0) + patch_size) if len(xy) else (np.zeros(2), np.ones(2))
    width, height = high - low
    longest = max(width, height)
    inches = min(6.0, max(2.8, 0.3 * longest / patch_size)) if len(xy) else 2.8  # a few patches don't fill a page
    figure, axes = _figure(max(2.8, inches * width / longest) + 1.4, max(2.8, inches * height / longest) + 0.7)
    axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[])  # y grows downwards
    axes.spines[:].set_visible(False)
    axes.set_title(_plain(title or "Attention"), loc="left")
    if len(xy) == 0:
        axes.text(0.5, 0.5, "no patches", transform=axes.transAxes, ha="center", va="center", color=_GREY)
    else:
        drawn = _draw_patches(axes, xy, percentile_rank(score), patch_size)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=24, pad=0.03)
        bar.set_label("Attention, percentile rank in the slide")
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    return _save(figure, path)


def plot_training(log: pd.DataFrame, path: Path | str, *, title: str | None = None) -> Path:
    """Training curves: every column whose name has "loss" in it above, every column with "auc" below.

    Args:
        log: a row an epoch: "epoch", losses, "val_auc"; with a column "fold", folds are thin lines under their mean.
        path: .png, .pdf or .svg.
        title: above the figure.

    Returns:
        The path.

    Raises:
        InputError: no column "epoch", no loss or AUC column, or no row.
    """
    columns = [str(c) for c in log.columns]
    losses, aucs = ([c for c in columns if word in c.lower()] for word in ("loss", "auc"))
    if "epoch" not in columns or not losses + aucs or len(log) == 0:
        raise InputError(f"training log: expected rows with 'epoch' and a loss or AUC column, got {', '.join(columns)}")
    panels = [(names, label) for names, label in ((losses, "Loss"), (aucs, "Validation AUC")) if names]
    figure = Figure(figsize=(7.2, 0.6 + 2.7 * len(panels)), dpi=150, layout="constrained")
    figure.suptitle(_plain(title or "Training"), x=0.01, ha="left")
    for i, (names, label) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, i + 1)
        _draw_curves(axes, log, names, label)
        if i == len(panels) - 1:
            axes.set_xlabel("Epoch")
    return _save(figure, path)


def plot_intervals(
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float | None]]]],
    path: Path | str,
    *,
    label: str,
    zero: bool = False,
    title: str | None = None,
) -> Path:
    """Estimates with their intervals, one line an arm, a panel beside a panel.

    Args:
        panels: {panel: {arm: {series: {"estimate", "low", "high"}}}}; the arms of all panels are the lines.
        path: .png, .pdf or .svg.
        label: of the horizontal axis.
        zero: draw the line of no difference.
        title: above the figure.

    Returns:
        The path.

    Raises:
        InputError: no estimate in any panel.
    """
    arms = list(dict.fromkeys(arm for lines in panels.values() for arm in lines))
    series = list(dict.fromkeys(s for lines in panels.values() for found in lines.values() for s in found))
    if not arms or not series:
        raise InputError(f"{path}: expected estimates to plot, got none; wait for a run to finish")
    labels = [_plain(textwrap.fill(arm, 40)) for arm in arms]
    heights = np.array([max(label.count("\n") + 1, len(series) / 1.5) for label in labels])
    at = dict(zip(arms, np.cumsum(heights) - heights / 2, strict=True))  # the middle of each line, from above
    figure = Figure(
        figsize=(3.4 + 2.6 * len(panels), 1.4 + 0.24 * heights.sum()), dpi=150, layout="constrained", facecolor="white"
    )
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for ax, (panel, lines) in zip(axes, panels.items(), strict=True):
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(_plain(panel), fontsize=10)
        ax.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
        if zero:
            ax.axvline(0, color=_GREY, linewidth=1)
        for n, name in enumerate(series):
            shift = 0.5 * (n - (len(series) - 1) / 2)
            for arm, found in lines.items():
                value = found.get(name, {})
                middle, low, high = (value.get(key) for key in ("estimate", "low", "high"))
                if middle is None:
                    continue
                colour, y = COLOURS[n % len(COLOURS)], at[arm] + shift
                if low is not None and high is not None:
                    ax.plot([low, high], [y, y], color=colour, linewidth=1.6)
                ax.plot(middle, y, color=colour, marker=MARKERS[n % len(MARKERS)], markersize=5, linestyle="")
    figure.supxlabel(_plain(label), fontsize=10)
    axes[0].set_yticks([at[arm] for arm in arms], labels)
    axes[0].set_ylim(heights.sum() + 0.2, -0.2)
    if len(series) > 1:
        marks = [
            Line2D([], [], color=COLOURS[n % len(COLOURS)], marker=MARKERS[n % len(MARKERS)], label=_plain(name))
            for n, name in enumerate(series)
        ]
        figure.legend(handles=marks, loc="outside upper right", frameon=False, fontsize=9, ncols=len(series))
    if title:
        figure.suptitle(_plain(title), fontsize=11)
    return _save(figure, path)


def plot_slots(
    usage: ArrayLike, patches: ArrayLike, attention: ArrayLike, classes: Sequence[str], path: Path | str
) -> Path:
    """Bars of every slot, a panel a class: its usage in training, and its shares of patches and attention.

    Args:
        usage: (C, K) of the memory; shown as the share of its class.
        patches, attention: (C, K) shares of all that lies nearest to a slot, each summing to one.
        classes: the C class names.
        path: .png, .pdf or .svg.

    Returns:
        The path.

    Raises:
        InputError: the shapes don't fit.
    """
    mass, *shares = (np.asarray(each, dtype=np.float64) for each in (usage, patches, attention))
    if mass.ndim != 2 or len(mass) != len(classes) or any(share.shape != mass.shape for share in shares):
        came = ", ".join(str(each.shape) for each in (mass, *shares))
        raise InputError(f"slots: expected three arrays (C, K) and C = {len(classes)} classes, got {came}")
    count, slots = mass.shape
    of_class = mass / np.maximum(mass.sum(axis=1, keepdims=True), 1e-30)
    bars = {"Usage in training, share of its class": of_class, "Share of patches": shares[0]}
    bars["Share of attention"] = shares[1]
    figure = Figure(figsize=(7.2, 0.8 + 1.7 * count), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle("Slots of the memory", x=0.01, ha="left")
    panels = figure.subplots(count, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, name, c in zip(panels, classes, range(count), strict=True):
        for i, (label, values) in enumerate(bars.items()):
            at = np.arange(slots) + 0.27 * (i - 1)
            hatch = ("", "///", "")[i]
            look: dict[str, Any] = {"color": COLOURS[i], "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            axes.bar(at, 100 * values[c], width=0.27, label=label if c == 0 else None, **look)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(_plain(textwrap.shorten(f"Class {name}", 70)), loc="left", fontsize=10)
        axes.set_ylabel("%")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
        axes.set_xlim(-0.6, slots - 0.4)
    panels[-1].set_xlabel("Slot")
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=3)
    return _save(figure, path)


def plot_prototypes(
    prototypes: ArrayLike,
    usage: ArrayLike,
    slides: ArrayLike,
    slide_classes: ArrayLike,
    classes: Sequence[str],
    path: Path | str,
) -> Path:
    """Prototypes in the plane of their first two principal components, numbered by slot; slides faint behind them.

    Args:
        prototypes: (C, K, S) unit vectors.
        usage: (C, K), the area of their marks.
        slides: (n, S) unit vectors of slides, n may be 0.
        slide_classes: (n,) the class that colours each slide, −1 for none.
        classes: the C class names.
        path: .png, .pdf or .svg.

    Returns:
        The path.

    Raises:
        InputError: the shapes don't fit.
    """
    vectors, mass = np.asarray(prototypes, np.float64), np.asarray(usage, np.float64)
    others, colours = np.asarray(slides, np.float64), np.asarray(slide_classes, np.int64)
    if vectors.ndim != 3 or mass.shape != vectors.shape[:2] or len(vectors) != len(classes):
        raise InputError(f"prototypes: expected (C, K, S) and usage (C, K), got {vectors.shape} and {mass.shape}")
    if others.shape != (len(colours), vectors.shape[2]):
        raise InputError(f"prototypes: expected slides (n, {vectors.shape[2]}), got {others.shape}")
    flat = np.pad(vectors.reshape(-1, vectors.shape[2]), ((0, 0), (0, max(0, 2 - vectors.shape[2]))))
    with np.errstate(invalid="ignore"):  # of no variance at all there are no shares
        pca = PCA(2, svd_solver="full").fit(flat)
    points = pca.transform(flat).reshape(*mass.shape, 2)
    figure, axes = _figure(6.4, 5.4)
    around = pca.transform(np.pad(others, ((0, 0), (0, flat.shape[1] - others.shape[1])))) if len(others) else others
    for c in np.unique(colours):
        colour = _GREY if c < 0 else COLOURS[c % len(COLOURS)]
        here = around[colours == c]
        axes.scatter(here[:, 0], here[:, 1], s=14, color=colour, alpha=0.25, linewidths=0, zorder=1)
    area = 110 + 500 * mass / max(mass.max(), 1e-30)
    for c, name in enumerate(classes):
        look: dict[str, Any] = {
            "color": COLOURS[c % len(COLOURS)],
            "marker": MARKERS[c % len(MARKERS)],
            "edgecolors": "white",
        }
        axes.scatter(points[c, :, 0], points[c, :, 1], s=area[c], linewidths=0.8, zorder=2, **look)
        axes.scatter([], [], s=110, label=_plain(textwrap.shorten(str(name), 40)), **look)
        for k, (x, y) in enumerate(points[c]):
            axes.text(x, y, str(k), color="white", fontsize=7, ha="center", va="center", zorder=3, clip_on=True)
    shares = np.nan_to_num(pca.explained_variance_ratio_)
    axes.set(xlabel=f"Component 1 ({shares[0]:.0%} of variance)", ylabel=f"Component 2 ({shares[1]:.0%} of variance)")
    axes.set_title("Prototypes and slides", loc="left")
    axes.scatter([], [], s=14, color=_GREY, alpha=0.6, linewidths=0, label="a slide, by class")
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=3)
    return _save(figure, path)


def percentile_rank(values: ArrayLike) -> Floats:
    """(N,) ranks in 0..1: the share of values below each, half of its equals counted; the only one has 0.5."""
    ranks: Floats = np.asarray(rankdata(tied(values), method="average"), dtype=np.float64)
    return (ranks - 0.5) / max(1, len(ranks))


def estimate_text(value: Mapping[str, float | None] | None, digits: int = 3, sign: bool = False) -> str:
    """ "0.912 (0.881–0.943)", signed "+0.021 (-0.004 to +0.046)"; a dash for what is undefined.

    Args:
        value: {"estimate" or "difference", "low", "high"}, or None.
        digits: after the point.
        sign: show it, as differences need.
    """
    middle = None if value is None else value.get("estimate", value.get("difference"))
    if value is None or middle is None:
        return "–"
    form, between = (f"+.{digits}f", " to ") if sign else (f".{digits}f", "–")
    low, high = value.get("low"), value.get("high")
    return f"{middle:{form}}" + ("" if low is None or high is None else f" ({low:{form}}{between}{high:{form}})")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path | str) -> Path:
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"{path}: expected a figure named .png, .pdf or .svg, got {path.suffix or 'no suffix'}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], bbox_inches="tight", pad_inches=0.1)
    return path


def _plain(text: str) -> str:
    """Matplotlib reads $...$ as mathematics; a name is just a name."""
    return str(text).replace("$", r"\$")


def _roc_folds(predictions: pd.DataFrame, classes: Sequence[str], part: str, name: str, grid: Floats) -> Floats:
    """True positive rate on the grid for each fold that has every class: (folds, grid)."""
    table = check_predictions(predictions, classes, name)
    table = table[(table["part"] == part) & (table["label"] >= 0)]
    scored = range(1, 2) if len(classes) == 2 else range(len(classes))
    curves = []
    for _, rows in table.groupby("fold"):
        if rows["label"].nunique() < len(classes):
            continue
        scores = {c: tied(rows[f"prob_{classes[c]}"]) for c in scored}
        each = [roc_curve(rows["label"] == c, scores[c], drop_intermediate=False) for c in scored]
        curve = np.mean([np.interp(grid, fpr, tpr) for fpr, tpr, _ in each], axis=0)
        curves.append(np.concatenate([[0.0], curve[1:]]))  # interp takes the top of the step at 0
    if not curves:
        raise InputError(f"{name}: expected a fold whose {part} slides have every class, got none; no ROC curve exists")
    return np.stack(curves)


def _draw_patches(axes: Axes, xy: Floats, rank: Floats, patch_size: float) -> Any:
    cells = np.rint((xy - xy.min(axis=0)) / patch_size).astype(np.int64)  # (N, 2)
    on_grid = np.abs(xy - xy.min(axis=0) - cells * patch_size).max() < 1e-3 * patch_size
    columns, rows = (cells.max(axis=0) + 1).tolist()
    look: dict[str, Any] = {"cmap": "viridis", "clim": (0, 1)}
    if on_grid and columns * rows <= _MAX_CELLS and len(np.unique(cells, axis=0)) == len(cells):
        image = np.full((rows, columns), np.nan)  # NaN is left white
        image[cells[:, 1], cells[:, 0]] = rank
        (left, top), (right, bottom) = xy.min(axis=0), xy.max(axis=0) + patch_size
        return axes.imshow(image, extent=(left, right, bottom, top), interpolation="nearest", **look)
    order = np.argsort(rank, kind="stable")  # where squares overlap, the highest attention is on top
    side = max(patch_size, np.ptp(xy, axis=0).max() / 900)  # a nucleus is never less than a pixel
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * side
    squares: Any = xy[order, None, :] + corners  # (N, 4, 2)
    return axes.add_collection(PolyCollection(squares, array=rank[order], linewidths=0, rasterized=True, **look))


def _draw_curves(axes: Axes, log: pd.DataFrame, names: Sequence[str], label: str) -> None:
    for i, name in enumerate(names):
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        if "fold" in log.columns and log["fold"].nunique() > 1:
            for _, rows in log.groupby("fold"):
                axes.plot(rows["epoch"], rows[name], color=colour, linewidth=0.8, alpha=0.3)
        mean = log.groupby("epoch")[name].mean()
        mark = "o" if len(mean) == 1 else ""  # a line through one epoch is invisible
        axes.plot(mean.index, mean, color=colour, linestyle=style, marker=mark, linewidth=1.8, label=_plain(name))
    values = log[list(names)].to_numpy(np.float64)
    values = values[np.isfinite(values)]
    if label == "Loss" and values.size and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log["epoch"].nunique() == 1:
        axes.set_xlim(log["epoch"].iloc[0] - 1, log["epoch"].iloc[0] + 1)
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)

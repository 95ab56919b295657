"""Tables for the terminal, and a small report of an experiment: report.md, and index.html in one file."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from rich import box
from rich.table import Table
from rich.text import Text

from momkd import page
from momkd.bootstrap import METRICS
from momkd.data.atomic import atomic_write, write_text
from momkd.errors import InputError
from momkd.plots import estimate_text, plot_attention, plot_roc, plot_training

__all__ = [
    "ReportFigure",
    "comparison_table",
    "estimate_text",
    "markdown_table",
    "markdown_text",
    "metrics_table",
    "plot_attention",
    "plot_roc",
    "plot_training",
    "write_report",
]

_NAMES = dict(zip(METRICS, ("AUC", "AUPRC", "F1", "Balanced accuracy", "Accuracy"), strict=True))
_PARTS = {
    "test": "Test, mean over folds",
    "pooled": "Test, pooled",
    "external": "External, mean over folds",
    "external_ensemble": "External, ensemble",
}
_FIGURES = (".png", ".svg")


class ReportFigure(NamedTuple):
    """A figure of the report: its .png or .svg, the line beneath it, and what it shows for those who don't see it."""

    path: Path
    caption: str
    alt: str


def metrics_table(metrics: Mapping[str, Any], title: str) -> Table:
    """What `evaluate_predictions` returned, as a table: metrics down, parts across, then the AUC of every fold.

    Where patients have several slides, there are two such blocks, by slide and by patient.

    Args:
        metrics: the dict of metrics.json.
        title: above the table.
    """
    parts = [part for part in _PARTS if part in metrics]
    table = Table(title=Text(title), title_justify="left", caption=_caption(metrics), caption_justify="left")
    table.box, table.show_edge, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, False, True
    table.add_column("Metric", no_wrap=True)
    for part in parts:
        table.add_column(_PARTS[part], min_width=13)  # an interval; four parts fit 80 columns
    levels = {"By slide": metrics, "By patient": metrics["by_patient"]} if _by_patient(metrics) else {"": metrics}
    for level, values in levels.items():
        if level:
            table.add_row(Text(level, "bold"))
        for metric, name in _NAMES.items():
            table.add_row(name, *(estimate_text(values.get(part, {}).get(metric)) for part in parts))
        table.add_section()
        keys = {"test": "folds", "external": "external_folds"}
        folds = {part: {entry["fold"]: entry for entry in values.get(key, [])} for part, key in keys.items()}
        for fold in sorted(folds["test"].keys() | folds["external"].keys()):
            table.add_row(f"AUC, fold {fold}", *(_fold_auc(folds.get(part, {}), fold) for part in parts))
        table.add_section()
    return table


def _by_patient(metrics: Mapping[str, Any]) -> bool:
    """Whether metrics by patient say something that those by slide do not."""
    return not metrics.get("by_patient", {"one_slide_each": True})["one_slide_each"]


def _facts(metrics: Mapping[str, Any]) -> list[str]:
    """What the numbers are of: the positive class, and the patients."""
    classes, told = metrics.get("classes", []), []
    if len(classes) == 2:
        told.append(f"Positive class: {classes[1]}.")
    if _by_patient(metrics):
        told.append(f"By patient: {metrics['by_patient']['rule']} of the probabilities of its slides.")
    elif "by_patient" in metrics:
        told.append("Every patient has one slide: metrics by slide and by patient are the same.")
    return told


def comparison_table(
    metrics: Mapping[str, Mapping[str, Any]],
    differences: Mapping[str, Mapping[str, float | None]] | None = None,
    *,
    baseline: str | None = None,
    title: str | None = None,
) -> Table:
    """Arms side by side.

    Args:
        metrics: {arm: the dict of metrics.json}.
        differences: {arm: `paired_difference` of its test AUC against the baseline}.
        baseline: name of the arm that the others are compared with; by default the first.
        title: above the table.
    """
    head, body = _comparison(metrics, differences or {}, baseline)
    table = Table(title=None if title is None else Text(title), title_justify="left", box=box.SIMPLE)
    table.add_column(head[0], overflow="fold")
    body = [[row[0], *(cell.replace(" (", "\n").removesuffix(")") for cell in row[1:])] for row in body]
    for i, name in enumerate(head[1:], start=1):  # the interval stands beneath the estimate and is never broken
        lines = [line for row in body for line in row[i].split("\n")]
        table.add_column(Text(name), min_width=max(map(len, lines), default=0))
    for row in body:
        table.add_row(*map(Text, row))
    return table


def write_report(
    folder: Path | str,
    *,
    title: str,
    comparison: Mapping[str, Mapping[str, Any]],
    note: str | None = None,
    differences: Mapping[str, Mapping[str, float | None]] | None = None,
    baseline: str | None = None,
    paragraphs: Sequence[str] = (),
    figures: Sequence[ReportFigure] = (),
) -> Path:
    """Writes report.md and index.html, which loads nothing from anywhere: images are inside it.

    Args:
        folder: made if it is missing; figures outside it are copied into it, for report.md.
        title: of the report.
        comparison: {arm: the dict of metrics.json}.
        note: what a reader must know first, such as that the data are simulated; stands under the title.
        differences, baseline: as in `comparison_table`.
        paragraphs: plain text between the note and the table.
        figures: shown in this order.

    Returns:
        The path of index.html.

    Raises:
        InputError: a figure is missing or is neither .png nor .svg.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        if figure.path.suffix.lower() not in _FIGURES or not figure.path.is_file():
            raise InputError(f"{figure.path}: expected a .png or .svg figure for the report, got none; plot it first")
    head, body = _comparison(comparison, differences or {}, baseline)
    remarks = [f"{arm}: {remark}" for arm, metrics in comparison.items() for remark in metrics.get("notes", [])]
    footnote = " ".join(filter(None, (_common_facts(comparison), _footnote(comparison))))
    parts = _Content(title, note, list(paragraphs), head, body, footnote, remarks)
    write_text(
        folder / "report.md",
        _markdown(parts, [(_beside(f.path, folder, i), f) for i, f in enumerate(figures, start=1)]),
    )
    write_text(folder / "index.html", _html(parts, figures))
    return folder / "index.html"


class _Content(NamedTuple):
    title: str
    note: str | None
    paragraphs: list[str]
    head: list[str]
    body: list[list[str]]
    footnote: str
    remarks: list[str]


def _fold_auc(folds: Mapping[int, dict[str, Any]], fold: int) -> str:
    if fold not in folds:
        return ""
    entry = folds[fold]
    return estimate_text({"estimate": entry["auc"], "low": entry["auc_low"], "high": entry["auc_high"]})


def _caption(metrics: Mapping[str, Any]) -> Text:
    unlabelled = {part: count for part, count in metrics.get("unlabelled", {}).items() if count}
    lines = [" ".join(_facts(metrics)), _footnote({"": metrics}), *metrics.get("notes", [])]
    lines += [f"{count} {part} rows have no label and are left out" for part, count in unlabelled.items()]
    return Text("\n".join(line for line in lines if line))


def _footnote(comparison: Mapping[str, Mapping[str, Any]]) -> str:
    """How the intervals came about, where all arms agree on it."""
    told = {(b["samples"], b["level"]) for m in comparison.values() if (b := m.get("bootstrap"))}
    if len(told) != 1:
        return ""
    samples, level = told.pop()
    return f"In brackets: {100 * level:g} % intervals from {samples} resamples of patients." if samples else ""


def _common_facts(comparison: Mapping[str, Mapping[str, Any]]) -> str:
    """The facts that all arms share."""
    lists = [_facts(metrics) for metrics in comparison.values()]
    return " ".join(fact for fact in (lists[0] if lists else []) if all(fact in facts for facts in lists))


def _comparison(
    metrics: Mapping[str, Mapping[str, Any]],
    differences: Mapping[str, Mapping[str, float | None]],
    baseline: str | None,
) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows; columns that no arm fills are left out. Differences are by slide."""
    if unknown := [name for name in (*differences, *([baseline] if baseline else [])) if name not in metrics]:
        raise InputError(f"comparison: expected one of {', '.join(metrics)}, got {unknown[0]!r}")
    columns = [("test", "auc", "Test AUC")]
    if differences:
        columns.append(("difference", "auc", f"AUC minus that of {baseline or next(iter(metrics))}"))
    columns += [("external", "auc", "External AUC"), ("test", "auprc", "Test AUPRC")]
    lines: list[tuple[str, Mapping[str, Any], Mapping[str, float | None] | None]] = []  # name, metrics, difference
    for arm, values in metrics.items():
        difference = differences.get(arm)
        if _by_patient(values):
            lines += [(f"{arm}, by slide", values, difference), (f"{arm}, by patient", values["by_patient"], None)]
        else:
            lines.append((arm, values, difference))
    head, cells = ["Arm"], [[name] for name, _, _ in lines]
    for part, metric, name in columns:
        if part == "difference":
            texts = [estimate_text(difference, sign=True) for _, _, difference in lines]
        elif any(part in values for _, values, _ in lines):
            texts = [estimate_text(values.get(part, {}).get(metric)) for _, values, _ in lines]
        else:
            continue
        head.append(name)
        cells = [[*row, text] for row, text in zip(cells, texts, strict=True)]
    return head, cells


def _beside(path: Path, folder: Path, number: int) -> str:
    """The figure's path relative to the report; one from elsewhere is copied, numbered because names may repeat."""
    path, folder = path.resolve(), folder.resolve()
    if path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    name = f"figure_{number}_{path.name}"
    with atomic_write(folder / name) as temporary:
        shutil.copyfile(path, temporary)
    return name


def _markdown(content: _Content, figures: Sequence[tuple[str, ReportFigure]]) -> str:
    blocks = [f"# {markdown_text(content.title)}"]
    blocks += [f"> **Note:** {markdown_text(content.note)}"] if content.note else []
    blocks += [markdown_text(text) for text in content.paragraphs]
    blocks.append(markdown_table(content.head, content.body))
    blocks += [markdown_text(content.footnote)] if content.footnote else []
    blocks += ["\n".join(f"- {markdown_text(remark)}" for remark in content.remarks)] if content.remarks else []
    blocks += [
        f"![{markdown_text(figure.alt)}]({quote(path)})\n\n{markdown_text(figure.caption)}" for path, figure in figures
    ]
    return "\n\n".join(blocks) + "\n"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose cells are text."""
    rows = [list(map(markdown_text, row)) for row in (head, *body)]
    rows.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _html(content: _Content, figures: Sequence[ReportFigure]) -> str:
    body = [page.note(content.note)] if content.note else []
    body += [page.paragraph(text) for text in content.paragraphs]
    body.append(page.table(content.head, content.body, content.footnote))
    body += [page.items(content.remarks)] if content.remarks else []
    body += [page.figure(*figure) for figure in figures]
    return page.page(content.title, body)

"""The tables and plots of a study: results.csv, report.md and index.html, which loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from momkd import page
from momkd.data.atomic import write_csv, write_text
from momkd.plots import estimate_text, plot_intervals
from momkd.report import markdown_table, markdown_text
from momkd.study.run import Study

_PARTS = {"test": "Internal test (cross-validation)", "external": "External cohort"}


_STYLE = "td { white-space: nowrap; }\nh2 { font-size: 1.15rem; margin-top: 2.5rem; }\n"


class _Section(NamedTuple):
    """A table of one task."""

    title: str
    head: list[str]
    body: list[list[str]]


def write_study_report(study: Study, results: pd.DataFrame) -> Path:
    """Writes results.csv, report.md, index.html and their figures into the study's folder; returns index.html.

    Args:
        study: as it was run.
        results: of `study_results`.
    """
    write_csv(study.out / "results.csv", results)
    figures = [
        (
            plot_intervals(_panels(results, "auc"), study.out / "auc.png", label="AUC"),
            "AUC of every arm: mean over folds and seeds, with 95 % intervals over patients.",
        )
    ]
    if "difference" in results and results["difference"].notna().any():
        name = results.loc[results["difference"].isna(), "title"].iloc[0]
        text = f"AUC of “{name}” minus that of every other arm, on the same patients, with 95 % intervals."
        panels = _panels(results[results["difference"].notna()], "difference")
        label = "Difference in AUC (right: the reference is better)"
        figures.append((plot_intervals(panels, study.out / "difference.png", label=label, zero=True), text))
    sections, told = _sections(results), _conditions(study, results)
    title = "Study of distillation arms"
    blocks = [f"# {title}", f"> **Note:** {markdown_text(study.cohort.note)}", *map(markdown_text, told)]
    blocks += [f"![{markdown_text(text)}]({path.name})\n\n{markdown_text(text)}" for path, text in figures]
    for section in sections:
        blocks += [f"## {markdown_text(section.title)}", markdown_table(section.head, section.body)]
    write_text(study.out / "report.md", "\n\n".join(blocks) + "\n")
    body = [page.note(study.cohort.note), *map(page.paragraph, told)]
    body += [page.figure(path, text, text) for path, text in figures]
    for section in sections:
        body += [f"<h2>{page.text(section.title)}</h2>", page.table(section.head, section.body)]
    write_text(study.out / "index.html", page.page(title, body, style=_STYLE))
    return study.out / "index.html"


def study_table(results: pd.DataFrame, task: str) -> Table:
    """The internal test of one task for the terminal; the interval stands beneath its estimate."""
    section = next(s for s in _sections(results[results["task"] == task]))
    table = Table(title=Text(section.title), title_justify="left", box=box.SIMPLE)
    table.add_column(section.head[0], overflow="fold", max_width=34)
    shown = range(1, min(4, len(section.head)))
    cells = [[row[i].replace(" (", "\n(") for i in shown] for row in section.body]
    for n, i in enumerate(shown):
        width = max(len(line) for row in cells for line in row[n].split("\n"))
        table.add_column(Text(section.head[i]), min_width=width)
    for row, own in zip(section.body, cells, strict=True):
        table.add_row(*map(Text, (row[0], *own)))
    return table


def _conditions(study: Study, results: pd.DataFrame) -> list[str]:
    seeds, settings = int(results["seeds"].max()), ", ".join(study.settings)
    splits = "as given" if study.cohort.splits else "made by case, stratified by the task, anew for each seed"
    told = [
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}; splits {splits}. Every arm is trained by the same loop"
        + (f", with {settings}." if settings else ", with the defaults of its preset."),
        "In brackets: 95 % intervals from resampling patients, jointly for all folds and seeds. ECE and Brier score "
        "are of the probabilities as they come from class-balanced training, not recalibrated.",
    ]
    told.append(_unit(results))
    if study.cohort.omics is None:
        told.append("There is no expression: every arm learns from slides alone.")
    if study.cohort.external_labels is not None:
        told.append("The external cohort is predicted from slides alone; no arm saw any of it.")
    return told


def _unit(results: pd.DataFrame) -> str:
    """What is scored: patients, and how their slides are joined."""
    rules = results["rule"].dropna().unique().tolist() if "rule" in results else []
    if not rules:
        return "Metrics are by patient; every patient has one slide."
    return f"Metrics are by patient ({rules[0]} of the probabilities of its slides), but for the AUC by slide."


def _sections(results: pd.DataFrame) -> list[_Section]:
    sections = []
    for (task, part), rows in results.groupby(["task", "part"], sort=False):
        compared = "difference" in rows and rows["difference"].notna().any()
        head = ["Arm", "AUC", *(["Reference minus arm"] if compared else []), "AUPRC", "ECE", "Brier"]
        attended = "attention_auc" in rows and rows["attention_auc"].notna().any()
        several = "auc_by_slide" in rows and rows["auc_by_slide"].notna().any()
        head += ["AUC by slide"] if several else []
        head += ["Attention AUC"] if attended else []
        body = []
        for row in rows.to_dict("records"):
            cells = [str(row["title"]), estimate_text(_value(row, "auc"))]
            if compared:
                told = estimate_text(_value(row, "difference"), sign=True)
                cells.append("reference" if pd.isna(row["difference"]) else told)  # it has none to itself
            cells += [estimate_text(_value(row, "auprc")), f"{row['ece']:.3f}", f"{row['brier']:.3f}"]
            if several:
                cells.append(estimate_text(_value(row, "auc_by_slide")))
            if attended:
                cells.append("–" if pd.isna(row["attention_auc"]) else f"{row['attention_auc']:.3f}")
            body.append(cells)
        positive = rows["positive"].iloc[0]
        named = "" if pd.isna(positive) else f", positive class {positive}"
        title = f"{task}: {_PARTS[str(part)]}, {int(rows['patients'].max())} patients{named}"
        sections.append(_Section(title, head, body))
    return sorted(sections, key=lambda s: _PARTS["external"] in s.title)


def _panels(results: pd.DataFrame, metric: str) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    panels: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {}
    for row in results.to_dict("records"):
        lines = panels.setdefault(str(row["task"]), {})
        lines.setdefault(str(row["title"]), {})[_PARTS[str(row["part"])]] = _value(row, metric)
    return panels


def _value(row: dict[Any, Any], metric: str) -> dict[str, float | None]:
    """Estimate and interval of a row of the results."""
    keys: Sequence[tuple[str, str]] = (("estimate", metric), ("low", f"{metric}_low"), ("high", f"{metric}_high"))
    return {key: None if pd.isna(row.get(name)) else float(row[name]) for key, name in keys}

"""Tables, figures and the written report."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps, pyplot
from matplotlib.image import imread
from rich.console import Console
from rich.table import Table

from momkd.errors import InputError
from momkd.metrics import evaluate_predictions, paired_difference
from momkd.plots import percentile_rank
from momkd.report import (
    ReportFigure,
    comparison_table,
    estimate_text,
    metrics_table,
    plot_attention,
    plot_roc,
    plot_training,
    write_report,
)

CLASSES = ("neg", "pos")
YELLOW, PURPLE, TEAL = (0.99, 0.91, 0.14), (0.27, 0.0, 0.33), (0.13, 0.57, 0.55)  # viridis at 1, 0 and 0.5
BLUE = (0.0, 0x72 / 255, 0xB2 / 255)


def predictions(gap: float = 2.0, seed: int = 0, folds: int = 2, n: int = 20) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for fold in range(folds):
        for part in ("val", "test"):
            for i in range(n):
                p = 1 / (1 + np.exp(-(rng.normal() + gap * (i % 2 - 0.5))))
                rows.append((f"s{fold}{part}{i}", f"c{fold}{part}{i}", i % 2, fold, part, 1 - p, p))
    return pd.DataFrame(rows, columns=["slide_id", "case_id", "label", "fold", "part", "prob_neg", "prob_pos"])


def text_of(table: Table, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def share(path: Path, colour: tuple[float, float, float], tolerance: float = 0.06) -> float:
    """Share of pixels that have the colour."""
    pixels = imread(path)[..., :3]
    return float((np.abs(pixels - colour).max(axis=2) < tolerance).mean())


# Tables


def test_estimate_text() -> None:
    assert estimate_text({"estimate": 0.91234, "low": 0.8, "high": 0.95}) == "0.912 (0.800–0.950)"
    assert estimate_text({"estimate": 0.5, "low": None, "high": None}, digits=2) == "0.50"
    assert estimate_text({"difference": 0.02, "low": -0.01, "high": 0.05}, sign=True) == "+0.020 (-0.010 to +0.050)"
    assert estimate_text({"estimate": None, "low": None, "high": None}) == estimate_text(None) == "–"
    assert estimate_text({"estimate": 0.0, "low": 0.0, "high": 0.0}) == "0.000 (0.000–0.000)"  # zero is a number


def test_metrics_table_shows_every_number_and_note() -> None:
    table = predictions()
    table.loc[(table["fold"] == 1) & (table["part"] == "test"), "label"] = 0
    metrics = evaluate_predictions(table, CLASSES, bootstrap=50)
    text = text_of(metrics_table(metrics, "Run [red]7[/red]"))
    assert "Run [red]7[/red]" in text  # a title is text, not markup
    for metric in ("auc", "auprc", "f1", "balanced_accuracy", "accuracy"):
        assert estimate_text(metrics["test"][metric]) in text
        assert estimate_text(metrics["pooled"][metric]) in text
    assert re.search(r"AUC, fold 0 .*\d\.\d{3} \(", text)
    assert re.search(r"AUC, fold 1 +– ", text)
    assert "no slide of class 'pos'" in text
    assert "95 % intervals from 50 resamples of patients" in text
    assert "External" not in text


def test_comparison_table_names_the_baseline_and_shows_differences() -> None:
    a, b = predictions(gap=3), predictions(gap=1)
    metrics = {name: evaluate_predictions(t, CLASSES, bootstrap=50) for name, t in (("[b]ours[/b]", a), ("abmil", b))}
    difference = paired_difference(a, b, CLASSES, bootstrap=50)
    text = text_of(comparison_table(metrics, {"[b]ours[/b]": difference}, baseline="abmil"), width=160)
    assert "[b]ours[/b]" in text
    assert "AUC minus that of abmil" in text
    assert f"{difference['difference']:+.3f}" in text
    assert f"{difference['low']:+.3f} to {difference['high']:+.3f}" in text
    assert f"{metrics['abmil']['test']['auc']['estimate']:.3f}" in text
    assert "minus" not in text_of(comparison_table(metrics))
    with pytest.raises(InputError, match=r"expected one of \[b\]ours\[/b\], abmil, got 'other'"):
        comparison_table(metrics, {"other": difference})


# Figures


def test_percentile_rank_by_hand() -> None:
    assert percentile_rank([3.0, 1.0, 2.0, 2.0]) == pytest.approx([7 / 8, 1 / 8, 1 / 2, 1 / 2])
    assert percentile_rank([5.0]) == pytest.approx([0.5])
    assert percentile_rank([]).shape == (0,)


def test_attention_map_colours_the_grid_by_rank(tmp_path: Path) -> None:
    x, y = np.meshgrid(np.arange(20), np.arange(10))
    coords = np.stack([x.ravel(), y.ravel()], axis=1) * 256 + 1000
    keep = (x.ravel() < 10) | (y.ravel() < 5)  # nothing lower right
    attention = np.where(x.ravel() < 10, 1e-6 * y.ravel(), 5 + y.ravel())  # rank counts, not size
    path = plot_attention(coords[keep], attention[keep], tmp_path / "map.png", patch_size=256, title="slide")
    image = imread(path)[..., :3]
    height, width = image.shape[:2]
    assert 500 < width < 1600
    assert 300 < height < width
    coloured = np.ptp(image, axis=2) > 0.15
    rows = np.flatnonzero(coloured[:, : int(0.3 * width)].any(axis=1))
    top, bottom = rows[0], rows[-1]
    columns = np.flatnonzero(coloured[top + 5])
    left = columns[0]
    cell = (bottom + 1 - top) / 10

    def at(column: int, row: int) -> np.ndarray:
        return image[int(top + (row + 0.5) * cell), int(left + (column + 0.5) * cell)]

    assert at(15, 7) == pytest.approx((1, 1, 1))  # no patch, no colour
    assert at(0, 0) == pytest.approx(PURPLE, abs=0.12)  # y grows downwards: the lowest attention is at the top left
    assert at(15, 4) == pytest.approx(YELLOW, abs=0.12)
    assert np.abs(at(15, 4) - at(5, 4)).max() > 0.3


def test_attention_map_of_scattered_nuclei_has_the_same_colours(tmp_path: Path) -> None:
    coords = np.array([[0.0, 0.0], [137.5, 61.0], [303.0, 17.0]])
    path = plot_attention(coords, [0.1, 0.2, 0.3], tmp_path / "map.png", patch_size=40)
    for rank in (1 / 6, 1 / 2, 5 / 6):
        assert share(path, colormaps["viridis"](rank)[:3], 0.01) > 0.003
    assert share(path, (1, 1, 1)) > 0.5


def test_overlapping_squares_show_the_highest_attention(tmp_path: Path) -> None:
    coords = np.zeros((50, 2))
    path = plot_attention(coords, np.arange(50)[::-1], tmp_path / "map.png", patch_size=10)
    assert share(path, YELLOW, 0.05) > 0.3


def test_attention_map_of_one_patch_and_of_none(tmp_path: Path) -> None:
    one = plot_attention([[512, 256]], [0.3], tmp_path / "one.png", patch_size=256)
    assert share(one, TEAL) > 0.3
    none = plot_attention(np.zeros((0, 2)), [], tmp_path / "none.png", patch_size=256)
    assert share(none, (1, 1, 1)) > 0.9
    assert 0 < (imread(none)[..., :3] < 0.6).all(axis=2).mean() < 0.1  # the words "no patches" and the title


@pytest.mark.parametrize(
    ("coords", "attention", "patch_size"),
    [
        ([[0, 0]], [0.1, 0.2], 10),
        ([[0, 0, 0]], [0.1], 10),
        ([[0, 0]], [[0.1]], 10),
        ([[0, 0]], [np.nan], 10),
        ([[np.inf, 0]], [0.1], 10),
        ([[0, 0]], [0.1], 0),
    ],
)
def test_attention_map_refuses(coords: object, attention: object, patch_size: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="attention map: expected"):
        plot_attention(coords, attention, tmp_path / "map.png", patch_size=patch_size)
    assert not list(tmp_path.iterdir())


def test_roc_draws_every_arm(tmp_path: Path) -> None:
    arms = {"a $1": predictions(2), "b_^{": predictions(1, seed=1)}  # names that are no mathematics
    path = plot_roc(arms, CLASSES, tmp_path / "roc.png", bootstrap=50)
    image = imread(path)
    assert 600 < image.shape[1] < 1000
    assert share(path, BLUE) > 0.003
    assert share(path, (0xD5 / 255, 0x5E / 255, 0)) > 0.002
    assert plot_roc(arms, CLASSES, tmp_path / "roc.svg", bootstrap=0).read_text().startswith("<?xml")


def test_roc_of_a_perfect_arm_hugs_the_corner(tmp_path: Path) -> None:
    table = predictions()
    table["prob_pos"] = np.where(table["label"] == 1, 0.9, 0.1)
    table["prob_neg"] = 1 - table["prob_pos"]
    path = plot_roc({"perfect": table}, CLASSES, tmp_path / "roc.png", bootstrap=0)
    blue = np.abs(imread(path)[..., :3] - BLUE).max(axis=2) < 0.06
    rows, columns = blue.sum(axis=1), blue.sum(axis=0)
    assert rows.max() > 0.7 * blue.shape[1]  # a line along the top
    assert columns.max() > 0.55 * blue.shape[0]  # and one up the left side
    assert np.argmax(rows) < 0.15 * blue.shape[0]
    assert np.argmax(columns) < 0.2 * blue.shape[1]


def test_roc_needs_both_classes_and_a_known_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="arm: expected a fold whose test slides have every class"):
        plot_roc({"arm": predictions().assign(label=1)}, CLASSES, tmp_path / "roc.png")
    with pytest.raises(InputError, match=r"roc.bmp: expected a figure named .png, .pdf or .svg"):
        plot_roc({"arm": predictions()}, CLASSES, tmp_path / "roc.bmp", bootstrap=0)
    assert not list(tmp_path.iterdir())


def test_training_curves(tmp_path: Path) -> None:
    epochs = np.arange(10)
    log = pd.DataFrame({"epoch": epochs, "train_loss": np.exp(-epochs / 3.0), "val_loss": 1.0, "val_auc": 0.9})
    path = plot_training(log, tmp_path / "log.png")
    assert share(path, BLUE) > 0.001
    both = plot_training(pd.concat([log.assign(fold=f) for f in (0, 1)]), tmp_path / "folds.png", title="t")
    assert share(both, BLUE) > 0.001
    assert imread(plot_training(log[["epoch", "val_auc"]], tmp_path / "auc.png")).shape[0] < imread(path).shape[0]
    plot_training(log.iloc[:1].assign(val_auc=np.nan), tmp_path / "one.png")  # fails where a warning is an error
    for wrong in (log.drop(columns="epoch"), log[["epoch"]], log.iloc[:0]):
        with pytest.raises(InputError, match="training log: expected rows"):
            plot_training(wrong, tmp_path / "no.png")


def test_figures_leave_nothing_global(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_attention([[0, 0]], [1.0], tmp_path / "map.png", patch_size=1)
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]  # no temporary file is left


# Report

HOSTILE = '<script>alert("1")</script> & | *MoMKD* $x$'


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    metrics = {
        name: evaluate_predictions(predictions(gap), CLASSES, bootstrap=20) for name, gap in (("<b>", 3), ("a|b", 1))
    }
    metrics["<b>"]["notes"].append("fold <0>")
    figure = plot_training(pd.DataFrame({"epoch": [0, 1], "loss": [2.0, 1.0]}), tmp_path / "a (1).png")
    difference = {"a|b": paired_difference(predictions(1), predictions(1), CLASSES, bootstrap=20)}
    return write_report(
        tmp_path / "new" / "report",
        title=HOSTILE,
        note="These data are <simulated>.",
        comparison=metrics,
        differences=difference,
        paragraphs=["Two arms & one figure."],
        figures=[ReportFigure(figure, "Loss <falls>.", 'A "falling" line')],
    )


def test_html_is_escaped_complete_and_self_contained(report: Path) -> None:
    source = report.read_text(encoding="utf-8")
    assert "<script" not in source
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in source
    page = _Page()
    page.feed(source)
    text = " ".join(page.text)
    for words in (HOSTILE, "These data are <simulated>.", "<b>", "a|b", "Loss <falls>.", "fold <0>", "Two arms & one"):
        assert words in text
    assert text.index("These data are <simulated>.") < text.index("Two arms") < text.index("Test AUC")
    assert "+0.000 (+0.000 to +0.000)" in text
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert image["alt"] == 'A "falling" line'
    kind, data = (image["src"] or "").split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data).startswith(b"\x89PNG")
    loaded = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert loaded == [image["src"]]
    assert "http:" not in source
    assert "https:" not in source
    assert "url(" not in source
    assert "prefers-color-scheme: dark" in source
    assert ("html", {"lang": "en"}) in page.tags


def test_html_tags_are_closed(report: Path) -> None:
    source = report.read_text(encoding="utf-8")
    for tag in (
        "html",
        "head",
        "body",
        "main",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "ul",
        "li",
        "figure",
        "p",
        "h1",
    ):
        opened, closed = len(re.findall(rf"<{tag}[ >]", source)), source.count(f"</{tag}>")
        assert opened == closed > 0, tag


def test_markdown_says_the_same_and_shows_the_figure(report: Path) -> None:
    source = (report.parent / "report.md").read_text(encoding="utf-8")
    assert source.splitlines()[0] == r'# &lt;script&gt;alert("1")&lt;/script&gt; &amp; \| \*MoMKD\* \$x\$'
    assert "> **Note:** These data are &lt;simulated&gt;." in source
    assert r"| a\|b |" in source
    link = re.search(r"!\[A \"falling\" line\]\((\S+)\)", source)
    assert link is not None
    assert link[1] == "figure_1_a%20%281%29.png"
    assert (report.parent / "figure_1_a (1).png").read_bytes().startswith(b"\x89PNG")
    bars = {line.count("|") - line.count(r"\|") for line in source.splitlines() if line.startswith("|")}
    assert len(bars) == 1  # every row has as many cells as the head


def test_report_without_note_or_figures(tmp_path: Path) -> None:
    metrics = {"only": evaluate_predictions(predictions(), CLASSES, bootstrap=0)}
    source = write_report(tmp_path, title="t", comparison=metrics).read_text(encoding="utf-8")
    assert "Note:" not in source
    assert "<img" not in source
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "report.md"]


def test_report_keeps_figures_that_lie_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    figure = plot_attention([[0, 0]], [1.0], tmp_path / "figures" / "map.png", patch_size=1)
    metrics = {"only": evaluate_predictions(predictions(), CLASSES, bootstrap=0)}
    write_report(tmp_path, title="t", comparison=metrics, figures=[ReportFigure(figure, "c", "a")])
    assert "](figures/map.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not (tmp_path / "figure_1_map.png").exists()


def test_figures_of_one_name_from_two_folders_both_stay(tmp_path: Path) -> None:
    figures = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        path = plot_attention(
            [[0, 0]] * (i + 1), [1.0] * (i + 1), tmp_path / str(i) / "map.png", patch_size=1, title=str(i)
        )
        figures.append(ReportFigure(path, "c", "a"))
    metrics = {"only": evaluate_predictions(predictions(), CLASSES, bootstrap=0)}
    write_report(tmp_path / "out", title="t", comparison=metrics, figures=figures)
    for i, figure in enumerate(figures, start=1):
        assert (tmp_path / "out" / f"figure_{i}_map.png").read_bytes() == figure.path.read_bytes()


def test_report_refuses_a_missing_figure_before_it_writes(tmp_path: Path) -> None:
    metrics = {"only": evaluate_predictions(predictions(), CLASSES, bootstrap=0)}
    with pytest.raises(InputError, match=r"none.png: expected a .png or .svg figure"):
        write_report(tmp_path, title="t", comparison=metrics, figures=[ReportFigure(tmp_path / "none.png", "c", "a")])
    assert not list(tmp_path.iterdir())

"""The page of an explanation, for a reader who knows slides and not this software."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from momkd import page
from momkd.bootstrap import Floats
from momkd.page import text

_SHOWN = 0.02  # share of attention from which on a prototype's table is open


@dataclass(frozen=True)
class SlideCard:
    """A slide to show.

    Attributes:
        slide_id: its name.
        patches: N.
        probs: (C,).
        predicted, label: classes; label −1 where it is not known.
        part: what the fold did with the slide: "val", "test" or "".
        map: the picture, or None.
        geojson: path beside the page, or None.
        written: patches in it.
        nearest: names of prototypes and the share of the slide's attention that lies nearest to each.
        missing: why there is no map.
    """

    slide_id: str
    patches: int
    probs: Floats
    predicted: int
    label: int
    part: str
    map: Path | None = None
    geojson: str | None = None
    written: int = 0
    nearest: Sequence[tuple[str, float]] = ()
    missing: str = ""


@dataclass(frozen=True)
class Memory:
    """The prototypes to show: their figures, and the tables of slots.csv and prototypes.csv."""

    slots_figure: Path
    map_figure: Path
    slots: pd.DataFrame
    nearest: pd.DataFrame


@dataclass(frozen=True)
class Content:
    """All that the page says."""

    title: str
    label: str  # the column that is predicted
    classes: Sequence[str]
    branches: bool  # one attention a class
    guided: bool  # by the memory
    gated: bool  # by a gate
    chosen: str  # which slides are shown
    cards: Sequence[SlideCard]
    memory: Memory | None
    notes: Sequence[str] = field(default=())


def index_html(content: Content, folder: Path) -> str:
    """The page; `folder` is where thumbnails lie."""
    body = [page.note(each) for each in content.notes]
    body += ["<h2>How to read this</h2>", page.items(_guide(content)), "<h2>Slides</h2>"]
    positive = f" (positive: {content.classes[1]})" if len(content.classes) == 2 else ""
    body += [page.paragraph(f"Classes of {content.label}: {', '.join(content.classes)}{positive}. {content.chosen}")]
    if content.cards:
        body.append(f'<div class="cards">{"".join(_slide(card, content) for card in content.cards)}</div>')
    if content.memory is not None:
        body += _prototypes(content.memory, content.classes, folder)
    return page.page(content.title, body, style=_STYLE)


def _guide(content: Content) -> list[str]:
    if content.branches:
        which = "Each class has an attention of its own; shown is that of the class predicted for the slide."
    else:
        which = "There is one attention for all classes."
    lines = [
        "Attention says how much each patch counts for the prediction of its slide; it sums to one over the slide. The "
        "model is not asked to find tumour, and high attention is no diagnosis of a patch.",
        f"Maps colour patches by the rank of their attention within the slide: yellow is the highest. {which} Every "
        "slide has some yellow, also where attention is spread evenly.",
        "Each .geojson file opens in QuPath over the image of its slide, by dragging it onto the image. MIRAX and "
        "Leica SCN images, which QuPath crops, must be opened without cropping there, or tiles are displaced.",
    ]
    if content.memory is not None:
        lines.append(
            "The model remembers prototypes, a number of slots for each class; it made them while it was trained."
        )
    if content.memory is not None and content.guided:
        classes = content.classes
        like = f"prototypes of class {classes[1]}, and not like those of class {classes[0]}"
        if content.branches:
            like = "prototypes of the class, and not like those of the others"
        beside = ", and to those that a gate, which was learnt with the model, prefers" if content.gated else ""
        lines.append(f"Attention goes to patches that look like {like}{beside}.")
    if content.memory is not None:
        lines.append(
            "The patches nearest to a prototype show what it stands for; the nearest is first, and cosine 1 is the "
            "same direction. Shares are means over slides: how much of their patches and attention lies nearest to it."
        )
    return lines


def _slide(card: SlideCard, content: Content) -> str:
    name, predicted = text(card.slide_id), content.classes[card.predicted]
    parts = [f"<h3>{name}</h3>"]
    verdict = f"Predicted: <strong>{text(predicted)}</strong>"
    if card.label >= 0:
        label = text(content.classes[card.label])
        verdict += (
            f". Label: {label}" if card.label == card.predicted else f'. <span class="wrong">Label: {label}</span>'
        )
    parts.append(f"<p>{verdict}</p>")
    rows = "".join(
        f'<tr><th scope="row">{text(c)}</th><td>{p:.2f}</td>'
        f'<td><meter min="0" max="1" value="{p:.4f}" aria-label="probability of {text(c)}"></meter></td></tr>'
        for c, p in zip(content.classes, card.probs.tolist(), strict=True)
    )
    parts.append(f'<table class="probs"><caption>Probability</caption><tbody>{rows}</tbody></table>')
    if card.map is not None:
        words = f"Map of attention over {card.slide_id}, {card.patches} patches"
        parts.append(f"<figure>{page.image(card.map, words)}</figure>")
    else:
        parts.append(f'<p class="small">{text(card.missing)}</p>')
    facts = [f"{card.patches:,} patches"] + ([f"{card.part} slide of this fold"] if card.part else [])
    parts.append(f'<p class="small">{text("; ".join(facts))}</p>')
    if card.nearest:
        said = "; ".join(f"{near} ({share:.0%})" for near, share in card.nearest)
        parts.append(f'<p class="small">Attention lies nearest to: {text(said)}</p>')
    if card.geojson is not None:
        link = f'<a href="{text(quote(card.geojson))}">{text(card.geojson)}</a>'
        parts.append(f'<p class="small">For QuPath, {card.written:,} patches: {link}</p>')
    return f"<article>{''.join(parts)}</article>"


def _prototypes(memory: Memory, classes: Sequence[str], folder: Path) -> list[str]:
    body = ["<h2>Prototypes</h2>"]
    body.append(
        page.figure(
            memory.slots_figure,
            "How much each slot was used in training (within its class), and its shares of these slides' patches and "
            "attention (over all classes). The numbers are in slots.csv.",
            "Bars of usage, share of patches and share of attention of every slot, a panel a class",
        )
    )
    body.append(
        page.figure(
            memory.map_figure,
            "Prototypes, numbered by slot, and slides on the two directions in which prototypes differ most. The "
            "larger the mark, the more it was used in training. What lies together here may be apart in more "
            "dimensions.",
            "Scatter of prototypes by class over slides, on two principal components",
        )
    )
    for name in classes:
        body.append(f"<h3>Class {text(name)}</h3>")
        own = memory.slots[memory.slots["class"] == name].sort_values("attention_share", ascending=False, kind="stable")
        cards = []
        for slot in own.to_dict("records"):
            near = memory.nearest[(memory.nearest["class"] == name) & (memory.nearest["slot"] == slot["slot"])]
            cards.append(_prototype(slot, own["usage"].sum(), near, folder))
        body.append(f'<div class="cards">{"".join(cards)}</div>')
    return body


def _prototype(slot: Mapping[Any, Any], of_class: float, near: pd.DataFrame, folder: Path) -> str:
    parts = [f"<h4>Class {text(slot['class'])}, slot {slot['slot']}</h4>"]
    told = f"{slot['attention_share']:.1%} of attention, {slot['patch_share']:.1%} of patches"
    told += f"; {slot['usage'] / of_class:.1%} of its class in training" if of_class > 0 else ""
    parts.append(f'<p class="small">{told}</p>')
    rows, pictures = [], []
    for patch in near.to_dict("records"):
        where = "" if pd.isna(patch["x"]) else f"{patch['x']}, {patch['y']}"
        cosine = f"{patch['cosine']:.3f}"
        rows.append([patch["slide_id"], where, cosine])
        if patch["thumbnail"]:
            alt = f"Patch of {patch['slide_id']} at {where}, cosine {cosine}"
            pictures.append(page.image(folder / patch["thumbnail"], alt))
    if pictures:
        parts.append(f'<div class="thumbnails">{"".join(pictures)}</div>')
    if rows:
        table = page.table(["Slide", "x, y in level-0 pixels", "Cosine"], rows)
        shown = "" if pictures or slot["attention_share"] < _SHOWN else " open"
        parts.append(f"<details{shown}><summary>Where the nearest patches lie</summary>{table}</details>")
    return f"<article>{''.join(parts)}</article>"


_STYLE = """
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; }
h3, h4 { font-size: 1.05rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
main > h3 { margin-top: 2rem; }
a { color: inherit; overflow-wrap: anywhere; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
article { border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem; min-width: 0; }
article p, article figure { margin: .5rem 0; }
article table { font-size: .875rem; }
.small { font-size: .875rem; }
.wrong { border-bottom: 3px solid var(--edge); }
.probs { width: 100%; }
.probs th, .probs td { border: 0; padding: 0 .5rem 0 0; font-weight: normal; overflow-wrap: anywhere; }
.probs caption { caption-side: top; padding: 0; }
meter { width: 7rem; }
meter::-webkit-meter-optimum-value { background: #0072b2; }
meter::-moz-meter-bar { background: #0072b2; }
.thumbnails { display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px; }
.thumbnails img { width: 100%; display: block; border-radius: 2px; }
details th[scope=row] { font-weight: normal; overflow-wrap: anywhere; }
details td { white-space: nowrap; }
summary { cursor: pointer; font-size: .875rem; margin-top: .5rem; }
"""

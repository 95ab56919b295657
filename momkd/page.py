"""Pages of HTML in one file that load nothing from anywhere: images are inside them, and they follow light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

IMAGES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}


def page(title: str, body: Sequence[str], *, style: str = "") -> str:
    """A whole page: `title` is text, `body` are pieces of HTML, `style` is CSS besides the common one."""
    title = html.escape(" ".join(title.split()))
    return _PAGE.format(title=title, style=_STYLE + style, body="\n".join([f"<h1>{title}</h1>", *body]))


def text(value: object) -> str:
    """Any text as HTML that shows it as it is."""
    return html.escape(str(value))


def paragraph(value: str) -> str:
    return f"<p>{text(value)}</p>"


def note(value: str) -> str:
    """What a reader must know, set apart."""
    return f'<p class="note" role="note"><strong>Note:</strong> {text(value)}</p>'


def items(values: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{text(value)}</li>" for value in values) + "</ul>"


def table(head: Sequence[str], body: Sequence[Sequence[str]], caption: str = "") -> str:
    """Cells are text; the first of a row is its heading. A table wider than the page scrolls by itself."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}>{text(cell)}</{tag.split()[0]}>" for cell in row)

    rows = "\n".join(f"<tr>{cells('th scope=row', r[:1])}{cells('td', r[1:])}</tr>" for r in body)
    below = f"<caption>{text(caption)}</caption>" if caption else ""
    top = f"<thead><tr>{cells('th scope=col', head)}</tr></thead>"
    return f'<div class="wide"><table>{below}{top}\n<tbody>\n{rows}\n</tbody></table></div>'


def image(path: Path, alt: str) -> str:
    """The image of a .png, .svg or .jpg file, inside the page; `alt` is for those who don't see it."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img src="data:{IMAGES[path.suffix.lower()]};base64,{data}" alt="{text(alt)}">'


def figure(path: Path, caption: str, alt: str) -> str:
    """An image and the line beneath it."""
    return f"<figure>{image(path, alt)}<figcaption>{text(caption)}</figcaption></figure>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1c1c1c; --paper: #ffffff; --line: #d5d5d5; --note: #fff4d6; --edge: #b36b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #17181a; --line: #45484d; --note: #3a2e10; --edge: #f0b14a; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
.note { background: var(--note); border-left: 4px solid var(--edge); padding: .75rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; font-size: .875rem; }
th, td { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
figure { margin: 2rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { font-size: .875rem; }
"""

"""HTML of the report: one file, with its style and its few lines of script in it, and nothing to fetch."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from m3i_large.pictures.sheet import Cell, Sheet, webp

HERE = Path(__file__).parent
QUALITY = 82


class Html(str):
    """Text that is HTML already; every other string is escaped."""

    __slots__ = ()


def html_of(value: object) -> str:
    """A value as HTML."""
    return value if isinstance(value, Html) else escape(str(value))


def page(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole document.

    Args:
        sections: (identifier, heading, content); those without content are left out.
    """
    there = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in there)
    parts = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(heading)}</h2>{content}</section>'
        for name, heading, content in there
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += '<meta name="color-scheme" content="light dark">'
    head += f"<title>{escape(title)}</title><style>{_asset('report.css')}</style>"
    body = f'<header><h1>{escape(title)}</h1></header><nav aria-label="Sections">{links}</nav><main>{parts}</main>'
    script = f"<script>{_asset('report.js')}</script>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{script}</body></html>'


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def table(header: Sequence[object], rows: Iterable[Sequence[object]], *, label: str, sortable: bool = True) -> str:
    """A table whose first column names the rows; a click on a heading sorts by it.

    Args:
        label: what it is, for who cannot see it.
    """
    lines = [list(row) for row in rows]
    if not lines:
        return ""
    words = [not all(_is_number(line[column]) for line in lines) for column in range(len(header))]
    kinds = [" class=words" if told else "" for told in words]
    head = "".join(
        f"<th scope=col{kind}>{html_of(cell)}</th>" if cell else "<td></td>"
        for cell, kind in zip(header, kinds, strict=True)
    )
    body = ""
    for first, *rest in lines:
        cells = "".join(f"<td{kind}>{html_of(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        body += f"<tr><th scope=row>{html_of(first)}</th>{cells}</tr>"
    kind = "sortable" if sortable and len(lines) > 1 else "plain"
    name = escape(label, quote=True)
    inner = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide" role="group" aria-label="{name}" tabindex="0">{inner}</div>'


def _is_number(cell: object) -> bool:
    """Numbers, shares and bars stand right, one under the other; words stand left."""
    return isinstance(cell, Html) or re.fullmatch(r"[-\d.,%e+]*", str(cell)) is not None


def bar(share: float, text: str) -> Html:
    """A number with a bar of its share of one under it."""
    width = 100 * min(1.0, max(0.0, share))
    return Html(f'<span class="bar" style="--share:{width:.1f}%">{escape(text)}</span>')


def note(text: str) -> str:
    """A quiet paragraph."""
    return f'<p class="quiet">{html_of(text)}</p>'


def folded(summary: str, content: str) -> str:
    """What is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def sheet_html(sheet: Sheet, *, heading: str = "") -> str:
    """A sheet: its strips as rows of pictures that wrap, every picture with what it shows."""
    strips = []
    for strip in sheet.strips:
        cells = "".join(_cell(strip.label, cell) for cell in strip.cells)
        strips.append(f'<div class="strip"><h4>{escape(strip.label)}</h4><div class="cells">{cells}</div></div>')
    title = f"<h3>{escape(heading or sheet.title)}</h3>"
    inner = f'{title}{note(sheet.about)}<div class="strips">{"".join(strips)}</div>'
    return f'<div class="sheet sheet-{sheet.name}">{inner}</div>'


def _cell(label: str, cell: Cell) -> str:
    data = base64.b64encode(webp(cell.pixels_HWC, quality=QUALITY)).decode()
    height, width = cell.pixels_HWC.shape[:2]
    marked = {True: " right", False: " wrong", None: ""}[cell.right]
    said = {True: "right: ", False: "not it: ", None: ""}[cell.right]
    sign = {True: "✓ ", False: "", None: ""}[cell.right]
    alt = escape(f"{label}: {said}{cell.note}", quote=True)
    image = f'<img alt="{alt}" width="{width}" height="{height}" src="data:image/webp;base64,{data}">'
    return f'<figure class="cell{marked}">{image}<figcaption>{sign}{escape(cell.note)}</figcaption></figure>'

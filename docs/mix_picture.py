"""Draws mix.svg: what goes into one step of M3I and what is predicted from it."""

import random
from pathlib import Path

PAGE = Path(__file__).parent / "mix.svg"
CELLS, SIDE = 6, 132
CELL = SIDE / CELLS
INK, QUIET, OWN, PARTNER = "#1b1f24", "#57606a", "#0a62b0", "#b34a00"

# Two scenes of our own, on a square of 132; the other view of a scene is a crop of it.
HOUSE = """<rect width="132" height="132" fill="#bfe0f5"/><rect y="92" width="132" height="40" fill="#7fb069"/>
<rect x="34" y="58" width="64" height="50" fill="#f4e3c1"/><path d="M26 60 L66 26 L106 60 Z" fill="#b5473c"/>
<rect x="58" y="78" width="17" height="30" fill="#7a5230"/><rect x="41" y="68" width="12" height="12" fill="#5d8aa8"/>
<circle cx="112" cy="20" r="11" fill="#f6c445"/>"""
BOAT = """<rect width="132" height="132" fill="#fde9c9"/><rect y="84" width="132" height="48" fill="#2f7f9e"/>
<path d="M22 82 L110 82 L94 104 L38 104 Z" fill="#8c4a2f"/><rect x="63" y="22" width="4" height="60" fill="#50331f"/>
<path d="M69 24 L104 76 L69 76 Z" fill="#ffffff"/><path d="M61 34 L61 76 L32 76 Z" fill="#f08a5d"/>
<circle cx="20" cy="20" r="12" fill="#e4572e"/>"""


def mask() -> list[tuple[int, int]]:
    """Cells that show the own picture: half of them, as in the recipes."""
    cells = [(row, column) for row in range(CELLS) for column in range(CELLS)]
    return sorted(random.Random(4).sample(cells, len(cells) // 2))


def cells(chosen: list[tuple[int, int]]) -> str:
    """Squares of a mask."""
    places = (f'<rect x="{c * CELL:g}" y="{r * CELL:g}" width="{CELL:g}" height="{CELL:g}"/>' for r, c in chosen)
    return "".join(places)


def placed(x: int, y: int, inner: str, label: str, colour: str = QUIET) -> str:
    """A square picture with a frame and a line of text under it."""
    frame = f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
    text = f'<text x="{SIDE / 2}" y="{SIDE + 19}" text-anchor="middle">{label}</text>'
    return f'<g transform="translate({x} {y})">{inner}{frame}{text}</g>'


def arrow(x0: float, y0: float, x1: float, y1: float, colour: str = QUIET) -> str:
    """A line that ends in a head."""
    return f'<path d="M{x0} {y0} L{x1} {y1}" stroke="{colour}" stroke-width="2" marker-end="url(#head)"/>'


def box(x: int, y: int, width: int, height: int, lines: list[str], colour: str = QUIET) -> str:
    """A rounded box with lines of text in its middle."""
    shown = ""
    for number, line in enumerate(lines):
        down = y + height / 2 + 5 + 19 * (number - (len(lines) - 1) / 2)
        weight = 600 if number == 0 else 400
        shown += f'<text x="{x + width / 2}" y="{down}" text-anchor="middle" font-weight="{weight}">{line}</text>'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="#f3f5f7" stroke="{colour}"/>{shown}'


def picture() -> str:
    """The whole drawing."""
    own = mask()
    crop = f'<svg width="{SIDE}" height="{SIDE}" viewBox="12 14 100 100">{BOAT}</svg>'
    every = [(row, column) for row in range(CELLS) for column in range(CELLS)]
    rest = [cell for cell in every if cell not in own]
    mixed = f'<g clip-path="url(#own)">{HOUSE}</g><g clip-path="url(#rest)">{crop}</g>'
    lattice = f'<rect width="{SIDE}" height="{SIDE}" fill="{PARTNER}"/><g fill="{OWN}">{cells(own)}</g>'
    parts = [
        placed(10, 14, HOUSE, "y of picture i", OWN),
        placed(10, 216, crop, "another view x of picture j", PARTNER),
        placed(204, 115, lattice, "mask m"),
        arrow(146, 100, 200, 150),
        arrow(146, 262, 200, 212),
        arrow(340, 181, 384, 181),
        placed(390, 115, mixed, "mixed input", INK),
        arrow(526, 181, 562, 181),
        box(568, 140, 104, 82, ["student", "one pass"], INK),
    ]
    targets = [
        ("intra", "features of y of i, by the average", OWN),
        ("inter", "features of y of j, by the average", PARTNER),
        ("category", "class of i, and of j", QUIET),
        ("text", "caption of i, and of j", QUIET),
    ]
    for number, (name, what, colour) in enumerate(targets):
        top = 20 + 86 * number
        parts += [arrow(674, 181, 706, top + 32, colour), box(712, top, 272, 64, [name, what], colour)]
    head = '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    head += f'<path d="M0 0 L10 5 L0 10 Z" fill="{QUIET}"/></marker>'
    clips = f'<clipPath id="own">{cells(own)}</clipPath><clipPath id="rest">{cells(rest)}</clipPath>'
    title = "Half of the patches of picture i and half of another view of picture j make one input; four targets follow"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-24 0 1020 386" role="img" aria-label="{title}">'
        f'<defs>{head}{clips}</defs><rect x="-24" width="1020" height="386" fill="#ffffff"/>'
        f'<g font-family="system-ui, sans-serif" font-size="14.5" fill="{INK}">{"".join(parts)}</g></svg>\n'
    )


if __name__ == "__main__":
    PAGE.write_text(picture(), encoding="utf-8")

"""Reads a report's drawings as a person does: by the numbers beside the axes."""

import re
from xml.etree import ElementTree

XLINK = "{http://www.w3.org/1999/xlink}"


def figures(html: str) -> dict[str, ElementTree.Element]:
    """The drawing of each panel, by the metrics that it says it shows."""
    found = {}
    for match in re.finditer(r'<figure class="panel" data-metric="([^"]*)".*?(<svg.*?</svg>)', html, flags=re.S):
        assert match[1] not in found, f"{match[1]} is drawn twice"
        found[match[1]] = ElementTree.fromstring(match[2])
    return found


def curve(svg: ElementTree.Element, number: int = 0) -> list[tuple[float, float]]:
    """The points of a curve, in the units of the axes."""
    (group,) = (g for g in svg.iter("g") if g.get("id", "").endswith(f"-curve-{number}"))
    path = group.find(".//path").get("d")  # type: ignore[union-attr]
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] ?([-\d.e]+) ([-\d.e]+)", path)]
    x, y = scale(svg, "x"), scale(svg, "y")
    return [(x(px), y(py)) for px, py in points]


def scale(svg: ElementTree.Element, axis: str):  # type: ignore[no-untyped-def]
    """From places in the drawing to values, by the first and the last label of an axis."""
    ticks = []
    for group in svg.iter("g"):
        if re.search(rf"-{axis}tick_\d+$", group.get("id", "")):
            mark, label = group.find(".//use"), group.find(".//text")
            if mark is not None and label is not None and label.text:
                ticks.append((float(mark.get(axis, "nan")), float(label.text.replace("\N{MINUS SIGN}", "-"))))
    (p0, v0), (p1, v1) = ticks[0], ticks[-1]
    return lambda place: v0 + (place - p0) / (p1 - p0) * (v1 - v0)

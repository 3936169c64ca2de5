"""Curves: drawn by matplotlib as SVG, coloured by the page, so that one file is light and dark and prints.

A long curve is drawn as the mean of equal numbers of its points, with a band from the lowest to the highest of them:
nothing is smoothed away unseen.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

POINTS = 160  # of a curve, at most: one for two pixels of a panel
COLOURS = 8
SIZE = (4.3, 2.5)  # inches; a panel is as wide as a phone
INK, GRID, RESTART, INCIDENT = "#fe0201", "#fe0202", "#fe0203", "#fe0204"
# Stand-ins in what matplotlib writes -> the page's own colours (report.css).
THEME = {INK: "var(--ink)", GRID: "var(--grid)", RESTART: "var(--quiet)", INCIDENT: "var(--bad)"}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 9,
    "path.simplify": False,  # what is drawn are the points, all of them
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
}


@dataclass(frozen=True)
class Line:
    """One curve: (N,) steps and values, in the page's colour of that number."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: int


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title, unit: of what is shown.
        metric: what it is called in metrics.jsonl, for the figure's own name.
        restarts, incidents: steps that are marked.
        log: logarithmic values.
    """

    title: str
    metric: str
    lines: tuple[Line, ...]
    unit: str = ""
    restarts: tuple[int, ...] = ()
    incidents: tuple[int, ...] = ()
    log: bool = False


def binned(steps: np.ndarray, values: np.ndarray, *, most: int = POINTS) -> tuple[np.ndarray, ...]:
    """A curve of at most `most` points -> (steps, means, lowest, highest); each of equally many, but the last."""
    size = -(-len(steps) // most)
    starts = np.arange(0, len(steps), size)
    counts = np.diff(np.append(starts, len(steps)))
    means = [np.add.reduceat(x.astype(np.float64), starts) / counts for x in (steps, values)]
    return means[0], means[1], np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def figure(panel: Panel, *, name: str) -> str:
    """HTML: the drawing, and a table with each curve's first, last, lowest and highest value.

    Args:
        name: of the figure within the page, for its identifiers.
    """
    drawing, limits = _draw(panel)
    said = "; ".join(f"{line.label} from {short(line.values[0])} to {short(line.values[-1])}" for line in panel.lines)
    about = f"{panel.title}{f' in {panel.unit}' if panel.unit else ''} by step: {said}"
    svg = _themed(drawing, name=name, about=about)
    points = [_points(line) for line in panel.lines]
    data = escape(json.dumps({"limits": limits, "lines": points}, separators=(",", ":")))
    unit = f" <span class=quiet>{escape(panel.unit)}</span>" if panel.unit else ""
    caption = f"<figcaption>{escape(panel.title)}{unit}</figcaption>"
    attributes = f'class="panel" data-metric="{escape(panel.metric)}" data-curves="{data}"'
    return f"<figure {attributes}>{caption}{svg}{_legend(panel)}</figure>"


def _legend(panel: Panel) -> str:
    head = "<tr><td></td><th>first</th><th>last</th><th>lowest</th><th>highest</th></tr>"
    rows = []
    for line in panel.lines:
        shown = [short(v) for v in (line.values[0], line.values[-1], line.values.min(), line.values.max())]
        cells = "".join(f"<td>{value}</td>" for value in shown)
        swatch = f'<span class="swatch c{line.colour % COLOURS}"></span>'
        rows.append(f"<tr><th scope=row>{swatch}{escape(line.label)}</th>{cells}</tr>")
    return f'<table class="legend"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def short(value: float) -> str:
    """A number in few characters: 6.385, 0.8717, 7.9e-4."""
    if value == 0 or 0.01 <= abs(value) < 1e6:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _points(line: Line) -> dict[str, Any]:
    """What the pointer reads (report.js)."""
    steps, means, _, _ = binned(line.steps, line.values)
    return {
        "label": line.label,
        "steps": [round(float(s), 1) for s in steps],
        "values": [float(f"{v:.5g}") for v in means],
    }


def _draw(panel: Panel) -> tuple[str, list[float]]:
    """SVG of a panel, and the limits of its axes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=SIZE, layout="constrained")
        axes = drawn.add_subplot()
        for number, line in enumerate(panel.lines):
            steps, means, low, high = binned(line.steps, line.values)
            colour = f"#fe01{line.colour % COLOURS:02x}"
            if len(steps) < len(line.steps):
                axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
            (curve,) = axes.plot(
                steps, means, color=colour, linewidth=1.4, marker="o" if len(steps) == 1 else "", zorder=3
            )
            curve.set_gid(f"curve-{number}")
        if panel.log:
            _logarithmic(axes)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        for step in panel.restarts:
            axes.axvline(step, color=RESTART, linestyle=":", linewidth=1.2)
        for step in panel.incidents:
            axes.axvline(step, color=INCIDENT, linestyle="--", linewidth=1.2)
        axes.patch.set_gid("area")
        axes.patch.set_visible(True)
        axes.patch.set_facecolor("none")
        drawn.patch.set_visible(False)
        limits = [*map(float, axes.get_xlim()), *map(float, axes.get_ylim())]
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue(), limits


def _logarithmic(axes: Any) -> None:
    """Few labels, as plain numbers: 1, 2 and 5 where there is a decade or two, else powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 150 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _themed(svg: str, *, name: str, about: str) -> str:
    """An SVG file as a part of the page: no header, own identifiers, the page's colours and font, a description."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None, "matplotlib writes one"
    opened = f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(about, quote=True)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: opened, svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{name}-{escape(m[1])}"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg.replace("xlink:href", "href"))
    for stand_in, colour in THEME.items() | {(f"#fe01{i:02x}", f"var(--c{i})") for i in range(COLOURS)}:
        svg = svg.replace(stand_in, colour)
    return re.sub(r"\s+", " ", svg)


def panels_html(panels: Sequence[Panel], *, name: str) -> str:
    """Panels beside each other, as many as fit."""
    drawn = [figure(panel, name=f"{name}-{number}") for number, panel in enumerate(panels) if panel.lines]
    return f'<div class="panels">{"".join(drawn)}</div>' if drawn else ""

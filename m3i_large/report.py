"""One self-contained HTML file about a run: opens from disk, no network, light and dark."""

import base64
import io
import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from m3i_large.errors import UserError
from m3i_large.goodput import goodput
from m3i_large.metrics import EVENTS, read_metrics, read_rows
from m3i_large.recipe import Recipe
from m3i_large.run import ENV, read_exit, read_recipe

Rows = Sequence[dict[str, Any]]
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, .quiet { opacity: .75; font-size: .9rem; } pre { overflow-x: auto; font-size: .8rem; }
"""


def write_report(run: Path) -> Path:
    """Writes run/report.html from what the run directory holds; works while the run is going on.

    Raises:
        UserError: the directory holds no run, or no step has been logged.
    """
    recipe, rows = read_recipe(run), read_metrics(run)
    if recipe is None or not rows:
        raise UserError(f"report: got {run}, which holds no run with a logged step; needed: a run directory")
    parts = [
        f"<h1>{escape(recipe.name)}</h1>",
        _summary(run, recipe, rows),
        _evaluation(read_rows(run / "eval.jsonl")),
        _curves(rows, run),
        _pictures(run),
        _events(read_rows(run / EVENTS)),
        f"<h2>Recipe</h2><details><summary>resolved values</summary><pre>{escape(recipe.to_yaml())}</pre></details>",
        _credits(Path(recipe.data.root)),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(recipe.name)}</title><style>{STYLE}</style>"
    html = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'
    path = run / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (
        f"<table><thead>{line(header, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"
    )


def _summary(run: Path, recipe: Recipe, rows: Rows) -> str:
    env = json.loads((run / ENV).read_text(encoding="utf-8")) if (run / ENV).is_file() else {}
    seconds = sum(row["time/step_s"] for row in rows)
    waited = sum(row["data/wait_s"] for row in rows)
    ended = read_exit(run).get("outcome", "still running, or killed")
    facts = {
        "outcome": f"{ended}, {rows[-1]['step'] + 1} steps, {rows[-1]['samples']:,} samples",
        "training time": f"{seconds / 60:.1f} minutes, {waited / max(seconds, 1e-9):.1%} of it waiting for data",
        "throughput": f"{len(rows) * recipe.train.global_batch / max(seconds, 1e-9):.1f} samples per second",
        "goodput": goodput(run).to_text().removeprefix("goodput "),
        "peak memory of the first rank": f"{max(row['perf/mem_gib'] for row in rows):.2f} GiB",
        "backbone": f"{recipe.backbone.name} {recipe.backbone.arch or ''}",
        "terms": ", ".join(f"{term.name} x {term.weight:g}" for term in recipe.objective.terms),
        "sources": ", ".join(source.name for source in recipe.data.sources),
        "device": f"{env.get('device', '?')}, {env.get('world', '?')} ranks, {env.get('precision', '?')}",
        "versions": ", ".join(f"{k} {v}" for k, v in env.get("versions", {}).items()),
    }
    return _table(("run", str(run)), facts.items())


def _evaluation(results: Rows) -> str:
    newest = {result["kind"]: result for result in results}
    if not newest:
        return "<h2>Evaluation</h2><p class=quiet>None yet: run <code>m3i eval</code> on this directory.</p>"
    lines = []
    for kind, result in newest.items():
        for name, value in result["values"].items():
            chance = result["chance"][name]
            shown = [f"{v:.1%}" for v in (value, result["untrained"][name], chance)]
            lines.append((f"{kind} {name}", *shown, f"{value / chance:.1f}", str(result["num_samples"])))
    places = ", ".join(sorted({result["data"] for result in newest.values()}))
    header = ("figure", "trained", "untrained", "chance", "times chance", "samples")
    note = f"<p class=quiet>Without fine-tuning, on {escape(places)}, after step {results[-1].get('step', '?')}.</p>"
    return f"<h2>Evaluation</h2>{note}{_table(header, lines)}"


def _curves(rows: Rows, run: Path) -> str:
    names = list(dict.fromkeys(k for row in rows for k in row if k.startswith("loss/")))  # a step left out has none
    terms = [k for k in names if k.count("/") == 1]
    restarts = [e["step"] for e in read_rows(run / EVENTS) if e["event"] == "resume"]
    charts = [
        ("Loss of each term", [[t] for t in terms]),
        ("Loss of each source", [[n for n in names if n.startswith(t + "/")] for t in terms]),
    ]
    charts.append(("Schedules", [["optim/lr"], ["optim/momentum_ema"], ["optim/temperature"]]))
    charts.append(("Health", [["optim/grad_norm"], ["time/step_s", "data/wait_s"]]))
    charts.append(("Signals", _signals(rows)))
    charts = [(title, panels) for title, panels in charts if any(panels)]
    return "".join(f"<h2>{title}</h2>{_figure(rows, panels, restarts, title)}" for title, panels in charts)


def _signals(rows: Rows) -> list[list[str]]:
    """Collapse, say of each term and contrast: one panel for each kind of signal that the run has."""
    names = sorted({k for row in rows for k in row if k.startswith(("collapse/", "cosine/", "gradient/"))})
    kinds = [("collapse/", "/std"), ("collapse/", "/rank"), ("collapse/", "_std"), ("collapse/", "_rank")]
    kinds += [("cosine/", ""), ("gradient/", "")]
    return [[n for n in names if n.startswith(start) and n.endswith(end)] for start, end in kinds]


def _figure(rows: Rows, panels: list[list[str]], restarts: list[int], title: str) -> str:
    from matplotlib.figure import Figure

    panels = [names for names in ([n for n in p if any(n in row for row in rows)] for p in panels) if names]
    figure = Figure(figsize=(9, 2.4 * ((len(panels) + 1) // 2)), layout="constrained")
    for i, names in enumerate(panels):
        axes = figure.add_subplot((len(panels) + 1) // 2, 2, i + 1)
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), linewidth=1, label=name)
        for step in restarts:
            axes.axvline(step, color="grey", linestyle=":", linewidth=1)
        if names[0].startswith("gradient/"):  # terms differ by orders of magnitude
            axes.set_yscale("log")
        axes.legend(fontsize=7)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("step", fontsize=7)
    described = "; ".join(_described(rows, name) for names in panels for name in names)
    return _image(
        lambda buffer: figure.savefig(buffer, format="png", dpi=110),
        f"{title}: {described}",
        "dotted: restarts" if restarts else "",
    )


def _described(rows: Rows, name: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{name} from {values[0]:.4g} to {values[-1]:.4g}"


def _image(write: Callable[[io.BytesIO], Any], alt: str, caption: str) -> str:
    buffer = io.BytesIO()
    write(buffer)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _pictures(run: Path) -> str:
    found = sorted((run / "pictures").glob("step_*/input.png"))
    if not found:
        return ""
    caption = (
        "From above: target view, other view (in a mix: the partner's), the student's input, "
        "the mask (white = visible, in a mix: own)."
    )
    alt = "Rows of small pictures: target view, other view, the student's input, mask"
    return f"<h2>What the student sees</h2>{_image(lambda b: b.write(found[-1].read_bytes()), alt, caption)}"


def _events(events: Rows) -> str:
    told = [(e, next((str(e[k]) for k in ("what", "why", "signal", "outcome") if k in e), "")) for e in events]
    lines = [(e["event"], str(e["step"]), str(e["attempt"]), what) for e, what in told if e["event"] != "save"]
    return f"<h2>Events</h2>{_table(('event', 'step', 'attempt', 'what'), lines)}"


def _credits(root: Path) -> str:
    path = root / "LICENSES.md"
    if not path.is_file():
        return ""
    return f"<h2>Credits</h2><pre>{escape(path.read_text(encoding='utf-8'))}</pre>"

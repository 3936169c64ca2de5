"""Tables: what was trained on what, what came of it, what happened, what it cost."""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from m3i_large.recipe_file import yaml_text
from m3i_large.report.charts import Line, Panel, panels_html
from m3i_large.report.page import Html, bar, folded, html_of, note, table
from m3i_large.report.run_data import BEGUN, RunData
from m3i_large.run import flat_values

SHOWN = 200  # rows of a table about what went wrong


def summary(runs: Sequence[RunData]) -> str:
    """What was trained on what, with what, for how long; a column a run."""
    facts: dict[str, Callable[[RunData], object]] = {
        "outcome": _outcome,
        "backbone": _backbone,
        "objective": _objective,
        "sources": _sources_line,
        "batch": _batch,
        "devices": _devices,
        "cost": _cost,
        "throughput": _throughput,
        "goodput": lambda run: run.goodput.to_text().removeprefix("goodput "),
        "data manifest": lambda run: next((e["data"] for e in reversed(run.begun) if "data" in e), ""),
        "code": _code,
        "directory": lambda run: run.directory,
    }
    rows = [(name, *(told(run) for run in runs)) for name, told in facts.items()]
    rows = [row for row in rows if any(str(cell) for cell in row[1:])]
    header = ("", *(run.label for run in runs))
    return table(header, rows, label="Summary", sortable=False) + _goodput(runs)


def _outcome(run: RunData) -> str:
    ended, last = run.exit.get("outcome", "still running, or killed"), int(run.history.steps[-1]) + 1
    samples = run.history.columns.get("samples")
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    seen = f"; {int(np.nanmax(samples)):,} samples" if samples is not None else ""
    message = f": {run.exit['message']}" if run.exit.get("message") else ""
    return f"{ended} after {last:,}{of} steps{seen}{message}"


def _backbone(run: RunData) -> str:
    backbone = run.recipe["backbone"]
    arch = ", ".join(f"{name} {value}" for name, value in backbone.get("arch", {}).items())
    sizes = next((e["parameters"] for e in reversed(run.begun) if "parameters" in e), None)
    told = f"; {sizes['student']:,} parameters, {sizes['trained']:,} trained in all" if sizes else ""
    return f"{backbone.get('name', '?')}{f' ({arch})' if arch else ''}{told}"


def _objective(run: RunData) -> str:
    objective = run.recipe.get("objective")
    if objective is None:
        return f"fine-tuning: {run.recipe.get('task', {}).get('kind', '')}".rstrip(": ")
    terms = ", ".join(f"{term['name']} x {term['weight']:g}" for term in objective["terms"])
    given = objective["input"]
    shown = f"mask {given['mask']}, ratio {given['ratio']}" if given["mask"] != "none" else "whole pictures"
    return f"{terms}; input: {shown}"


def _sources_line(run: RunData) -> str:
    return ", ".join(source["name"] for source in _configured(run))


def _configured(run: RunData) -> list[dict[str, Any]]:
    """The recipe's sources; a fine-tuning has none."""
    given = run.recipe.get("data")
    return given.get("sources", []) if isinstance(given, dict) else []


def _batch(run: RunData) -> str:
    train = run.recipe["train"]
    told = f"{train['global_batch']:,} samples a step" if "global_batch" in train else ""
    if train.get("contrast_batch") not in (None, train.get("global_batch")):
        told += f", {train['contrast_batch']:,} at a time"
    return ", ".join(filter(None, (told, train.get("precision", ""), f"seed {train.get('seed', 0)}")))


def _devices(run: RunData) -> str:
    worlds = list(dict.fromkeys(str(event.get("world", "?")) for event in run.begun))
    many = f"{' then '.join(worlds)} rank{'' if worlds == ['1'] else 's'}" if worlds else ""
    return ", ".join(filter(None, (run.env.get("device", ""), many)))


def _cost(run: RunData) -> str:
    wall = run.goodput.wall / 3600
    began = min((event["time"] for event in run.events if "time" in event), default=None)
    since = f", begun {datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC" if began is not None else ""
    starts = f"{len(run.begun)} start{'s' * (len(run.begun) != 1)}"
    return f"{run.device_hours:.3g} device-hours in {wall:.3g} hours, {starts}{since}"


def _throughput(run: RunData) -> str:
    history = run.history
    parts = []
    if "perf/samples_per_s" in history:
        parts.append(f"{np.median(history.series('perf/samples_per_s')[1]):.4g} samples a second in the median step")
    if "perf/mfu" in history:
        parts.append(f"{np.median(history.series('perf/mfu')[1]):.1%} MFU")
    seconds = history.total("time/step_s")
    if seconds and "data/wait_s" in history:
        parts.append(f"{history.total('data/wait_s') / seconds:.1%} waiting for data")
    if "perf/mem_gib" in history:
        parts.append(f"{history.series('perf/mem_gib')[1].max():.2f} GiB on the first rank")
    return ", ".join(parts)


def _code(run: RunData) -> str:
    commit = f"commit {run.env['commit']}; " if run.env.get("commit") else ""
    return commit + ", ".join(f"{name} {version}" for name, version in run.env.get("versions", {}).items())


def _goodput(runs: Sequence[RunData]) -> str:
    """Shares of the wall time."""
    parts = ("productive", "data", "skipped", "replayed", "checkpoints", "other")
    rows = []
    for part in parts:
        spent = [(getattr(run.goodput, part), run.goodput.wall) for run in runs]
        cells = [bar(s / wall if wall else 0.0, f"{s / wall if wall else 0.0:.1%}") for s, wall in spent]
        rows.append((part, *cells))
    header = ("share of wall time", *(run.label for run in runs))
    return f"<h3>Where the time went</h3>{table(header, rows, label='Share of wall time')}"


def evaluation(runs: Sequence[RunData]) -> str:
    """The last figures of each kind, beside chance and the untrained network; and through training, where there are."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.newest_evaluations))
    if not kinds:
        return note(Html("None yet: run <code>m3i eval</code> on this directory."))
    rows = []
    for kind in kinds:
        told = [run.newest_evaluations.get(kind, {}) for run in runs]
        for name in dict.fromkeys(name for result in told for name in result.get("values", {})):
            rows.append((f"{kind} {name}", *(_figure(result, name) for result in told), *_beside(told, name)))
    header = ["figure", *(run.label if len(runs) > 1 else "trained" for run in runs)]
    header += ["untrained", "chance", "times chance", "samples"]
    places = sorted({str(r["data"]) for run in runs for r in run.newest_evaluations.values() if "data" in r})
    steps = sorted({r["step"] for run in runs for r in run.newest_evaluations.values() if "step" in r})
    of = f", of the state after step {', '.join(map(str, steps))}" if steps else ""
    where = note(f"On {', '.join(places)}{of}.") if places else ""
    return where + table(header, rows, label="Evaluation") + _through_training(runs)


def _figure(result: dict[str, Any], name: str) -> object:
    value = result.get("values", {}).get(name)
    return "-" if value is None else bar(value, f"{value:.1%}")


def _beside(results: Sequence[dict[str, Any]], name: str) -> list[object]:
    """Untrained, chance, times chance (of the first run) and number of samples."""
    result = next(result for result in results if name in result.get("values", {}))
    untrained, chance = (result.get(key, {}).get(name) for key in ("untrained", "chance"))
    times = f"{result['values'][name] / chance:.1f}" if chance else ""
    shown = ["" if value is None else f"{value:.1%}" for value in (untrained, chance)]
    return [*shown, times, f"{result['num_samples']:,}" if "num_samples" in result else ""]


def _through_training(runs: Sequence[RunData]) -> str:
    """Figures that were measured at more than one step."""
    points: dict[str, dict[int, dict[int, float]]] = {}
    for number, run in enumerate(runs):
        for row in run.evaluations:
            for name, value in row.get("values", {}).items():
                full = f"{row.get('kind', '')} {name}".strip()
                points.setdefault(full, {}).setdefault(number, {})[row.get("step", 0)] = value
    panels = []
    for name, by_run in points.items():
        if all(len(values) < 2 for values in by_run.values()):
            continue
        lines = tuple(
            Line(runs[n].label, np.array(sorted(v)), np.array([v[s] for s in sorted(v)]), n) for n, v in by_run.items()
        )
        panels.append(Panel(name, f"eval {name}", lines))
    return f"<h3>Through training</h3>{panels_html(panels, name='eval')}" if panels else ""


def data(runs: Sequence[RunData]) -> str:
    """Sources and how often they were seen; what could not be used."""
    several = len(runs) > 1
    rows, bad = [], []
    for run in runs:
        prefix = f"{run.label}: " if several else ""
        rows += [(prefix + str(row[0]), *row[1:]) for row in _source_rows(run)]
        bad += [
            (prefix + row["source"], *(row[k] for k in ("step", "shard", "key", "reason"))) for row in run.quarantined
        ]
    header = ("source", "kind", "samples", "drawn a step", "epochs seen", "licence")
    html = table(header, rows, label="Sources")
    if not bad:
        return html + note("No sample was quarantined.") if html else ""
    counts = Counter((row[0], str(row[4]).split(":")[-1].strip()) for row in bad)
    reasons = "; ".join(f"{count} x {reason} ({source})" for (source, reason), count in counts.most_common(8))
    more = f"; the first {SHOWN} of them" if len(bad) > SHOWN else ""
    shown = table(("source", "step", "shard", "key", "reason"), bad[:SHOWN], label="Quarantined samples")
    told = note(f"{len(bad)} could not be used and were replaced{more}. {reasons}")
    return f"{html}<h3>Quarantined samples</h3>{told}{shown}"


def _source_rows(run: RunData) -> list[tuple[object, ...]]:
    config = {source["name"]: source for source in _configured(run)}
    known: list[dict[str, Any]] = next((e["sources"] for e in reversed(run.begun) if "sources" in e), [])
    steps = int(run.history.steps[-1]) + 1
    rows: list[tuple[object, ...]] = []
    for source in known:
        given = config.get(source["name"], {})
        per_step = source.get("draws_per_step")
        seen = ("", "") if per_step is None else (f"{per_step:.4g}", f"{per_step * steps / source['samples']:.3g}")
        rows.append((source["name"], given.get("kind", ""), f"{source['samples']:,}", *seen, given.get("licence", "")))
    return rows


def events(runs: Sequence[RunData]) -> str:
    """Starts, incidents and ends, without the routine saves."""
    rows = []
    for run in runs:
        prefix = (run.label,) if len(runs) > 1 else ()
        for event in run.events:
            if event["event"] != "save":
                rows.append((event["event"], *prefix, event["step"], event["attempt"], told_of(event), _when(event)))
    header = ("event", *(("run",) if len(runs) > 1 else ()), "step", "attempt", "what", "time (UTC)")
    more = note(f"The last {SHOWN} of {len(rows):,}.") if len(rows) > SHOWN else ""
    return more + table(header, rows[-SHOWN:], label="Events")


def told_of(event: dict[str, Any]) -> str:
    """What an event says beside its kind and step, in a line."""
    if event["event"] in BEGUN:
        world = event.get("world", "?")
        return f"{world} rank{'s' * (world != 1)}"
    first = next((str(event[k]) for k in ("what", "why", "signal", "outcome", "reason", "message") if event.get(k)), "")
    more = {k: v for k, v in event.items() if k in ("term", "rank", "host", "ratio", "loss", "checkpoint", "message")}
    said = ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items() if str(v) != first and v != ""
    )
    return " ".join(filter(None, (first, f"({said})" if said else "")))


def _when(event: dict[str, Any]) -> str:
    return f"{datetime.fromtimestamp(event['time'], UTC):%m-%d %H:%M:%S}" if "time" in event else ""


def recipe(runs: Sequence[RunData]) -> str:
    """Resolved values of each run, and where they differ."""
    flat = [flat_values(_by_name(run.recipe)) for run in runs]
    names = sorted({name for values in flat for name in values})
    differing = [name for name in names if len({repr(values.get(name)) for values in flat}) > 1]
    rows = [(name, *(values.get(name, "-") for values in flat)) for name in differing]
    html = ""
    if len(runs) > 1:
        html = table(("field", *(run.label for run in runs)), rows, label="Differing fields") or note(
            "The same values."
        )
    whole = "".join(
        folded(
            f"resolved values{f' of {run.label}' if len(runs) > 1 else ''}",
            f"<pre>{html_of(yaml_text(run.recipe))}</pre>",
        )
        for run in runs
    )
    return html + whole


def _by_name(value: Any) -> Any:
    """Lists of mappings, as terms and sources are, as mappings by their names: so that what differs is a field."""
    if isinstance(value, dict):
        return {key: _by_name(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(item.get("name", number)): _by_name(item) for number, item in enumerate(value)}
    return value


def credits(runs: Sequence[RunData]) -> str:
    """Who made the pictures that are shown."""
    return "".join(f"<pre>{html_of(text)}</pre>" for text in dict.fromkeys(run.credits() for run in runs) if text)

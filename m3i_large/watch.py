"""A run in the terminal, live: the report's signals in 80 columns."""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from m3i_large.errors import UserError
from m3i_large.metrics import EVENTS, METRICS, last_rows
from m3i_large.report import training
from m3i_large.report.charts import binned
from m3i_large.report.history import History
from m3i_large.report.overview import told_of
from m3i_large.report.run_data import BEGUN, INCIDENTS
from m3i_large.run import RECIPE, read_exit

HELD_BYTES = 2**22  # of metrics.jsonl: some thousand steps; a long run's whole file is gigabytes
LEVELS = "▁▂▃▄▅▆▇█"
SPARKS = 26
BAR = 70
RECENT = 20  # steps that a value is the mean of, as single ones are noisy
SILENT_S = 120.0
EVENTS_SHOWN = 5
LOSSES = (training.Group("loss", "loss", "loss"), training.Group("loss of", "loss/"))
SECTIONS: tuple[tuple[str, tuple[training.Group, ...]], ...] = (
    ("Losses", LOSSES),
    ("Speed", training.SPEED),
    ("Schedules", training.SCHEDULES),
    ("Health", training.HEALTH + training.COLLAPSE),
)


def watch(run: Path, *, every: float, once: bool = False, console: Console | None = None) -> None:
    """Shows a run until it ends or Ctrl-C is pressed.

    Args:
        every: seconds between two looks.
        once: print what there is now and return.

    Raises:
        UserError: the directory holds no run.
    """
    console = console or Console()
    first = view(run)
    if once:
        console.print(first)
        return
    try:
        with Live(first, console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while "outcome" not in read_exit(run):
                time.sleep(every)
                live.update(view(run), refresh=True)
    except KeyboardInterrupt:
        pass
    if console.is_terminal:
        console.print(view(run))  # what the full screen showed last stays


def view(run: Path, *, now: float | None = None) -> RenderableType:
    """All that is shown of a run at one moment.

    Args:
        now: seconds since 1970 (default: the clock).
    """
    if not (run / RECIPE).is_file():
        raise UserError(f"watch: got {run}, which holds no run; needed: a run directory")
    history = History.of(last_rows(run / METRICS, num_bytes=HELD_BYTES))
    if not history:
        return Text(f"no step yet, the run sets itself up: {run}")
    events = last_rows(run / EVENTS)
    told = [_event(event) for event in events if event["event"] != "save"]
    head = _head(run, history, events, time.time() if now is None else now)
    return Group(head, *told[-EVENTS_SHOWN:], _signals(history))


def _head(run: Path, history: History, events: list[dict[str, Any]], now: float) -> RenderableType:
    """How far it is, how long it will take, and whether it moves."""
    done = int(history.steps[-1]) + 1
    begun: dict[str, Any] = next((e for e in reversed(events) if e["event"] in BEGUN), {})
    total, last = begun.get("steps"), max(history.ends.values(), default=0.0)
    outcome = read_exit(run).get("outcome")
    left = ""
    if total and outcome is None and "time/step_s" in history:
        seconds = float(np.median(history.series("time/step_s")[1][-RECENT:]))
        left = f", {timedelta(seconds=round((total - done) * seconds))} left"
    ago = max(0.0, now - last)
    silent = "no step for" if ago > SILENT_S else "last step"
    state = outcome or f"{silent} {timedelta(seconds=round(ago))}{'' if ago > SILENT_S else ' ago'}"
    where = f"attempt {max(history.ends)}" + (f", {told_of(begun)}" if "world" in begun else "")
    counted = f"step {done:,}{f' of {total:,} ({done / total:.0%})' if total else ''}{left}"
    style = {"finished": "green", "failed": "red"}.get(str(outcome), "red" if ago > SILENT_S and not outcome else "")
    lines: list[RenderableType] = [Text(str(run), style="bold", overflow="ellipsis", no_wrap=True)]
    lines += [Text(counted), Text(f"{state}; {where}", style=style)]
    filled = round(BAR * min(1.0, done / total)) if total else 0
    return Group(*lines, Text.assemble(("━" * filled, "green"), ("━" * (BAR - filled), "dim")))


def _signals(history: History) -> Table:
    """Every signal: its value now, and how it got there."""
    steps = f"steps {int(history.steps[0]):,} to {int(history.steps[-1]):,}"
    table = Table(
        Column("", no_wrap=True, width=33, overflow="ellipsis"),
        Column("now", justify="right", no_wrap=True, width=10),
        Column(steps, no_wrap=True, width=SPARKS),
        box=None,
        padding=(0, 1),
    )
    for heading, groups in SECTIONS:
        rows = list(_rows(history, groups))
        if rows:
            table.add_row(Text(heading, style="bold"))
            for row in rows:
                table.add_row(*row)
    return table


def _rows(history: History, groups: tuple[training.Group, ...]) -> Iterator[tuple[str, str, str]]:
    for group in groups:
        for name in group.names(history):
            steps, values = history.series(name)
            if name.count("/") > 1 and name.startswith("loss/"):
                continue  # a term's sources are the report's, as are a step's parts and what is always 0
            if (name.startswith("time/") and name != "time/step_s") or not values.any():
                continue
            now = float(values[-RECENT:].mean()) if name.startswith(("loss", "perf", "time", "data")) else values[-1]
            yield f"  {name}", f"{now:.4g}", sparkline(steps, values)


def sparkline(steps: np.ndarray, values: np.ndarray, *, width: int = SPARKS) -> str:
    """A curve in one line: the means of equal numbers of steps, from the lowest of them to the highest."""
    _, means, _, _ = binned(steps, values, most=width)
    low, high = float(means.min()), float(means.max())
    level = (means - low) / (high - low) * (len(LEVELS) - 1) if high > low else np.zeros(len(means))
    return "".join(LEVELS[round(float(x))] for x in level)


def _event(event: dict[str, Any]) -> Text:
    said = f"step {event['step']:,} {event['event']} {told_of(event)}"
    return Text(said.rstrip(), style="yellow" if event["event"] in INCIDENTS else "", overflow="ellipsis", no_wrap=True)

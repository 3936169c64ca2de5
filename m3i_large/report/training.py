"""Which metrics are shown together, for one run and for several beside each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from m3i_large.report.charts import COLOURS, Line, Panel, panels_html
from m3i_large.report.history import History
from m3i_large.report.page import html_of, note
from m3i_large.report.run_data import RunData


@dataclass(frozen=True)
class Group:
    """Metrics that are drawn into one pair of axes where a single run is shown, the largest first.

    Attributes:
        start, end: of the metrics' names; the rest of a name is its label.
        log: logarithmic axis.
    """

    title: str
    start: str
    end: str = ""
    unit: str = ""
    log: bool = False

    def names(self, history: History) -> list[str]:
        """The metrics that belong here."""
        found = [name for name in history.names(self.start) if name.endswith(self.end)]
        return sorted(found, key=lambda name: -float(np.mean(np.abs(history.series(name)[1]))))

    def label(self, name: str) -> str:
        """What tells a metric from the others here."""
        return name.removeprefix(self.start).removesuffix(self.end).strip("/") or name.split("/")[-1]


SCHEDULES = (
    Group("Learning rate", "optim/lr"),
    Group("Momentum of the target's average", "optim/momentum_ema"),
    Group("Temperature of the text term", "optim/temperature"),
)
HEALTH = (
    Group("Gradient norm, before clipping", "optim/grad_norm", log=True),
    Group("Distance of student and average, relative", "optim/ema_distance"),
    Group("Updates left out in a row so far", "optim/skipped"),
    Group("Slowest rank over the median rank", "straggler/"),
    Group("Gradient of each term by the student's tokens", "gradient/", unit="norm", log=True),
)
COLLAPSE = (
    Group("Spread of targets", "collapse/", "/std", unit="standard deviation"),
    Group("Effective rank of targets", "collapse/", "/rank", unit="dimensions"),
    Group("Spread of predictions", "collapse/", "/prediction_std", unit="standard deviation"),
    Group("Effective rank of predictions", "collapse/", "/prediction_rank", unit="dimensions"),
    Group("Cosine of pairs", "cosine/"),
)
SPEED = (
    Group("Throughput", "perf/samples_per_s", unit="samples a second"),
    Group("Model FLOPs of the devices' peak (MFU)", "perf/mfu"),
    Group("All FLOPs of the devices' peak (HFU)", "perf/hfu"),
    Group("Parts of a step", "time/", "_s", unit="seconds"),
    Group("Waiting for data", "data/wait_s", unit="seconds a step"),
    Group("Memory of the first rank, highest so far", "perf/mem_gib", unit="GiB"),
    Group("Reads repeated so far", "data/retries"),
)
UNSEEN = ("time", "samples")  # of a row: not what a person looks at


def losses(runs: Sequence[RunData]) -> str:
    """Loss, each term, and each source of it."""
    found = dict.fromkeys(name for run in runs for name in run.history.names("loss/"))
    terms = [name for name in found if name.count("/") == 1]
    panels = list(_panels(runs, [Group("Loss, the weighted sum of the terms", "loss", "loss")]))
    if len(runs) == 1:
        panels += [_term_panel(runs[0], term) for term in terms]
    else:
        names = [*terms, *(name for name in found if name.count("/") == 2)]
        panels += [
            _beside(runs, name, Group(f"Loss of {name.removeprefix('loss/').replace('/', ' on ')}", name))
            for name in names
        ]
    return panels_html(panels, name="loss") + marks(runs)


def speed(runs: Sequence[RunData]) -> str:
    """Throughput, use of the devices, waiting, memory."""
    return _section(runs, SPEED, name="speed")


def schedules(runs: Sequence[RunData]) -> str:
    """What changes by plan."""
    return _section(runs, SCHEDULES, name="schedule")


def health(runs: Sequence[RunData]) -> str:
    """Gradients, collapse, slow ranks."""
    return _section(runs, HEALTH + COLLAPSE, name="health")


def others(runs: Sequence[RunData]) -> str:
    """Metrics that have no place of their own: none is left out."""
    groups = (*SPEED, *SCHEDULES, *HEALTH, *COLLAPSE)
    placed = {name for run in runs for group in groups for name in group.names(run.history)}
    rest = dict.fromkeys(
        name
        for run in runs
        for name in run.history.names("")
        if name not in placed and not name.startswith("loss") and name not in UNSEEN
    )
    return _section(runs, [Group(name, name, unit="") for name in rest], name="other")


def marks(runs: Sequence[RunData]) -> str:
    """What the vertical lines mean, where there are any."""
    told = []
    if any(run.restarts for run in runs):
        told.append("dotted: continued after a stop")
    if any(run.incidents for run in runs):
        told.append("dashed: an incident (see Events)")
    return note(f"Vertical lines: {'; '.join(told)}.") if told else ""


def _section(runs: Sequence[RunData], groups: Sequence[Group], *, name: str) -> str:
    """Panels of some groups, and a line about what is always 0, of which there is nothing to see."""
    still = [n for group in groups for n in _names(runs, group) if _always_zero(runs, n)]
    html = panels_html([panel for panel in _panels(runs, groups) if panel.lines], name=name)
    always = note(f"0 throughout: {', '.join(still)}.") if still else ""
    return html + always


def _names(runs: Sequence[RunData], group: Group) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in group.names(run.history)))


def _always_zero(runs: Sequence[RunData], name: str) -> bool:
    return not any(np.any(run.history.series(name)[1]) for run in runs if name in run.history)


def _panels(runs: Sequence[RunData], groups: Sequence[Group]) -> Iterator[Panel]:
    for group in groups:
        names = [name for name in _names(runs, group) if not _always_zero(runs, name)]
        if len(runs) > 1:
            yield from (_beside(runs, name, group) for name in names)
            continue
        for first in range(0, len(names), COLOURS):
            yield _together(runs[0], names[first : first + COLOURS], group)


def _together(run: RunData, names: Sequence[str], group: Group) -> Panel:
    """Several metrics of one run."""
    lines = [Line(group.label(name), *run.history.series(name), i) for i, name in enumerate(names)]
    return _marked([run], group, lines, metric=" ".join(names))


def _beside(runs: Sequence[RunData], name: str, group: Group) -> Panel:
    """One metric of several runs."""
    lines = [Line(run.label, *run.history.series(name), i) for i, run in enumerate(runs) if name in run.history]
    label = group.label(name)
    alone = name == group.start
    return _marked(runs, group, lines, metric=name, title=group.title if alone else f"{group.title}: {label}")


def _term_panel(run: RunData, term: str) -> Panel:
    """A term over all sources, and on each of them; one source alone is the term itself."""
    names = [term, *run.history.names(term + "/")]
    names = names[:COLOURS] if len(names) > 2 else names[:1]
    short = term.removeprefix("loss/")
    lines = [
        Line("all sources" if name == term else name.removeprefix(term + "/"), *run.history.series(name), i)
        for i, name in enumerate(names)
    ]
    return _marked([run], Group(f"Loss of {short}", term), lines, metric=" ".join(names))


def _marked(
    runs: Sequence[RunData], group: Group, lines: list[Line], *, metric: str, title: str | None = None
) -> Panel:
    """A panel with the runs' restarts and incidents; a logarithm only of what is positive."""
    gather = partial(_steps_of, runs)
    return Panel(
        title=title or group.title,
        metric=metric,
        lines=tuple(lines),
        unit=group.unit,
        restarts=gather("restarts"),
        incidents=gather("incidents"),
        log=group.log and all(line.values.min() > 0 for line in lines),
    )


def _steps_of(runs: Sequence[RunData], what: str) -> tuple[int, ...]:
    return tuple(sorted({step for run in runs for step in getattr(run, what)}))


def legend(runs: Sequence[RunData]) -> str:
    """Which colour is which run."""
    shown = [f'<span class="swatch c{i % COLOURS}"></span>{html_of(run.label)}' for i, run in enumerate(runs)]
    return f"<p>{' &nbsp; '.join(shown)}</p>" if len(runs) > 1 else ""

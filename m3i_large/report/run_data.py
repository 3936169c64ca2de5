"""Everything that a run directory says of its run; nothing else is asked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from m3i_large.errors import UserError
from m3i_large.goodput import Goodput, goodput
from m3i_large.metrics import EVENTS, read_rows
from m3i_large.pictures import Album, Sheet, album_sheets, chosen, look_steps, looks_of
from m3i_large.recipe_file import yaml_values
from m3i_large.report.history import History
from m3i_large.run import ENV, RECIPE, read_exit

BEGUN = ("start", "resume")
INCIDENTS = ("incident", "skip", "preempt")


@dataclass(frozen=True)
class RunData:
    """A run of pre-training or fine-tuning, finished, going on or broken off.

    Attributes:
        directory: the run's.
        label: what it is called beside others.
        recipe: resolved values, as in recipe.yaml.
    """

    directory: Path
    label: str
    recipe: dict[str, Any]
    history: History
    events: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    env: dict[str, Any]
    exit: dict[str, Any]

    @classmethod
    def read(cls, run: Path, *, label: str | None = None) -> "RunData":
        """Reads a run directory; UserError where it holds no run, or no step has been logged."""
        history = History.read(run) if (run / RECIPE).is_file() else None
        if not history:
            raise UserError(f"report: got {run}, which holds no run with a logged step; needed: a run directory")
        env = json.loads((run / ENV).read_text(encoding="utf-8")) if (run / ENV).is_file() else {}
        recipe = yaml_values(run / RECIPE)
        events, evaluations = read_rows(run / EVENTS), read_rows(run / "eval.jsonl")
        return cls(run, label or recipe["name"], recipe, history, events, evaluations, env, read_exit(run))

    @property
    def begun(self) -> list[dict[str, Any]]:
        """An event for each start."""
        return [event for event in self.events if event["event"] in BEGUN]

    @property
    def total_steps(self) -> int | None:
        """Steps that the run is to have."""
        return next(
            (event["steps"] for event in reversed(self.begun) if "steps" in event), self.recipe["train"]["steps"]
        )

    @property
    def restarts(self) -> tuple[int, ...]:
        """Steps at which an attempt went on, of the first of each."""
        return tuple(sorted({event["step"] for event in self.events if event["event"] == "resume"}))

    @property
    def incidents(self) -> tuple[int, ...]:
        """Steps at which something went wrong."""
        return tuple(sorted({event["step"] for event in self.events if event["event"] in INCIDENTS}))

    @cached_property
    def goodput(self) -> Goodput:
        """Where the wall time went."""
        return goodput(self.directory)

    @cached_property
    def album(self) -> Album | None:
        """The pictures that it is watched by."""
        return Album.load(self.directory / "pictures")

    @property
    def device_hours(self) -> float:
        """Hours that devices were held by the run's attempts, from each one's start to its last trace."""
        total = 0.0
        for event in self.begun:
            ends = [e["time"] for e in self.events if e["attempt"] == event["attempt"] and "time" in e]
            ended = max([self.history.ends.get(event["attempt"], 0.0), *ends], default=0.0)
            if "time" in event:
                total += event.get("world", 1) * max(0.0, ended - event["time"] + event.get("setup_s", 0.0))
        return total / 3600

    @property
    def quarantined(self) -> list[dict[str, Any]]:
        """Samples that could not be used."""
        return read_rows(self.directory / "quarantine.jsonl")

    @property
    def newest_evaluations(self) -> dict[str, dict[str, Any]]:
        """The last evaluation of each kind."""
        return {row.get("kind", "evaluation"): row for row in self.evaluations if "values" in row}

    def sheets(self) -> list[Sheet]:
        """The newest pictures: of the batch, of the album, of the worst samples."""
        pictures = self.directory / "pictures"
        found = [_newest(pictures, "input")]
        if self.album is not None:
            found += album_sheets(self.album, looks_of(pictures, chosen(look_steps(pictures))))
        return [sheet for sheet in [*found, _newest(pictures, "worst")] if sheet is not None]

    def credits(self) -> str:
        """Who made the pictures, where the data says so."""
        return "" if self.album is None else self.album.credits


def _newest(pictures: Path, name: str) -> Sheet | None:
    for path in sorted(pictures.glob(f"step_*/{name}.json"), reverse=True):
        if (sheet := Sheet.load(path.parent, name)) is not None:
            return sheet
    return None


def read_runs(runs: Sequence[Path]) -> list[RunData]:
    """Runs to be shown beside each other, each with a name of its own.

    Raises:
        UserError: none is given, one is given twice, or as `RunData.read`.
    """
    if not runs:
        raise UserError("report: got no run; needed: at least one run directory")
    places = [run.resolve() for run in runs]
    if twice := [run for i, run in enumerate(runs) if places[i] in places[:i]]:
        raise UserError(f"report: got {twice[0]} twice; needed: different runs")
    if len(runs) == 1:
        return [RunData.read(runs[0])]
    names = [run.name for run in places]
    labels = [place.name if names.count(place.name) == 1 else str(run) for run, place in zip(runs, places, strict=True)]
    return [RunData.read(run, label=label) for run, label in zip(runs, labels, strict=True)]

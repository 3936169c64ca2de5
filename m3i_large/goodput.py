"""How much of a run's wall time trained: a pure function of its metrics.jsonl and events.jsonl."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3i_large.metrics import EVENTS, METRICS, iterate_rows, read_rows


@dataclass(frozen=True)
class Goodput:
    """Seconds of wall time, from the first start to the last trace, by what they went into.

    Attributes:
        wall: everything, the time between attempts included.
        productive: steps that count and were applied, without their waiting for data.
        data: these steps' waiting for data.
        skipped: steps that count and were not applied.
        replayed: steps that a later attempt did again.
        checkpoints: what saving held the training up.
        other: starting, stopping, and what was lost between a step and a crash or down in between.
    """

    wall: float
    productive: float
    data: float
    skipped: float
    replayed: float
    checkpoints: float
    other: float

    @property
    def share(self) -> float:
        """productive / wall."""
        return self.productive / self.wall if self.wall > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        """JSON values: the share, and the seconds."""
        return {"share": round(self.share, 4), **{f"{k}_s": round(v, 3) for k, v in asdict(self).items()}}

    def to_text(self) -> str:
        """One line."""
        parts = {k: v / self.wall if self.wall > 0 else 0.0 for k, v in asdict(self).items() if k != "wall"}
        del parts["productive"]
        lost = ", ".join(f"{name} {share:.1%}" for name, share in parts.items())
        return f"goodput {self.share:.1%} of {self.wall / 60:.1f} minutes ({lost})"


def goodput(run: Path) -> Goodput:
    """Reads a run directory, of a run that goes on or has ended in whatever way."""
    events = [event for event in read_rows(run / EVENTS) if "time" in event]
    skipped = {(e["attempt"], e["step"]) for e in events if e["event"] == "skip"}
    began = min((e["time"] - e.get("setup_s", 0.0) for e in events), default=0.0)
    ended = max((e["time"] for e in events), default=0.0)
    replaced = _replaced_from(events)
    spent = dict.fromkeys(("productive", "data", "skipped", "replayed"), 0.0)
    for row in iterate_rows(run / METRICS):  # a long run has a million
        if "time/step_s" not in row:
            continue
        seconds, waited, step, attempt = row["time/step_s"], row["data/wait_s"], row["step"], row["attempt"]
        if step >= replaced.get(attempt, math.inf):
            spent["replayed"] += seconds
        elif (attempt, step) in skipped:
            spent["skipped"] += seconds
        else:
            spent["productive"] += seconds - waited
            spent["data"] += waited
        ended = max(ended, row.get("time", ended))
    checkpoints = sum(event.get("held_s", 0.0) for event in events if event["event"] == "save")
    wall = ended - began
    other = max(0.0, wall - sum(spent.values()) - checkpoints)
    return Goodput(wall=wall, checkpoints=checkpoints, other=other, **spent)


def _replaced_from(events: list[dict[str, Any]]) -> dict[int, float]:
    """By attempt: from which step on later ones did its steps again, as the weights they began with never saw them."""
    begun = {e["attempt"]: e["step"] for e in events if e["event"] in ("start", "resume")}
    replaced, first = {}, math.inf
    for attempt in sorted(begun, reverse=True):
        replaced[attempt] = first
        first = min(first, begun[attempt])
    return replaced

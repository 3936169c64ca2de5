"""How much of a run's wall time trained: a pure function of its metrics.jsonl and events.jsonl."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3i_large.metrics import read_rows


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
    rows = [row for row in read_rows(run / "metrics.jsonl") if "time/step_s" in row]
    events = [event for event in read_rows(run / "events.jsonl") if "time" in event]
    counted = _counted(rows, events)
    skipped = {(e["attempt"], e["step"]) for e in events if e["event"] == "skip"}
    spent = dict.fromkeys(("productive", "data", "skipped", "replayed"), 0.0)
    for row in rows:
        seconds, waited = row["time/step_s"], row["data/wait_s"]
        if row["attempt"] != counted.get(row["step"]):
            spent["replayed"] += seconds
        elif (row["attempt"], row["step"]) in skipped:
            spent["skipped"] += seconds
        else:
            spent["productive"] += seconds - waited
            spent["data"] += waited
    checkpoints = sum(event.get("seconds", 0.0) for event in events if event["event"] == "save")
    moments = [event["time"] - event.get("setup_s", 0.0) for event in events]
    moments += [moment for record in (*rows, *events) if (moment := record.get("time"))]
    wall = max(moments) - min(moments) if moments else 0.0
    other = max(0.0, wall - sum(spent.values()) - checkpoints)
    return Goodput(wall=wall, checkpoints=checkpoints, other=other, **spent)


def _counted(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> dict[int, int]:
    """The attempt that counts for each step; a later one replaces what earlier ones did from its first step on."""
    counted: dict[int, int] = {}
    begun = {e["attempt"]: e["step"] for e in events if e["event"] in ("start", "resume")}
    for row in rows:
        if all(row["step"] < step for attempt, step in begun.items() if attempt > row["attempt"]):
            counted[row["step"]] = row["attempt"]
    return counted

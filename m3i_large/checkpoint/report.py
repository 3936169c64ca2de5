"""What saving has to tell the training loop."""

from collections import deque
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """A row for events.jsonl: `save` (it is complete), or `incident` (what: checkpoint or checkpoint_copy; reason)."""

    event: str
    step: int
    details: dict[str, Any]

    @classmethod
    def incident(cls, step: int, *, what: str, reason: str, **more: Any) -> "Report":
        """Something that failed without ending the run; `reason` is one line."""
        return cls("incident", step, {"what": what, "reason": reason, **more})

    @property
    def line(self) -> str:
        """An incident as a sentence for the log; empty for what needs none."""
        if self.event != "incident":
            return ""
        return f"step {self.step}: {self.details['what'].replace('_', ' ')}: {self.details['reason']}"


def brief(error: Exception) -> str:
    """What went wrong in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def drain(reports: deque[Report]) -> list[Report]:
    """Takes out all that is there while another thread may add more."""
    return [reports.popleft() for _ in range(len(reports))]

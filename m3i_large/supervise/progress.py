"""What a run directory tells about a training from outside: how far it is, whether it still writes, how it ended."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_large.metrics import EVENTS, METRICS, last_rows
from m3i_large.run import EXIT, read_exit


@dataclass(frozen=True)
class Reached:
    """Steps done, and steps in the newest checkpoint that was announced."""

    step: int = 0
    saved: int = 0

    def beyond(self, other: "Reached") -> bool:
        """Whether either number is larger than in `other`."""
        return self.step > other.step or self.saved > other.saved

    def furthest(self, other: "Reached") -> "Reached":
        """The larger of each number."""
        return Reached(max(self.step, other.step), max(self.saved, other.saved))


def reached(run: Path) -> Reached:
    """How far the newest rows of a run say that it is."""
    steps = [row["step"] + 1 for row in last_rows(run / METRICS) if "step" in row]
    saves = [row["step"] for row in last_rows(run / EVENTS) if row.get("event") == "save"]
    return Reached(max(steps, default=0), max(saves, default=0))


class Activity:
    """Seconds since the run last wrote a row."""

    def __init__(self, run: Path) -> None:
        self._files = (run / METRICS, run / EVENTS)
        self._sizes, self._since = self._measure(), time.monotonic()

    def silent_s(self) -> float:
        """By this machine's monotonic clock: file times of shared storage come from another one."""
        sizes = self._measure()
        if sizes != self._sizes:
            self._sizes, self._since = sizes, time.monotonic()
        return time.monotonic() - self._since

    def _measure(self) -> list[int]:
        return [path.stat().st_size if path.is_file() else 0 for path in self._files]


class ExitFile:
    """exit.json as this start left it; one of an earlier start does not count."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._before = self._stamp()

    def read(self) -> dict[str, Any]:
        """What this start wrote; empty where it wrote nothing."""
        return read_exit(self._run) if self._stamp() not in (None, self._before) else {}

    def _stamp(self) -> tuple[int, int] | None:
        path = self._run / EXIT
        if not path.is_file():
            return None
        status = path.stat()
        return status.st_ino, status.st_mtime_ns

"""The metrics of a run as columns: a million steps fit, as no row is kept."""

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3i_large.metrics import METRICS, iterate_rows

NAN = math.nan


@dataclass(frozen=True)
class History:
    """Metrics by step.

    Attributes:
        steps: (N,) int64, rising.
        columns: (N,) float64 by name, NaN where a row has none.
        ends: time of the last row of each attempt, seconds since 1970.
    """

    steps: np.ndarray
    columns: dict[str, np.ndarray]
    ends: dict[int, float]

    @classmethod
    def read(cls, run: Path) -> "History":
        """The whole metrics.jsonl."""
        return cls.of(iterate_rows(run / METRICS))

    @classmethod
    def of(cls, found: Iterable[dict[str, Any]]) -> "History":
        """Of rows with the same step the highest attempt's last one counts, as for `read_metrics`."""
        place: dict[int, int] = {}  # of a step
        attempts: dict[int, int] = {}
        columns: dict[str, array[float]] = {}
        ends: dict[int, float] = {}
        rows = 0
        for row in found:
            step, attempt = row["step"], row["attempt"]
            ends[attempt] = max(ends.get(attempt, 0.0), row.get("time", 0.0))
            if attempt < attempts.get(step, -1):
                continue
            attempts[step], place[step] = attempt, rows
            for name in row.keys() - columns.keys() - {"step", "attempt"}:
                columns[name] = array("d", [NAN]) * rows
            for name, column in columns.items():
                value = row.get(name)
                column.append(NAN if value is None else value)
            rows += 1
        steps = np.array(sorted(place), np.int64)
        kept = np.array([place[step] for step in steps], np.int64)
        values = {name: np.frombuffer(column)[kept] for name, column in sorted(columns.items())}
        return cls(steps, values, ends)

    def __len__(self) -> int:
        return len(self.steps)

    def __contains__(self, name: str) -> bool:
        return name in self.columns and bool(np.isfinite(self.columns[name]).any())

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, where it has values."""
        values = self.columns[name]
        there = np.isfinite(values)
        return self.steps[there], values[there]

    def names(self, start: str) -> list[str]:
        """Metrics whose names begin so."""
        return [name for name in self.columns if name.startswith(start) and name in self]

    def total(self, name: str) -> float:
        """Sum over steps; 0 where there is no such metric."""
        return float(np.nansum(self.columns[name])) if name in self else 0.0

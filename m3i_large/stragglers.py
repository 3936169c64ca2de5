"""Ranks that are slower than the others.

Under ZeRO-3 all ranks' forward and backward passes take the same time, that of the slowest: each waits for the others
in every gather. What a rank's step would take if it waited for nobody is therefore estimated: what it does alone
(waiting for its data, the moving average) as measured, and what it does with the others in proportion to the time of a
fixed piece of work, the probe.
"""

import statistics
import time
from collections.abc import Sequence

import torch

CHECKS = 3  # in a row, before a rank is called slow
PROBE_SIDE = {"cpu": 384, "cuda": 4096}


def probe(device: torch.device) -> float:
    """Seconds of the fixed piece of work, one matrix product on the device: the best of three."""
    x = torch.ones(2 * [PROBE_SIDE[device.type]], device=device)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def own_seconds(alone: Sequence[float], together: Sequence[float], probes: Sequence[float]) -> list[float]:
    """Each rank's estimated step, by rank: alone + the least time together * its probe / the median probe."""
    shared, usual = min(together), statistics.median_low(probes)
    return [a + shared * p / usual for a, p in zip(alone, probes, strict=True)]


class Stragglers:
    """Which rank is persistently slower than `factor` times the median."""

    def __init__(self, *, factor: float) -> None:
        self._factor, self._count = factor, 0
        self._slowest: int | None = None

    def check(self, seconds: Sequence[float]) -> tuple[float, int | None]:
        """Takes one look; -> the slowest over the median, and the rank to report, once each time it becomes slow."""
        ratio = max(seconds) / statistics.median_low(seconds)
        slowest = seconds.index(max(seconds)) if ratio > self._factor else None
        self._count = self._count + 1 if slowest == self._slowest else 1
        self._slowest = slowest
        return ratio, slowest if self._count == CHECKS else None

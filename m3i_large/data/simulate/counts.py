"""The whole run in closed form: how many draws of which source by which step, and whether the split ever drifts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from m3i_large.data.mixture import Mixture
from m3i_large.data.simulate.reads import shares

MOST_STEPS = 1_000_000  # of a longer run, the first and the last half of this
CALL = 1 << 13


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """Closed-form figures of one source over the run.

    Attributes:
        share: samples per lane and step on average; slots: fewest and most of them in a step.
        drift: furthest that the draws per lane were from `share` x step.
        epochs, wanted: passes over the source, and those asked for (None where the recipe fixes steps).
        overshoot: samples drawn beyond those.
    """

    name: str
    samples: int
    block: int
    blocks_per_window: int
    share: float
    slots: tuple[int, int]
    drift: float
    drawn: int
    epochs: float
    wanted: float | None
    overshoot: float | None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The whole run (T steps).

    Attributes:
        looked_at: steps whose split was computed: all of them up to MOST_STEPS.
        filled: each of these fills its lanes exactly, with no source drawn backwards.
        shortest: one step less would leave a source short (None where the recipe fixes steps).
        drift_TS: for plots, (stretches, S) furthest drift in each stretch of steps; at_T: where the stretches begin.
    """

    steps: int
    looked_at: int
    filled: bool
    shortest: bool | None
    sources: list[SourceCounts]
    at_T: np.ndarray = field(repr=False)
    drift_TS: np.ndarray = field(repr=False)


def count(
    mixture: Mixture,
    *,
    steps: int,
    epochs: float | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Counts:
    """Goes through the split of every step. epochs: what the run was to draw, weighted by repeats; None: not asked."""
    share = np.array(shares(mixture))
    ranges = [(0, steps)]
    if steps > MOST_STEPS:
        ranges = [(0, MOST_STEPS // 2), (steps - MOST_STEPS // 2, steps)]
    looked_at = sum(stop - start for start, stop in ranges)
    fewest, most, filled, done = np.full(len(share), mixture.slots), np.zeros(len(share), np.int64), True, 0
    at, drift = [], []
    for first, last in ranges:
        for start in range(first, last, CALL):
            stop = min(start + CALL, last)
            drawn_TS = np.array([mixture.drawn(step) for step in range(start, stop + 1)], np.int64)
            k_TS = np.diff(drawn_TS, axis=0)
            filled &= bool((k_TS.sum(1) == mixture.slots).all() and (k_TS >= 0).all())
            fewest, most = np.minimum(fewest, k_TS.min(0)), np.maximum(most, k_TS.max(0))
            at.append(start)
            drift.append(np.abs(drawn_TS - np.arange(start, stop + 1)[:, None] * share).max(0))
            done += stop - start
            progress(done, looked_at)
    drift_TS = np.array(drift)
    sources = _sources(mixture, steps=steps, epochs=epochs, slots=(fewest, most), drift=drift_TS.max(0))
    shortest = None
    if epochs is not None:
        wanted = _wanted(mixture, epochs=epochs)
        shortest = not _enough(mixture, steps - 1, wanted=wanted) and _enough(mixture, steps, wanted=wanted)
    return Counts(
        steps=steps,
        looked_at=looked_at,
        filled=filled,
        shortest=shortest,
        sources=sources,
        at_T=np.array(at),
        drift_TS=drift_TS,
    )


def step_of(mixture: Mixture, *, source: int, draw: int) -> int:
    """The step that takes draw number `draw` (from 0, over all lanes) of a source."""
    low, high = 0, 1
    while mixture.position(high)[source] <= draw:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mixture.position(middle)[source] <= draw else (low, middle)
    return low


def _sources(
    mixture: Mixture,
    *,
    steps: int,
    epochs: float | None,
    slots: tuple[np.ndarray, np.ndarray],
    drift: np.ndarray,
) -> list[SourceCounts]:
    wanted = [None] * len(mixture.orders) if epochs is None else _wanted(mixture, epochs=epochs)
    result = []
    for s, (order, share, drawn, want) in enumerate(
        zip(mixture.orders, shares(mixture), mixture.position(steps), wanted, strict=True)
    ):
        result.append(
            SourceCounts(
                name=order.name,
                samples=order.n,
                block=order.b,
                blocks_per_window=order.K,
                share=share,
                slots=(int(slots[0][s]), int(slots[1][s])),
                drift=float(drift[s]),
                drawn=drawn,
                epochs=drawn / order.n,
                wanted=None if want is None else float(want / order.n),
                overshoot=None if want is None else float(drawn - want),
            )
        )
    return result


def _wanted(mixture: Mixture, *, epochs: float) -> list[Fraction]:
    """Draws asked for of each source: epochs x repeats x n."""
    return [Fraction(str(epochs)) * weight / mixture.denominator for weight in mixture.weights]


def _enough(mixture: Mixture, steps: int, *, wanted: list[Fraction]) -> bool:
    return all(p >= w for p, w in zip(mixture.position(steps), wanted, strict=True))

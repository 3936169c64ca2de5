"""Decides from each step's loss whether a run goes on, or reloads a checkpoint and leaves bad steps out. Pure."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# A spike is at least this share of the usual loss times the factor: a loss that hardly moves has a tiny spread.
LEAST_SPREAD = 0.01
SIGMA_PER_MAD = 1.4826  # of a normal distribution


class SpikeConfig(BaseModel):
    """When a loss is a spike, and what happens then."""

    model_config = ConfigDict(extra="forbid")

    window: int = Field(
        100, ge=10, description="steps whose losses say what is usual; none is judged before half of it"
    )
    factor: float = Field(10.0, gt=0, description="a spike lies so many standard deviations above the median")
    action: Literal["warn", "reload", "off"] = Field(
        "warn", description="reload: back to the last good checkpoint, the spike's steps left out"
    )


class SpikeDetector:
    """Losses far above the median of the last `window`, measured by their median absolute deviation.

    Both hardly move while less than half of the window are spikes; a loss that stays high is usual in the end.
    """

    def __init__(self, *, window: int, factor: float) -> None:
        self._losses: deque[tuple[int, float]] = deque(maxlen=window)
        self._least, self._factor = window // 2, factor

    def is_spike(self, step: int, loss: float) -> bool:
        """Judges a finite loss by those before it, and takes it in."""
        before = [value for _, value in self._losses]
        self._losses.append((step, loss))
        if len(before) < self._least:
            return False
        median = statistics.median(before)
        spread = SIGMA_PER_MAD * statistics.median(abs(value - median) for value in before)
        return loss > median + self._factor * max(spread, LEAST_SPREAD * abs(median))

    def rewind(self, step: int) -> None:
        """Forgets the losses from `step` on."""
        self._losses = deque((x for x in self._losses if x[0] < step), maxlen=self._losses.maxlen)


@dataclass(frozen=True)
class Judgement:
    """What was found of a step; `reload`: the steps of the streak are to be undone and left out."""

    kind: Literal["good", "skipped", "spike"]
    reload: bool = False


class Guard:
    """Follows the steps of a run.

    A streak is a run of bad steps: not applied because a gradient was not finite, or spikes that are to be undone. It
    ends a reload: after `max_skipped` steps, or, where it holds a spike, as soon as a good step follows.

    Args:
        max_skipped: length of a streak that leads to a reload.
        spike: see SpikeConfig.
        skip_steps: steps that are never applied, from the recipe and the checkpoint.
    """

    def __init__(self, *, max_skipped: int, spike: SpikeConfig, skip_steps: Iterable[int]) -> None:
        self.skip_steps = set(skip_steps)
        self._max_skipped, self._action = max_skipped, spike.action
        self._detector = SpikeDetector(window=spike.window, factor=spike.factor)
        self._streak: list[int] = []
        self._undo = False  # the streak holds steps that were applied
        self._last_bad, self.rewinds = -1, 0  # rewinds since a step after the bad ones was good
        self._high = False

    def judge(self, step: int, *, applied: bool, loss: float) -> Judgement:
        """Takes in a step that was run (not one of `skip_steps`) and its `loss`, the same on every rank."""
        if not applied:
            self.skip_steps.add(step)
            self._streak.append(step)
            return Judgement("skipped", reload=len(self._streak) >= self._max_skipped)
        high = self._action != "off" and math.isfinite(loss) and self._detector.is_spike(step, loss)
        first, self._high = high and not self._high, high
        if high and self._action == "reload":
            self._streak.append(step)
            self._undo = True
            return Judgement("spike", reload=len(self._streak) >= self._max_skipped)
        if self._undo:
            return Judgement("good", reload=True)
        self._streak.clear()
        self.rewinds = self.rewinds if step <= self._last_bad else 0
        return Judgement("spike" if first else "good")  # a loss that stays high is told once

    def recall(self, losses: Mapping[int, float]) -> None:
        """Takes in the losses of steps before this start, so that a restart changes no judgement."""
        for step in sorted(losses.keys() - self.skip_steps):
            self._high = self._detector.is_spike(step, losses[step])

    @property
    def streak(self) -> list[int]:
        """The bad steps that led here; empty after a good one. What is saved during a streak may be bad as well."""
        return list(self._streak)

    @property
    def spoiled(self) -> bool:
        """Whether weights hold an update that may be undone: they are not worth a checkpoint."""
        return self._undo

    def skipped(self, step: int) -> int:
        """How many steps up to and with `step` were not applied."""
        return sum(s <= step for s in self.skip_steps)

    def rewind(self, step: int) -> None:
        """Back to before `step`: the streak's steps are left out from now on."""
        self.skip_steps.update(self._streak)
        self._last_bad, self.rewinds = max(self._streak), self.rewinds + 1
        self._streak, self._undo, self._high = [], False, False
        self._detector.rewind(step)

"""Counts replaced samples and says when there are too many of them."""

import math
from collections import deque
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from m3i_large.data.config import BadSampleBudget
from m3i_large.data.producer import BadSample
from m3i_large.errors import UserError


class BadSampleLedger:
    """What one rank has seen of each source.

    Args:
        budget: data.bad_samples.
        names: of the sources, in the recipe's order.
    """

    def __init__(self, budget: BadSampleBudget, names: Sequence[str]) -> None:
        self._budget, self._names = budget, names
        self._drawn = [0] * len(names)
        self._in_a_row = [0] * len(names)
        self._longest = [0] * len(names)
        self._bad: list[deque[int]] = [deque() for _ in names]
        self._last: dict[str, BadSample] = {}
        # In whole samples, by the share's decimal digits: 0.29 of 100 is 29, not 28.999.
        self._most = math.floor(Fraction(str(budget.share)) * budget.window)

    def count(self, source_N: np.ndarray, substitute_N: np.ndarray, bad: Sequence[BadSample]) -> None:
        """Takes one micro-batch: the source of each row, its substitute's number (0: itself), and what was bad."""
        self._last |= {sample.source: sample for sample in bad}
        for source in range(len(self._names)):
            for replaced in substitute_N[source_N == source] > 0:
                self._drawn[source] += 1
                self._in_a_row[source] = self._in_a_row[source] + 1 if replaced else 0
                if replaced:
                    self._bad[source].append(self._drawn[source])
                self._longest[source] = max(self._longest[source], self._in_a_row[source])
            while self._bad[source] and self._bad[source][0] <= self._drawn[source] - self._budget.window:
                self._bad[source].popleft()

    def check(self) -> None:
        """Raises UserError where a source is over its budget, naming it, the figures and the last bad sample."""
        for source, name in enumerate(self._names):
            if (row := self._longest[source]) >= (limit := self._budget.in_a_row):
                self._refuse(name, f"{row} samples in a row", f"below {limit} (in_a_row)")
            if (bad := len(self._bad[source])) > self._most:
                seen = min(self._drawn[source], self._budget.window)
                self._refuse(name, f"{bad} of the last {seen} samples", f"at most {self._most} (share)")

    def _refuse(self, name: str, got: str, needed: str) -> None:
        last = self._last[name]
        raise UserError(
            f"source {name}: {got} could not be used; needed: {needed}, of data.bad_samples. "
            f"The last one: {last.key} of {last.shard}: {last.reason}"
        )

"""Signals that ask a run to save and to end."""

import signal
from types import FrameType
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) ask for a checkpoint and an orderly end.

    A handler only takes a note, so that further signals disturb nothing; the launcher kills ranks 30 s after SIGTERM.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in ASKING:
            self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # The launcher passes SIGTERM on after Ctrl-C: the first signal is the reason.
        self.number = self.number or number

"""Signals that ask a run to save and to end."""

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """SIGTERM and SIGINT ask for a checkpoint and an orderly end; the launcher kills ranks 30 s after SIGTERM."""

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # The launcher passes SIGTERM on after Ctrl-C: the first signal is the reason.
        self.name = self.name or signal.Signals(number).name
        self.requested = True

"""Signals that ask a run to save and to end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
Handler = Callable[[int, FrameType | None], None]


class Stopped(KeyboardInterrupt):
    """A run was asked to stop while it set itself up: there is nothing to save, and it can be started again."""


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """ASKING raise Stopped in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"{signal.Signals(number).name} before the first step; the same command starts again")

    with _handled_by(stop):
        yield


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) ask for a checkpoint and an orderly end.

    A handler only takes a note, so that further signals disturb nothing; the launcher kills ranks 30 s after SIGTERM.
    """

    def __init__(self) -> None:
        self.number = 0
        self._handlers = _handled_by(self._ask)

    def __enter__(self) -> "StopSignals":
        self._handlers.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._handlers.__exit__(None, None, None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # The launcher passes SIGTERM on after Ctrl-C: the first signal is the reason.
        self.number = self.number or number


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)

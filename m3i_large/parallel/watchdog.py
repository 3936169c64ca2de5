"""Finds ranks that make no progress, in bounded time, and ends the run with the stacks of all of them.

Every rank has a thread that writes the rank's place into a small file every few seconds. A rank that is stopped or
holds the interpreter's lock writes nothing, one that waits in a collective says so: whoever is behind can be named from
the files alone, whatever state the process group is in.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType

from m3i_large.parallel.comm import Rank

PATIENT = ("checkpoint", "pictures")  # phases that may take PATIENCE times as long, like the first step
PATIENCE = 3
BEATS_PER_TIMEOUT, LONGEST_BEAT_S = 10, 10.0
SILENT_BEATS = 3  # a rank that has not written for so many beats is not running
WAITING_IN = ("torch/distributed/", "deepspeed/")


@dataclass(frozen=True)
class Beat:
    """A rank's place.

    Attributes:
        place: phases begun so far, which are the same ones in the same order on all ranks.
        waiting: whether its main thread is within a collective (False where it cannot be told).
        silent_s: for how long it has written nothing.
    """

    rank: int
    host: str
    place: int
    step: int
    phase: str
    waiting: bool
    silent_s: float = 0.0


def behind(beats: Sequence[Beat], *, silent_s: float) -> list[Beat]:
    """The ranks that hold the others up: those that do not run; else those that are not waiting for others and have
    come least far; all of them where all are at the same place."""
    silent = [beat for beat in beats if beat.silent_s > silent_s]
    if silent:
        return silent
    least = min((beat.place, beat.waiting) for beat in beats)
    return [beat for beat in beats if (beat.place, beat.waiting) == least]


def describe(beats: Sequence[Beat]) -> str:
    """One line about them."""
    shown = [f"rank {b.rank} ({b.host}) in {b.phase} of step {b.step}" for b in beats[:4]]
    return ", ".join(shown) + (f" and {len(beats) - 4} more" if len(beats) > 4 else "")


class Watchdog:
    """Watches this rank while it is entered; ends the process with status 1 when a rank hangs.

    Args:
        run: run directory; stacks go to stacks/attempt_A_rank_R.txt, places to .beats/.
        rank: this process.
        attempt: number of this start.
        timeout_s: longest time between two phases (three times as long in the first step and in a checkpoint).
        on_hang: called by one rank, in the watching thread, with the ranks that are behind.
    """

    def __init__(
        self, run: Path, *, rank: Rank, attempt: int, timeout_s: float, on_hang: Callable[[list[Beat]], None]
    ) -> None:
        self._rank, self._timeout, self._on_hang = rank, timeout_s, on_hang
        self._interval = min(LONGEST_BEAT_S, timeout_s / BEATS_PER_TIMEOUT)
        self._beats, self._stacks = run / ".beats", run / "stacks"
        self._name = f"attempt_{attempt}_rank_{rank.rank}"
        self._all = [self._beats / f"attempt_{attempt}_rank_{r}.json" for r in range(rank.world)]
        self._alarm = self._stacks / f"attempt_{attempt}_hang"
        self._place, self._step, self._phase, self._first_step = 0, -1, "start", -1
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._beats.mkdir(parents=True, exist_ok=True)
        self._stacks.mkdir(exist_ok=True)
        self._file = (self._stacks / f"{self._name}.txt").open("w", encoding="utf-8")
        self._main = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with contextlib.suppress(OSError):  # leftovers of a rank that died stay; nothing reads them
            (self._beats / f"{self._name}.json").unlink(missing_ok=True)
            (self._stacks / f"{self._name}.txt").unlink()
            self._stacks.rmdir()
        with contextlib.suppress(OSError):
            self._beats.rmdir()

    def mark(self, phase: str, step: int) -> None:
        """This rank begins a phase."""
        if self._first_step < 0:
            self._first_step = step
        self._place, self._step, self._phase, self._since = self._place + 1, step, phase, time.monotonic()

    def _watch(self) -> None:
        beat = self._interval
        while not self._stop.wait(beat):
            # While something holds the interpreter's lock this thread cannot run: then faulthandler's own does.
            faulthandler.dump_traceback_later(self._timeout + 2 * beat, exit=True, file=self._file)
            # A file that cannot be written or read now can be in the next beat, or this rank is as good as silent.
            with contextlib.suppress(OSError):
                self._write()
                patient = self._step == self._first_step or self._phase in PATIENT
                if time.monotonic() - self._since > self._timeout * (PATIENCE if patient else 1):
                    self._alarm.touch()
                if self._alarm.exists():
                    self._end()

    def _write(self) -> None:
        path = self._beats / f"{self._name}.json"
        temporary = path.with_suffix(".tmp")
        waiting = is_waiting(sys._current_frames().get(self._main))
        beat = Beat(self._rank.rank, socket.gethostname(), self._place, self._step, self._phase, waiting)
        temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
        os.replace(temporary, path)

    def _read(self) -> list[Beat]:
        """Every rank's last beat; times are the file system's, so that clocks need not agree."""
        found = []
        for rank, path in enumerate(self._all):
            try:
                found.append((path.stat().st_mtime, Beat(**json.loads(path.read_text(encoding="utf-8")))))
            except FileNotFoundError:  # it has not come to its first beat, or has left already
                found.append((0.0, Beat(rank, "?", 0, -1, "start", False)))
        newest = max(moment for moment, _ in found)
        return [replace(b, silent_s=round(newest - t, 1) if t else self._timeout) for t, b in found]

    def _end(self) -> None:
        """Dumps this process's stacks, reports if no lower rank can, and ends without the interpreter's leave."""
        try:
            faulthandler.dump_traceback(self._file, all_threads=True)
            beats = self._read()
            silent_s = SILENT_BEATS * self._interval
            running = [beat.rank for beat in beats if beat.silent_s <= silent_s]
            if self._rank.rank == min(running):
                self._on_hang(behind(beats, silent_s=silent_s))
            # The launcher ends all ranks as soon as one has ended: first the others are to see the alarm.
            time.sleep(2 * self._interval)
        finally:
            os._exit(1)


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a thread at `frame` waits for other ranks."""
    return frame is not None and any(place in frame.f_code.co_filename for place in WAITING_IN)

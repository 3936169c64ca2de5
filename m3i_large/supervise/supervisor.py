"""The restart policy: start, watch, judge the end, wait, start again; or give up with the reason."""

import os
import random
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from m3i_large.errors import REQUEUE, OutageError, UserError
from m3i_large.metrics import append_row
from m3i_large.run import RECIPE, read_exit
from m3i_large.supervise.available import Available, largest_world
from m3i_large.supervise.command import Command, shortened, slots
from m3i_large.supervise.processes import Family, marked
from m3i_large.supervise.progress import Activity, ExitFile, Reached, reached

LOG = "supervise.jsonl"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
Outcome = Literal["finished", "interrupted", "mistake", "failed"]


@dataclass(frozen=True)
class Policy:
    """When to restart, how long to wait, when to give up. Seconds."""

    failures: int = 3  # in a row without a step or checkpoint further
    delay_s: float = 5.0  # before the first restart; doubles
    delay_cap_s: float = 300.0
    grace_s: float = 120.0  # from the stop signal to the kill
    timeout_s: float = 1800.0  # without a new row: hung
    orphans_s: float = 10.0  # for ranks to end after their launcher
    poll_s: float = 0.2

    def delay(self, failures: int, *, luck: float) -> float:
        """Seconds before the restart after so many failures in a row; `luck` in [0, 1) spreads runs that crash
        together over the upper half."""
        return min(self.delay_cap_s, self.delay_s * 2 ** (failures - 1)) * (0.5 + luck / 2)


@dataclass(frozen=True)
class End:
    """How one start ended, and why."""

    outcome: Outcome
    reason: str


def supervise(
    command: Command,
    *,
    run: Path,
    worlds: Sequence[int],
    available: Callable[[], Available],
    policy: Policy,
    say: Callable[[str], None],
) -> int:
    """Runs `command` until its training in `run` is finished.

    Args:
        worlds: valid numbers of ranks.
        available: asked before each start.
        say: takes one line about each thing done; `run`/supervise.jsonl holds the same.

    Returns:
        Exit status: 0 finished, 75 stopped by a signal, 2 a mistake in the input, 1 given up.

    Raises:
        UserError: another supervisor's or an orphaned training still runs in `run`.
    """
    if left := sorted(marked(run)):
        raise UserError(f"--out: {run} is still trained by the processes {', '.join(map(str, left))}; end them first")
    supervisor = Supervisor(command, run, worlds, available, policy, say)
    heeded = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    previous = {number: signal.signal(number, supervisor.take_signal) for number in heeded}
    try:
        return supervisor.run_to_the_end()
    except OutageError as error:
        supervisor.log("gave up", reason=str(error))
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Supervisor:
    """One supervised run."""

    def __init__(
        self,
        command: Command,
        run: Path,
        worlds: Sequence[int],
        available: Callable[[], Available],
        policy: Policy,
        say: Callable[[str], None],
    ) -> None:
        self._command, self._run, self._worlds = command, run, worlds
        self._available, self._policy, self._say = available, policy, say
        self._signal = ""
        self._starts = 0
        self._world = 0
        self._reached = reached(run)
        self._unwritten: deque[dict[str, Any]] = deque()

    def take_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal counts: schedulers and impatient people send several."""
        self._signal = self._signal or signal.Signals(number).name

    def run_to_the_end(self) -> int:
        """Starts and restarts; returns the exit status."""
        failures = 0
        while True:
            end = self._start_and_watch()
            now = reached(self._run)
            failures = 1 if now.beyond(self._reached) else failures + 1
            self._reached = self._reached.furthest(now)
            if end.outcome == "finished":
                self.log("finished", reason=end.reason)
                return 0
            if end.outcome == "interrupted":
                self.log("interrupted", reason=end.reason)
                return REQUEUE
            if end.outcome == "mistake":
                self.log("gave up", reason=end.reason)
                return 2
            if failures >= self._policy.failures:
                times = f"{failures} failures in a row {_place(self._reached)}"
                self.log("gave up", reason=f"{times}; the last: {end.reason}")
                return 1
            delay = self._policy.delay(failures, luck=random.random())
            self.log("restart", reason=end.reason, delay_s=round(delay, 3))
            self._sleep(delay)

    def _start_and_watch(self) -> End:
        if self._signal:
            return End("interrupted", f"{self._signal} before the start")
        try:
            found = self._available()
            self._world = largest_world(self._worlds, found.count)
            hosts = slots(self._command.hostfile) if self._command.hostfile else {}
        except OutageError as error:
            return End("failed", str(error))
        except UserError as error:
            if not self._starts:
                raise
            return End("failed", str(error))  # a hostfile being rewritten, say
        with tempfile.TemporaryDirectory(prefix="supervise-") as folder:
            hostfile = Path(folder) / "hostfile" if hosts else None
            if hostfile:
                hostfile.write_text(shortened(hosts, self._world), encoding="utf-8")
            words = self._command.on(self._world, devices=found.devices, hostfile=hostfile)
            env = self._command.environment(self._world, devices=found.devices)
            self._starts += 1
            self.log("start", available=found.count, command=words)
            exit_file = ExitFile(self._run)
            try:
                family = Family(words, run=self._run, env=env)
            except OSError as error:
                return End("mistake", f"{words[0]}: {os.strerror(error.errno or 0)}")
            return self._judge(family, exit_file, stopped=self._watch(family))

    def _watch(self, family: Family) -> str:
        """Waits for the end of one start, passing a signal on; returns why it was killed, empty if it was not."""
        policy, activity = self._policy, Activity(self._run)
        asked_at: float | None = None
        killed = ""
        while not killed and family.status() is None:
            time.sleep(policy.poll_s)
            if self._signal and asked_at is None:
                asked_at = time.monotonic()
                self.log("signal", reason=self._signal)
                family.ask_to_stop()
            if asked_at is not None and time.monotonic() - asked_at > policy.grace_s:
                killed = f"still running {policy.grace_s:g} s after {self._signal}"
            elif asked_at is None and activity.silent_s() > policy.timeout_s:
                killed = f"no new row in metrics.jsonl or events.jsonl for {policy.timeout_s:g} s"
        left = policy.grace_s - (time.monotonic() - asked_at) if asked_at is not None else policy.orphans_s
        orphans = family.end(patience_s=0.0 if killed else max(0.0, left))
        if orphans:
            self.log("kill", reason=killed or "outlived the launcher", processes=orphans)
        return killed

    def _judge(self, family: Family, exit_file: ExitFile, *, stopped: str) -> End:
        """exit.json is the truth: the launcher may exit 0 after a rank was killed, and 1 after an orderly end."""
        status, written = family.status(), exit_file.read()
        outcome, message = written.get("outcome"), str(written.get("message") or "")
        if outcome == "finished" or (status == 0 and not written and self._finished_before()):
            return End("finished", f"exit status {status}")
        if self._signal or outcome == "interrupted" or status == REQUEUE:
            return End("interrupted", stopped or message or self._signal or "stopped by a signal of its own")
        if status == 2 and not stopped:
            said = message or "its own message says why"
            return End("mistake", f"the command refused its input (exit status 2): {said}")
        how = f"killed by {signal.Signals(-status).name}" if status is not None and status < 0 else f"status {status}"
        return End("failed", stopped or (f"{message} ({how})" if message else f"the command ended with {how}"))

    def _finished_before(self) -> bool:
        return read_exit(self._run).get("outcome") == "finished"

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._signal and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, self._policy.poll_s))

    def log(self, event: str, **details: Any) -> None:
        """Says what was done, and writes it into the run directory."""
        row = {"time": time.time(), "event": event, "start": self._starts, "world": self._world}
        row |= {"step": self._reached.step, "saved": self._reached.saved, **details}
        # A new run's directory is the training's to make: it refuses one that already holds files.
        self._unwritten.append(row)
        # Nor may a full disk end the supervisor: what it does not take waits for the next row.
        with suppress(OSError):
            while self._unwritten and (self._run / RECIPE).is_file():
                append_row(self._run / LOG, self._unwritten[0])
                self._unwritten.popleft()
        shown = ", ".join(f"{k} {v}" for k, v in details.items() if k != "command")
        self._say(f"supervise: {event} (start {self._starts}, {self._world} ranks){': ' if shown else ''}{shown}")


def _place(at: Reached) -> str:
    if not at.step:
        return "before the first step"
    return f"at step {at.step} (newest checkpoint: step {at.saved})"

"""Everything that one start of the command left running on this machine: launcher, ranks, loaders, orphans.

The launchers do not keep them together: DeepSpeed's leaves orphans when it is killed, torchrun gives each rank a
session of its own. All of them inherit the environment, so a variable that names the run finds each (Linux's /proc).
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from m3i_large.errors import OutageError

MARK = "M3I_SUPERVISED_RUN"
PROC = Path("/proc")
KILL_S = 60.0  # a rank with much pinned memory takes seconds to be taken apart


def marked(run: Path) -> dict[int, bool]:
    """Living processes that belong to `run`, and of each whether it is a training rank or a child of one."""
    mark, found = f"{MARK}={run.resolve()}".encode(), {}
    for entry in PROC.glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        if mark in variables:
            found[int(entry.name)] = any(v.startswith(b"RANK=") for v in variables)
    return found


class Family:
    """The processes of one start of the command in `run`."""

    def __init__(self, arguments: Sequence[str], *, run: Path, env: dict[str, str]) -> None:
        self._run = run
        # A session of its own, so that a terminal's Ctrl-C reaches the ranks once, through the supervisor.
        self._child = subprocess.Popen(
            list(arguments),
            env={**os.environ, **env, MARK: str(run.resolve())},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def status(self) -> int | None:
        """The command's exit status, negative for a signal; None while it runs."""
        return self._child.poll()

    def alive(self) -> list[int]:
        """Process ids of what still runs."""
        child = {self._child.pid} if self._child.poll() is None else set()
        return sorted(marked(self._run).keys() | child)

    def ask_to_stop(self) -> None:
        """SIGTERM to the ranks alone: a launcher that gets one kills them 30 s later, whatever they are saving."""
        found = marked(self._run)
        ranks = [pid for pid, is_rank in found.items() if is_rank and not found.get(_parent(pid), False)]
        # Before there are ranks, or where they run on other machines, only the launcher's processes can be asked.
        for pid in ranks or self.alive():
            _send(pid, signal.SIGTERM)

    def end(self, *, patience_s: float) -> list[int]:
        """Waits up to `patience_s` for what still runs, then kills it until nothing is left.

        Returns whom it killed. Raises OutageError where a process does not end even so: it waits for a driver or a
        disk that is gone, and another start beside it would be two trainings in one directory.
        """
        until = time.monotonic() + patience_s
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.1)
        killed, until = left, time.monotonic() + KILL_S
        while left:
            if time.monotonic() > until:
                raise OutageError(f"processes {', '.join(map(str, left))} do not end {KILL_S:g} s after SIGKILL")
            for pid in left:
                _send(pid, signal.SIGKILL)
            time.sleep(0.1)
            left = self.alive()
        self._child.wait()
        return killed


def _parent(pid: int) -> int:
    try:
        # The name, in parentheses, may hold blanks; state and parent follow it.
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return

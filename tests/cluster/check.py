"""What the checks of cluster launchers share: the shortened demo, its runs, a log of what was seen."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from m3i_large.metrics import read_metrics, read_rows
from m3i_large.run import read_exit

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable)
SHORT, LONG = 8, 80  # steps
# Two machines that are one would take twice as many threads as its two ranks: another rounding.
SAME = ("train.precision=fp32", "train.threads=1")
MARK = "M3I_CHECK"  # in the environment of all that a check starts: its directory
GRACE_S = 20.0  # from SIGTERM to SIGKILL
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Check:
    """A directory for everything, the demo at a few steps on two ranks, and a printed line for each thing proven."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.begun = time.monotonic()
        # One thread a rank, as the two ranks of a run share this machine whoever starts them.
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{PYTHON.parent}:{os.environ['PATH']}"}
        self.environment[MARK] = str(directory)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            self.environment.pop(name, None)

    def arguments(self, steps: int, *more: str) -> list[str]:
        """Arguments of launchers/pretrain.py."""
        recipe = [f"data.root={self.directory}/data", f"train.steps={steps}", "train.checkpoint_every=4"]
        return ["--ds", "ds_configs/zero3.json", *recipe, "train.picture_every=0", *SAME, *more]

    def run(self, *command: object, status: int = 0, timeout: float = 600) -> str:
        """Runs a command in the repository; its output, or what was wrong."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if done.returncode != status:
            sys.exit(f"{' '.join(map(str, command))}: status {done.returncode}, expected {status}\n{done.stdout}")
        return done.stdout

    def on_one_machine(self, name: str, steps: int) -> list[float]:
        """The losses of a run of two ranks under the deepspeed launcher."""
        launch = ["deepspeed", "--num_accelerators", 2, "--master_port", free_port()]
        self.run(*launch, "launchers/pretrain.py", "--out", self.directory / name, *self.arguments(steps))
        return self.losses(self.directory / name, steps)

    @contextmanager
    def started(self, *command: object) -> Iterator[subprocess.Popen[bytes]]:
        """A command that runs meanwhile, and is ended with the block."""
        process = subprocess.Popen([str(part) for part in command], env=self.environment, stdout=subprocess.DEVNULL)
        with cleaning_up_after(lambda: end(process.pid) if process.poll() is None else None, process.wait):
            yield process

    def left(self) -> dict[int, str]:
        """Processes of this check, by the variable that they inherit or the directory on their command line."""
        mark, found = f"{MARK}={self.directory}".encode(), {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").strip()
                ours = bytes(self.directory) in line or mark in (entry / "environ").read_bytes().split(b"\0")
                if ours and int(entry.name) != os.getpid() and line:  # a zombie has no line
                    found[int(entry.name)] = line.decode(errors="replace")
        return found

    def kill_what_is_left(self) -> list[str]:
        """SIGKILL to all processes of this check until there is none; the command lines of those that there were."""
        killed: dict[int, str] = {}
        deadline = time.monotonic() + 30
        while (found := self.left()) and time.monotonic() < deadline:
            killed |= found
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        return list(killed.values())

    def losses(self, out: Path, steps: int) -> list[float]:
        """The losses of a finished run."""
        outcome = read_exit(out)
        self.expect(outcome.get("outcome") == "finished", f"{out} ended with {outcome}")
        rows = read_metrics(out)
        self.expect([row["step"] for row in rows] == list(range(steps)), f"{out} has steps missing")
        return [row["loss"] for row in rows]

    def until(self, true: Callable[[], object], what: str, *, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            self.expect(time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s")
            time.sleep(0.2)

    def reaches(self, out: Path, step: int) -> None:
        """Waits for a step of a run."""
        self.until(lambda: any(row["step"] >= step for row in read_rows(out / "metrics.jsonl")), f"{out}, step {step}")

    def expect(self, true: object, what: str) -> None:
        if not true:
            sys.exit(f"FAILED: {what}")

    def proven(self, what: str) -> None:
        print(f"{time.monotonic() - self.begun:6.0f} s  {what}", flush=True)


@contextmanager
def checking(name: str) -> Iterator[Check]:
    """A check in a directory of its own; an error, Ctrl-C or SIGTERM leaves neither that nor a process of it behind."""
    previous = {number: signal.signal(number, _ended) for number in ENDING}
    try:
        with tempfile.TemporaryDirectory(prefix=f"m3i-{name}-", ignore_cleanup_errors=True) as directory:
            check = Check(Path(directory))
            with cleaning_up_after(lambda: _sweep(check)):
                yield check
        print(f"{name}-check passed")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def cleaning_up_after(*steps: Callable[[], object]) -> Iterator[None]:
    """Takes all the steps after the block, each whatever became of the block and of those before, uninterrupted."""
    errors: list[BaseException] = []
    try:
        yield
    except BaseException as error:
        errors.append(error)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    for step in steps:
        try:
            step()
        except (Exception, SystemExit) as error:
            print(f"while cleaning up: {error!r}", file=sys.stderr)
            errors.append(error)
    for number, handler in previous.items():
        signal.signal(number, handler)
    if errors:
        raise errors[0]


def free_port() -> int:
    """One that nothing listens on now: the launcher's own, 29500, may be another run's."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def end(pid: int) -> None:
    """SIGTERM to a process, SIGKILL after GRACE_S; returns once it is gone."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while not (gone := _is_gone(pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if gone:
            return
    raise TimeoutError(f"process {pid} does not end")


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _sweep(check: Check) -> None:
    for line in check.kill_what_is_left():
        print(f"was left and killed: {line[:160]}", file=sys.stderr)


def _ended(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)

"""What the checks of cluster launchers share: the shortened demo, its runs, a log of what was seen."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from m3i_large.metrics import read_metrics, read_rows
from m3i_large.run import read_exit

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable)
SHORT, LONG = 8, 80  # steps
# Two machines that are one would take twice as many threads as its two ranks: another rounding.
SAME = ("train.precision=fp32", "train.threads=1")


class Check:
    """A directory for everything, the demo at a few steps on two ranks, and a printed line for each thing proven."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.begun = time.monotonic()
        # One thread a rank, as the two ranks of a run share this machine whoever starts them.
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{PYTHON.parent}:{os.environ['PATH']}"}
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

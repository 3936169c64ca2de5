"""A window of steps recorded by torch.profiler, as a trace for chrome://tracing or Perfetto."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m3i_large.errors import UserError
from m3i_large.parallel.comm import Rank


@dataclass(frozen=True)
class Window:
    """Steps `start` to before `start + steps`."""

    start: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Window":
        """From `START:STEPS`; UserError where it is none."""
        parts = text.split(":")
        if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[1]) < 1:
            raise UserError(f"--profile: got {text!r}; needed: START:STEPS, such as 20:3")
        return cls(int(parts[0]), int(parts[1]))


class Profile:
    """Records a window of steps of this rank into run/profile/; does nothing without one."""

    def __init__(self, window: Window | None, *, run: Path, rank: Rank) -> None:
        self._window, self._directory, self._rank = window, run / "profile", rank
        self._profiler: Any = None

    def at(self, step: int) -> None:
        """Step `step` is about to begin."""
        if self._window is None:
            return
        if step >= self._window.start + self._window.steps:
            self.close()
        elif step == self._window.start and self._profiler is None:
            cuda = [torch.profiler.ProfilerActivity.CUDA] if self._rank.device.type == "cuda" else []
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *cuda])
            self._profiler.start()

    def close(self) -> None:
        """Writes the trace of what was recorded."""
        if self._profiler is None or self._window is None:
            return
        self._profiler.stop()
        self._directory.mkdir(exist_ok=True)
        name = f"step_{self._window.start:08d}_rank_{self._rank.rank}.json"
        self._profiler.export_chrome_trace(str(self._directory / name))
        self._profiler = None

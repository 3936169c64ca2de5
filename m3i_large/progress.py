"""What a person sees while a run goes on: a bar in a terminal, a line now and then in a log file."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column


class Progress:
    """Progress of one run, silent on every rank but the first.

    Args:
        run: named in front of the lines.
        total: steps of the whole run.
        enabled: False on the other ranks.
        every: steps between lines where standard output is no terminal.
    """

    def __init__(self, run: Path, *, total: int, enabled: bool, every: int) -> None:
        self._run, self._total, self._every, self._enabled = run, total, every, enabled
        self._console = Console(quiet=not enabled, soft_wrap=True, highlight=False)
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            # In a narrow window the losses give way, not the counts.
            TextColumn("{task.fields[values]}", table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis")),
        )
        self._bar = Bar(*columns, console=self._console, expand=True) if enabled and self._console.is_terminal else None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False)

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """Shows a finished step (0-based) and its losses."""
        if not self._enabled:
            return
        names = ("loss", *sorted(k for k in row if k.startswith("loss/") and k.count("/") == 1))
        shown = [f"{name.removeprefix('loss/')} {row[name]:.2f}" for name in names if name in row]
        values = " ".join(shown) or "left out"
        if self._bar is None:
            if (step + 1) % self._every == 0 or step + 1 == self._total:
                self.say(f"{self._run} step {step + 1}/{self._total} {values} ({row['time/step_s']:.2f} s/step)")
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(self._run.name, total=self._total, values="")
        self._bar.update(self._task, completed=step + 1, values=values)

    def close(self) -> None:
        """Ends the bar, leaving its last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

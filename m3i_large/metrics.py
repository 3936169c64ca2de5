"""Run directory files: append-only JSON lines, mirrored to TensorBoard and, where asked for, to Weights & Biases."""

import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from m3i_large.errors import UserError

if TYPE_CHECKING:
    from m3i_large.pictures.sheet import Sheet

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
TAIL_BYTES = 256 * 1024  # many rows; the whole file of a long run is gigabytes
PACKAGES = ("m3i_large", "torch", "deepspeed", "timm", "transformers", "numpy")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON object as a line; non-finite numbers become null, as JSON has none.

    After a line that a crash cut short a new one is begun, so that only the cut one is lost.
    """
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    line = json.dumps(clean) + "\n"
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file, one at a time; a line cut by a crash is dropped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file."""
    return list(iterate_rows(path))


def last_rows(path: Path, *, num_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The rows that are whole in the last bytes of a JSON-lines file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
        lines = file.read().splitlines()
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut at either end
            continue
    return [row for row in rows if isinstance(row, dict)]


def event_row(kind: str, *, step: int, attempt: int, **details: Any) -> dict[str, Any]:
    """A row of events.jsonl: start, resume, save, skip, preempt, incident or end."""
    return {"event": kind, "step": step, "attempt": attempt, "time": time.time(), **details}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Metric rows by step; of rows with the same step the highest attempt counts."""
    best: dict[int, dict[str, Any]] = {}
    for row in read_rows(run / METRICS):
        if row["step"] not in best or row["attempt"] >= best[row["step"]]["attempt"]:
            best[row["step"]] = row
    return [best[step] for step in sorted(best)]


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # ranks of several machines may write one
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def create_json(path: Path, value: Any) -> bool:
    """As `write_json`, but of all that write a file only the first one does: whether it was this one."""
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    write_json(temporary, value)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def source_commit() -> str | None:
    """Commit of the code that runs, with `-dirty` where it was changed since; None where it is in no git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def environment(*, world: int, device: torch.device, precision: str, threads: int) -> dict[str, Any]:
    """What env.json holds: machine, versions and the resolved values that resume reuses. No environment variables."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": package_versions(),
        "platform": platform.platform(),
        "device": f"{device.type}: {name}",
        "world": world,
        "precision": precision,
        "threads": threads,
        "commit": source_commit(),
        "command": Path(sys.argv[0]).name,
    }


def require_wandb(project: str | None) -> None:
    """Refuses a project without the package, before anything has been done."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"train.wandb_project: got {project!r}, but the package is not installed; needed: pip install wandb"
        )


def _wandb_id(run: Path) -> str:
    """What this run is called in a project on all its starts; directories of several runs may have one name."""
    path = run / "wandb" / "run_id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")


class MetricsWriter:
    """Writes metrics.jsonl and events.jsonl of a run directory, and the same scalars to TensorBoard and wandb.

    Only the first rank writes; on the others (`enabled` False) every call does nothing. Rows that a full disk refuses
    wait for the next ones: training goes on, and `close` tries a last time.

    Args:
        tensorboard: mirror to run/tensorboard, where the package is installed (`has_board` says so).
        wandb_project: mirror to this project; offline with WANDB_MODE=offline.
    """

    def __init__(
        self, run: Path, *, attempt: int, enabled: bool, tensorboard: bool = True, wandb_project: str | None = None
    ) -> None:
        self._run, self._attempt, self._enabled = run, attempt, enabled
        self._board: Any = None
        self._wandb: Any = None
        self._waiting: deque[tuple[Path, dict[str, Any]]] = deque()
        if enabled and tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"))
        if enabled and wandb_project is not None:
            import wandb

            name, number = run.name, _wandb_id(run)
            self._wandb = wandb.init(project=wandb_project, name=name, dir=str(run), resume="allow", id=number)
            # Its own count of steps cannot go back to a checkpoint.
            self._wandb.define_metric("*", step_metric="step")

    @property
    def has_board(self) -> bool:
        """Whether TensorBoard gets the metrics too."""
        return self._board is not None

    def log(self, row: dict[str, Any]) -> None:
        """One optimizer step; `step` is the step's index, floats are logged as scalars."""
        if not self._enabled:
            return
        self._append(METRICS, {**row, "attempt": self._attempt, "time": time.time()})
        scalars = {k: v for k, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log({**scalars, "step": row["step"]})

    def pictures(self, sheets: "Sequence[Sheet]", *, step: int) -> None:
        """Pictures of a step, to TensorBoard and wandb as `pictures/<name>`; the run directory has them already."""
        for sheet in sheets if self._board is not None or self._wandb is not None else ():
            name, image = f"pictures/{sheet.name}", sheet.image()
            if self._board is not None:
                self._board.add_image(name, image, step, dataformats="HWC")
                self._board.add_text(name, sheet.caption, step)
            if self._wandb is not None:
                import wandb

                self._wandb.log({name: wandb.Image(image, caption=sheet.caption), "step": step})

    def event(self, kind: str, *, step: int, **details: Any) -> None:
        """See `event_row`."""
        if self._enabled:
            self._append(EVENTS, event_row(kind, step=step, attempt=self._attempt, **details))

    def close(self) -> None:
        """Flushes what the mirrors still hold."""
        self._write_waiting()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        self._waiting.append((self._run / name, row))
        self._write_waiting()

    def _write_waiting(self) -> None:
        with suppress(OSError):
            while self._waiting:
                append_row(*self._waiting[0])
                self._waiting.popleft()

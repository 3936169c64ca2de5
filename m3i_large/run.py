"""The run directory: who may write into it, where to continue, and how a run ended."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch

from m3i_large import checkpoint
from m3i_large.data.storage import is_url
from m3i_large.errors import DivergenceError, OutageError, UserError
from m3i_large.goodput import goodput
from m3i_large.metrics import EVENTS, METRICS, append_row, create_json, event_row, iterate_rows, last_rows, write_json
from m3i_large.parallel.comm import Rank, local_ranks
from m3i_large.recipe import validate
from m3i_large.recipe_file import yaml_values
from m3i_large.stop_signals import Stopped, StopSignals

Outcome = Literal["finished", "interrupted", "failed"]
RECIPE, ENV, EXIT = "recipe.yaml", "env.json", "exit.json"


class AnyRecipe(Protocol):
    """What a run directory needs of a recipe: of pre-training, or of fine-tuning."""

    name: str
    train: Any

    def to_dict(self) -> dict[str, Any]: ...

    def to_yaml(self) -> str: ...

    def model_copy(self, *, update: dict[str, Any]) -> Any: ...


R = TypeVar("R", bound=AnyRecipe)


@dataclass(frozen=True)
class Run:
    """An opened run directory.

    Attributes:
        recipe: resolved.
        attempt: number of this start.
        resume_from: the checkpoint to continue from.
        report: writes the report of a directory whose run has ended, in whatever way; what it returns is for people.
    """

    directory: Path
    recipe: AnyRecipe
    attempt: int
    resume_from: Path | None
    report: Callable[[Path], str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints lie."""
        return self.directory / "checkpoints"

    def ended(self, outcome: Outcome, *, step: int, steps: int, message: str = "") -> list[str]:
        """Writes exit.json, which supervisors trust more than the launcher's exit status, the `end` event, the report.

        Args:
            step: how many of the run's `steps` are done.
            message: what went wrong.

        Returns lines for people; what went wrong is not among them.
        """
        write_json(self.directory / EXIT, self._exit(outcome, step, message))
        more = "" if outcome == "finished" else "; the same command continues"
        return [
            f"{self.directory} {outcome} after {step} of {steps} steps{more}",
            *self._account(outcome, step, message),
        ]

    def failed(self, message: str) -> None:
        """As `ended`, by whichever rank fails first, as the others' failures follow from its own. Once begun only."""
        if not (self.directory / RECIPE).is_file():
            return
        # The last rows alone: a long run has a million, and the launcher kills all ranks seconds after the first ends.
        rows = last_rows(self.directory / METRICS)
        step = rows[-1]["step"] + 1 if rows else 0
        attempts = [row["attempt"] for row in iterate_rows(self.directory / EVENTS)]  # a reload counts as one
        run = replace(self, attempt=max([self.attempt, *attempts]))
        if create_json(self.directory / EXIT, run._exit("failed", step, message)):
            run._account("failed", step, message)

    def event(self, kind: str, *, step: int, **details: Any) -> None:
        """A row of events.jsonl, from any rank; see `event_row`."""
        append_row(self.directory / EVENTS, event_row(kind, step=step, attempt=self.attempt, **details))

    def _exit(self, outcome: Outcome, step: int, message: str) -> dict[str, Any]:
        return {"outcome": outcome, "step": step, "attempt": self.attempt, "message": message}

    def _account(self, outcome: Outcome, step: int, message: str) -> list[str]:
        """Reads all rows, which takes seconds: exit.json is there before, as a kill may follow."""
        found = goodput(self.directory)
        write_json(self.directory / EXIT, self._exit(outcome, step, message) | {"goodput": found.to_dict()})
        self.event("end", step=step, outcome=outcome, message=message, goodput=found.to_dict())
        return [found.to_text()] + ([self.report(self.directory)] if self.report else [])


@contextmanager
def failures_recorded(run: Run) -> Iterator[None]:
    """Writes the first line of whatever ends this rank into exit.json, but for a stop before the first step."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        text = str(error).strip().split("\n")[0]
        known = isinstance(error, UserError | OutageError | DivergenceError)
        # The launcher ends all ranks once one has: this one is still to write its report, and to print what is wrong. A
        # disk that takes nothing must not hide what ended the run.
        with StopSignals(), suppress(OSError):
            run.failed(text if known else f"{type(error).__name__}: {text}")
        raise


def resolve_precision(choice: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the hardware computes it natively, else fp32; decided from flags, never by timing."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & _cpu_flags() else "fp32"


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return set()
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("flags")]
    return set(lines[0].split()) if lines else set()


def resolve_threads(choice: int | None) -> int:
    """CPU threads per rank: as asked, or the usable cores shared among this machine's ranks."""
    if choice is not None:
        return choice
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks())


def read_recipe(directory: Path, *, parse: Callable[[dict[str, Any]], Any] = validate) -> Any:
    """The resolved recipe of a run directory, None where it holds no run.

    `parse`: makes a recipe of plain values; that of the kind of run which is expected.
    """
    path = directory / RECIPE
    if not path.is_file():
        return None
    return parse(yaml_values(path))


def read_exit(directory: Path) -> dict[str, Any]:
    """exit.json of a run directory; empty where the run has not ended or was killed."""
    path = directory / EXIT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def resolve(
    recipe: R, directory: Path, device: torch.device, *, parse: Callable[[dict[str, Any]], Any] = validate
) -> R:
    """Fixes precision and threads: the run's earlier values where it has any, else this machine's."""
    previous = read_recipe(directory, parse=parse)
    precision, threads = recipe.train.precision, recipe.train.threads
    if previous is not None:
        precision = previous.train.precision if precision == "auto" else precision
        threads = previous.train.threads if threads is None else threads
    settled = {"precision": resolve_precision(precision, device), "threads": resolve_threads(threads)}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=settled)})


def open_run(
    directory: Path,
    recipe: AnyRecipe,
    *,
    resume: str,
    parse: Callable[[dict[str, Any]], Any] = validate,
    report: Callable[[Path], str] | None = None,
) -> Run:
    """Checks, without writing, that `recipe` may run in `directory`, and finds the checkpoint to continue from.

    Args:
        recipe: resolved (see `resolve`).
        resume: `auto` (the newest checkpoint of this run, if any), `never` (a fresh directory is needed), or a
            checkpoint or run directory, or the URL of copies, to start from.
        report: see `Run`; kept where the recipe wants one.

    Raises:
        UserError: the directory holds another recipe's run or other files, or the checkpoint is not there.
    """
    previous = read_recipe(directory, parse=parse)
    if previous is None and directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"--out: {directory} holds files but no run; needed: an empty or new directory")
    if previous is not None and previous != recipe:
        changed = _difference(previous.to_dict(), recipe.to_dict())
        raise UserError(f"--out: {directory} holds a run of another recipe ({changed}); choose another --out")
    if previous is not None and resume == "never":
        raise UserError(f"--resume never: {directory} already holds a run; choose another --out")
    attempt = 1 + max((row["attempt"] for row in iterate_rows(directory / EVENTS)), default=-1)
    wanted = report if recipe.train.report else None
    return Run(directory, recipe, attempt, _resume_point(directory, resume), wanted)


def _resume_point(directory: Path, resume: str) -> Path | None:
    own = checkpoint.newest(directory / "checkpoints")
    if own is not None and Path(resume).parent.resolve() == own.parent.resolve() and Path(resume).name != own.name:
        raise UserError(
            f"--resume: got {resume}, but this run's newest checkpoint is {own.name}; needed: auto, or another --out, "
            "to start a run from an earlier one"
        )
    if resume in ("auto", "never") or own is not None:
        return own
    if is_url(resume):
        return None  # see resume_point
    path = Path(resume)
    found = path if (path / checkpoint.MANIFEST).is_file() else checkpoint.newest(path / "checkpoints")
    if found is None:
        raise UserError(
            f"--resume: got {resume}, which holds no checkpoint; needed: auto, never, a run or a checkpoint directory"
        )
    return found


def resume_point(run: Run, *, resume: str, rank: Rank) -> tuple[checkpoint.Checkpoint | None, list[checkpoint.Report]]:
    """The verified checkpoint to continue from, None for a new run, and what was found damaged; every rank calls it.

    Args:
        resume: as for `open_run`. The run's own checkpoints come first; `auto` looks for copies where it has none
            (train.checkpoint_copy), a URL names them.

    Raises:
        UserError: the checkpoint that was named is damaged, or all of the run's own are, or the copies are of a run of
            another recipe.
    """
    named = run.resume_from
    if named is not None and named.parent != run.checkpoints:
        if reason := checkpoint.verify(named, rank):
            raise UserError(f"--resume: {named} is damaged: {reason}; needed: an intact checkpoint")
        return checkpoint.Checkpoint(named, verify=False), []
    own_copy = run.recipe.train.checkpoint_copy if resume == "auto" else None
    copy = resume if is_url(resume) else own_copy
    if copy is not None and rank.is_first:
        claim(run)  # before anything is fetched into it
    saved, reports = checkpoint.newest_intact(run.checkpoints, rank=rank, copy=copy)
    if saved is None and is_url(resume):
        raise UserError(f"--resume: got {checkpoint.redacted(resume)}, which holds no complete checkpoint")
    if saved is not None and own_copy is not None and (changed := _other_recipe(saved, run.recipe)):
        raise UserError(
            f"train.checkpoint_copy: {own_copy} holds checkpoints of another recipe ({changed}); needed: a place for "
            "this run alone"
        )
    return saved, reports


def _other_recipe(saved: checkpoint.Checkpoint, recipe: AnyRecipe) -> str:
    """What differs in a checkpoint's recipe beside what each machine settles for itself; empty where nothing does."""
    old, new = saved.manifest["recipe"], recipe.to_dict()
    settled = {name: new["train"][name] for name in ("precision", "threads")}
    old = {**old, "train": {**old["train"], **settled}}
    return _difference(old, new) if old != new else ""


def checkpoint_writer(run: Run, rank: Rank) -> checkpoint.CheckpointWriter:
    """Saves this run's checkpoints as its recipe says."""
    recipe = run.recipe.train
    keep, keep_every, copier = recipe.checkpoint_keep, recipe.checkpoint_keep_every, None
    if recipe.checkpoint_copy is not None and rank.is_first:
        remote = checkpoint.Remote(recipe.checkpoint_copy)
        copier = checkpoint.Copier(run.checkpoints, remote, keep=keep, keep_every=keep_every)
    return checkpoint.CheckpointWriter(
        run.checkpoints,
        rank=rank,
        attempt=run.attempt,
        keep=keep,
        keep_every=keep_every,
        background=recipe.checkpoint_async,
        copier=copier,
    )


def claim(run: Run) -> None:
    """Makes the directory this run's: writes recipe.yaml."""
    run.directory.mkdir(parents=True, exist_ok=True)
    temporary = run.directory / f".{RECIPE}.tmp"
    temporary.write_text(run.recipe.to_yaml(), encoding="utf-8")
    os.replace(temporary, run.directory / RECIPE)


def begin(run: Run, env: dict[str, Any]) -> None:
    """Writes recipe.yaml and env.json and removes an earlier exit.json; the first rank calls it."""
    claim(run)
    (run.directory / EXIT).unlink(missing_ok=True)
    write_json(run.directory / ENV, env)


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    old, new = flat_values(a), flat_values(b)
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    return f"{changed[0]} is {old.get(changed[0])!r} there, {new.get(changed[0])!r} here" if changed else "same values"


def flat_values(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name; a list is a value."""
    if isinstance(value, dict):
        return {
            k: v
            for key, item in value.items()
            for k, v in flat_values(item, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value}

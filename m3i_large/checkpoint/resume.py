"""Which checkpoint a run continues from: the newest one that is intact."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from m3i_large.checkpoint import directory
from m3i_large.checkpoint.reader import Checkpoint, damage
from m3i_large.checkpoint.remote import Remote, fetch_newest
from m3i_large.checkpoint.report import Report
from m3i_large.errors import OutageError, UserError
from m3i_large.parallel.comm import Rank, gather_objects

T = TypeVar("T")


def newest_intact(root: Path, *, rank: Rank, copy: str | None = None) -> tuple[Checkpoint | None, list[Report]]:
    """The checkpoint to continue from, verified; every rank calls it and gets the same.

    What agrees with its checksums counts, the newest first. A damaged one is renamed aside (`damaged_step_...`) and
    reported; nothing is removed. Where no intact one is left, the newest intact copy is fetched from `copy`.

    Args:
        root: the run's `checkpoints` directory; what a crash left in it is put right.
        copy: directory or URL where copies lie.

    Returns:
        The checkpoint, None where there has never been one, and what was found damaged.

    Raises:
        UserError: there are checkpoints but all are damaged.
        OutageError: the copies cannot be read.
    """
    source = _Source(root, copy)
    reports: list[Report] = []
    while (found := _on_first(source.next, rank)) is not None:
        reason = verify(found, rank)
        if not reason:
            _on_first(lambda found=found: directory.point_latest(root, found), rank)  # type: ignore[misc]
            return Checkpoint(found, verify=False), reports
        aside = _on_first(lambda found=found: directory.set_aside(found), rank)  # type: ignore[misc]
        why = f"{found} is damaged: {reason}; renamed {aside.name}, another one is used"
        step = directory.step_of(found)
        reports.append(Report.incident(step, what="checkpoint", path=str(found), reason=why))
    damaged = _on_first(lambda: directory.damaged_checkpoints(root), rank)
    if damaged:
        last = f" ({reports[0].details['reason'].partition(';')[0]})" if reports else ""
        raise UserError(
            f"checkpoint: all {len(damaged)} in {root} are damaged{last}; needed: --resume with an intact one, "
            "or another --out to start anew"
        )
    return None, reports


def verify(found: Path, rank: Rank) -> str:
    """Why a checkpoint must not be used, or nothing; each rank reads its share of the files, all get the same."""
    reasons = gather_objects(damage(found, part=rank.rank, parts=rank.world), rank)
    return next((reason for reason in reasons if reason), "")


class _Source:
    """Hands out candidates on the first rank: local ones, then copies."""

    def __init__(self, root: Path, copy: str | None) -> None:
        self._root, self._copy, self._cleaned = root, copy, False
        self._below: int | None = None

    def next(self) -> Path | None:
        if not self._cleaned:
            directory.clean(self._root)
            self._cleaned = True
        if (named := directory.named_latest(self._root)) is not None:
            return named
        if local := directory.step_directories(self._root):
            return local[-1]
        if self._copy is None:
            return None
        fetched = fetch_newest(Remote(self._copy), self._root, below=self._below)
        self._below = directory.step_of(fetched) if fetched else None
        return fetched


def _on_first(call: Callable[[], T], rank: Rank) -> T:
    """What the first rank's call returns, on every rank; its UserError and OutageError likewise."""
    result: T | None = None
    error: Exception | None = None
    if rank.is_first:
        try:
            result = call()
        except (UserError, OutageError) as caught:
            error = caught
    result, error = gather_objects((result, error), rank)[0]
    if error is not None:
        raise error
    return result

"""Does an epoch of a source hold every sample exactly once? Played in full, on all cores, in n bytes of memory."""

import mmap
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from m3i_large.data.order import SourceOrder

CALL = 1 << 16  # positions per call: larger arrays leave the cache and take up to three times as long per id
QUICK = 1 << 22
ALONE = 1 << 20  # below this many positions, starting processes takes longer than playing


@dataclass(frozen=True, kw_only=True)
class Once:
    """What one epoch of a source drew.

    Attributes:
        drawn: positions played that gave an id of the source; all others were out of place.
        wanted: positions played: n, or fewer with quick.
        distinct: different ids among them.
    """

    name: str
    epoch: int
    samples: int
    wanted: int
    drawn: int
    distinct: int

    @property
    def complete(self) -> bool:
        return self.wanted == self.samples

    @property
    def missing(self) -> int:
        """Ids never drawn; as many draws repeat another, since there are n of both. 0 where only a part was played."""
        return self.samples - self.distinct if self.complete else 0

    @property
    def repeated(self) -> int:
        """Draws of an id that was drawn before."""
        return self.drawn - self.distinct

    @property
    def holds(self) -> bool:
        return self.wanted == self.drawn == self.distinct


def play_epoch(
    order: SourceOrder,
    *,
    epoch: int,
    quick: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Once:
    """Plays every position of `epoch`; with `quick` only the first and the last 4 M of them.

    workers: processes; default: the cores this process may use. progress: called with positions done and to do.
    """
    n = order.n
    if quick and n > 2 * QUICK:
        starts = [at + start for at in (0, n - QUICK) for start in range(0, QUICK, CALL)]
        ids = np.concatenate([_ids(order, epoch=epoch, start=start, stop=start + CALL) for start in starts])
        return _once(order, epoch=epoch, wanted=2 * QUICK, drawn=ids.size, distinct=np.unique(ids).size)
    forks = "fork" in multiprocessing.get_all_start_methods() and n > ALONE
    workers = (workers or _cores()) if forks else 1
    # Anonymous memory that forked processes share. A flag and not a counter: two processes may write one byte at the
    # same moment, and a lost increment would hide a repeat, while a flag never drawn stays 0 whoever writes.
    seen = np.frombuffer(mmap.mmap(-1, n), np.uint8)
    drawn, played = np.frombuffer(mmap.mmap(-1, 16 * workers), np.int64).reshape(2, workers)
    if workers == 1:
        _mark(order, epoch=epoch, worker=0, seen=seen, drawn=drawn, played=played, progress=progress)
    else:
        _mark_in_processes(order, epoch=epoch, seen=seen, drawn=drawn, played=played, progress=progress)
    return _once(order, epoch=epoch, wanted=n, drawn=int(drawn.sum()), distinct=int(np.count_nonzero(seen)))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _once(order: SourceOrder, *, epoch: int, wanted: int, drawn: int, distinct: int) -> Once:
    return Once(name=order.name, epoch=epoch, samples=order.n, wanted=wanted, drawn=drawn, distinct=distinct)


def _mark_in_processes(
    order: SourceOrder,
    *,
    epoch: int,
    seen: np.ndarray,
    drawn: np.ndarray,
    played: np.ndarray,
    progress: Callable[[int, int], None],
) -> None:
    fork = multiprocessing.get_context("fork")
    shared = {"epoch": epoch, "seen": seen, "drawn": drawn, "played": played}
    processes = [
        fork.Process(target=_mark, args=(order,), kwargs=shared | {"worker": worker}, daemon=True)
        for worker in range(len(drawn))
    ]
    for process in processes:
        process.start()
    for process in processes:  # one that dies leaves its positions undrawn, which is what the result then says
        while process.is_alive():
            process.join(0.2)
            progress(int(played.sum()), order.n)


def _mark(
    order: SourceOrder,
    *,
    epoch: int,
    worker: int,
    seen: np.ndarray,
    drawn: np.ndarray,
    played: np.ndarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Marks in `seen` the ids of this worker's stretches of the epoch (workers take turns); counts in its own cells."""
    for start in range(worker * CALL, order.n, len(drawn) * CALL):
        stop = min(start + CALL, order.n)
        ids = _ids(order, epoch=epoch, start=start, stop=stop)
        seen[ids] = 1
        drawn[worker] += ids.size
        played[worker] += stop - start
        progress(int(played.sum()), order.n)


def _ids(order: SourceOrder, *, epoch: int, start: int, stop: int) -> np.ndarray:
    """Ids at offsets start to stop, without those that belong to no sample or another epoch."""
    found, _, ids = order.ids(np.arange(epoch * order.n + start, epoch * order.n + stop))
    return ids[(ids >= 0) & (ids < order.n) & (found == epoch)]

"""From samples to batches, ahead of time: decoding and resizing happen in threads, as the libraries that do it release
the interpreter's lock, and nothing needs to be sent between processes."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

from m3i_large.finetune.sampling import Order, collate_rng, in_rounds, micro_batch, sample_rng, shares
from m3i_large.finetune.task import Samples, Task

MAX_SUBSTITUTES = 20  # samples in a row that cannot be read


class Trained:
    """Item k: micro-step k of the run, of this rank, as (batch, reasons of samples that were replaced).

    Args:
        rows: (global_batch, accumulation).
        place: (rank, world).
    """

    def __init__(self, task: Task, order: Order, *, seed: int, rows: tuple[int, int], place: tuple[int, int]) -> None:
        self._task, self._order, self._seed = task, order, seed
        self._rows, self._place = rows, place

    def __getitem__(self, number: int) -> tuple[Any, list[str]]:
        global_batch, accumulation = self._rows
        rank, world = self._place
        step, micro_step = divmod(number, accumulation)
        chosen = micro_batch(
            self._order,
            step=step,
            micro_step=micro_step,
            global_batch=global_batch,
            accumulation=accumulation,
            rank=rank,
            world=world,
        )
        bad: list[str] = []
        samples = [self._read(epoch, sample, bad) for epoch, sample in chosen]
        return self._task.collate(samples, collate_rng(self._seed, step, micro_step, rank)), bad

    def _read(self, epoch: int, sample: int, bad: list[str]) -> Any:
        """A sample, or the next one that can be read."""
        data: Samples = self._task.train
        for offset in range(MAX_SUBSTITUTES):
            number = (sample + offset) % len(data)
            try:
                return data.read(number, sample_rng(self._seed, epoch, number))
            except ValueError as error:
                bad.append(str(error))
        raise OSError(f"data: {MAX_SUBSTITUTES} samples in a row cannot be read, the last: {bad[-1]}")


class Evaluated:
    """Item k: the k-th batch that this rank evaluates, as (indices, batch).

    Args:
        size: samples of a batch.
        place: (rank, world).
    """

    def __init__(self, task: Task, *, size: int, place: tuple[int, int]) -> None:
        self._task = task
        rank, world = place
        mine = [share[rank] for share in shares(len(task.evaluated), world=world)]
        self._rounds = [list(found) for found in in_rounds(mine, size=size)]

    def __len__(self) -> int:
        return len(self._rounds)

    def __getitem__(self, number: int) -> tuple[list[int], Any]:
        indices = self._rounds[number]
        samples = [self._task.evaluated.read(index, None) for index in indices]
        return indices, self._task.collate(samples, None)


class Items(Protocol):
    """Anything that makes item k."""

    def __getitem__(self, number: int) -> Any: ...


def ahead(items: Items, numbers: range, *, workers: int) -> Iterator[Any]:
    """The items of these numbers in their order, made by `workers` threads before they are asked for; 0: in no thread.

    An exception of one is raised in its turn.
    """
    if workers == 0:
        yield from map(items.__getitem__, numbers)
        return
    pool, left = ThreadPoolExecutor(workers, thread_name_prefix="samples"), iter(numbers)
    try:
        waiting = deque(pool.submit(items.__getitem__, number) for number in islice(left, workers + 1))
        while waiting:
            item = waiting.popleft().result()
            waiting.extend(pool.submit(items.__getitem__, number) for number in islice(left, 1))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)

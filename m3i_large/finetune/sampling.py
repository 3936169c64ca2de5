"""Which samples a step trains on: a pure function of (seed, step), the same at any number of ranks.

An epoch is a shuffled list of sample numbers, in which one that counts r times stands floor(r) times, and once more
with probability r - floor(r). Global batches are cut from the epochs one after the other, so that one may hold the end
of an epoch and the beginning of the next.
"""

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

import numpy as np

# Keys of the generators, so that no two draws share their numbers.
ORDER, SAMPLE, COLLATE = range(3)


class Order:
    """The order of samples.

    Args:
        num_samples: of the data set.
        repeats: float64 (num_samples,), how often each counts in an epoch; None: once.
        seed: of the run.
    """

    def __init__(self, num_samples: int, *, repeats: np.ndarray | None, seed: int) -> None:
        self.num_samples, self.repeats, self.seed = num_samples, repeats, seed
        self._epochs: dict[int, np.ndarray] = {}  # the two that were asked for last
        self._lock = Lock()  # threads that make batches share it
        self._starts = [0]  # position of each epoch's first sample, as far as they are known

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, sample) at a position counted from the run's first sample."""
        with self._lock:
            while self._starts[-1] <= position:
                self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
            epoch = int(np.searchsorted(self._starts, position, side="right")) - 1
            return epoch, int(self.epoch(epoch)[position - self._starts[epoch]])

    @property
    def mean_length(self) -> float:
        """Samples of an epoch, on average."""
        return float(self.num_samples if self.repeats is None else self.repeats.sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """Samples of an epoch in their order."""
        if epoch not in self._epochs:
            kept = list(self._epochs.items())[-1:]
            self._epochs = dict([*kept, (epoch, self._made(epoch))])
        return self._epochs[epoch]

    def _made(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, ORDER, epoch])
        samples = np.arange(self.num_samples)
        if self.repeats is not None:
            times = np.floor(self.repeats) + (rng.random(self.num_samples) < self.repeats % 1)
            samples = np.repeat(samples, times.astype(np.int64))
        return rng.permutation(samples)


def micro_batch(
    order: Order, *, step: int, micro_step: int, global_batch: int, accumulation: int, rank: int, world: int
) -> list[tuple[int, int]]:
    """(epoch, sample) of each of a rank's rows of a micro-step.

    A global batch is cut into micro-steps, and each of these into the ranks' shares.
    """
    rows = global_batch // accumulation
    share = rows // world
    first = step * global_batch + micro_step * rows + rank * share
    return [order[position] for position in range(first, first + share)]


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Draws of a sample's augmentation."""
    return np.random.default_rng([seed, SAMPLE, epoch, sample])


def collate_rng(seed: int, step: int, micro_step: int, rank: int) -> np.random.Generator:
    """Draws of what is done to a micro-batch."""
    return np.random.default_rng([seed, COLLATE, step, micro_step, rank])


def steps_of(order: Order, *, epochs: float, global_batch: int) -> int:
    """Steps that so many epochs take, rounded, at least one."""
    return max(1, round(epochs * order.mean_length / global_batch))


def shares(total: int, *, world: int) -> Iterator[tuple[int, ...]]:
    """Every round of an evaluation: the index of each rank's sample; where there are no more, the last one again, since
    under ZeRO-3 all ranks must call the model equally often."""
    for first in range(0, total, world):
        yield tuple(min(first + rank, total - 1) for rank in range(world))


def in_rounds(indices: Sequence[Any], *, size: int) -> Iterator[Sequence[Any]]:
    """Runs of `size` and a shorter last one."""
    for first in range(0, len(indices), size):
        yield indices[first : first + size]

"""What a mixture's order costs in reads and memory: blocks are read whole, samples leave memory at their use.

Symbols as in SAMPLER: W ranks, T steps; n samples, V lanes, b samples per block, Kt block rows of a source's epoch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from m3i_large.data.mixture import Mixture
from m3i_large.data.order import SourceOrder

LOOKAHEAD = 16  # steps before its first use that a block is in memory
MEASURED_WINDOWS = 2
MOST_DRAWS = 40_000_000  # played at most: about 60 bytes and 1 us each


@dataclass(frozen=True, kw_only=True)
class SourceSize:
    """What a source is made of, beside its number of samples: shards, and mean bytes of a sample."""

    shards: int
    mean_bytes: float


@dataclass(frozen=True, kw_only=True)
class SourceReads:
    """Reads of one source, over all ranks and measured steps.

    Attributes:
        window_steps: steps in which a block is used up on average (T_w); 0 where samples are read one by one.
        requests: ranged reads of the measured steps; a block over the edge of a shard takes two.
        samples_per_request, bytes_per_request: means.
        amplification: bytes read over bytes used by the rank that read them.
        held_bytes: mean per rank.
        held_expected: the same for blocks drawn evenly within their windows.
    """

    name: str
    window_steps: float
    requests: int
    samples_per_request: float
    bytes_per_request: float
    amplification: float
    held_bytes: float
    held_expected: float


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Reads of every rank while `first` <= step < `last`; the steps around them were played to make these exact.

    Attributes:
        requests_TW: ranged reads that a rank needs for the first time in a step.
        held_TW: raw bytes in memory of a rank during a step.
        complete: False where windows are longer than what was played, so that figures are too low.
    """

    first: int
    last: int
    requests_TW: np.ndarray
    held_TW: np.ndarray
    complete: bool
    sources: list[SourceReads]

    def burst(self, *, steps: int = 16) -> tuple[float, float]:
        """Most requests in that many steps over the mean: of the worst rank, and of the whole cluster."""
        steps = min(steps, len(self.requests_TW))
        summed = np.concatenate([np.zeros((1, self.requests_TW.shape[1])), self.requests_TW.cumsum(0)])
        in_window = summed[steps:] - summed[:-steps]
        mean = max(in_window.mean(), 1e-9)
        return float(in_window.max() / mean), float(in_window.mean(1).max() / mean)


def shares(mixture: Mixture) -> list[float]:
    """Samples of each source per lane and step, on average."""
    if mixture.quotas:
        return [float(quota) for quota in mixture.quotas]
    total = sum(mixture.weights)
    return [mixture.slots * weight / total for weight in mixture.weights]


def crumbs_of(order: SourceOrder, *, epoch: int) -> np.ndarray:
    """Ids that fill no block in this epoch, (C,): a run of neighbouring ids, wrapping from n - 1 to 0."""
    return (order.n - order.C + np.arange(order.C) + order.shift(np.asarray(epoch))) % order.n


def pieces(order: SourceOrder, *, epoch: np.ndarray | int, block: np.ndarray, shards: int) -> np.ndarray:
    """Ranged reads that each block takes: one in every shard it touches; it may also wrap from id n - 1 to 0."""
    first = (block * order.b + order.shift(np.asarray(epoch))) % order.n
    last = (first + order.b - 1) % order.n
    a, z = shard_of(first, n=order.n, shards=shards), shard_of(last, n=order.n, shards=shards)
    return 1 + np.where(last >= first, z - a, shards - a + z)


def shard_of(ids: np.ndarray, *, n: int, shards: int) -> np.ndarray:
    """The shard of each id where all shards are alike, n / shards samples each."""
    return ids * shards // n


def rank_of(lane: np.ndarray, mixture: Mixture, *, world: int) -> np.ndarray:
    """The rank that draws a lane: micro-step a of A takes the lanes v with v mod A == a, ranks whole runs of them."""
    per_micro_step = mixture.lanes // mixture.accumulation
    return lane // mixture.accumulation // (per_micro_step // world)


def window_rows(order: SourceOrder) -> float:
    """Rows of a lane (its draws) in a mean window, crumb rows included; 0 in exact mode."""
    return order.Kt / order.F * order.b / regular_part(order) if order.F else 0.0


def regular_part(order: SourceOrder) -> float:
    """Part of a source's draws that lie in blocks; the rest are crumbs."""
    return order.Kt * order.V * order.b / order.n


def play_reads(
    mixture: Mixture,
    *,
    sizes: Sequence[SourceSize],
    world: int,
    start: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reads:
    """Plays whole global batches from step `start`: one window to warm up, two that count, one to see blocks used up.

    Every rank is played at once, since a rank's reads are those of its lanes.
    """
    rates = shares(mixture)
    # The longest time that a block can be in use, in steps: its window, and where the quota varies a little more.
    lives = [
        math.ceil((o.K * o.b / regular_part(o) + 3) / rate) + 2
        for o, rate in zip(mixture.orders, rates, strict=True)
        if o.K
    ]
    wanted, most = max(lives, default=4), max(8, MOST_DRAWS // (mixture.slots * mixture.lanes))
    life = min(wanted, most // (MEASURED_WINDOWS + 2))
    first, last = start + life, start + (MEASURED_WINDOWS + 1) * life
    stop = last + life + LOOKAHEAD
    drawn: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in mixture.orders]
    for step in range(start, stop):
        for micro_step in range(mixture.accumulation):
            rows = mixture.rows(step, micro_step)
            rank = rank_of(rows.lane, mixture, world=world)
            for s, order in enumerate(mixture.orders):
                of = rows.source == s
                unit = _unit(order, epoch=rows.epoch[of], ids=rows.id[of]) * world + rank[of]
                drawn[s].append((unit, np.full(unit.size, step, np.int32)))
        progress(step - start + 1, stop - start)
    requests_TW, held_TW = np.zeros((stop - start, world), np.int64), np.zeros((stop - start, world))
    sources = []
    for s, order in enumerate(mixture.orders):
        unit, used = (np.concatenate(column) for column in zip(*drawn[s], strict=True))
        drawn[s] = []  # a big source's columns are most of the memory
        part = _Part(order, sizes[s], world=world, start=start, stop=stop, unit=unit, used=used)
        inside = slice(first - start, last - start)
        sources.append(part.figures(inside, rate=rates[s]))
        requests_TW += part.requests_TW
        held_TW += part.held_TW
    return Reads(
        first=first,
        last=last,
        requests_TW=requests_TW[inside],
        held_TW=held_TW[inside],
        complete=life == wanted,
        sources=sources,
    )


def expected_held(order: SourceOrder, *, rate: float, lanes_per_rank: float) -> float:
    """Samples that a rank holds: `rate` a lane and step, each from LOOKAHEAD before its block's first use to its own.

    b draws spread evenly over a window of T steps are first used at T / (b + 1) and on average at T / 2.
    """
    window = window_rows(order) / rate
    waiting = regular_part(order) * window * (order.b - 1) / (2 * (order.b + 1))
    return rate * lanes_per_rank * (waiting + LOOKAHEAD + 1)


class _Part:
    """One source's reads: what ranks read (units: a block, or a crumb alone) from `start` to `stop`.

    unit: (draws,) what each draw is read with and by which rank; used: (draws,) the step of the draw, ascending.
    """

    def __init__(
        self,
        order: SourceOrder,
        size: SourceSize,
        *,
        world: int,
        start: int,
        stop: int,
        unit: np.ndarray,
        used: np.ndarray,
    ) -> None:
        self.order, self.size, self.world = order, size, world
        shape = (stop - start, world)
        self.rank_and_step = (used - start).astype(np.int64) * world + unit % world
        by_unit = np.argsort(unit, kind="stable")  # stable: the first of a unit is its earliest draw
        unit = unit[by_unit]
        heads = np.flatnonzero(np.diff(unit, prepend=-1))
        self.draws = np.diff(np.append(heads, unit.size))
        unit, first = unit[heads], used[by_unit[heads]].astype(np.int64) - start
        rank = unit % world
        epoch, block = np.divmod(unit // world, order.Kt * order.V + order.n)
        in_block = block < order.Kt * order.V
        self.samples = np.where(in_block, order.b, 1)
        self.pieces = np.where(in_block, pieces(order, epoch=epoch, block=block, shards=size.shards), 1)
        self.first = first
        self.requests_TW = _table(first * world + rank, self.pieces, shape)
        # Samples enter before their block's first draw and leave after their own. The rank knows its order, so samples
        # of a block that it will not draw itself (a few, where an epoch's start was swapped) are dropped at once.
        enter = _table(np.maximum(first - LOOKAHEAD, 0) * world + rank, self.draws, shape)
        leave = _table(self.rank_and_step, np.ones(used.size), shape)
        self.held_TW = (enter.cumsum(0) - leave.cumsum(0) + leave) * size.mean_bytes

    def figures(self, inside: slice, *, rate: float) -> SourceReads:
        """Means over the steps `inside`."""
        order, mean_bytes = self.order, self.size.mean_bytes
        counted = (self.first >= inside.start) & (self.first < inside.stop)
        requests, samples = int(self.pieces[counted].sum()), int(self.samples[counted].sum())
        return SourceReads(
            name=order.name,
            window_steps=window_rows(order) / rate,
            requests=requests,
            samples_per_request=samples / max(requests, 1),
            bytes_per_request=samples * mean_bytes / max(requests, 1),
            amplification=samples / max(int(self.draws[counted].sum()), 1),
            held_bytes=float(self.held_TW[inside].mean()),
            held_expected=expected_held(order, rate=rate, lanes_per_rank=order.V / self.world) * mean_bytes,
        )


def _table(index: np.ndarray, weights: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Sums of weights by (step, rank), int64."""
    return np.bincount(index, weights, minlength=shape[0] * shape[1]).astype(np.int64).reshape(shape)


def _unit(order: SourceOrder, *, epoch: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """One integer for what is read in one go: a block of an epoch, or a crumb of it."""
    block, blocks = order.blocks(epoch, ids), order.Kt * order.V
    return epoch * (blocks + order.n) + np.where(block >= 0, block, blocks + ids)

"""Global batches looked at one by one: repeats, the split over ranks, and how well they are shuffled (SAMPLER 5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from m3i_large.data.mixture import Mixture
from m3i_large.data.order import SourceOrder
from m3i_large.data.simulate.counts import Counts, step_of
from m3i_large.data.simulate.reads import SourceSize, crumbs_of, rank_of, regular_part, shard_of, window_rows

RANDOM_STEPS, RANK_STEPS, EDGES = 32, 8, 40


@dataclass(frozen=True, kw_only=True)
class SourceBatches:
    """One source in the global batches looked at.

    Attributes:
        large: n is at least 3 batches of its largest share, so that no batch may hold a sample twice.
        edges: epoch edges inside a batch that were looked at, and how many the run has.
        duplicates: draws of an id that the same batch holds already.
        judged: draws in the random batches, which the means below are over.
        neighbours: others of the batch with |id difference| < b, per sample.
        neighbours_expected: of blocks shuffled evenly within windows; neighbours_rule: (b - 1) / T_w, which it tends to
            with many slots per lane.
        mates, mates_expected: others in the same shard, per sample; mates_ideal: where single samples are shuffled.
    """

    name: str
    large: bool
    edges: tuple[int, int]
    duplicates: int
    judged: int
    neighbours: float
    neighbours_expected: float
    neighbours_rule: float
    mates: float
    mates_expected: float
    mates_ideal: float


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Global batches looked at; `unequal`: (step, ranks) whose ranks differ in split or do not make up the batch."""

    steps: int
    rank_steps: int
    unequal: list[tuple[int, int]]
    sources: list[SourceBatches]


def look_at_batches(
    mixture: Mixture,
    *,
    sizes: Sequence[SourceSize],
    counts: Counts,
    world: int,
    random: np.random.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Batches:
    """Looks at random steps and at those where an epoch of a source ends inside the batch.

    Inside one epoch no id can repeat where an epoch holds each once, so the edges are all that is left to see.
    """
    edges = [_edges(mixture, s, steps=counts.steps, random=random) for s in range(len(mixture.orders))]
    drawn_at = random.choice(counts.steps, min(RANDOM_STEPS, counts.steps), replace=False).tolist()
    anywhere = set(drawn_at)
    todo = sorted({*anywhere, *(step for steps, _ in edges for step in steps)})
    ranked = {*drawn_at[:RANK_STEPS], *(steps[0] for steps, _ in edges if steps)}
    tallies = [_Tally(order, size) for order, size in zip(mixture.orders, sizes, strict=True)]
    unequal: list[tuple[int, int]] = []
    for done, step in enumerate(todo):
        source, epoch, ids = global_batch(mixture, step)
        for s, tally in enumerate(tallies):
            tally.add(ids[source == s], epoch=epoch[source == s], shuffled=step in anywhere)
        worlds = {world} if step in ranked else set()
        if step == drawn_at[0]:
            worlds |= set(mixture.valid_world_sizes())
        unequal += [(step, w) for w in sorted(worlds) if not _ranks_agree(mixture, step, world=w)]
        progress(done + 1, len(todo))
    sources = [
        tally.figures(large=order.n >= 3 * mixture.lanes * part.slots[1], share=part.share, edges=(len(steps), in_run))
        for tally, order, part, (steps, in_run) in zip(tallies, mixture.orders, counts.sources, edges, strict=True)
    ]
    return Batches(steps=len(todo), rank_steps=len(ranked), unequal=unequal, sources=sources)


def global_batch(mixture: Mixture, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, epoch and id of every sample of a step, (N,) each."""
    rows = [mixture.rows(step, micro_step) for micro_step in range(mixture.accumulation)]
    source, epoch, ids = ([getattr(r, column) for r in rows] for column in ("source", "epoch", "id"))
    return np.concatenate(source), np.concatenate(epoch), np.concatenate(ids)


def count_neighbours(ids: np.ndarray, *, b: int) -> int:
    """Ordered pairs of different draws with |id difference| < b."""
    ids = np.sort(ids)
    return int((np.searchsorted(ids, ids + b) - np.searchsorted(ids, ids - b, side="right") - 1).sum())


def count_mates(ids: np.ndarray, *, n: int, shards: int) -> int:
    """Ordered pairs of different draws in the same shard."""
    sizes = np.unique(shard_of(ids, n=n, shards=shards), return_counts=True)[1]
    return int((sizes * (sizes - 1)).sum())


def mates_of_block(order: SourceOrder, *, slots: float) -> float:
    """Others of its own block that a sample meets in a batch which takes `slots` rows of blocks from each lane.

    Two rows of a lane belong together with probability (b - 1) / (window - 1) if they are of one window: with phases
    an epoch has F + 1 - 1 / V windows, and rows d apart of a window of R rows are parted by its edge in d of R cases.
    """
    if not order.K or slots <= 1:
        return 0.0
    windows = order.F + 1 - 1 / order.V
    rows = order.Kt * order.b / windows
    together = min(1.0, (order.b - 1) / max(rows - 1, 1))
    unparted = max(0.0, 1 - (slots + 1) / 3 * regular_part(order) / rows)
    return (slots - 1) * together * unparted


class _Tally:
    """Sums over batches of one source."""

    def __init__(self, order: SourceOrder, size: SourceSize) -> None:
        self.order, self.size = order, size
        self.draws = self.duplicates = self.neighbours = self.mates = 0
        self.neighbours_expected = self.mates_expected = self.mates_ideal = 0.0

    def add(self, ids: np.ndarray, *, epoch: np.ndarray, shuffled: bool) -> None:
        """Counts one batch; `shuffled`: it was chosen at random and counts for the shuffle too."""
        order, n, b, m = self.order, self.order.n, self.order.b, ids.size
        self.duplicates += m - np.unique(ids).size
        if not shuffled or m == 0:
            return
        self.draws += m
        self.neighbours += count_neighbours(ids, b=b)
        self.mates += count_mates(ids, n=n, shards=self.size.shards)
        crumbs = order.blocks(epoch, ids) < 0
        in_blocks = m - int(crumbs.sum())
        of_block = in_blocks * mates_of_block(order, slots=in_blocks / order.V)
        near, shard = min(b, n), n / self.size.shards
        near_ids, shard_ids = (near - 1) * (2 * n - near) / n, max(shard - 1, 0)
        block_ids = (b - 1) * in_blocks / m  # those of its own block are counted above
        pairs = m * (m - 1) / max(n - 1, 1)  # times ids: how often one of them is met where all are shuffled evenly
        self.neighbours_expected += of_block + pairs * (near_ids - block_ids)
        self.mates_ideal += pairs * shard_ids
        self.mates_expected += of_block * _one_shard(b, shard) + pairs * (shard_ids - block_ids * _one_shard(b, shard))
        if order.K:
            self._add_crumbs(epoch[crumbs])

    def _add_crumbs(self, epoch: np.ndarray) -> None:
        """Crumbs, here of these epochs, come a row of V at a time out of one run of C ids: few batches have any."""
        order, C, b = self.order, self.order.C, self.order.b
        for e, drawn in zip(*np.unique(epoch, return_counts=True), strict=True):
            pairs, near = int(drawn) * (int(drawn) - 1) / max(C * (C - 1), 1), min(b, C)
            self.neighbours_expected += pairs * (near - 1) * (2 * C - near)
            self.mates_expected += pairs * count_mates(crumbs_of(order, epoch=e), n=order.n, shards=self.size.shards)

    def figures(self, *, large: bool, share: float, edges: tuple[int, int]) -> SourceBatches:
        """Means per draw."""
        draws, window = max(self.draws, 1), window_rows(self.order)
        return SourceBatches(
            name=self.order.name,
            large=large,
            edges=edges,
            duplicates=self.duplicates,
            judged=self.draws,
            neighbours=self.neighbours / draws,
            neighbours_expected=self.neighbours_expected / draws,
            neighbours_rule=(self.order.b - 1) / (window / share) if window else 0.0,
            mates=self.mates / draws,
            mates_expected=self.mates_expected / draws,
            mates_ideal=self.mates_ideal / draws,
        )


def _one_shard(b: int, shard: float) -> float:
    """Part of the pairs of a block that lie in one shard of that many samples."""
    if b < 2:
        return 0.0
    apart = np.arange(1, b)
    return float(((b - apart) * np.maximum(0, 1 - apart / shard)).sum() / (b * (b - 1) / 2))


def _edges(mixture: Mixture, source: int, *, steps: int, random: np.random.Generator) -> tuple[list[int], int]:
    """Steps in which an epoch of the source ends inside the batch, EDGES of them at most, and the run's epoch ends."""
    order = mixture.orders[source]
    in_run = (mixture.position(steps)[source] - 1) // order.n
    chosen = np.arange(1, in_run + 1)
    if in_run > EDGES:
        chosen = 1 + random.choice(in_run, EDGES, replace=False)
    return [step_of(mixture, source=source, draw=int(epoch) * order.n) for epoch in chosen], in_run


def _ranks_agree(mixture: Mixture, step: int, *, world: int) -> bool:
    """Whether all ranks have the same split and only their own lanes, and together the batch of one rank, in order."""
    for micro_step in range(mixture.accumulation):
        whole = mixture.rows(step, micro_step)
        parts = [mixture.rows(step, micro_step, rank=rank, world=world) for rank in range(world)]
        if len({tuple(np.bincount(part.source, minlength=len(mixture.orders))) for part in parts}) > 1:
            return False
        if any((rank_of(part.lane, mixture, world=world) != rank).any() for rank, part in enumerate(parts)):
            return False
        for column in ("source", "epoch", "id", "slot"):
            if not np.array_equal(np.concatenate([getattr(part, column) for part in parts]), getattr(whole, column)):
                return False
    return True

"""Collectives of a step: which, how many, how many bytes, and how many gathered parameters are alive at most.

ZeRO-3 is played: the visits of a walk in the rules of DeepSpeed 0.19's parameter coordinator
(deepspeed/runtime/zero/partitioned_param_coordinator.py), with its trace complete, as from the third step on.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from m3i_large.plan.parameters import Table
from m3i_large.plan.walk import Visit, Walk
from m3i_large.plan.zero import Zero


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one step: calls, and bytes of the whole tensors that they make or take."""

    what: str
    op: str
    calls: int
    bytes: int


@dataclass
class Gathers:
    """Elements, padded to all ranks, of every gather of a micro-step; and the most elements gathered at once."""

    sizes: list[int] = field(default_factory=list)
    live: int = 0
    peak: int = 0


def collectives(walk: Walk, table: Table, zero: Zero, *, world: int, accumulation: int) -> list[Traffic]:
    """Every collective of an optimizer step, on each rank; empty on one rank.

    Not counted: a handful of scalars (gradient norm, overflow, counts of valid rows in the loop).
    """
    if world == 1:
        return []
    width, trained = table.element, [table.size[name] for name in walk.gradients]
    rows = []
    if zero.stage == 3:
        first, later = (play_gathers(walk.visits, table, zero, world=world, updated=now) for now in (True, False))
        sizes = first.sizes + (accumulation - 1) * later.sizes
        rows.append(Traffic("weights", "all_gather", len(sizes), width * sum(sizes)))
        small = [_padded(n, world) for n in table.size.values() if n <= zero.persistence]
        rows.append(Traffic("small weights, after", "all_gather", len(small), width * sum(small)))
        calls = _buckets(trained, zero.reduce_bucket)
        bytes_ = width * sum(_padded(n, world) for n in trained)
        rows.append(Traffic("gradients", "reduce_scatter", accumulation * calls, accumulation * bytes_))
    else:
        # Stages 0 and 1 reduce once a step, stage 2 after every micro-step.
        times = accumulation if zero.stage == 2 else 1
        calls = _buckets(trained, zero.reduce_bucket)
        rows.append(Traffic("gradients", "all_reduce", times * calls, times * width * sum(trained)))
        if zero.stage:
            calls = math.ceil(sum(trained) / zero.allgather_bucket)
            rows.append(Traffic("weights, after", "all_gather", calls, width * sum(trained)))
    for op, bytes_ in walk.exchanged.items():
        rows.append(Traffic("objective", op, 0, accumulation * bytes_))
    return rows


def _padded(numel: int, world: int) -> int:
    return math.ceil(numel / world) * world


def _buckets(sizes: Sequence[int], limit: int) -> int:
    """Reductions that a backward pass starts: a bucket is sent when the next gradient would not fit."""
    calls, filled = 0, 0
    for size in sizes:
        if filled and filled + size > limit:
            calls, filled = calls + 1, 0
        filled += size
    return calls + bool(filled)


def play_gathers(visits: Sequence[Visit], table: Table, zero: Zero, *, world: int, updated: bool = True) -> Gathers:
    """The gathers of one micro-step under ZeRO-3.

    Parameters up to the persistence threshold are on every rank already, but for those of averaged targets in the
    first micro-step behind an update (`updated`), which are gathered anew.
    """
    return _Coordinator(visits, table, zero, world, stale=table.averaged if updated else frozenset()).play()


class _Coordinator:
    """State of the parameter coordinator; method by method what DeepSpeed's does."""

    def __init__(self, visits: Sequence[Visit], table: Table, zero: Zero, world: int, *, stale: frozenset[str]) -> None:
        self.visits, self.size, self.zero, self.world = visits, table.size, zero, world
        self.persistent = {name for name, size in table.size.items() if size <= zero.persistence}
        self.order = [v for v in visits if v.fetch]
        self.available = set(self.persistent - stale)
        self.active: dict[str, set[int]] = defaultdict(set)
        self.last: dict[str, int] = defaultdict(lambda: -1)  # the step for which a parameter was last fetched
        self.queue = deque((name, step) for step, v in enumerate(self.order) for name in sorted_(v, table))
        self.step = 0
        self.out = Gathers()

    def play(self) -> Gathers:
        """Goes through the visits."""
        for visit in self.visits:
            if visit.fetch:
                self._fetch(visit)
            else:
                self._release(visit)
        return self.out

    def _gather(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.available]
        if not missing:
            return
        self.available |= set(missing)
        self.out.sizes.append(sum(_padded(self.size[name], self.world) for name in missing))
        self.out.live += sum(self.size[name] for name in missing)
        self.out.peak = max(self.out.peak, self.out.live)

    def _fetch(self, visit: Visit) -> None:
        self._gather(visit.parameters)
        for name in visit.parameters:
            self.active[name].add(visit.module)
        new = {name for name in visit.parameters if self.last[name] < self.step}
        found: set[str] = set()
        while self.queue and len(found) < len(new):
            name, step = self.queue.popleft()
            self.last[name] = step
            found.add(name)
        self._prefetch()
        self.step += 1

    def _prefetch(self) -> None:
        room = min(self.zero.max_live - self.out.live, self.zero.prefetch_bucket)
        chosen: list[str] = []
        numel = 0
        while self.queue and numel < room:
            name, step = self.queue.popleft()
            self.last[name] = max(self.last[name], step)
            if name not in self.available and name not in chosen:
                chosen.append(name)
                numel += self.size[name]
        self._gather(chosen)

    def _release(self, visit: Visit) -> None:
        keep = self.persistent | self._reused()
        for name in visit.parameters:
            self.active[name].discard(visit.module)
            if name in keep or self.last[name] > self.step or self.active[name] or name not in self.available:
                continue
            self.available.discard(name)
            self.out.live -= self.size[name]

    def _reused(self) -> set[str]:
        """What the next modules need, up to the reuse distance."""
        soon: set[str] = set()
        distance = 0
        for visit in self.order[self.step :]:
            if distance >= self.zero.max_reuse:
                break
            soon |= set(visit.parameters)
            distance += sum(self.size[name] for name in visit.parameters)
        return soon


def sorted_(visit: Visit, table: Table) -> list[str]:
    """A module's parameters in the order in which they were made."""
    return sorted(visit.parameters, key=table.position.__getitem__)

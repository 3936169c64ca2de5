"""Collectives of a step: which, how many, how many bytes, and how many gathered parameters are alive at most.

ZeRO-3 is played: the visits of a walk in the rules of DeepSpeed 0.19's parameter coordinator
(deepspeed/runtime/zero/partitioned_param_coordinator.py), after the steps in which it learns the order of modules.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from m3i_large.ds_file import Zero
from m3i_large.plan.parameters import Table
from m3i_large.plan.walk import Visit, Walk


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one step: calls, and bytes of the whole tensors that they make or take."""

    what: str
    op: str
    calls: int
    bytes: int


@dataclass
class Gathers:
    """Elements, padded to all ranks, of every gather of a step; and the most elements gathered at once."""

    sizes: list[int] = field(default_factory=list)
    peak: int = 0


def collectives(walk: Walk, table: Table, zero: Zero, *, world: int, accumulation: int) -> list[Traffic]:
    """Every collective of an optimizer step, on each rank; empty on one rank.

    Not counted: a handful of scalars (gradient norm, overflow, counts of valid rows in the loop).
    """
    if world == 1:
        return []
    width, trained = table.element, [table.size[name] for name in walk.gradients]
    backward = accumulation * walk.passes[-1][0]
    rows = []
    if zero.stage == 3:
        sizes = play_gathers(walk, table, zero, world=world, accumulation=accumulation).sizes
        rows.append(Traffic("weights", "all_gather", len(sizes), width * sum(sizes)))
        small = [_padded(n, world) for n in table.size.values() if n <= zero.persistence]
        if small:
            rows.append(Traffic("small weights, after", "all_gather", len(small), width * sum(small)))
        calls = _buckets(trained, zero.reduce_bucket)
        bytes_ = width * sum(_padded(n, world) for n in trained)
        rows.append(Traffic("gradients", "reduce_scatter", backward * calls, backward * bytes_))
    else:
        # Stage 1 reduces once a step, stage 2 after every backward pass.
        times = backward if zero.stage == 2 else 1
        calls = _buckets(trained, zero.reduce_bucket)
        rows.append(Traffic("gradients", "all_reduce", times * calls, times * width * sum(trained)))
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


def play_gathers(walk: Walk, table: Table, zero: Zero, *, world: int, accumulation: int = 1) -> Gathers:
    """The gathers of one step under ZeRO-3, once steps repeat themselves."""
    coordinator = _Coordinator(table, zero, world)
    before = coordinator.step(walk, accumulation)
    for _ in range(3):  # the first pass of a kind is recorded, the second one follows the record
        if (now := coordinator.step(walk, accumulation)) == before:
            break
        before = now
    return now


class _Coordinator:
    """State of the parameter coordinator; method by method what DeepSpeed's does.

    A pass is one call of the root module with its backward pass, if any. Without a record every module's weights are
    gathered when it is entered and released when it is left; such a pass is recorded, and those behind it prefetch
    along the record until a pass goes another way.
    """

    def __init__(self, table: Table, zero: Zero, world: int) -> None:
        self.size, self.position, self.zero, self.world = table.size, table.position, zero, world
        self.persistent = {name for name, size in table.size.items() if size <= zero.persistence}
        # Those of averaged targets are released by the update and gathered anew.
        self.kept = self.persistent - table.averaged
        self.available = set(self.kept)
        self.flying: set[str] = set()  # gathered ahead and not yet used
        self.active: dict[str, set[int]] = defaultdict(set)
        self.record: list[Visit] | None = None  # of the pass before, being made
        self.order: list[Visit] | None = None  # complete
        self.kept_on: dict[tuple[int, int], frozenset[str]] = {}  # DeepSpeed's cache outlives the record it is made of
        self.live = 0
        self.out = Gathers()

    def step(self, walk: Walk, accumulation: int) -> Gathers:
        """Goes through all passes of an optimizer step."""
        self.out = Gathers()
        self.available = (self.available - self.persistent) | self.kept
        self.live = sum(self.size[name] for name in self.available - self.kept)
        for _ in range(accumulation):
            for num, visits in walk.passes:
                self._passes(num, visits)
        return self.out

    def _passes(self, num: int, visits: Sequence[Visit]) -> None:
        for done in range(1, num + 1):
            before, told = (self.order, set(self.available)), len(self.out.sizes)
            self._pass(visits)
            if self.order is not None and (self.order, self.available) == before:
                self.out.sizes += (num - done) * self.out.sizes[told:]  # nor would any other pass differ
                return

    def _pass(self, visits: Sequence[Visit]) -> None:
        self._begin()
        for visit in visits:
            if visit.fetch:
                self._fetch(visit)
            else:
                self._release(visit)
        # What no gradient came by, as nothing in front of it is trained: release_backward_leftovers.
        for name in [name for name, modules in self.active.items() if modules]:
            self.active[name].clear()
            if name not in self.persistent:
                self._drop(name)

    def _begin(self) -> None:
        """reset_step."""
        self._drop_flying()
        if self.order is None:
            self.order, self.record = (None, []) if self.record is None else (self.record, None)
        self.queue = deque((n, step) for step, v in enumerate(self.order or ()) for n in self._sorted(v))
        self.last: dict[str, int] = defaultdict(lambda: -1)  # the step for which a parameter was last fetched
        self.at, self.gathered = 0, 0

    def _drop_flying(self) -> None:
        for name in self.flying:
            self._drop(name)
        self.flying = set()

    def _drop(self, name: str) -> None:
        if name in self.available and not self.active[name]:
            self.available.discard(name)
            self.live -= self.size[name]
            self.gathered -= self.size[name]

    def _sorted(self, visit: Visit) -> list[str]:
        """A module's parameters in the order in which they were made."""
        return sorted(visit.parameters, key=self.position.__getitem__)

    def _gather(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.available]
        if not missing:
            return
        self.available |= set(missing)
        self.flying |= set(missing)
        self.out.sizes.append(sum(math.ceil(self.size[name] / self.world) * self.world for name in missing))
        self.live += sum(self.size[name] for name in missing)
        self.gathered += sum(self.size[name] for name in missing)
        self.out.peak = max(self.out.peak, self.live)

    def _fetch(self, visit: Visit) -> None:
        if self.order is not None and self.order[self.at : self.at + 1] != [visit]:
            self.order, self.queue, self.last = None, deque(), defaultdict(lambda: -1)
            self._drop_flying()
        if self.record is not None:
            self.record.append(visit)
        self._gather(visit.parameters)
        self.flying -= set(visit.parameters)
        for name in visit.parameters:
            self.active[name].add(visit.module)
        if self.order is not None:
            self._advance(visit)
        self.at += 1

    def _advance(self, visit: Visit) -> None:
        """Takes a module's parameters off the queue, and prefetches what comes behind them."""
        new = {name for name in visit.parameters if self.last[name] < self.at}
        found: set[str] = set()
        while self.queue and len(found) < len(new):
            name, step = self.queue.popleft()
            self.last[name] = step
            found.add(name)
        room = min(self.zero.max_live - self.gathered, self.zero.prefetch_bucket)
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
        keep = self._kept(visit) if self.order is not None else frozenset()
        for name in visit.parameters:
            self.active[name].discard(visit.module)
            if name not in keep:
                self._drop(name)

    def _kept(self, visit: Visit) -> frozenset[str]:
        """Those of a module's parameters that are persistent, or needed again soon."""
        key = visit.module, self.at
        if key not in self.kept_on:
            later = {name for name in visit.parameters if self.last[name] > self.at}
            self.kept_on[key] = frozenset(visit.parameters) & (self.persistent | later | self._reused())
        return self.kept_on[key]

    def _reused(self) -> set[str]:
        """What the next modules need, up to the reuse distance."""
        soon: set[str] = set()
        distance = 0
        for visit in (self.order or [])[self.at :]:
            if distance >= self.zero.max_reuse:
                break
            soon |= set(visit.parameters)
            distance += sum(self.size[name] for name in visit.parameters)
        return soon

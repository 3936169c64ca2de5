"""The mixture of sources as a pure function of (seed, step): who reads which sample, at any number of ranks.

A step consumes k_s * V consecutive positions of every source s; lane v gets the positions q with q mod V == v. Ranks
own whole lanes, micro-steps take every A-th lane, so what a micro-step holds never depends on the number of ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from m3i_large.data.order import SourceOrder
from m3i_large.errors import UserError

ORDER_VERSION = 1
# (name, eligible samples, repeats, mean bytes of a sample, fixed samples per lane and step or None)
SourceSpec = tuple[str, int, object, float, int | None]


@dataclass(frozen=True)
class MixtureRows:
    """Rows of one micro-step on one rank, in the canonical order: lane by lane, within a lane by source.

    All arrays are int64 of the same length. `slot` is the row's place in the step's canonical global batch.
    """

    source: np.ndarray
    epoch: np.ndarray
    offset: np.ndarray
    id: np.ndarray
    lane: np.ndarray
    slot: np.ndarray


def split(m: int, weights: Sequence[int]) -> list[int]:
    """Divides m draws by weight: nested Bresenham, so that every count is monotone in m and never drifts."""
    order = sorted(range(len(weights)), key=lambda s: -weights[s])
    counts = [0] * len(weights)

    def divide(m: int, part: list[int]) -> None:
        if len(part) == 1:
            counts[part[0]] = m
            return
        total, left, best = sum(weights[s] for s in part), 0, (math.inf, 0, 0)
        for i, s in enumerate(part[:-1]):
            left += weights[s]
            best = min(best, (abs(total - 2 * left), i + 1, left))
        _, cut, left = best
        share = (2 * m * left + total) // (2 * total)
        divide(share, part[:cut])
        divide(m - share, part[cut:])

    divide(m, order)
    return counts


@dataclass(frozen=True)
class Mixture:
    """The frozen layout of a run's sample order. Its only moving part is the step, which callers pass in."""

    orders: tuple[SourceOrder, ...]
    weights: tuple[int, ...]
    denominator: int
    quotas: tuple[int, ...] | None
    slots: int
    lanes: int
    accumulation: int
    base_step: int = 0
    base_pos: tuple[int, ...] = ()

    @classmethod
    def plan(
        cls,
        seed: int,
        *,
        sources: Sequence[SourceSpec],
        global_batch: int,
        lanes: int | None = None,
        accumulation: int = 1,
        window_steps: int = 128,
    ) -> "Mixture":
        """Lays out a new run from data and batch size alone, never from the number of ranks.

        Raises UserError where something does not divide, a source is empty, or fixed quotas do not fill a lane.
        """
        names = [source[0] for source in sources]
        if len(set(names)) != len(names):
            raise UserError(f"data.sources: a name occurs twice in {names}")
        lanes = default_lanes(global_batch) if lanes is None else lanes
        if lanes < 1 or global_batch % lanes:
            fitting = [v for v in range(1, min(global_batch, 256) + 1) if global_batch % v == 0]
            raise UserError(
                f"data.lanes: got {lanes}, which does not divide global_batch {global_batch}; needed: one of {fitting}"
            )
        if lanes % accumulation:
            raise UserError(f"data.lanes: {lanes} lanes do not divide into {accumulation} micro-steps")
        slots = global_batch // lanes
        (weights, denominator), quotas = _weights(sources), _fixed(sources, slots)
        total = sum(weights)
        orders = []
        for s, (name, n, _, mean_bytes, _) in enumerate(sources):
            share = quotas[s] if quotas else slots * weights[s] / total
            most = quotas[s] if quotas else math.ceil(share) + 1
            plan = SourceOrder.plan(
                name,
                seed=seed,
                n=n,
                lanes=lanes,
                quota=share,
                max_quota=most,
                mean_bytes=mean_bytes,
                window_steps=window_steps,
            )
            orders.append(plan)
        return cls(tuple(orders), weights, denominator, quotas, slots, lanes, accumulation)

    def continued(self, step: int, plan: "Mixture") -> "Mixture":
        """This order up to `step`, from there on in the batches, lanes and shares of `plan` (SAMPLER 4).

        Every source goes on where it is, and its epochs stay exact. Blocks keep the lanes they were laid out for; if
        there are more or fewer lanes now, several ranks share a block.

        Raises:
            UserError: `plan` is of other sources or other sizes.
        """
        if [(o.name, o.n) for o in self.orders] != [(o.name, o.n) for o in plan.orders]:
            raise UserError(
                f"data.sources: got {[(o.name, o.n) for o in plan.orders]}; needed: the names and numbers of samples "
                f"that the run began with, {[(o.name, o.n) for o in self.orders]}"
            )
        return replace(plan, orders=self.orders, base_step=step, base_pos=tuple(self.position(step)))

    def to_state(self) -> dict[str, Any]:
        """JSON values that `from_state` turns back into the same order, whatever defaults have become."""
        return {
            "order_version": ORDER_VERSION,
            "orders": [order.to_state() for order in self.orders],
            "weights": [str(w) for w in self.weights],
            "denominator": str(self.denominator),
            "quotas": list(self.quotas) if self.quotas else None,
            "slots": self.slots,
            "lanes": self.lanes,
            "accumulation": self.accumulation,
            "base_step": self.base_step,
            "base_pos": list(self.base_pos),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Mixture":
        """Restores a frozen layout; UserError for one written by another order."""
        if state["order_version"] != ORDER_VERSION:
            raise UserError(f"sampler: order version {state['order_version']} was saved; needed: {ORDER_VERSION}")
        return cls(
            tuple(SourceOrder(**order) for order in state["orders"]),
            tuple(int(w) for w in state["weights"]),
            int(state["denominator"]),
            tuple(state["quotas"]) if state["quotas"] else None,
            state["slots"],
            state["lanes"],
            state["accumulation"],
            state.get("base_step", 0),
            tuple(state.get("base_pos", ())),
        )

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names in the order of the `source` column."""
        return tuple(order.name for order in self.orders)

    @property
    def max_quota(self) -> tuple[int, ...]:
        """The most samples per lane that any step takes of each source."""
        if self.quotas:
            return self.quotas
        total = sum(self.weights)
        return tuple(min(self.slots, self.slots * w // total + 2) for w in self.weights)

    def valid_world_sizes(self) -> list[int]:
        """Numbers of ranks that leave every micro-step as it is: W with W * A dividing V."""
        per_step = self.lanes // self.accumulation
        return [w for w in range(1, per_step + 1) if per_step % w == 0]

    def drawn(self, step: int) -> list[int]:
        """K_s: draws per lane of each source before `step`, since the layout last changed."""
        steps = step - self.base_step
        if self.quotas:
            return [steps * quota for quota in self.quotas]
        return split(self.slots * steps, self.weights)

    def position(self, step: int) -> list[int]:
        """P_s: draws of each source before `step`, the place of its stream where the step begins."""
        base = self.base_pos or (0,) * len(self.orders)
        return [b + self.lanes * k for b, k in zip(base, self.drawn(step), strict=True)]

    def rows(self, step: int, micro_step: int = 0, *, rank: int = 0, world: int = 1) -> MixtureRows:
        """What `rank` of `world` reads in one micro-step."""
        if world not in (valid := self.valid_world_sizes()):
            raise ValueError(f"ranks: got {world}; needed: one of {', '.join(map(str, valid))}")
        chosen = np.arange(micro_step, self.lanes, self.accumulation)
        per_rank = len(chosen) // world
        lanes = chosen[rank * per_rank : (rank + 1) * per_rank]
        before, after, positions = self.drawn(step), self.drawn(step + 1), self.position(step)
        columns: list[list[np.ndarray]] = []
        start = 0
        for s, order in enumerate(self.orders):
            k, base = after[s] - before[s], positions[s]
            i = np.arange(k)[None]
            q = base + i * self.lanes + (lanes[:, None] - base) % self.lanes
            slot = lanes[:, None] * self.slots + start + i
            start += k
            epoch, offset, ids = order.ids(q.ravel())
            lane = np.broadcast_to(lanes[:, None], q.shape).ravel()
            columns.append([np.full(q.size, s), epoch, offset, ids, lane, slot.ravel()])
        joined = [np.concatenate(column).astype(np.int64) for column in zip(*columns, strict=True)]
        in_order = np.argsort(joined[-1], kind="stable")
        return MixtureRows(*(column[in_order] for column in joined))

    def substitute(self, source: int, *, epoch: int, offset: int, attempt: int) -> int:
        """The sample to read instead of a bad one: half an epoch away, so not in the same batch."""
        order = self.orders[source]
        place = (offset + order.n // 2 + attempt * (order.g + 1)) % order.n
        return int(order.id_at(np.array([epoch]), np.array([place]))[0])

    def steps_for_epochs(self, epochs: float) -> int:
        """Smallest number of steps after which every source was drawn epochs * repeats * n times (SAMPLER 4)."""
        wanted = [Fraction(str(epochs)) * w / self.denominator for w in self.weights]

        def enough(step: int) -> bool:
            return all(p >= w for p, w in zip(self.position(step), wanted, strict=True))

        low, high = self.base_step, self.base_step + 1
        while not enough(high):
            low, high = high, 2 * high
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle + 1, high)
        return low

    def epochs_seen(self, step: int) -> dict[str, float]:
        """How often each source has been gone through before `step`."""
        return {order.name: p / order.n for order, p in zip(self.orders, self.position(step), strict=True)}


def default_lanes(global_batch: int) -> int:
    """The largest divisor of N up to min(256, N / 8): from N alone, so that every number of ranks finds the same."""
    most = max(1, min(256, global_batch // 8))
    return next(v for v in range(most, 0, -1) if global_batch % v == 0)


def _weights(sources: Sequence[SourceSpec]) -> tuple[tuple[int, ...], int]:
    """repeats * n of each source as integers over a common denominator."""
    exact = []
    for name, n, repeats, _, _ in sources:
        if n < 1:
            raise UserError(f"data.sources.{name}: has no samples; needed: at least one")
        try:
            value = Fraction(str(repeats))
        except ValueError:
            raise UserError(
                f"data.sources.{name}.repeats: got {repeats!r}; needed: a number such as 2, 0.5 or 1/3"
            ) from None
        if value <= 0:
            raise UserError(f"data.sources.{name}.repeats: got {repeats}; needed: more than 0")
        exact.append(value * n)
    denominator = math.lcm(*(value.denominator for value in exact))
    return tuple(int(value * denominator) for value in exact), denominator


def _fixed(sources: Sequence[SourceSpec], slots: int) -> tuple[int, ...] | None:
    """Fixed samples per lane and step, if the sources name them."""
    quotas = [source[4] for source in sources]
    if all(quota is None for quota in quotas):
        return None
    fixed = [quota for quota in quotas if quota is not None]
    if len(fixed) != len(quotas):
        raise UserError(f"data.sources: quotas are {quotas}; needed: one for every source or none at all")
    if min(fixed) < 0 or sum(fixed) != slots:
        raise UserError(f"data.sources: quotas {fixed} sum to {sum(fixed)}; needed: {slots} (global_batch / lanes)")
    return tuple(fixed)

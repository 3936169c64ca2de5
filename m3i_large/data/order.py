"""One source as an infinite stream of positions: every epoch is a closed-form bijection of its samples (SAMPLER 0-2).

Symbols as there: n samples, V lanes, b samples per block, K blocks per lane and window (0 = exact mode), Kt block rows,
F windows per epoch, C crumbs, R full rows, Cr crumb rows, g guard, c lane phase, e epoch, o offset, u in-epoch lane.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from m3i_large.data.keyed import feistel, key, name_tag


@dataclass(frozen=True)
class SourceOrder:
    """The frozen integers of one source's order; written into checkpoints and never derived anew."""

    name: str
    seed: int
    n: int
    V: int
    b: int
    K: int
    g: int
    c: int

    @classmethod
    def plan(
        cls,
        name: str,
        *,
        seed: int,
        n: int,
        lanes: int,
        quota: float,
        max_quota: int,
        mean_bytes: float,
        window_steps: int,
    ) -> "SourceOrder":
        """Chooses the layout (SAMPLER 1): `quota` = samples per lane and step, `max_quota` = the most of them.

        mean_bytes: mean size of a sample, which sets the block to about 1.3 MB.
        """
        b = min(64, max(8, round(1.3e6 / mean_bytes))) if mean_bytes > 0 else 32
        most = lanes * max_quota
        K = max(1, round(window_steps * quota / b))
        if n < 4 * lanes * b or n <= window_steps * most:
            K = 0
        return cls(name, seed, n, lanes, b, K, min(most, n // 3), _phase(lanes))

    def to_state(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @property
    def Kt(self) -> int:
        return self.n // (self.V * self.b) if self.K else 0

    @property
    def C(self) -> int:
        return self.n - self.Kt * self.V * self.b

    @property
    def F(self) -> int:
        return math.ceil(self.Kt / self.K) if self.K else 0

    def ids(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, offset and sample id of stream positions q (int64)."""
        epoch, offset = np.divmod(np.atleast_1d(np.asarray(q, np.int64)), self.n)
        return epoch, offset, self.id_at(epoch, offset)

    def id_at(self, epoch: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """The sample at an offset of an epoch; swapped near an epoch's start where it was drawn a moment before."""
        epoch, offset = np.broadcast_arrays(np.atleast_1d(epoch), np.atleast_1d(offset))
        ids = self._raw(offset, epoch)
        guarded = (epoch > 0) & (offset < 2 * self.g)
        for e in np.unique(epoch[guarded]):
            here = guarded & (epoch == e)
            ids[here] = self._zone(int(e))[offset[here]]
        return ids

    def blocks(self, epoch: np.ndarray | Sequence[int], id: np.ndarray | Sequence[int]) -> np.ndarray:
        """The block that sample `id` belongs to in an epoch -> int64, -1 for crumbs, which belong to none."""
        x = (np.asarray(id, np.int64) - self.shift(np.asarray(epoch, np.int64))) % self.n
        return np.where(x < self.Kt * self.V * self.b, x // self.b, -1)

    def block(self, epoch: int, id: int) -> int:
        """The same for one sample, quickly."""
        x = (id - _shift(self, epoch)) % self.n
        return x // self.b if x < self.Kt * self.V * self.b else -1

    def block_ids(self, epoch: int, block: int) -> list[int]:
        """The b samples of a block: consecutive, except where they wrap from n - 1 to 0 (once an epoch)."""
        first = block * self.b + _shift(self, epoch)
        return [(first + i) % self.n for i in range(self.b)]

    def shift(self, epoch: np.ndarray) -> np.ndarray:
        """The epoch's cyclic shift of all ids, so that block edges and the crumbs move every epoch."""
        return (key(self.seed, name_tag(self.name), epoch, 4) % np.uint64(self.n)).astype(np.int64)

    def _zone(self, epoch: int) -> np.ndarray:
        """Ids of the first 2g draws: those seen among the last g of the epoch before swap into the second half."""
        return _zone(self, epoch)

    def _raw(self, o: np.ndarray, e: np.ndarray) -> np.ndarray:
        V, b, n, C, Kt, F = self.V, self.b, self.n, self.C, self.Kt, self.F
        tag = name_tag(self.name)
        row, u = np.divmod(o, V)
        R = n // V
        Cr = R - Kt * b
        crumbs_before = np.where(row == R, Cr, row * Cr // max(R, 1))
        crumb = (row == R) | ((row + 1) * Cr // max(R, 1) > crumbs_before)
        x = np.empty_like(o)
        if crumb.any():
            at = crumbs_before[crumb] * V + u[crumb]
            x[crumb] = Kt * V * b + feistel(at, C, key(self.seed, tag, e[crumb], 1))
        if not crumb.all():
            regular = ~crumb
            x[regular] = self._block(row[regular] - crumbs_before[regular], u[regular], e[regular], tag, Kt, F)
        return (x + self.shift(e)) % n

    def _block(self, rr: np.ndarray, u: np.ndarray, e: np.ndarray, tag: int, Kt: int, F: int) -> np.ndarray:
        V, b = self.V, self.b
        kr, f = rr // b, u * self.c % V
        w = (((kr + 1) * F * V - 1) // Kt - f) // V + 1
        a0 = np.where(w == 0, 0, ((w - 1) * V + f) * Kt // (F * V))
        a1 = np.where(w == F, Kt, (w * V + f) * Kt // (F * V))
        y = feistel(rr - a0 * b, (a1 - a0) * b, key(self.seed, tag, e, 2, w, u))
        block = (a0 + y // b) * V + u
        return feistel(block, Kt * V, key(self.seed, tag, e, 3)) * b + y % b


@lru_cache(maxsize=64)
def _shift(order: SourceOrder, epoch: int) -> int:
    return int(order.shift(np.array([epoch]))[0])


@lru_cache(maxsize=16)  # a small source spends most of each epoch in here
def _zone(order: SourceOrder, epoch: int) -> np.ndarray:
    g = order.g
    zone = order._raw(np.arange(2 * g), np.full(2 * g, epoch))
    before = order._raw(np.arange(order.n - g, order.n), np.full(g, epoch - 1))
    hit = np.isin(zone, before)
    first, second = np.flatnonzero(hit[:g]), g + np.flatnonzero(~hit[g:])
    second = second[: first.size]
    zone[first], zone[second] = zone[second].copy(), zone[first].copy()
    zone.flags.writeable = False
    return zone


def _phase(lanes: int) -> int:
    """An integer near 0.618 V coprime to V: staggers the lanes' windows."""
    start = max(1, round(0.618 * lanes))
    return next((c for d in range(lanes) for c in (start - d, start + d) if c > 0 and math.gcd(c, lanes) == 1), 1)

"""Gets samples' bytes from the sources: one range a sample, or one range a block of samples that a lane will use soon.

Which way depends on the storage alone. The order never does (SAMPLER 0.3), so a batch is the same either way.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from m3i_large.data.mixture import Mixture, MixtureRows
from m3i_large.data.sources import Encoded, Source
from m3i_large.data.storage import is_url

BlockKey = tuple[int, int, int]  # source, epoch, block, or ~id of a sample that belongs to none


class SampleReader:
    """Reads every sample by itself: right where a request costs little (local disks), and needs no memory."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def ahead(self, rows: MixtureRows) -> None:
        """Nothing: samples are read when they are asked for."""

    def read(self, source: int, epoch: int, id: int) -> Encoded:
        """One sample's parts; OutageError where the storage fails."""
        return self._sources[source].fetch([id])[0]


class BlockReader:
    """Reads blocks of consecutive samples ahead of time and keeps each sample until it is used, once.

    A block's samples are all drawn by one lane within one window (SAMPLER 0.3), so by this rank, soon. A sample of no
    block (crumbs; every one of a small source) is read ahead of time by itself, as a block of one. Samples of the first
    steps after a start and of blocks that were dropped for room are read when they are needed.

    Args:
        pool: threads for the reads.
        capacity: bytes kept; the oldest blocks are dropped beyond it.
    """

    def __init__(self, sources: Sequence[Source], mixture: Mixture, pool: ThreadPoolExecutor, *, capacity: int) -> None:
        self._sources, self._mixture, self._pool, self._capacity = sources, mixture, pool, capacity
        self._lock = threading.Lock()
        self._blocks: OrderedDict[BlockKey, Future[dict[int, Encoded]]] = OrderedDict()
        # A byte for each block of an epoch, not a set: there may be ten million.
        self._asked: dict[tuple[int, int], bytearray] = {}
        self.held = 0

    def ahead(self, rows: MixtureRows) -> None:
        """Begins to read the blocks of rows that are needed in some steps; each row is announced once."""
        for source, order in enumerate(self._mixture.orders):
            here = rows.source == source
            if not here.any():
                continue
            epochs, ids = rows.epoch[here], rows.id[here]
            blocks = order.blocks(epochs, ids)
            blocks = np.where(blocks < 0, ~ids, blocks)
            for epoch, block in dict.fromkeys(zip(epochs.tolist(), blocks.tolist(), strict=True)):
                if block < 0 or self._is_new(source, epoch, block):
                    future = self._pool.submit(self._fetch, source, epoch, block)
                    with self._lock:
                        self._blocks[source, epoch, block] = future

    def read(self, source: int, epoch: int, id: int) -> Encoded:
        """One sample's parts, from its block if that was read; OutageError where the storage fails."""
        order = self._mixture.orders[source]
        block = order.block(epoch, id) if order.K else -1
        block = ~id if block < 0 else block
        with self._lock:
            future = self._blocks.get((source, epoch, block))
        if future is not None:
            samples = future.result()
            with self._lock:
                sample = samples.pop(id, None)
                if sample is not None:
                    self.held -= _size(sample)
                if not samples:
                    self._blocks.pop((source, epoch, block), None)
            if sample is not None:
                return sample
        return self._sources[source].fetch([id])[0]

    def _is_new(self, source: int, epoch: int, block: int) -> bool:
        asked = self._asked.get((source, epoch))
        if asked is None:
            order = self._mixture.orders[source]
            asked = self._asked[source, epoch] = bytearray(order.Kt * order.V)
            self._asked.pop((source, epoch - 2), None)
        new = not asked[block]
        asked[block] = True
        return new

    def _fetch(self, source: int, epoch: int, block: int) -> dict[int, Encoded]:
        ids = [~block] if block < 0 else self._mixture.orders[source].block_ids(epoch, block)
        samples = dict(zip(ids, self._sources[source].fetch(ids), strict=True))
        with self._lock:
            self.held += sum(map(_size, samples.values()))
            for key, future in list(self._blocks.items()):
                if self.held <= self._capacity:
                    break
                if key != (source, epoch, block) and future.done() and not future.exception():
                    dropped = self._blocks.pop(key).result()
                    self.held -= sum(map(_size, dropped.values()))
                    dropped.clear()
        return samples


def reads_blocks(choice: str, sources: Sequence[Source]) -> bool:
    """Resolves data.read: `auto` reads blocks where any shard is remote."""
    if choice != "auto":
        return choice == "block"
    return any(is_url(source.storage.location(row.name)) for source in sources for row in source.shards)


def _size(sample: Encoded) -> int:
    return sum(map(len, sample.parts.values()))

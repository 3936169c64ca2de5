"""Blocks read ahead: the bytes of single reads, every block once, and nothing held that will not be used."""

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3i_large.data.mixture import Mixture, MixtureRows
from m3i_large.data.reader import BlockReader, SampleReader, reads_blocks
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import Encoded, Source, open_sources
from m3i_large.errors import OutageError

LANES, QUOTA, WINDOW = 4, 2, 4
SAMPLES, SMALL = 1061, 37  # a prime: crumbs, and a block that wraps around
PAYLOAD = 1_300_000 / 32  # what the layout is told: 32 samples a block


SIZE = 3000  # bytes of a picture: more than half of what a tar makes of it, so that a block is one read


def write(path: Path, samples: range) -> None:
    """Pictures that tell their samples apart and are none but for their header; nothing here decodes them."""
    with tarfile.open(path, "w") as tar:
        for i in samples:
            content = b"GIF89a\1\0\1\0" + f"{path.name} {i} ".encode()
            for extension, data in (("jpg", content.ljust(SIZE)), ("txt", b"%04d" % i)):
                member = tarfile.TarInfo(f"{i:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blocks")
    for number, samples in enumerate((range(400), range(400, 833), range(833, SAMPLES))):
        write(root / f"big-{number:06d}.tar", samples)
    write(root / "small-000000.tar", range(SMALL))
    return root


class Play:
    """Two sources, one of them in blocks, read in the order of a run with a look ahead."""

    def __init__(self, root: Path, *, capacity: int = 1 << 30, pool: ThreadPoolExecutor | None = None) -> None:
        configs = [SourceConfig(name=n, kind="image_text", shards=f"{n}-*.tar") for n in ("big", "small")]
        self.sources = open_sources(configs, root)
        specs = [("big", SAMPLES, 1, PAYLOAD, QUOTA), ("small", SMALL, 1, PAYLOAD, 1)]
        self.mixture = Mixture.plan(
            3, sources=specs, global_batch=LANES * (QUOTA + 1), lanes=LANES, window_steps=WINDOW
        )
        self.order = self.mixture.orders[0]
        assert (self.order.b, self.order.K > 0, self.mixture.orders[1].K) == (32, True, 0)
        self.fetches: list[tuple[str, tuple[int, ...]]] = []
        self.requests: list[tuple[str, int, int]] = []
        storage = self.sources[0].storage
        storage.read = self._requested(storage.read)  # type: ignore[method-assign]
        for source in self.sources:
            source.fetch = self._counted(source, source.fetch)  # type: ignore[method-assign]
        self.pool = pool or Immediate()
        self.reader = BlockReader(self.sources, self.mixture, self.pool, capacity=capacity)
        self.plain = SampleReader(open_sources(configs, root))
        self._expected: dict[tuple[int, int], Encoded] = {}

    def expected(self, source: int, id: int) -> Encoded:
        """What a single read gives."""
        if (source, id) not in self._expected:
            self._expected[source, id] = self.plain.read(source, 0, id)
        return self._expected[source, id]

    def _requested(self, read: Callable) -> Callable:
        def requested(name: str, offset: int, size: int, **more: object) -> bytes:
            self.requests.append((name, offset, size))
            return read(name, offset, size, **more)

        return requested

    def _counted(self, source: Source, fetch: Callable) -> Callable:
        def counted(ids: list[int]) -> list:
            self.fetches.append((source.name, tuple(ids)))
            return fetch(ids)

        return counted

    def steps_of(self, epochs: int) -> int:
        return -(-epochs * SAMPLES // (LANES * QUOTA))

    def rows(self, step: int, rank: int, world: int) -> MixtureRows:
        return self.mixture.rows(step, rank=rank, world=world)

    def run(self, first: int, last: int, *, ahead: int = 3, rank: int = 0, world: int = 1) -> Iterator[int]:
        """Announces and reads as a Producer does, compares with single reads, and yields after every step."""
        announced = first
        for step in range(first, last):
            while announced < min(step + ahead, last - 1):
                announced += 1
                self.reader.ahead(self.rows(announced, rank, world))
            rows = self.rows(step, rank, world)
            for s, e, i in zip(rows.source.tolist(), rows.epoch.tolist(), rows.id.tolist(), strict=True):
                assert self.reader.read(s, e, i) == self.expected(s, i)
            yield step


class Immediate(ThreadPoolExecutor):
    """Runs what is submitted at once, so that the order of events is one and the same."""

    def __init__(self) -> None:
        super().__init__(1)

    def submit(self, function, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (3, 4)])
def test_two_epochs_give_the_bytes_of_single_reads_and_every_block_once(root: Path, rank: int, world: int) -> None:
    play = Play(root)
    steps = play.steps_of(2)
    for _ in play.run(0, steps, rank=rank, world=world):
        pass
    singles = Counter(len(ids) for _, ids in play.fetches)
    assert set(singles) == {1, 32}
    blocks = [ids for name, ids in play.fetches if len(ids) == 32]
    # The first step's rows are read when they are needed.
    expected = set().union(*(keys(play, step, rank, world) for step in range(1, steps)))
    # One request a block, two where it spans shards or wraps around.
    large = [request for request in play.requests if request[2] > 2 * SIZE]
    assert len(blocks) <= len(large) <= len(blocks) + 8
    assert len(blocks) == len(expected) and set(blocks) == {tuple(play.order.block_ids(*key)) for key in expected}
    # What is left: samples of the first step whose block came later, what the swap at the epochs' edge gave to another
    # rank, and the rest of the blocks that the last steps began.
    left = {(0, epoch, id) for epoch, block in expected for id in play.order.block_ids(epoch, block)}
    soon = {key for step in (1, 2, 3) for key in keys(play, step, rank, world)}
    for step in range(steps):
        rows = play.rows(step, rank, world)
        used = set(zip(rows.source.tolist(), rows.epoch.tolist(), rows.id.tolist(), strict=True))
        left -= used if step else {u for u in used if (u[1], int(play.order.blocks([u[1]], [u[2]])[0])) in soon}
    assert play.reader.held == len(left) * (SIZE + 4)
    assert sum(key[1] == 0 for key in left) <= LANES * QUOTA + 2 * play.order.g * 32 * (world > 1)
    assert world > 1 or all(key[1] != 1 for key in left), "of an epoch that was begun and ended nothing is left"


def keys(play: Play, step: int, rank: int, world: int) -> set[tuple[int, int]]:
    """(epoch, block) of a step's rows in blocks."""
    rows = play.rows(step, rank, world)
    epochs, ids = rows.epoch[rows.source == 0], rows.id[rows.source == 0]
    blocks = play.order.blocks(epochs, ids)
    return {(e, b) for e, b in zip(epochs.tolist(), blocks.tolist(), strict=True) if b >= 0}


def test_a_first_step_aside_nothing_is_held_at_the_end_of_an_epoch(root: Path) -> None:
    play = Play(root)
    play.reader.ahead(play.rows(0, 0, 1))
    most = 0
    for _ in play.run(0, play.steps_of(1)):
        most = max(most, play.reader.held)
    # The last step may reach into the next epoch, whose blocks are then whole but for the samples it took.
    last = play.rows(play.steps_of(1) - 1, 0, 1)
    later = {key for key in play.reader._blocks if key[1] > 0 and key[0] == 0}
    assert all(key in later or key[2] < 0 for key in play.reader._blocks)
    assert len(later) <= int((last.epoch > 0).sum())
    assert play.reader.held == sum(
        sum(map(len, sample.parts.values())) for f in play.reader._blocks.values() for sample in f.result().values()
    )
    window = 32 * LANES * 3 * (SIZE + 4)  # bytes: three blocks a lane
    assert 0 < most < window


def test_crumbs_and_small_sources_are_read_ahead_by_themselves(root: Path) -> None:
    play = Play(root)
    rows = play.rows(1, 0, 1)
    play.reader.ahead(rows)
    before = len(play.fetches)
    for s, e, i in zip(rows.source.tolist(), rows.epoch.tolist(), rows.id.tolist(), strict=True):
        assert play.reader.read(s, e, i).parts
    assert len(play.fetches) == before
    assert {ids for name, ids in play.fetches if name == "small"} == {(int(i),) for i in rows.id[rows.source == 1]}
    assert not any(key[0] == 1 for key in play.reader._blocks)


@pytest.mark.parametrize("samples", [0, 1, 50, 130])
def test_a_small_capacity_costs_reads_and_no_bytes(root: Path, samples: int) -> None:
    capacity, block = samples * (SIZE + 4), 32 * (SIZE + 4)
    play = Play(root, capacity=capacity)
    for _ in play.run(0, play.steps_of(1)):
        # The newest block is never dropped: it is about to be used.
        assert 0 <= play.reader.held <= capacity + block
        assert play.reader.held == sum(
            sum(map(len, s.parts.values())) for f in play.reader._blocks.values() for s in f.result().values()
        )
    assert sum(len(ids) == 1 for _, ids in play.fetches) > 100
    assert max(Counter(ids for name, ids in play.fetches if len(ids) == 32).values()) == 1


def test_the_oldest_blocks_go_first(root: Path) -> None:
    play = Play(root, capacity=3 * 32 * (SIZE + 4))
    for step in range(1, 12):
        play.reader.ahead(replace_small(play.rows(step, 0, 1)))
    asked = [tuple(ids) for _, ids in play.fetches if len(ids) == 32]
    kept = [tuple(play.order.block_ids(e, b)) for _, e, b in play.reader._blocks if b >= 0]
    assert 2 <= len(kept) <= 4 and kept == asked[-len(kept) :]


def replace_small(rows: MixtureRows) -> MixtureRows:
    """Without the rows of the small source."""
    keep = rows.source == 0
    return replace(rows, **{name: value[keep] for name, value in vars(rows).items()})


@pytest.mark.parametrize("start", [7, 33, 130])
def test_a_start_inside_a_window_reads_its_first_rows_alone(root: Path, start: int) -> None:
    play = Play(root)
    steps = play.run(start, start + 30)
    next(steps)
    rows = play.rows(start, 0, 1)
    announced = set().union(*(keys(play, step, 0, 1) for step in range(start + 1, start + 4)))
    ahead = {tuple(play.order.block_ids(*key)) for key in announced}
    alone = [ids for _, ids in play.fetches if len(ids) == 1]
    covered = {i for ids in ahead for i in ids}
    assert {(i,) for i in rows.id[rows.source == 0].tolist() if i not in covered} <= set(alone)
    assert {ids for _, ids in play.fetches if len(ids) == 32} == ahead
    for _ in steps:
        pass
    assert max(Counter(ids for _, ids in play.fetches if len(ids) == 32).values()) == 1


def test_threads_change_nothing(root: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        play = Play(root, pool=pool, capacity=140 * SIZE)
        for _ in play.run(0, play.steps_of(1), ahead=16):
            pass
    assert play.reader.held >= 0


def test_an_outage_of_a_block_reaches_every_one_of_its_samples(root: Path) -> None:
    play = Play(root)

    def fail(ids: list[int]) -> list:
        raise OutageError("shard big: gave up")

    play.sources[0].fetch = fail  # type: ignore[method-assign]
    rows = play.rows(5, 0, 1)
    play.reader.ahead(rows)
    for s, e, i in zip(rows.source.tolist(), rows.epoch.tolist(), rows.id.tolist(), strict=True):
        if s == 0:
            with pytest.raises(OutageError, match="shard big: gave up"):
                play.reader.read(s, e, i)
        else:
            assert play.reader.read(s, e, i).parts
    assert play.reader.held == 0


def test_a_failed_block_is_no_room_to_be_made(root: Path) -> None:
    play = Play(root, capacity=0)
    good = play.sources[0].fetch
    play.sources[0].fetch = lambda ids: (_ for _ in ()).throw(OutageError("out"))  # type: ignore[method-assign]
    play.reader.ahead(replace_small(play.rows(1, 0, 1)))
    play.sources[0].fetch = good  # type: ignore[method-assign]
    play.reader.ahead(replace_small(play.rows(60, 0, 1)))
    failed = [future.exception() is not None for future in play.reader._blocks.values()]
    assert any(failed) and not failed[-1], "the failure of one is not another's"


class Late(Future):
    """A block that is dropped for room between its being found and its being used."""

    def __init__(self, samples: dict, drop: Callable[[], None]) -> None:
        super().__init__()
        self.set_result(samples)
        self.drop: Callable[[], None] | None = drop

    def result(self, timeout: float | None = None) -> dict:
        if drop := self.drop:
            self.drop = None
            drop()
        return super().result(timeout)


def test_a_block_that_is_dropped_while_it_is_used_is_counted_once(root: Path) -> None:
    play = Play(root)
    rows = replace_small(play.rows(1, 0, 1))
    play.reader.ahead(rows)
    (source, epoch, block), found = next(item for item in play.reader._blocks.items() if item[0][2] >= 0)
    play.reader._capacity = 0
    later = replace_small(play.rows(50, 0, 1))
    play.reader._blocks[source, epoch, block] = Late(found.result(), lambda: play.reader.ahead(later))
    id = play.order.block_ids(epoch, block)[0]
    assert play.reader.read(source, epoch, id) == play.plain.read(source, epoch, id)
    assert play.reader.held == sum(
        sum(map(len, s.parts.values())) for f in play.reader._blocks.values() for s in f.result().values()
    )


def test_a_block_is_asked_for_once_on_both_sides_of_an_epochs_edge(root: Path) -> None:
    play = Play(root)
    before, after = (replace_small(play.rows(play.steps_of(1) + step, 0, 1)) for step in (-4, 3))
    assert set(before.epoch.tolist()) == {0} and set(after.epoch.tolist()) == {1}
    for rows in (before, after):
        play.reader.ahead(rows)
    asked = [ids for _, ids in play.fetches if len(ids) == 32]
    play.reader.ahead(before)
    assert [ids for _, ids in play.fetches if len(ids) == 32] == asked and asked


def test_blocks_are_what_brute_force_says() -> None:
    mixture = Mixture.plan(
        9, sources=[("a", SAMPLES, 1, PAYLOAD, 2)], global_batch=2 * LANES, lanes=LANES, window_steps=WINDOW
    )
    order = mixture.orders[0]
    ids = np.arange(SAMPLES)
    for epoch in (0, 1, 7):
        blocks = order.blocks(np.full(SAMPLES, epoch), ids)
        assert Counter(blocks.tolist()) == {-1: order.C} | dict.fromkeys(range(order.Kt * LANES), 32)
        for block in range(order.Kt * LANES):
            members = order.block_ids(epoch, block)
            assert sorted(members) == np.flatnonzero(blocks == block).tolist()
            steps = np.diff(members)
            assert set(steps.tolist()) <= {1, 1 - SAMPLES} and all(type(i) is int for i in members)
        # Every block is drawn by one lane, but for the samples that are swapped at the epochs' edge.
        offset = np.arange(2 * order.g, SAMPLES)
        drawn = order.id_at(np.full(offset.size, epoch), offset)
        lanes: dict[int, set[int]] = {}
        for block, lane in zip(
            order.blocks(np.full(offset.size, epoch), drawn).tolist(), (offset % LANES).tolist(), strict=True
        ):
            lanes.setdefault(block, set()).add(lane)
        assert all(len(found) == 1 for block, found in lanes.items() if block >= 0)
    assert sum(bool((np.diff(order.block_ids(e, b)) < 0).any()) for e in range(4) for b in range(order.Kt * LANES)) >= 1


def test_blocks_are_read_where_any_shard_is_remote(root: Path) -> None:
    sources = Play(root).sources
    assert [reads_blocks(choice, sources) for choice in ("auto", "sample", "block")] == [False, False, True]
    shards = sources[1].shards
    remote = replace(shards[0], name="https://host/small-000001.tar")
    sources[1].shards = (*shards, remote)
    assert reads_blocks("auto", sources) and not reads_blocks("sample", sources)

"""The simulation against brute force on small mixtures, and against orders with a fault, which it must not pass."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE_S
from tiny import ROOT, environment, recipe, write_recipe

from m3i_large import cli
from m3i_large.data.keyed import feistel, key
from m3i_large.data.mixture import Mixture
from m3i_large.data.order import SourceOrder
from m3i_large.data.simulate import Simulation, SourceSize, batches, once, simulate
from m3i_large.data.simulate.batches import count_mates, count_neighbours, look_at_batches
from m3i_large.data.simulate.counts import count, step_of
from m3i_large.data.simulate.once import play_epoch
from m3i_large.data.simulate.plots import draw_plots
from m3i_large.data.simulate.reads import LOOKAHEAD, Reads, crumbs_of, pieces, play_reads, rank_of, shard_of
from m3i_large.data.simulate.tables import print_tables
from m3i_large.errors import UserError

# Windowed, windowed with less than a slot per lane, exact mode.
SOURCES = [("x", 40_003, 1, 40_000, None), ("y", 9001, "1/3", 130_000, None), ("z", 700, 2.5, 3000, None)]
SIZES = [SourceSize(shards=100, mean_bytes=40_000), SourceSize(shards=7, mean_bytes=130_000)]
SIZES += [SourceSize(shards=1, mean_bytes=3000)]
FIXED = [(name, n, repeats, size, quota) for (name, n, repeats, size, _), quota in zip(SOURCES, (5, 2, 1), strict=True)]


def mixture(sources: list = SOURCES, *, accumulation: int = 2, window_steps: int = 12) -> Mixture:
    return Mixture.plan(
        3, sources=sources, global_batch=192, lanes=24, accumulation=accumulation, window_steps=window_steps
    )


def play(sources: list = SOURCES, *, sizes: list = SIZES, **options: object) -> Simulation:
    length = {} if "steps" in options else {"epochs": 3}
    return simulate(partial(mixture, sources), sizes=sizes, world=4, **length, **options)


def verdicts(simulation: Simulation) -> dict[str, str]:
    return {verdict.promise: verdict.verdict for verdict in simulation.verdicts}


def failed(simulation: Simulation) -> set[str]:
    """Promises found broken, by what they start with and end with."""
    return {promise for promise, verdict in verdicts(simulation).items() if verdict == "FAILED"}


def batch(m: Mixture, step: int) -> np.ndarray:
    """(source, epoch, id, rank of 4) of a step, (N, 4)."""
    rows = [m.rows(step, a, rank=r, world=4) for a in range(m.accumulation) for r in range(4)]
    ranks = [r for _ in range(m.accumulation) for r in range(4)]
    return np.concatenate(
        [np.stack([p.source, p.epoch, p.id, np.full(p.id.size, r)], 1) for p, r in zip(rows, ranks, strict=True)]
    )


# -- the whole run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sources", [SOURCES, FIXED])
def test_counts_are_those_of_going_through_the_run(sources: list) -> None:
    m = mixture(sources)
    steps = m.steps_for_epochs(1.1)
    result = count(m, steps=steps, epochs=1.1)
    rows = [np.concatenate([m.rows(step, a).source for a in range(2)]) for step in range(steps)]
    slots_TS = np.array([np.bincount(source, minlength=3) // 24 for source in rows])
    weights = [Fraction(str(repeats)) * n for _, n, repeats, _, _ in sources]
    total = sum(weights)
    assert (result.steps, result.looked_at, result.filled, result.shortest) == (steps, steps, True, True)
    for s, (part, (_, n, repeats, _, quota)) in enumerate(zip(result.sources, sources, strict=True)):
        drawn = 24 * int(slots_TS[:, s].sum())
        share = Fraction(quota) if quota else 8 * weights[s] / total
        drift = max(abs(int(k) - share * (t + 1)) for t, k in enumerate(slots_TS[:, s].cumsum()))
        assert part.slots == (slots_TS[:, s].min(), slots_TS[:, s].max())
        assert (part.drawn, part.epochs) == (drawn, drawn / n) and part.share == pytest.approx(float(share))
        assert part.drift == pytest.approx(float(drift), abs=1e-9)
        wanted = Fraction(11, 10) * Fraction(str(repeats))
        assert part.wanted == pytest.approx(float(wanted)) and part.overshoot == pytest.approx(
            float(drawn - wanted * n)
        )
    assert any(24 * int(slots_TS[:-1, s].sum()) < Fraction(11, 10) * weights[s] for s in range(3)), (
        "a step less is too short"
    )


def test_a_run_longer_than_it_looks_at_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3i_large.data.simulate.counts.MOST_STEPS", 100)
    simulation = play(steps=1000)
    assert simulation.counts.looked_at == 100
    assert verdicts(simulation)["every step fills every lane, and the split never drifts by 2 slots"] == "IN PART"


def test_the_step_of_a_draw() -> None:
    m = mixture()
    drawn = [0, 0, 0]
    for step in range(40):
        for s, k in enumerate(np.bincount(batch(m, step)[:, 0], minlength=3).tolist()):
            assert all(step_of(m, source=s, draw=draw) == step for draw in {drawn[s], drawn[s] + k - 1} if k)
            drawn[s] += k


# -- an epoch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_an_epoch_is_played_in_full_by_any_number_of_processes(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(once, "CALL", 1000)
    monkeypatch.setattr(once, "ALONE", 0)
    order, shown = mixture().orders[0], []
    result = play_epoch(order, epoch=2, workers=workers, progress=lambda done, total: shown.append((done, total)))
    assert (result.wanted, result.drawn, result.distinct) == (order.n, order.n, order.n) and result.holds
    assert shown[-1] == (order.n, order.n) and shown == sorted(shown)


def faulty(monkeypatch: pytest.MonkeyPatch, fault: object, *, names: str = "xyz") -> None:
    """Puts `fault(order, epoch, offset, ids)` in place of what sources draw."""
    genuine = SourceOrder.id_at

    def id_at(self: SourceOrder, epoch: np.ndarray, offset: np.ndarray) -> np.ndarray:
        epoch, offset = np.broadcast_arrays(np.atleast_1d(epoch), np.atleast_1d(offset))
        ids = genuine(self, epoch, offset)
        return fault(self, epoch, offset, ids) if self.name in names else ids

    monkeypatch.setattr(SourceOrder, "id_at", id_at)


def another(order: SourceOrder, epoch: np.ndarray, offset: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Draws the id of another place instead of the one in the middle."""
    middle = SourceOrder._raw(order, np.array([order.n // 2 + 5]), epoch[:1])
    return np.where(offset == order.n // 2, middle, ids)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_id_lost_of_an_epoch_is_seen(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(once, "CALL", 1000)
    monkeypatch.setattr(once, "ALONE", 0)
    order = mixture().orders[0]
    with monkeypatch.context() as patch:
        faulty(patch, another)
        result = play_epoch(order, epoch=2, workers=workers)
        assert (result.missing, result.repeated, result.holds) == (1, 1, False)
    with monkeypatch.context() as patch:
        faulty(patch, lambda order, epoch, offset, ids: np.where(ids == 7, order.n, ids))
        result = play_epoch(order, epoch=2, workers=workers)
        assert (result.drawn, result.missing, result.holds) == (order.n - 1, 1, False)
    with monkeypatch.context() as patch:
        patch.setattr(SourceOrder, "ids", lambda self, q: (q // self.n + (q % self.n == 9), q % self.n, q % self.n))
        assert play_epoch(order, epoch=2, workers=workers).missing == 1, "an id of another epoch does not count"


def test_a_process_that_dies_is_no_proof(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(once, "CALL", 1000)
    monkeypatch.setattr(once, "ALONE", 0)

    def die(order: SourceOrder, epoch: np.ndarray, offset: np.ndarray, ids: np.ndarray) -> np.ndarray:
        if (offset == 33_333).any():
            raise ValueError("feistel: an index lies outside [0, n)")
        return ids

    faulty(monkeypatch, die)
    result = play_epoch(mixture().orders[0], epoch=2, workers=2)
    assert not result.holds and result.drawn < result.wanted and "outside [0, n)" in capfd.readouterr().err


def test_quick_looks_at_both_ends_and_claims_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "CALL", 1000)
    monkeypatch.setattr(once, "QUICK", 5000)
    simulation = play(quick=True)
    assert [o.complete for o in simulation.once] == [False, True, True], "small sources are played in full"
    assert simulation.once[0].drawn == 10_000
    assert verdicts(simulation)["x: every id exactly once an epoch"] == "IN PART"
    assert verdicts(simulation)["y: every id exactly once an epoch"] == "PROVEN" and not simulation.failed
    order = mixture().orders[0]
    with monkeypatch.context() as patch:
        faulty(patch, another)
        assert play_epoch(order, epoch=2, quick=True).holds, "the middle was not looked at"
    ends = order.id_at(np.array([2]), np.array([10, order.n - 10]))
    faulty(monkeypatch, lambda order, epoch, offset, ids: np.where(ids == ends[0], ends[1], ids))
    assert play_epoch(order, epoch=2, quick=True).repeated == 1, "once in either end"


# -- batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 5, 32])
def test_neighbours_and_mates_are_counted(b: int) -> None:
    ids = np.random.default_rng(b).choice(900, 200, replace=False)
    pairs = [(i, j) for k, i in enumerate(ids) for m, j in enumerate(ids) if k != m]
    assert count_neighbours(ids, b=b) == sum(abs(i - j) < b for i, j in pairs)
    shard = shard_of(np.arange(900), n=900, shards=7)
    assert np.bincount(shard).tolist() == [129, 129, 128, 129, 128, 129, 128]
    assert count_mates(ids, n=900, shards=7) == sum(shard[i] == shard[j] for i, j in pairs)


def test_batches_are_those_of_the_run() -> None:
    """With no more steps than are drawn at random, every one is looked at."""
    m, steps = mixture(), 30
    counts = count(m, steps=steps, epochs=None)
    found = look_at_batches(m, sizes=SIZES, counts=counts, world=4, random=np.random.default_rng(0))
    assert (found.steps, found.unequal) == (steps, [])
    for s, (part, order, size) in enumerate(zip(found.sources, m.orders, SIZES, strict=True)):
        drawn = [np.sort(rows[rows[:, 0] == s, 2]) for rows in map(partial(batch, m), range(steps))]
        total = sum(ids.size for ids in drawn)
        near = sum(int((np.abs(ids[:, None] - ids) < order.b).sum()) - ids.size for ids in drawn)
        shards = [ids * size.shards // order.n for ids in drawn]
        mates = sum(int((at[:, None] == at).sum()) - at.size for at in shards)
        assert part.judged == total and part.neighbours == near / total and part.mates == mates / total
        assert part.edges == (0, 0) and part.duplicates == 0


@pytest.mark.parametrize(("slots", "window_steps"), [(4, 16), (27, 16), (27, 4)])
def test_neighbours_and_mates_are_as_expected_of_the_windows(slots: int, window_steps: int) -> None:
    """Every step of an epoch: the rule (b - 1) / T_w is too high by a quarter where a lane has 4 slots."""
    size, batch_size = [SourceSize(shards=1000, mean_bytes=40_000)], 16 * slots
    plan = [("big", 100_000, 1, 40_000, None)]
    m = Mixture.plan(1, sources=plan, global_batch=batch_size, lanes=16, window_steps=window_steps)
    counts = count(m, steps=2 * 100_000 // batch_size, epochs=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "RANDOM_STEPS", counts.steps)
        patch.setattr(batches, "RANK_STEPS", 1)
        part = look_at_batches(m, sizes=size, counts=counts, world=4, random=np.random.default_rng(0)).sources[0]
    assert part.neighbours == pytest.approx(part.neighbours_expected, rel=0.02)
    assert part.mates == pytest.approx(part.mates_expected, rel=0.02)
    assert slots > 4 or part.neighbours_rule > 1.25 * part.neighbours


def test_every_epoch_edge_is_looked_at() -> None:
    m = mixture()
    counts = count(m, steps=m.steps_for_epochs(3), epochs=3)
    found = look_at_batches(m, sizes=SIZES, counts=counts, world=4, random=np.random.default_rng(0))
    assert [part.edges for part in found.sources] == [(3, 3), (1, 1), (7, 7)]


# -- reads ------------------------------------------------------------------------------------------


def test_a_row_of_crumbs_in_a_batch_is_expected_too() -> None:
    """All crumbs lie in two shards or three: a batch with a row of them has many more mates than the others."""
    m = Mixture.plan(
        1, sources=[("big", 24 * 32 * 520 + 300, 1, 40_000, None)], global_batch=24 * 20, lanes=24, window_steps=16
    )
    order, size = m.orders[0], SourceSize(shards=1000, mean_bytes=1)
    found = {}
    for step in range(order.n // (24 * 20)):
        tally = batches._Tally(order, size)
        _, epoch, ids = batches.global_batch(m, step)
        tally.add(ids, epoch=epoch, shuffled=True)
        crumbs = int((order.blocks(epoch, ids) < 0).sum())
        found.setdefault(crumbs, []).append((tally.mates, tally.mates_expected))
    (few, few_expected), (many, many_expected) = np.mean(found[0], 0), np.mean(found[24], 0)
    assert order.C == 300 and len(found[24]) == 11
    assert many > 1.1 * few and few == pytest.approx(few_expected, rel=0.02)
    assert many == pytest.approx(many_expected, rel=0.04)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("epoch", [0, 4])
def test_blocks_are_runs_of_ids_of_one_lane(which: int, epoch: int) -> None:
    order, size = mixture().orders[which], SIZES[which]
    block = order.blocks(epoch, np.arange(order.n))
    sizes = np.bincount(block + 1, minlength=order.Kt * order.V + 1)
    assert sizes[0] == order.C and (sizes[1:] == order.b).all()
    assert set(crumbs_of(order, epoch=epoch).tolist()) == set(np.flatnonzero(block < 0).tolist())
    offsets = np.arange(2 * order.g if epoch else 0, order.n)
    of_draw = order.blocks(epoch, order.id_at(np.full(offsets.size, epoch), offsets))
    lanes = defaultdict(set)
    for number, lane in zip(of_draw.tolist(), (offsets % order.V).tolist(), strict=True):
        lanes[number].add(lane)
    assert all(len(found) == 1 for number, found in lanes.items() if number >= 0)
    blocks = np.arange(order.Kt * order.V)
    expected = []
    for number in blocks.tolist():
        ids = np.flatnonzero(block == number)
        runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)  # two where it wraps
        assert len(runs) == 1 or (ids[0], ids[-1]) == (0, order.n - 1)
        expected.append(sum(len(set((run * size.shards // order.n).tolist())) for run in runs))
    assert pieces(order, epoch=epoch, block=blocks, shards=size.shards).tolist() == expected


def brute_reads(m: Mixture, reads: Reads, *, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, list[Counter]]:
    """Requests and bytes held by (measured step, rank), and sums of each source, sample by sample."""
    first_use: dict[tuple, int] = {}
    uses: dict[tuple, list[int]] = defaultdict(list)
    for step in range(start, stop):
        for s, epoch, id, rank in batch(m, step).tolist():
            order = m.orders[s]
            block = int(order.blocks(epoch, np.array([id]))[0])
            unit = (s, rank, epoch, "block", block) if block >= 0 else (s, rank, epoch, "single", id)
            first_use.setdefault(unit, step)
            uses[unit].append(step)
    requests, held = (np.zeros((reads.last - reads.first, 4)) for _ in range(2))
    sums = [Counter() for _ in m.orders]
    for unit, first in first_use.items():
        s, rank, epoch, kind, number = unit
        order, size, number_of_reads = m.orders[s], SIZES[s], 1
        if kind == "block":
            at = pieces(order, epoch=epoch, block=np.array([number]), shards=size.shards)
            number_of_reads = int(at[0])
        if reads.first <= first < reads.last:
            requests[first - reads.first, rank] += number_of_reads
            samples = order.b if kind == "block" else 1
            sums[s].update(requests=number_of_reads, read=samples, used=len(uses[unit]))
        for use in uses[unit]:
            enter, leave = max(first - LOOKAHEAD, reads.first), min(use, reads.last - 1)
            held[enter - reads.first : max(0, leave - reads.first + 1), rank] += size.mean_bytes
    return requests, held, sums


@pytest.mark.parametrize("start", [0, 205, 230])
def test_reads_are_those_of_every_rank_played_sample_by_sample(start: int) -> None:
    """From the beginning, and over ends of epochs: those of x in its 236th step and its 472nd."""
    m = mixture()
    reads = play_reads(m, sizes=SIZES, world=4, start=start)
    life = reads.first - start
    assert reads.complete and reads.last - reads.first == 2 * life
    requests, held, sums = brute_reads(m, reads, start=start, stop=reads.last + life + LOOKAHEAD)
    assert np.array_equal(reads.requests_TW, requests) and np.allclose(reads.held_TW, held)
    for part, size, found in zip(reads.sources, SIZES, sums, strict=True):
        assert part.requests == found["requests"]
        assert part.bytes_per_request == pytest.approx(found["read"] * size.mean_bytes / found["requests"])
        assert part.amplification == pytest.approx(found["read"] / found["used"]) and part.amplification < 1.03
        assert part.held_bytes == pytest.approx(part.held_expected, rel=0.15)
    assert reads.held_TW.mean() == pytest.approx(sum(part.held_bytes for part in reads.sources))
    summed = [requests[t : t + 16].sum(0) for t in range(len(requests) - 15)]
    mean = np.mean(summed)
    assert reads.burst() == pytest.approx((np.max(summed) / mean, np.max(np.mean(summed, 1)) / mean))


def test_the_rank_of_a_lane_is_the_rank_that_draws_it() -> None:
    for accumulation in (1, 2, 4):
        m = mixture(accumulation=accumulation)
        for world in m.valid_world_sizes():
            for rank in range(world):
                for micro_step in range(accumulation):
                    rows = m.rows(5, micro_step, rank=rank, world=world)
                    assert (rank_of(rows.lane, m, world=world) == rank).all()


def test_windows_longer_than_what_is_played_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3i_large.data.simulate.reads.MOST_DRAWS", 192 * 40)
    simulation = play()
    assert not simulation.reads.complete
    assert verdicts(simulation)["x: every byte is read by one rank once, and soon used up"] == "NOT JUDGED"


# -- verdicts ---------------------------------------------------------------------------------------


def test_a_sound_order_is_proven() -> None:
    found = verdicts(play())
    assert set(found.values()) == {"PROVEN"} and len(found) == 3 + 4 * 3 + 1, found
    fixed = verdicts(play(FIXED, steps=500))
    assert fixed["the run ends with the first step that gives every source its epochs"] == "NOT JUDGED"
    assert set(fixed.values()) == {"PROVEN", "NOT JUDGED"}
    tiny = play([("x", 40_003, 1, 40_000, 7), ("t", 50, 1, 3000, 1)], sizes=SIZES[:2], steps=300)
    assert verdicts(tiny)["t: no sample twice in a global batch"] == "NOT JUDGED" and not tiny.failed


def test_repeated_and_lost_samples_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, another, names="x")
    assert failed(play()) == {"x: every id exactly once an epoch"}


def test_a_missing_guard_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = lambda self, e: self._raw(np.arange(2 * self.g), np.full(2 * self.g, e))  # noqa: E731
    monkeypatch.setattr(SourceOrder, "_zone", zone)
    small = [("x", 40_003, 1, 40_000, 2), ("s", 450, 1, 3000, 6)]
    assert failed(play(small, sizes=SIZES[:2], steps=400)) == {"s: no sample twice in a global batch"}


def test_a_scattered_order_fails_though_exactly_once(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, lambda order, epoch, offset, ids: feistel(offset, order.n, key(epoch, 7)), names="x")
    broken = failed(play())
    assert "x: every byte is read by one rank once, and soon used up" in broken
    assert "x: neighbours and same-shard mates in a batch as of blocks shuffled in windows" in broken
    assert "x: every id exactly once an epoch" not in broken and not any(p.startswith(("y", "z")) for p in broken)


def test_an_order_without_shuffle_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, lambda order, epoch, offset, ids: offset, names="z")
    broken = failed(play([("x", 40_003, 1, 40_000, 6), ("z", 900, 1, 3000, 2)], sizes=SIZES[::2], steps=400))
    assert broken == {"z: neighbours and same-shard mates in a batch as of blocks shuffled in windows"}


def test_blocks_kept_too_long_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of twice the length that the layout says: as few requests, more memory."""
    simulation_of = partial(play, [("x", 400_000, 1, 40_000, 8)], sizes=SIZES[:1], steps=500)
    assert not simulation_of().failed

    def longer(self: SourceOrder, *arguments: object) -> np.ndarray:
        *rest, windows = arguments
        return block(self, *rest, windows // 2)

    block = SourceOrder._block
    monkeypatch.setattr(SourceOrder, "_block", longer)
    assert "x: every byte is read by one rank once, and soon used up" in failed(simulation_of())


def test_a_split_that_drifts_or_does_not_fill_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, promise = Mixture.drawn, "every step fills every lane, and the split never drifts by 2 slots"

    def drifting(self: Mixture, step: int) -> list[int]:
        x, y, z = genuine(self, step)
        return [x - step // 100, y + step // 100, z]

    def leaking(self: Mixture, step: int) -> list[int]:
        x, y, z = genuine(self, step)
        return [x - (step > 77), y, z]

    for fault in (drifting, leaking):
        with monkeypatch.context() as patch:
            patch.setattr(Mixture, "drawn", fault)
            assert promise in failed(play(steps=400))
    with monkeypatch.context() as patch:
        steps = Mixture.steps_for_epochs
        patch.setattr(Mixture, "steps_for_epochs", lambda self, epochs: steps(self, epochs) - 1)
        assert failed(play()) == {"the run ends with the first step that gives every source its epochs"}
        patch.setattr(Mixture, "steps_for_epochs", lambda self, epochs: steps(self, epochs) + 1)
        assert failed(play()) == {"the run ends with the first step that gives every source its epochs"}


def test_ranks_that_overlap_or_depend_on_their_number_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, promise = Mixture.rows, "all ranks have the same split and make up the same batch at every number of ranks"

    def overlapping(self: Mixture, step: int, micro_step: int = 0, *, rank: int = 0, world: int = 1) -> object:
        return genuine(self, step, micro_step, rank=0 if rank == world - 1 else rank, world=world)

    def next_step(self: Mixture, step: int, micro_step: int = 0, *, rank: int = 0, world: int = 1) -> object:
        return genuine(self, step + (world == 12), micro_step, rank=rank, world=world)

    for fault in (overlapping, next_step):
        with monkeypatch.context() as patch:
            patch.setattr(Mixture, "rows", fault)
            assert failed(play(steps=200)) == {promise}


def test_slow_planning_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3i_large.data.simulate.verdicts.PLAN_SECONDS", 1e-9)
    assert failed(play(steps=100)) == {"planning and seeking take no time and no memory"}


def test_what_does_not_fit_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="--ranks: got 5; needed: one of 1, 2, 3, 4, 6, 12"):
        simulate(mixture, sizes=SIZES, world=5, steps=10)


# -- the command ------------------------------------------------------------------------------------


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    values = recipe(tmp_path / "nowhere", steps=None, epochs=2)
    values["data"]["lanes"] = 8
    values["train"] |= {"global_batch": 64, "contrast_batch": 32}
    values["data"]["sources"] = [
        {
            "name": name,
            "kind": "image_text",
            "shards": [f"{name}.tar"],
            "repeats": repeats,
            "nominal": {"samples": samples, "shards": 9, "mean_bytes": 40_000},
        }
        for name, samples, repeats in (("big", 20_000, 1), ("small", 900, "3/2"))
    ]
    return write_recipe(tmp_path / "small.yaml", values)


def m3i(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["m3i", "data", "simulate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_the_command_prints_json_for_scripts(tiny_recipe: Path) -> None:
    program = [sys.executable, "-c", "from m3i_large.cli import main; main()", "data", "simulate", str(tiny_recipe)]
    result = subprocess.run(
        [*program, "train.epochs=3", "--ranks", "2", "--gpu-rate", "50", "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["ranks"] == 2 and values["valid_ranks"] == [1, 2, 4] and values["accumulation"] == 2
    assert [s["wanted"] for s in values["counts"]["sources"]] == [3.0, 4.5]
    assert [o["samples"] for o in values["once"]] == [20_000, 900] and all(o["holds"] for o in values["once"])
    assert values["reads"]["step_seconds"] == 64 / 2 / 50 and not values["failed"]
    assert {v["verdict"] for v in values["verdicts"]} <= {"PROVEN", "NOT JUDGED"}


def test_the_command_prints_tables_and_draws(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert m3i(monkeypatch, tiny_recipe, "--ranks", 4, "--quick", "--out", tmp_path / "plots") == 0
    out, err = capsys.readouterr()
    assert "ranks that fit: 1, 2, 4" in out and out.count("PROVEN") >= 8 and "FAILED" not in out and not err.strip()
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["order.png", "reads.png", "shuffle.png", "simulate.json", "split.png"]
    assert all((tmp_path / "plots" / n).read_bytes()[:4] == b"\x89PNG" for n in names if n.endswith("png"))
    assert json.loads((tmp_path / "plots/simulate.json").read_text())["recipe"] == "tiny"


def test_the_command_fails_with_the_order_and_refuses_what_it_cannot_play(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        faulty(patch, another, names=("big",))
        assert m3i(patch, tiny_recipe, "--ranks", 4, "--json") == 1
        assert json.loads(capsys.readouterr().out)["failed"]
        assert m3i(patch, tiny_recipe, "--ranks", 4) == 1
        assert "big: every id exactly once an epoch" in capsys.readouterr().out
    for wrong, message in (
        ([tiny_recipe, "--ranks", 3], "--ranks: got 3; needed: one of 1, 2, 4"),
        ([tiny_recipe, "data.sources.1.nominal=null", "--ranks", 1], "data.sources.small.nominal: is missing; needed:"),
        ([tiny_recipe], "--ranks"),
    ):
        assert m3i(monkeypatch, *wrong) == 2
        assert message in capsys.readouterr().err


def test_tables_and_plots_of_every_kind_of_source(tmp_path: Path) -> None:
    from rich.console import Console

    simulation = play(steps=300)
    console = Console(record=True, width=120)
    print_tables(simulation, console, title="three kinds")
    text = console.export_text()
    assert "single" in text and "40,003" in text and "…" not in text, "no figure is cut"
    assert all(path.stat().st_size > 5000 for path in draw_plots(simulation, tmp_path / "new/directory"))

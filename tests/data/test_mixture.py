"""The sample order: exactly once an epoch, the same at every number of ranks, local to read, and frozen (SAMPLER 8)."""

import hashlib
import itertools
import json
import warnings
from fractions import Fraction

import numpy as np
import pytest

from m3i_large.data import keyed
from m3i_large.data.keyed import feistel, key, name_tag, uniform
from m3i_large.data.mixture import Mixture, default_lanes, split
from m3i_large.data.order import SourceOrder

LAYOUTS = [(24, 8, 2), (1, 1, 1), (24, 32, 3), (4, 8, 0), (256, 32, 8), (6, 1, 5)]
SIZES = [1, 2, 7, 31, 32, 33, 1000, 24 * 8 - 1, 24 * 8, 24 * 8 + 1, 49152, 100_003]


def order(n: int, V: int, b: int, K: int, *, seed: int = 5, name: str = "a", most: int = 3) -> SourceOrder:
    return SourceOrder(name, seed, n, V, b, K if n >= V * b else 0, min(V * most, n // 3), 5 if V > 5 else 1)


@pytest.fixture(autouse=True)
def no_overflow_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- keys and permutations --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 300, 7), 2, 3, 4, 5, 64, 65, 4095, 4096, 4097, 65537, 1_000_003])
def test_feistel_is_a_bijection(n: int) -> None:
    assert np.array_equal(np.sort(feistel(np.arange(n), n, key(1, n))), np.arange(n))


def test_feistel_takes_a_size_and_a_key_per_element_and_refuses_what_lies_outside() -> None:
    sizes, keys = np.array([5, 70, 4096]), key(np.arange(3))
    each = [int(feistel(np.array([4]), int(n), keys[i : i + 1])[0]) for i, n in enumerate(sizes)]
    assert feistel(np.array([4, 4, 4]), sizes, keys).tolist() == each
    for x in (-1, 5):
        with pytest.raises(ValueError, match="outside"):
            feistel(np.array([x]), 5, key(1))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9, 30, 100])
def test_feistel_sends_every_index_everywhere_equally_often(n: int) -> None:
    trials = 200 * n
    where = feistel(np.zeros(trials, np.int64), n, key(np.arange(trials), 11))
    counts = np.bincount(where, minlength=n)
    chi2 = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi2 - (n - 1)) < 5 * np.sqrt(2 * n), counts


def test_all_orders_of_four_are_equally_likely() -> None:
    trials = 24 * 300
    keys = key(np.arange(trials), 3)
    orders = np.stack([feistel(np.full(trials, i), 4, keys) for i in range(4)], 1)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 300) ** 2 / 300).sum() < 23 + 5 * np.sqrt(46)


def test_uniform_draws_are_uniform_and_independent_of_their_neighbours() -> None:
    draws = uniform(key(np.arange(20_000), 7), 3)
    assert draws.shape == (20_000, 3) and draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 0.01 and np.abs(draws.var(0) - 1 / 12).max() < 0.003
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03


# -- one source -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_exactly_once_an_epoch_and_no_repeat_near_its_edge(n: int, layout: tuple[int, int, int]) -> None:
    o = order(n, *layout)
    for first in (0, 777):
        epoch, offset, ids = o.ids(np.arange(first * n, (first + 3) * n))
        assert (epoch == np.repeat([first, first + 1, first + 2], n)).all() and (
            offset == np.tile(np.arange(n), 3)
        ).all()
        assert (np.sort(ids.reshape(3, n), 1) == np.arange(n)).all()
        for edge in (n, 2 * n) if o.g else ():
            for start in range(edge - o.g, edge + 1, max(1, o.g // 5)):
                assert len(np.unique(ids[start : start + o.g])) == o.g
    chosen = np.random.default_rng(0).permutation(3 * n)[:500]
    assert (o.ids(chosen + 777 * n)[2] == ids[chosen]).all(), "random access must equal sequential access"


@pytest.mark.parametrize(("n", "V", "b", "K"), [(50_000, 24, 8, 4), (49_999, 16, 32, 2)])
def test_a_block_is_read_by_one_lane_within_one_window(n: int, V: int, b: int, K: int) -> None:
    o = order(n, V, b, K)
    for e in (0, 3):
        offsets = np.arange(2 * o.g if e else 0, n)
        shift = int(key(o.seed, name_tag(o.name), e, 4)[0] % np.uint64(n))
        x = (o.id_at(np.full(offsets.size, e), offsets) - shift) % n
        regular = x < o.Kt * V * b
        crumb_rows = n // V - o.Kt * b
        frame = {}
        for block, row, lane in zip(x[regular] // b, offsets[regular] // V, offsets[regular] % V, strict=True):
            low, high, lanes = frame.get(block, (row, row, set()))
            frame[block] = (min(low, row), max(high, row), lanes | {lane})
        assert all(len(lanes) == 1 for _, _, lanes in frame.values())
        assert max(high - low for low, high, _ in frame.values()) <= o.K * b + crumb_rows


def test_epochs_and_lanes_are_shuffled_differently() -> None:
    """A missing epoch or lane in a key keeps everything exactly-once and local; only this finds it."""
    o = order(49_152, 24, 8, 16)
    first, second = (o.id_at(np.full(o.n, e), np.arange(o.n)) for e in (5, 6))
    shift = [int(key(o.seed, name_tag(o.name), e, 4)[0] % np.uint64(o.n)) for e in (5, 6)]
    blocks = [(ids - s) % o.n // o.b for ids, s in zip((first, second), shift, strict=True)]
    assert (blocks[0] == blocks[1]).mean() < 0.01
    inside = ((first - shift[0]) % o.n % o.b).reshape(-1, 24)
    agree = np.mean([(inside[:, a] == inside[:, c]).mean() for a, c in itertools.combinations(range(24), 2)])
    assert abs(agree - 1 / o.b) < 0.02
    for ids in (first, second):
        assert abs(np.corrcoef(ids, np.arange(o.n))[0, 1]) < 4.5 * np.sqrt(o.b / o.n)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 * np.sqrt(o.b / o.n)


def test_neighbours_in_a_batch_follow_the_window() -> None:
    """Samples of one block that meet in a batch: (b - 1) / T_w each, whatever the number of lanes."""
    m = Mixture.plan(1, sources=[("big", 400_000, 1, 40_000, None)], global_batch=512, lanes=32, window_steps=32)
    b, met = m.orders[0].b, []
    for step in range(100, 400, 10):
        ids = np.sort(m.rows(step).id)
        met.append(sum((np.abs(ids - i) < b).sum() - 1 for i in ids) / len(ids))
    assert np.mean(met) == pytest.approx((b - 1) / 32, rel=0.2)


# -- quotas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [[1], [1, 1], [5, 3, 1], [400_000_000, 15_000_000, 12_000_000, 14_000_000], [7, 7, 7, 7, 1, 90]]
)
def test_quotas_sum_up_never_fall_and_never_drift(weights: list[int]) -> None:
    total, before = sum(weights), [0] * len(weights)
    for m in [*range(400), 10**7, 10**7 + 1]:
        counts = split(m, weights)
        assert sum(counts) == m
        assert all(abs(Fraction(m * w, total) - c) < 2 for w, c in zip(weights, counts, strict=True))
        assert m == 10**7 or all(c >= p for c, p in zip(counts, before, strict=True))
        before = counts
    if total < 1000:
        assert split(3 * total, weights) == [3 * w for w in weights]


# -- ranks, micro-steps, steps ----------------------------------------------------------------------

SOURCES = [("x", 1000, 1, 3000, None), ("y", 50_000, "1/3", 3000, None), ("z", 700, 2.5, 3000, None)]
FIXED = [("x", 1000, 1, 3000, 2), ("y", 50_000, 1, 3000, 1), ("z", 700, 1, 3000, 1)]


def rows_of(m: Mixture, step: int, micro_step: int, world: int) -> np.ndarray:
    parts = [m.rows(step, micro_step, rank=r, world=world) for r in range(world)]
    assert len({tuple(np.bincount(p.source, minlength=3)) for p in parts}) == 1, "every rank has the same split"
    return np.concatenate([np.stack([p.source, p.epoch, p.offset, p.id, p.lane, p.slot], 1) for p in parts])


@pytest.mark.parametrize("sources", [SOURCES, FIXED])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_global_batch_is_the_same_at_every_world_size(sources: list, accumulation: int) -> None:
    m = Mixture.plan(3, sources=sources, global_batch=96, lanes=24, accumulation=accumulation)
    for step in (0, 1, 3_000_000):
        slots = []
        for micro_step in range(accumulation):
            whole = rows_of(m, step, micro_step, 1)
            assert (whole[:, 4] % accumulation == micro_step).all()
            for world in m.valid_world_sizes():
                assert np.array_equal(rows_of(m, step, micro_step, world), whole)
            slots += whole[:, 5].tolist()
        assert sorted(slots) == list(range(96))
    assert m.valid_world_sizes() == [w for w in range(1, 25) if (24 // accumulation) % w == 0]


def test_a_run_draws_every_source_exactly_once_per_epoch_in_any_order_of_asking() -> None:
    m = Mixture.plan(3, sources=SOURCES, global_batch=96, lanes=24)
    steps = 400
    batches = {step: m.rows(step) for step in np.random.default_rng(1).permutation(steps).tolist()}
    drawn = m.drawn(steps)
    for s, o in enumerate(m.orders):
        pairs = np.concatenate([np.stack([b.epoch[b.source == s], b.id[b.source == s]], 1) for b in batches.values()])
        expected = np.stack(o.ids(np.arange(24 * drawn[s]))[::2], 1)
        assert np.array_equal(pairs[np.lexsort(pairs.T)], expected[np.lexsort(expected.T)])
    for batch in batches.values():
        for s, o in enumerate(m.orders):
            ids = batch.id[batch.source == s]
            if o.n >= 3 * 24 * m.max_quota[s]:
                assert len(np.unique(ids)) == len(ids), "no sample twice in a batch"


@pytest.mark.parametrize("seed", range(4))
def test_batch_lanes_and_shares_may_change_in_the_middle_and_every_epoch_stays_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, step, drawn = Mixture.plan(3, sources=SOURCES, global_batch=96, lanes=24), 0, []
    for _ in range(6):
        steps = int(rng.integers(20, 90))
        world = int(rng.choice(m.valid_world_sizes()))
        for t in range(step, step + steps):
            for micro_step in range(m.accumulation):
                for rank in range(world):
                    rows = m.rows(t, micro_step, rank=rank, world=world)
                    drawn.append(np.stack([rows.source, rows.epoch, rows.id], 1))
        step += steps
        lanes, slots = int(rng.choice([4, 6, 24, 48])), int(rng.integers(3, 6))
        sources = [(n, size, int(rng.integers(1, 4)), *rest) for n, size, _, *rest in SOURCES]
        accumulation = int(rng.choice([1, 2]))
        plan = Mixture.plan(9, sources=sources, global_batch=lanes * slots, lanes=lanes, accumulation=accumulation)
        before = m.position(step)
        m = Mixture.from_state(json.loads(json.dumps(m.continued(step, plan).to_state())))
        assert m.position(step) == before and m.lanes == lanes and len(m.rows(step).id) == lanes * slots // accumulation
    rows = np.concatenate(drawn)
    for s, o in enumerate(m.orders):
        mine = rows[rows[:, 0] == s][:, 1:]
        expected = np.stack(o.ids(np.arange(len(mine)))[::2], 1)
        assert np.array_equal(mine[np.lexsort(mine.T)], expected[np.lexsort(expected.T)])
    others = [("x", 999, 1, 40_000, None), *SOURCES[1:]]
    with pytest.raises(ValueError, match=r"needed: the names and numbers of samples that the run began with"):
        m.continued(step, Mixture.plan(3, sources=others, global_batch=96, lanes=24))


def test_quotas_follow_repeats_or_stay_fixed() -> None:
    m = Mixture.plan(3, sources=SOURCES, global_batch=96, lanes=24)
    counts = np.array([np.bincount(m.rows(s).source, minlength=3) for s in range(300)])
    share = np.array([1000, 50_000 / 3, 1750]) / (1000 + 50_000 / 3 + 1750)
    assert np.abs(counts.mean(0) / 96 - share).max() < 0.01
    assert (counts <= 24 * np.array(m.max_quota)).all()
    fixed = Mixture.plan(3, sources=FIXED, global_batch=96, lanes=24)
    assert all(np.bincount(fixed.rows(s).source).tolist() == [48, 24, 24] for s in range(20))


def test_length_in_epochs() -> None:
    m = Mixture.plan(3, sources=SOURCES, global_batch=96, lanes=24)
    steps = m.steps_for_epochs(2)
    seen, short = m.epochs_seen(steps), m.epochs_seen(steps - 1)
    wanted = {"x": 2, "y": 2 / 3, "z": 5}
    assert all(seen[n] >= w for n, w in wanted.items()) and any(short[n] < w for n, w in wanted.items())


def test_a_substitute_is_another_sample_half_an_epoch_away() -> None:
    m = Mixture.plan(3, sources=FIXED, global_batch=96, lanes=24)
    batch = m.rows(7)
    for i in range(0, 96, 7):
        s, e, o = int(batch.source[i]), int(batch.epoch[i]), int(batch.offset[i])
        found = [m.substitute(s, epoch=e, offset=o, attempt=a) for a in range(4)]
        assert len(set(found)) == 4 and not set(found) & set(batch.id[batch.source == s].tolist())
        assert found == [m.substitute(s, epoch=e, offset=o, attempt=a) for a in range(4)]


def test_the_order_is_frozen() -> None:
    """A change of this hash changes every run's data order: raise ORDER_VERSION with it."""
    m = Mixture.plan(3, sources=SOURCES, global_batch=96, lanes=24)
    digest = hashlib.sha256()
    for step in (0, 1, 2, 10, 100, 1000, 12_345, 99_999, 1_000_000, 3_000_000):
        batch = m.rows(step)
        for column in (batch.source, batch.epoch, batch.id):
            digest.update(column.astype("<i8").tobytes())
    assert digest.hexdigest() == "eb11f55f1ec95295e8b9484bd8a3d2ce63533398cf981774427e94cd3c50224f"


def test_the_state_is_json_and_restores_the_same_order() -> None:
    for sources in (SOURCES, FIXED):
        m = Mixture.plan(3, sources=sources, global_batch=96, lanes=24, accumulation=2)
        assert Mixture.from_state(json.loads(json.dumps(m.to_state()))) == m
    with pytest.raises(ValueError, match="order version 0"):
        Mixture.from_state(m.to_state() | {"order_version": 0})


def test_442_million_samples_cost_nothing_to_seek() -> None:
    sizes = {"laion": 407_332_084, "yfcc": 14_800_000, "cc12m": 10_500_000, "in22k": 14_197_122}
    m = Mixture.plan(0, sources=[(n, size, 1, 40_000, None) for n, size in sizes.items()], global_batch=16_384)
    assert m.lanes == 256 and all(o.K for o in m.orders)
    batch = m.rows(3_000_000, rank=5, world=8)
    assert len(batch.id) == 2048 and all((batch.id[batch.source == s] < n).all() for s, n in enumerate(sizes.values()))
    whole = m.rows(24_861)  # LAION's second epoch begins in this region
    assert len(np.unique(np.stack([whole.source, whole.id]), axis=1).T) == 16_384


@pytest.mark.parametrize(("n", "lanes"), [(96, 12), (16_384, 256), (4096, 256), (18_432, 256), (7, 1), (8, 1)])
def test_default_lanes_depend_on_the_batch_alone(n: int, lanes: int) -> None:
    assert default_lanes(n) == lanes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 25}, "data.lanes: got 25, which does not divide global_batch 96"),
        ({"accumulation": 5}, "24 lanes do not divide into 5 micro-steps"),
        ({"sources": [("x", 0, 1, 1, None)]}, "data.sources.x: has no samples"),
        ({"sources": [("x", 5, 1, 1, None)] * 2}, "occurs twice"),
        ({"sources": [("x", 5, "much", 1, None)]}, "data.sources.x.repeats: got 'much'"),
        ({"sources": [("x", 5, 0, 1, None)]}, "data.sources.x.repeats: got 0; needed: more than 0"),
        ({"sources": [("x", 5, 1, 1, 3)]}, "quotas \\[3\\] sum to 3; needed: 4"),
        ({"sources": [("x", 5, 1, 1, 3), ("y", 5, 1, 1, None)]}, "one for every source or none"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change: dict, message: str) -> None:
    arguments = {"sources": SOURCES, "global_batch": 96, "lanes": 24} | change
    with pytest.raises(ValueError, match=message):
        Mixture.plan(3, **arguments)
    with pytest.raises(ValueError, match="ranks: got 5; needed: one of 1, 2, 3, 4, 6, 8, 12, 24"):
        Mixture.plan(3, sources=SOURCES, global_batch=96, lanes=24).rows(0, rank=0, world=5)


# -- mutants: each fault must be seen by the checks above -------------------------------------------


def exactly_once(o: SourceOrder) -> bool:
    ids = o.ids(np.arange(3 * o.n))[2].reshape(3, o.n)
    return bool((np.sort(ids, 1) == np.arange(o.n)).all())


def edge_is_guarded(o: SourceOrder) -> bool:
    ids = o.ids(np.arange(9 * o.n))[2]
    return all(len(np.unique(ids[s : s + o.g])) == o.g for e in range(1, 9) for s in range(e * o.n - o.g, e * o.n, 3))


def test_the_checks_see_a_missing_guard_and_a_lost_crumb(monkeypatch: pytest.MonkeyPatch) -> None:
    o = order(1000, 24, 8, 2)
    assert exactly_once(o) and edge_is_guarded(o)
    with monkeypatch.context() as m:
        m.setattr(SourceOrder, "_zone", lambda self, e: self._raw(np.arange(2 * self.g), np.full(2 * self.g, e)))
        assert not edge_is_guarded(o)
    with monkeypatch.context() as m:
        m.setattr(SourceOrder, "C", property(lambda self: self.n - self.Kt * self.V * self.b + 1))
        assert not exactly_once(o)
    with monkeypatch.context() as m:
        m.setattr(keyed, "ROUNDS", 0)
        assert np.array_equal(feistel(np.arange(64), 64, key(1)), np.arange(64)), "without rounds nothing is shuffled"

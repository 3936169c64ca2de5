"""Which samples a step trains on: the same at any number of ranks, everything once an epoch."""

from collections import Counter

import numpy as np
import pytest

from m3i_large.finetune.sampling import Order, collate_rng, micro_batch, sample_rng, shares, steps_of


def rows(order: Order, step: int, *, global_batch: int, accumulation: int, world: int) -> list[tuple[int, int]]:
    """A whole global batch, put together from its micro-steps and ranks in their order."""
    return [
        row
        for micro_step in range(accumulation)
        for rank in range(world)
        for row in micro_batch(
            order,
            step=step,
            micro_step=micro_step,
            global_batch=global_batch,
            accumulation=accumulation,
            rank=rank,
            world=world,
        )
    ]


@pytest.mark.parametrize(("accumulation", "world"), [(1, 1), (1, 3), (2, 1), (2, 3), (6, 1)])
def test_a_global_batch_does_not_depend_on_ranks_or_micro_steps(accumulation: int, world: int) -> None:
    whole = [rows(Order(10, repeats=None, seed=4), s, global_batch=6, accumulation=1, world=1) for s in range(7)]
    order = Order(10, repeats=None, seed=4)
    cut = [rows(order, s, global_batch=6, accumulation=accumulation, world=world) for s in range(7)]
    assert cut == whole


def test_every_sample_once_an_epoch_in_another_order() -> None:
    order = Order(10, repeats=None, seed=4)
    drawn = [order[position] for position in range(30)]
    orders = [[sample for epoch, sample in drawn if epoch == number] for number in range(3)]
    assert all(sorted(found) == list(range(10)) for found in orders)
    assert orders[0] != orders[1] != orders[2]
    assert [epoch for epoch, _ in drawn] == [0] * 10 + [1] * 10 + [2] * 10
    assert drawn != [Order(10, repeats=None, seed=5)[position] for position in range(30)]


def test_a_position_asked_for_first_is_the_same_as_in_its_turn() -> None:
    repeats = np.array([1.0, 2.5, 1.2, 3.0])
    in_turn = Order(4, repeats=repeats, seed=1)
    wanted = [in_turn[position] for position in range(100)]
    assert [Order(4, repeats=repeats, seed=1)[position] for position in (99, 50, 7)] == [
        wanted[99],
        wanted[50],
        wanted[7],
    ]


def test_repeats_are_met_on_average_and_to_the_next_whole_number_in_every_epoch() -> None:
    repeats = np.array([1.0, 2.5, 1.2, 3.0])
    order, number = Order(4, repeats=repeats, seed=0), 2000
    counts = np.zeros(4)
    for epoch in range(number):
        found = Counter(order.epoch(epoch).tolist())
        for sample, wanted in enumerate(repeats):
            assert found[sample] in (int(np.floor(wanted)), int(np.ceil(wanted)))
            counts[sample] += found[sample]
    # Standard error of a mean of Bernoulli draws: below 0.012.
    assert np.abs(counts / number - repeats).max() < 0.05
    assert order.mean_length == pytest.approx(7.7)


def test_length_in_epochs() -> None:
    assert steps_of(Order(100, repeats=None, seed=0), epochs=25, global_batch=16) == round(2500 / 16)
    assert steps_of(Order(3, repeats=None, seed=0), epochs=0.1, global_batch=16) == 1


def test_generators_differ_in_every_part_of_their_key() -> None:
    def first(rng: np.random.Generator) -> float:
        return float(rng.random())

    keys = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)]
    assert len({first(sample_rng(*key)) for key in keys}) == len(keys)
    assert first(sample_rng(0, 1, 2)) == first(sample_rng(0, 1, 2))
    keys4 = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)]
    assert len({first(collate_rng(*key)) for key in keys4}) == len(keys4)


@pytest.mark.parametrize(("total", "world"), [(10, 1), (10, 4), (3, 4), (8, 4)])
def test_an_evaluation_asks_all_ranks_equally_often_and_for_everything(total: int, world: int) -> None:
    rounds = list(shares(total, world=world))
    assert all(len(found) == world for found in rounds) and len(rounds) == -(-total // world)
    assert {index for found in rounds for index in found} == set(range(total))

"""Schedules against hand-computed points."""

import itertools
import math

import pytest

from m3i_large.schedule import LearningRateConfig, MomentumConfig, ema_momentum, learning_rate


def test_learning_rate_warms_up_linearly_then_follows_half_a_cosine() -> None:
    config = LearningRateConfig(peak=2.0, warmup=0.1, final=0.5)
    rates = [learning_rate(s, steps=100, config=config) for s in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.25)  # half way through the decay
    assert rates[99] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_constant_decay_and_no_warmup() -> None:
    config = LearningRateConfig(peak=1.0, warmup=0.0, decay="constant")
    assert {learning_rate(s, steps=5, config=config) for s in range(5)} == {1.0}


def test_momentum_rises_from_base_to_final() -> None:
    config = MomentumConfig(base=0.9, final=1.0)
    values = [ema_momentum(s, steps=10, config=config) for s in range(11)]
    assert values[0] == pytest.approx(0.9) and values[5] == pytest.approx(0.95) and values[10] == pytest.approx(1.0)
    assert values == sorted(values)

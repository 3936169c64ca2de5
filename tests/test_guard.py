"""Spikes and streaks as pure functions of the losses; stragglers; where a run's time went."""

import math
from pathlib import Path

import numpy as np
import pytest

from m3i_large.goodput import goodput
from m3i_large.guard import Guard, Judgement, SpikeConfig, SpikeDetector
from m3i_large.metrics import append_row
from m3i_large.stragglers import Stragglers, own_seconds

GOOD, SKIPPED, SPIKE = Judgement("good"), Judgement("skipped"), Judgement("spike")


def curve(kind: str, steps: int, seed: int) -> np.ndarray:
    """Losses as pre-training makes them: a fall with a plateau in the middle, noise in proportion, heavy tails."""
    t, random = np.arange(steps), np.random.default_rng(seed)
    smooth = 3.0 + 6.5 * np.exp(-t / 90) + 1.5 / (1 + np.exp((t - steps / 2) / 30))
    if kind == "rising":  # a target that becomes harder to predict, as a collapse that is overcome does
        smooth = smooth + 2.0 * (1 - np.exp(-t / 200))
    if kind == "flat":
        smooth = np.full(steps, 0.6931)
    noise = random.standard_t(6, steps) if kind == "heavy" else random.standard_normal(steps)
    return smooth * (1 + 0.01 * noise)


@pytest.mark.parametrize("kind", ["normal", "heavy", "rising", "flat"])
def test_no_false_alarm_on_healthy_losses_and_every_real_spike_is_seen(kind: str) -> None:
    config = SpikeConfig()
    for seed in range(5):
        losses = curve(kind, 1500, seed)
        detector = SpikeDetector(window=config.window, factor=config.factor)
        assert not any(detector.is_spike(i, x) for i, x in enumerate(losses))
        places = (500, 1000, 1001, 1400)  # a steep fall hides a spike of this size
        losses[list(places)] *= 1.6
        detector = SpikeDetector(window=config.window, factor=config.factor)
        assert [i for i, x in enumerate(losses) if detector.is_spike(i, x)] == list(places)


def test_nothing_is_judged_early_and_a_loss_that_stays_high_becomes_usual() -> None:
    detector = SpikeDetector(window=20, factor=10)
    assert not any(detector.is_spike(i, x) for i, x in enumerate([1.0, 50.0] * 5)), "half a window comes first"
    detector = SpikeDetector(window=20, factor=10)
    found = [i for i, x in enumerate([1.0] * 20 + [5.0] * 30) if detector.is_spike(i, x)]
    assert found == list(range(20, 30)), "10 of 20 are high then: the median is"
    detector.rewind(45)
    assert [step for step, _ in detector._losses] == list(range(30, 45))


def guard(**more: object) -> Guard:
    return Guard(**({"max_skipped": 3, "spike": SpikeConfig(window=10), "skip_steps": [2]} | more))  # type: ignore


def test_a_streak_of_steps_not_applied_leads_to_a_reload_and_single_ones_do_not() -> None:
    g = guard()
    results = [g.judge(i, applied=i not in (5, 6, 8), loss=1.0) for i in range(10)]
    assert results == [SKIPPED if i in (5, 6, 8) else GOOD for i in range(10)] and g.streak == []
    assert g.skip_steps == {2, 5, 6, 8} and [g.skipped(i) for i in (1, 2, 5, 9)] == [0, 1, 2, 4]
    results = [g.judge(i, applied=False, loss=math.nan) for i in (10, 11, 12)]
    assert results == [SKIPPED, SKIPPED, Judgement("skipped", reload=True)] and g.streak == [10, 11, 12]
    g.rewind(4)
    assert g.streak == [] and g.skip_steps == {2, 5, 6, 8, 10, 11, 12}
    assert g.rewinds == 1 and g.judge(13, applied=False, loss=math.nan) == SKIPPED
    g.rewind(4)
    g.judge(4, applied=True, loss=1.0)
    assert g.rewinds == 2, "steps before the bad ones were good already"
    g.judge(14, applied=True, loss=1.0)
    assert g.rewinds == 0


@pytest.mark.parametrize("action", ["warn", "off", "reload"])
def test_what_a_spike_leads_to(action: str) -> None:
    g = guard(spike=SpikeConfig(window=10, action=action))
    assert {g.judge(i, applied=True, loss=1.0).kind for i in range(10)} == {"good"}
    results = [g.judge(10 + i, applied=True, loss=x) for i, x in enumerate([9.0, 9.0, 1.0])]
    if action == "reload":
        assert results == [SPIKE, SPIKE, Judgement("good", reload=True)] and g.streak == [10, 11]
        assert g.spoiled, "not worth a checkpoint"
        g.rewind(8)
        assert g.skip_steps == {2, 10, 11} and not g.spoiled
        results = [g.judge(i, applied=True, loss=1.0 if i < 12 else 9.0) for i in (8, 9, 12, 13, 14)]
        assert results == [GOOD, GOOD, SPIKE, SPIKE, Judgement("spike", reload=True)], "it need not end by itself"
    else:
        assert results == [SPIKE if action == "warn" else GOOD, GOOD, GOOD] and g.skip_steps == {2}
        assert not g.spoiled


def test_a_restart_changes_no_judgement() -> None:
    losses = {i: 1.0 + 0.01 * (i % 3) for i in range(12)} | {5: 90.0}
    before, restarted = (guard(skip_steps=[5], spike=SpikeConfig(window=10, action="reload")) for _ in range(2))
    for step in losses.keys() - {5}:
        before.judge(step, applied=True, loss=losses[step])
    restarted.recall(losses)
    assert list(before._detector._losses) == list(restarted._detector._losses)
    assert restarted.judge(12, applied=True, loss=2.0) == SPIKE and restarted.spoiled
    assert guard(spike=SpikeConfig(window=10, action="reload")).judge(12, applied=True, loss=2.0) == GOOD


def test_a_slow_rank_is_told_once_after_three_looks_in_a_row() -> None:
    seconds = own_seconds([0.1, 0.1, 0.3, 0.1], [1.0, 1.1, 0.9, 1.0], [0.01, 0.01, 0.01, 0.02])
    assert seconds == pytest.approx([1.0, 1.0, 1.2, 1.9])
    s = Stragglers(factor=1.3)
    slow, even = [1.0, 1.0, 1.0, 1.9], [1.0, 1.1, 1.2, 1.0]
    told = [s.check(x)[1] for x in (slow, slow, even, slow, slow, slow, slow, even, slow, slow, slow)]
    assert told == [None] * 5 + [3] + [None] * 4 + [3]
    assert s.check([1.0, 2.0]) == (2.0, None), "of two the faster one is the median"


def test_goodput_of_a_run_with_a_crash_a_reload_and_a_skipped_step(tmp_path: Path) -> None:
    """By hand: 0 to 3 s set-up; steps of 1 s, 0.25 s of them data; a save of 0.5 s; a crash, 10 s down; a reload."""
    assert goodput(tmp_path).share == 0.0

    def event(kind: str, step: int, attempt: int, time: float, **more: object) -> None:
        append_row(tmp_path / "events.jsonl", {"event": kind, "step": step, "attempt": attempt, "time": time, **more})

    def steps(numbers: range, attempt: int, time: float) -> None:
        for i, step in enumerate(numbers):
            row = {"step": step, "attempt": attempt, "time": time + i + 1, "time/step_s": 1.0, "data/wait_s": 0.25}
            append_row(tmp_path / "metrics.jsonl", row)

    event("start", 0, 0, 103.0, setup_s=3.0)
    steps(range(2), 0, 103.0)
    event("save", 2, 0, 105.5, held_s=0.5, seconds=3.0)
    steps(range(2, 5), 0, 105.5)  # 108.5: killed
    event("resume", 2, 1, 120.5, setup_s=2.0)
    steps(range(2, 4), 1, 120.5)
    event("skip", 4, 1, 123.5)
    steps(range(4, 5), 1, 122.5)
    event("resume", 2, 2, 124.0)  # reloaded in the process; killed once more after one step, then started again
    steps(range(2, 3), 2, 124.0)
    event("resume", 2, 3, 130.0, setup_s=1.0)
    steps(range(2, 4), 3, 130.0)
    event("skip", 4, 3, 133.0)
    steps(range(4, 5), 3, 132.0)
    event("end", 5, 3, 134.0)
    found = goodput(tmp_path)
    assert found.wall == 34.0 and found.checkpoints == 0.5
    assert found.productive == 4 * 0.75 and found.data == 4 * 0.25 and found.skipped == 1.0
    assert found.replayed == 3 + 3 + 1
    assert found.other == pytest.approx(34 - 0.5 - 4 - 1 - 7)
    assert found.share == pytest.approx(3 / 34) and "goodput 8.8% of 0.6 minutes" in found.to_text()

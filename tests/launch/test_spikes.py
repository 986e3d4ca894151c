"""The detector of loss spikes: by hand-computed numbers, on noise, and across a checkpoint."""

from __future__ import annotations

import json
import math
import random

import pytest

from launch.spikes import Spike, SpikeDetector


def judged(losses: list[float], window: int = 8, deviations: float = 5.0) -> list[Spike | None]:
    detector = SpikeDetector(window, deviations)
    return [detector.judge(loss) for loss in losses]


def test_the_numbers_of_a_spike_are_those_of_the_window_before_it() -> None:
    # Median 4.5, absolute deviations 3.5 2.5 1.5 .5 .5 1.5 2.5 3.5 with median 2: 1.4826 * 2 is a deviation.
    *before, spike = judged([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 34.152])
    assert before == [None] * 8
    assert spike is not None
    assert (spike.loss, spike.median, spike.continues) == (34.152, 4.5, False)
    assert spike.deviations == pytest.approx((34.152 - 4.5) / (1.4826 * 2))  # 10.0
    assert judged([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 19.3])[-1] is None  # 4.99
    assert judged([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 19.4])[-1] is not None  # 5.02


def test_nothing_is_said_before_the_window_is_full() -> None:
    assert judged([1.0, 1.1] * 3 + [1.0, 1000.0]) == [None] * 8


def test_a_fall_is_no_spike() -> None:
    assert judged([3.0, 3.1] * 4 + [-1000.0])[-1] is None


def test_one_spike_does_not_hide_the_next() -> None:
    """Mean and standard deviation would: the first spike would be in both."""
    losses = [3.0, 3.1] * 4 + [1000.0, 3.0, 3.1, 900.0]
    assert [spike is not None for spike in judged(losses)[8:]] == [True, False, False, True]


def test_a_level_that_stays_is_soon_none_and_told_as_one_spike() -> None:
    spikes = judged([3.0, 3.1] * 4 + [9.0, 9.1] * 5)[8:]
    told = [spike is not None for spike in spikes]
    assert told == [True] * told.count(True) + [False] * told.count(False)
    assert 2 <= told.count(True) <= 5
    assert [spike.continues for spike in spikes if spike] == [False] + [True] * (told.count(True) - 1)


def test_constant_losses_have_a_least_deviation() -> None:
    assert judged([2.0] * 8 + [2.009])[-1] is None
    assert judged([2.0] * 8 + [2.011])[-1] is not None
    assert judged([0.0] * 8 + [0.0])[-1] is None


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_a_spike_and_is_forgotten(loss: float) -> None:
    losses = [3.0, 3.1] * 4
    spike, after = judged([*losses, loss, 3.05])[8:]
    assert spike is not None
    assert spike.deviations == math.inf
    assert after is None


def test_noise_is_no_spike() -> None:
    draw = random.Random(0)
    assert judged([draw.gauss(3.0, 0.1) for _ in range(20_000)], window=128, deviations=10.0) == [None] * 20_000


def test_a_detector_that_goes_on_from_its_scalars_judges_as_the_first() -> None:
    draw = random.Random(1)
    losses = [draw.gauss(3.0, 0.1) * (5 if draw.random() < 0.1 else 1) for _ in range(400)]
    whole = judged(losses)
    assert sum(spike is not None for spike in whole) > 10
    for cut in (0, 3, 8, 100, 257):
        first, second = SpikeDetector(8, 5.0), SpikeDetector(8, 5.0)
        before = [first.judge(loss) for loss in losses[:cut]]
        second.load_scalars(json.loads(json.dumps(first.as_scalars())))
        assert before + [second.judge(loss) for loss in losses[cut:]] == whole


def test_a_smaller_window_keeps_the_newest_losses() -> None:
    large, small, fresh = SpikeDetector(16, 5.0), SpikeDetector(8, 5.0), SpikeDetector(8, 5.0)
    for number in range(16):
        large.judge(3.0 + number % 5)
    for number in range(8, 16):
        fresh.judge(3.0 + number % 5)
    small.load_scalars(large.as_scalars())
    assert small.judge(100.0) == fresh.judge(100.0)

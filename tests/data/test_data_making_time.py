"""What a rank's part of the steps takes it, without what it waits for others."""

from __future__ import annotations

import time

from data.making_time import MakingTime


def test_what_was_waited_for_others_is_no_time_of_its_own() -> None:
    making = MakingTime()
    assert making.take() is None
    begun = time.perf_counter()
    for steps, samples in ((1, 6), (3, 18)):
        with making.of(steps, samples):
            time.sleep(0.01)
            assert making.waiting(_exchange, [1, 2]) == [2, 4]
    all_seconds = time.perf_counter() - begun
    made = making.take()
    assert made is not None
    assert made.samples == 6
    assert 2 * 0.01 <= 4 * made.seconds <= all_seconds - 2 * 0.1
    assert making.take() is None


def _exchange(values: list[int]) -> list[int]:
    time.sleep(0.1)
    return [2 * value for value in values]

"""Learning-rate schedules against values worked out by hand."""

from __future__ import annotations

import pytest

from distrib.config import ScheduleConfig
from distrib.schedule import learning_rate


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(kind="constant"), [1.0] * 9),
        (ScheduleConfig(kind="constant", warmup_steps=4), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (ScheduleConfig(kind="linear", final_fraction=0.2), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        (
            ScheduleConfig(kind="linear", warmup_steps=4, final_fraction=0.0),
            [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0],
        ),
        (
            ScheduleConfig(kind="cosine", warmup_steps=4, final_fraction=0.0),
            [0.25, 0.5, 0.75, 1.0, 1.0, 0.8535533906, 0.5, 0.1464466094, 0.0],
        ),
    ],
)
def test_nine_steps(config: ScheduleConfig, expected: list[float]) -> None:
    assert [learning_rate(config, 2.0, step, 9) / 2.0 for step in range(9)] == pytest.approx(expected)


def test_a_run_that_is_all_warm_up_and_one_of_a_single_step() -> None:
    assert learning_rate(ScheduleConfig(warmup_steps=3), 1.0, 2, 3) == 1.0
    assert learning_rate(ScheduleConfig(), 1.0, 0, 1) == 1.0

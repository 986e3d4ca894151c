"""Which exit code a run has, from its workers'; the supervisor's dealings with live workers are in tests/end_to_end."""

from __future__ import annotations

import signal

import pytest

from launch.supervisor import _run_exit_code, default_workers


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0], 0),
        ([0, 0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([78, 1], 78),
        ([1, 78], 78),
        ([2, 2], 2),
        ([1, 2, 1], 2),
        ([0, 1], 1),
        ([75, 1], 1),
        ([-signal.SIGKILL, 1], 1),
        ([-signal.SIGKILL, -signal.SIGKILL], 1),
        ([78, -signal.SIGKILL], 78),
        ([75, -signal.SIGSEGV], 1),
        ([0, 3], 1),
    ],
)
def test_the_most_telling_code_is_the_runs(codes: list[int], expected: int) -> None:
    assert _run_exit_code(codes) == expected


def test_a_cpu_gets_at_most_two_workers() -> None:
    assert default_workers("cpu") in (1, 2)

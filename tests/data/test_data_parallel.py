"""Work in several processes: results in the order of the jobs, and failures where they belong."""

import os
import signal
from collections.abc import Callable

import pytest

from data.parallel import each


def make_square(refused: int) -> Callable[[int], int]:
    def square(number: int) -> int:
        if number == refused:
            raise ValueError(f"not {number}")
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    return square


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs_and_errors_where_they_belong(workers: int) -> None:
    assert list(each(make_square, 7, range(7), workers=workers)) == [number * number for number in range(7)]
    results = each(make_square, 7, range(30), workers=workers)
    assert [next(results) for _ in range(7)] == [0, 1, 4, 9, 16, 25, 36]
    with pytest.raises(ValueError, match="not 7"):
        next(results)


def test_a_killed_worker_is_told_in_a_line() -> None:
    with pytest.raises(ValueError, match="a worker process was killed"):
        list(each(make_square, 7, [1, 2, -1, 3, 4], workers=2))

"""Work in several processes: results in the order of the jobs, and failures where they belong."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import CorruptData, NoRoom, Unavailable
from data.parallel import each
from tests.data.preparing_helpers import serves


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
    with pytest.raises(ValueError, match="a worker process was killed by SIGKILL; if memory"):
        list(each(make_square, 7, [1, 2, -1, 3, 4], workers=2))


def make_raise(kind: type[Exception]) -> Callable[[str], None]:
    def fail(text: str) -> None:
        raise kind(text)

    return fail


@pytest.mark.parametrize("kind", [ValueError, CorruptData, Unavailable, NoRoom])
def test_errors_keep_their_kinds(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^why$") as raised:
        list(each(make_raise, kind, ["why"], workers=2))
    assert type(raised.value) is kind


def test_a_worker_that_cannot_begin_is_told() -> None:
    with pytest.raises(ValueError, match="no ground to stand on"):
        list(each(make_nothing, None, range(9), workers=2))


def make_nothing(setting: None) -> Callable[[int], int]:
    raise ValueError("no ground to stand on")


UNHEARD = """
from data.child import Child
from tests.data.test_data_parallel import make_square
child = Child(make_square, 7)
child.replies.close()
for job in (3, 7):
    child.ask(job)
print(child._process.wait())
"""


def test_a_worker_that_replies_when_nobody_is_left_to_hear_ends_without_a_word() -> None:
    """Where whoever asked is killed, it may come to that before its own pipe ends."""
    done = subprocess.run([sys.executable, "-c", UNHEARD], capture_output=True, text=True, timeout=240, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def make_sleeper(_: None) -> Callable[[int], int]:
    def pid_or_sleep(number: int) -> int:
        if number > 1:
            time.sleep(60)
        return os.getpid()

    return pid_or_sleep


WORKING = """
from data.parallel import each
from tests.data.test_data_parallel import make_sleeper
for pid in each(make_sleeper, None, range(9), workers=2):
    print(pid, flush=True)
"""


def test_a_kill_leaves_no_worker_and_no_name_behind() -> None:
    command = [sys.executable, "-c", WORKING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True) as process:
        assert process.stdout is not None
        workers = [int(process.stdout.readline()) for _ in range(2)]
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (process.pid, *workers)]
        os.killpg(process.pid, signal.SIGKILL)
    named = {word for text in maps for word in text.split() if word.startswith("/dev/shm/")}
    deadline = time.monotonic() + 60
    while any(serves(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives the process that started it"
        time.sleep(0.01)
    assert not [name for name in named if Path(name).exists()]

"""Work in several processes: results in the order of the jobs, only so many jobs ahead of them, and no process left behind."""

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")
Setting = TypeVar("Setting")

# Jobs handed out for each process, so that none waits for its next one.
_JOBS_AHEAD = 3

_perform: Callable[[Any], Any]
"""What this process does with a job; only in the processes that `each` starts."""


def each(
    make: Callable[[Setting], Callable[[Job], Outcome]], setting: Setting, jobs: Iterable[Job], *, workers: int
) -> Iterator[Outcome]:
    """`make(setting)(job)` of each job, in their order, where `make` is called once in each of `workers` processes.

    A single worker is this process. An exception of a job is raised here; ValueError where a process was killed.
    """
    if workers == 1:
        yield from map(make(setting), jobs)
        return
    context = multiprocessing.get_context("spawn")  # a forked child of a process with threads may wait for ever
    with ProcessPoolExecutor(workers, context, _set_up, (make, setting)) as pool:
        rest = iter(jobs)
        ahead: deque[Future[Outcome]] = deque()
        try:
            for job in itertools.islice(rest, workers * _JOBS_AHEAD):
                ahead.append(pool.submit(_do, job))
            while ahead:
                yield ahead.popleft().result()
                for job in itertools.islice(rest, 1):
                    ahead.append(pool.submit(_do, job))
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, perhaps for want of memory; try again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _set_up(make: Callable[[Any], Callable[[Any], Any]], setting: Any) -> None:
    global _perform
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _perform = make(setting)


def _do(job: Any) -> Any:
    return _perform(job)

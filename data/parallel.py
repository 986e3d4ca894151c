"""Work in several processes: results in the order of the jobs, only so many jobs ahead of them, and no process left behind."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from data.child import ChildEnded, Reply, ready, started

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")
Setting = TypeVar("Setting")

# Jobs handed out for each process, so that none waits for its next one.
_JOBS_AHEAD = 3


def each(
    make: Callable[[Setting], Callable[[Job], Outcome]], setting: Setting, jobs: Iterable[Job], *, workers: int
) -> Iterator[Outcome]:
    """`make(setting)(job)` of each job, in their order, where `make` is called once in each of `workers` processes.

    A single worker is this process. An exception of a job is raised here; ValueError where a process was killed.
    """
    if workers == 1:
        yield from map(make(setting), jobs)
        return
    rest, handed_out = enumerate(jobs), 0
    replies: dict[int, Reply] = {}
    errors: dict[int, BaseException] = {}  # the last one that each process told
    with started(make, setting, workers) as children:
        asked: dict[int, deque[int]] = {child.pid: deque() for child in children}
        for wanted in itertools.count():
            for number, job in itertools.islice(rest, wanted + workers * _JOBS_AHEAD - handed_out):
                child = min(children, key=lambda child: len(asked[child.pid]))
                child.ask(job)
                asked[child.pid].append(number)
                handed_out += 1
            if wanted == handed_out:
                return
            while wanted not in replies:
                for child in ready(children):
                    try:
                        reply = child.hear()
                    except ChildEnded as ended:
                        if (
                            child.pid in errors
                        ):  # it could not begin, and said so in reply to a later job than is wanted
                            raise errors[child.pid] from None
                        raise ValueError(
                            f"a worker process {ended}; if memory ran out, try again with fewer --workers"
                        ) from None
                    if reply[0] == "error":
                        errors[child.pid] = reply[1]
                    # A child that has no job can only fail at getting ready for one.
                    replies[asked[child.pid].popleft() if asked[child.pid] else wanted] = reply
            kind, value = replies.pop(wanted)
            if kind == "error":
                raise value
            yield value

"""The tasks of a preparation, carried out in this process or in several others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from data.build import Builder, Job
from data.child import Child, ChildEnded, ready, report, started
from data.source_reading import UnitInput
from data.workspace import GroupRecord, UnitRecord


@dataclass(frozen=True)
class Task:
    """Make a unit, make a group's shards of its units, or verify a group that is finished."""

    kind: Literal["unit", "group", "verify"]
    number: int
    unit: UnitInput | None = None
    units: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Result:
    """A unit's or a group's record; or None, and then `redo` names a group's units that must be made again."""

    record: UnitRecord | GroupRecord | None
    redo: tuple[int, ...] = ()


class Schedule(Protocol):
    """Which tasks there are. `take` gives None while there are none to begin; `settle` may bring new ones."""

    def take(self) -> Task | None: ...
    def advance(self, task: Task, documents: int, tokens: int, size_bytes: int) -> None: ...
    def settle(self, task: Task, result: Result) -> None: ...


def perform(builder: Builder, task: Task, report: Callable[[int, int, int], None]) -> Result:
    """Carry a task out in this process."""
    if task.kind == "unit":
        assert task.unit is not None
        return Result(builder.build_unit(task.number, task.unit, report))
    if task.kind == "verify":
        return Result(builder.verify_group(task.number))
    made = builder.build_group(task.number, range(*task.units))
    return Result(None, tuple(made)) if isinstance(made, list) else Result(made)


def work_through(schedule: Schedule, job: Job, processes: int) -> None:
    """Carry out all tasks: in this process if `processes` is 0, else in so many others.

    Raises what a task raised, and a ValueError of one line where a worker was killed.
    """
    if processes == 0:
        builder = Builder(job)
        while (task := schedule.take()) is not None:
            schedule.settle(task, perform(builder, task, lambda *done, task=task: schedule.advance(task, *done)))
        return
    with started(_Performer, job, processes) as children:
        tasks: dict[int, Task] = {}
        _keep_busy(children, tasks, schedule)
        while tasks:
            for child in ready(children):
                _hear(child, tasks, schedule)
            _keep_busy(children, tasks, schedule)


class _Performer:
    """Carries tasks out in a process of their own."""

    def __init__(self, job: Job) -> None:
        self._builder = Builder(job)

    def __call__(self, task: Task) -> Result:
        return perform(self._builder, task, report)


def _keep_busy(children: list[Child], tasks: dict[int, Task], schedule: Schedule) -> None:
    for child in children:
        if child.pid not in tasks and (task := schedule.take()) is not None:
            tasks[child.pid] = task
            child.ask(task)


def _hear(child: Child, tasks: dict[int, Task], schedule: Schedule) -> None:
    """Read what a worker says; pass it on to the schedule."""
    try:
        kind, value = child.hear()
    except ChildEnded as ended:
        raise ValueError(
            f"a worker process that prepares data {ended}; if memory ran out, use fewer workers; what was finished is "
            "kept: start again"
        ) from None
    if kind == "error":
        raise value
    if kind == "report":
        schedule.advance(tasks[child.pid], *value)
    else:
        schedule.settle(tasks.pop(child.pid), value)

"""Which units and groups are still to be made, and how far a preparation has come."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.sources import Source
from data.units import Plan, Unit, input_of
from data.workers import Result, Task
from data.workspace import Content, GroupRecord, UnitRecord, Workspace

# A unit that is found damaged so often was not damaged by chance.
MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class Progress:
    """How far a preparation has come. `tokens` is 0 for images.

    `size_bytes` of text or encoded images, of which `found_bytes` were there before; of `input_bytes`, None where unknown,
    `read_bytes` were read, about.
    """

    documents: int
    empty: int
    """Texts without a character, which were left out."""
    tokens: int
    size_bytes: int
    found_bytes: int
    read_bytes: int
    input_bytes: int | None


Watch = Callable[[Progress], None]


class Verification:
    """The tasks of making sure that finished groups are as they were written."""

    def __init__(self, groups: Sequence[int]) -> None:
        self._tasks = deque(Task("verify", group) for group in groups)
        self.records: dict[int, GroupRecord] = {}
        self.damaged: list[int] = []

    def take(self) -> Task | None:
        """The next task."""
        return self._tasks.popleft() if self._tasks else None

    def advance(self, task: Task, documents: int, tokens: int, size_bytes: int) -> None:
        """Verifying makes no documents."""

    def settle(self, task: Task, result: Result) -> None:
        """A task is done."""
        if isinstance(result.record, GroupRecord):
            self.records[task.number] = result.record
        else:
            self.damaged.append(task.number)


class UnitSchedule:
    """The tasks of some groups of a plan: their units first, in order, each group's shards as soon as its units are there.

    `records` fills with the records of the groups that are finished and verified.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Source],
        units: Sequence[Unit],
        groups: Sequence[int],
        workspace: Workspace,
        tokenizer: str | None,
        watch: Watch | None,
    ) -> None:
        self._plan, self._sources, self._units = plan, sources, units
        self._workspace, self._tokenizer, self._watch = workspace, tokenizer, watch
        self.records: dict[int, GroupRecord] = {}
        self._group_of = {unit: group for group in groups for unit in plan.units_of(group)}
        weights = [units[unit].weight for unit in self._group_of]
        known = [weight for weight in weights if weight is not None]
        self._input_bytes = sum(known) if len(known) == len(weights) else None
        self._missing: dict[int, int] = {}
        self._attempts: dict[int, int] = {}
        self._finished: dict[int, Content] = {}
        self._under_way: dict[int, Content] = {}
        self._total = Content()
        self._read_bytes = self._found_bytes = 0
        self._tasks: deque[Task] = deque()
        self.found_units = self.found_groups = 0
        for group in groups:
            if workspace.group_path(group).exists():
                self._tasks.append(Task("verify", group))
                self.found_groups += 1
            else:
                self._schedule_units(group)

    @property
    def units_to_do(self) -> int:
        """How many tasks of those known by now make a unit."""
        return sum(task.kind == "unit" for task in self._tasks)

    @property
    def tasks(self) -> int:
        """How many tasks are known by now."""
        return len(self._tasks)

    def _schedule_units(self, group: int) -> None:
        self._missing[group] = 0
        for unit in self._plan.units_of(group):
            record = self._workspace.unit_record(unit, self._tokenizer)
            if record is None:
                self._missing[group] += 1
                self._tasks.append(self._unit_task(unit))
            else:
                self.found_units += 1
                self._found_bytes += record.content.size_bytes
                self._finish(unit, record.content)
        if not self._missing[group]:
            self._tasks.appendleft(self._group_task(group))

    def _unit_task(self, unit: int) -> Task:
        return Task("unit", unit, input_of(self._units[unit], self._sources, self._plan.class_names))

    def _group_task(self, group: int) -> Task:
        units = self._plan.units_of(group)
        return Task("group", group, units=(units.start, units.stop))

    def take(self) -> Task | None:
        """The next task; None while there is none to begin."""
        return self._tasks.popleft() if self._tasks else None

    def advance(self, task: Task, documents: int, tokens: int, size_bytes: int) -> None:
        """A unit that is under way has come so much further."""
        before = self._under_way.get(task.number, Content())
        more = Content(documents=documents, tokens=tokens, size_bytes=size_bytes)
        self._under_way[task.number] = Content.together([before, more])
        self._tell()

    def settle(self, task: Task, result: Result) -> None:
        """A task is done."""
        if task.kind == "unit":
            assert isinstance(result.record, UnitRecord)
            self._under_way.pop(task.number, None)
            self._finish(task.number, result.record.content)
            self._count_down(self._group_of[task.number])
        elif isinstance(result.record, GroupRecord):
            self.records[task.number] = result.record
            if task.kind == "verify":
                self._found_bytes += result.record.content.size_bytes
                self._total = Content.together([self._total, result.record.content])
                self._read_bytes += sum(self._units[unit].weight or 0 for unit in self._plan.units_of(task.number))
        elif task.kind == "verify":
            self._schedule_units(task.number)
        else:
            self._do_again(task.number, result.redo)
        self._tell()

    def _finish(self, unit: int, content: Content) -> None:
        self._finished[unit] = content
        self._total = Content.together([self._total, content])
        self._read_bytes += self._units[unit].weight or 0

    def _count_down(self, group: int) -> None:
        self._missing[group] -= 1
        if not self._missing[group]:
            self._tasks.appendleft(self._group_task(group))

    def _do_again(self, group: int, units: Sequence[int]) -> None:
        self._missing[group] = len(units)
        for unit in units:
            self._attempts[unit] = self._attempts.get(unit, 0) + 1
            if self._attempts[unit] > MOST_ATTEMPTS:
                raise ValueError(
                    f"{self._workspace.unit_path(unit)}: what is written there is not what is read; check the disk"
                )
            before = self._finished.pop(unit)
            total = self._total
            self._total = total.model_copy(
                update={
                    "documents": total.documents - before.documents,
                    "empty": total.empty - before.empty,
                    "tokens": total.tokens - before.tokens,
                    "size_bytes": total.size_bytes - before.size_bytes,
                }
            )
            self._read_bytes -= self._units[unit].weight or 0
            self._tasks.appendleft(self._unit_task(unit))

    def _tell(self) -> None:
        if self._watch is None:
            return
        begun = Content.together(list(self._under_way.values()))
        read = sum(min(content.size_bytes, self._units[unit].weight or 0) for unit, content in self._under_way.items())
        self._watch(
            Progress(
                documents=self._total.documents + begun.documents,
                empty=self._total.empty,
                tokens=self._total.tokens + begun.tokens,
                size_bytes=self._total.size_bytes + begun.size_bytes,
                found_bytes=self._found_bytes,
                read_bytes=self._read_bytes + read,
                input_bytes=self._input_bytes,
            )
        )

"""Worker processes of a preparation: one line of JSON asks for a task, and lines of JSON answer.

Each is a Python of its own with one thread, started by `start` and fed by `work_through`. A worker ends when its pipe does:
none outlives the process that started it, however that one ended.
"""

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from data.build import Builder, Job
from data.errors import CorruptData
from data.source_reading import UnitInput
from data.workspace import GroupRecord, UnitRecord

# One thread each: of the tokenizers' library, of Arrow and of NumPy's algebra.
ONE_THREAD = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Task:
    """Make a unit, make a group's shards of its units, or verify a group that is finished."""

    kind: Literal["unit", "group", "verify"]
    number: int
    unit: UnitInput | None = None
    units: tuple[int, int] = (0, 0)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": self.kind,
            "number": self.number,
            "unit": self.unit and self.unit.as_json(),
            "units": list(self.units),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Task":
        """What `as_json` made."""
        unit = values["unit"] and UnitInput.from_json(values["unit"])
        return cls(values["kind"], values["number"], unit, (values["units"][0], values["units"][1]))


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
    with _started(job, processes) as workers, selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.replies, selectors.EVENT_READ, worker)
        _keep_busy(workers, schedule)
        while any(worker.task is not None for worker in workers):
            for key, _ in selector.select():
                key.data.hear(schedule)
            _keep_busy(workers, schedule)


def _keep_busy(workers: list["_Worker"], schedule: Schedule) -> None:
    for worker in workers:
        if worker.task is None and (task := schedule.take()) is not None:
            worker.ask(task)


class _Worker:
    """A worker process as its parent sees it."""

    def __init__(self, job: Job) -> None:
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        # -P: a folder `data` where somebody stands must not shadow ours. A session of its own: Ctrl-C reaches the parent
        # alone, whose pipe then ends.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from data.workers import serve; serve()"],
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.replies = self._process.stdout
        self._rest = b""
        self.task: Task | None = None
        self._send(job.as_json())

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: the end of its replies says so
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def ask(self, task: Task) -> None:
        self.task = task
        self._send(task.as_json())

    def hear(self, schedule: Schedule) -> None:
        """Read what the worker says; pass it on to the schedule."""
        content = os.read(self.replies.fileno(), 1 << 16)
        if not content:
            raise ValueError(self._ending())
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            message = json.loads(line)
            assert self.task is not None
            if "done" in message:
                schedule.advance(self.task, *message["done"])
                continue
            if "error" in message:
                raise _raised(message["error"])
            task, self.task = self.task, None
            kind = UnitRecord if task.kind == "unit" else GroupRecord
            record = None if message["record"] is None else kind.model_validate_json(json.dumps(message["record"]))
            schedule.settle(task, Result(record, tuple(message["redo"])))

    def _ending(self) -> str:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return (
            f"a worker process that prepares data {how}; if memory ran out, use fewer workers; what was finished is kept: "
            "start again"
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)


@contextlib.contextmanager
def _started(job: Job, processes: int) -> Iterator[list[_Worker]]:
    workers: list[_Worker] = []
    try:
        for _ in range(processes):
            workers.append(_Worker(job))
        yield workers
    finally:
        for worker in workers:
            worker.end()


def _raised(error: dict[str, Any]) -> Exception:
    if error["kind"] == "OSError":
        return OSError(error["number"], error["text"], error["filename"])
    kinds: dict[str, type[Exception]] = {"ValueError": ValueError, "CorruptData": CorruptData}
    return kinds.get(error["kind"], RuntimeError)(error["text"])


def _told(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename
        return {"kind": "OSError", "number": error.errno, "text": error.strerror, "filename": name and str(name)}
    if isinstance(error, ValueError):
        return {"kind": "CorruptData" if isinstance(error, CorruptData) else "ValueError", "text": str(error)}
    return {"kind": "other", "text": "".join(traceback.format_exception(error))}


def serve() -> None:
    """A worker process: tasks come by standard input, answers leave by standard output, which nothing else may use."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            asked.put(line)
        os._exit(0)  # whoever asked is gone, and with it the need for what is being done

    def say(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")

    threading.Thread(target=listen, daemon=True).start()
    builder: Builder | None = None
    while True:
        message = json.loads(asked.get())
        try:
            if builder is None:
                builder = Builder(Job.from_json(message))
                continue
            result = perform(builder, Task.from_json(message), lambda *done: say(done=done))
            say(record=result.record and result.record.model_dump(mode="json"), redo=result.redo)
        except Exception as error:
            say(error=_told(error))

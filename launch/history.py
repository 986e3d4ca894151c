"""What a run's own files say that it did: its attempts, and the one line of each step that counts. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from data.errors import CorruptData
from launch.clock import STEP_PHASES
from launch.tracking.metrics_file import FILE_NAME, read_step_lines

_KEYS = ("attempt", "samples", "tokens", "digest", "streams")
# The phases of a clock are read a moment before what was waited in them.
_READ_APART_SECONDS = 0.1


class DatasetPlace(BaseModel):
    """Where an attempt read a stream."""

    model_config = ConfigDict(strict=True)

    directory: str
    fingerprint: str


class ClockReading(BaseModel):
    """A worker's clock, as `launch.clock` reads it."""

    model_config = ConfigDict(allow_inf_nan=False)

    at: float = Field(ge=0)
    phases: dict[str, Annotated[float, Field(ge=0)]]
    waiting: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _waited_within_steps(self) -> ClockReading:
        within = sum(self.phases.get(phase, 0.0) for phase in STEP_PHASES)
        if self.waiting is not None and self.waiting > within + _READ_APART_SECONDS:
            raise ValueError(f"waiting {self.waiting:g} s is more than the {within:g} s of all steps")
        return self


class BatchJob(BaseModel):
    """The job that an attempt ran in, as `launch.batch_job` tells it."""

    model_config = ConfigDict(allow_inf_nan=False)

    submitted: float | None
    eligible: float | None
    began: float | None


class AttemptTime(BaseModel):
    """When an attempt began and ended, in seconds since 1970."""

    model_config = ConfigDict(allow_inf_nan=False)

    launched: float
    process_began: float
    job: BatchJob | None
    clock: ClockReading
    """At its beginning."""
    ended: float | None = None
    """When its launcher saw its last worker end; None where the launcher ended first, or is not ours."""


class AttemptRecord(BaseModel):
    """An attempt, as run.json has it from before its first step."""

    model_config = ConfigDict(strict=True)

    attempt: int = Field(ge=1)
    world_size: int = Field(ge=1)
    engine: str
    plan: str
    """The hash of its plan."""
    datasets: dict[str, DatasetPlace]
    resumed_from: str | None
    resumed_from_step: int | None = Field(ge=0, lt=1 << 62)
    resumed_from_position: int | None = Field(ge=0, lt=1 << 62)
    resumed_from_digest: str | None = Field(pattern=r"^[0-9a-f]{32}$")
    time: AttemptTime | None = None

    @model_validator(mode="after")
    def _resumed_wholly_or_not_at_all(self) -> AttemptRecord:
        whence = (self.resumed_from, self.resumed_from_step, self.resumed_from_position, self.resumed_from_digest)
        if any(part is None for part in whence) != all(part is None for part in whence):
            raise ValueError("says only in part what it was resumed from")
        return self

    @property
    def went_back_to(self) -> int:
        """The step after which it began; 0 for one that started afresh."""
        return self.resumed_from_step or 0


@dataclass(frozen=True)
class StepLine:
    """A step's line of metrics.jsonl, as far as it tells what was read. Values may be of any kind: anyone may have written."""

    line: int
    step: int
    attempt: Any
    samples: Any
    tokens: Any
    digest: Any
    streams: Any

    @property
    def place(self) -> str:
        return f"line {self.line} of {FILE_NAME}, attempt {self.attempt}"


@dataclass(frozen=True)
class History:
    """The steps from `first_step` on that no later attempt went back before, and what is wrong with them as a sequence."""

    attempts: Sequence[AttemptRecord]
    steps: Sequence[StepLine]
    """Each step's line, in order, up to the first that is missing or not the only one."""
    superseded: Sequence[StepLine]
    flaw: str | None

    @property
    def began(self) -> AttemptRecord:
        return self.attempts[0]

    @property
    def last_step(self) -> int:
        return self.steps[-1].step if self.steps else self.began.went_back_to


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """A file of a run that cannot be read is told in a line, as CorruptData where it is none. One that is missing is the
    caller's to tell."""
    try:
        yield
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise CorruptData(f"{path}: a directory, where a run writes a file; restore the file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def read_lines(run_directory: Path) -> list[StepLine]:
    """Every step's line in the order of the file. CorruptData for a line that is none; a torn last one is dropped."""
    with told_of(run_directory / FILE_NAME):
        try:
            return [
                StepLine(number, record["step"], *(record.get(key) for key in _KEYS))
                for number, record in read_step_lines(run_directory)
            ]
        except ValueError as error:
            raise CorruptData(str(error)) from None


def read_attempts(run_directory: Path) -> list[AttemptRecord]:
    """The attempts of run.json. ValueError where there is no run, CorruptData where it does not hold what a run writes."""
    path = run_directory / "run.json"
    if not path.is_file():
        raise ValueError(
            f"{run_directory}: not a run of Lockstep (no run.json); give a directory such as runs/NAME-0001"
        )
    try:
        attempts = TypeAdapter(list[AttemptRecord]).validate_python(json.loads(path.read_text())["attempts"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("attempts", *first["loc"]))
        raise CorruptData(f"{path}: {where}: {first['msg']}; restore the file") from None
    except (ValueError, RecursionError, LookupError, TypeError):
        raise CorruptData(f"{path}: not what a run writes; restore the file") from None
    if not attempts or [attempt.attempt for attempt in attempts] != list(range(1, len(attempts) + 1)):
        raise CorruptData(f"{path}: its attempts are not numbered 1, 2, ...; restore the file")
    if any(attempt.went_back_to < attempts[0].went_back_to for attempt in attempts):
        raise CorruptData(f"{path}: an attempt went back to before the run began; restore the file")
    return attempts


def history_of(attempts: Sequence[AttemptRecord], lines: Sequence[StepLine]) -> History:
    """Which lines count, and the first thing that is wrong with them."""
    limits: dict[Any, int] = {}
    """A line counts if no later attempt went back before it: up to which step, by attempt."""
    limit = 1 << 62
    for attempt in reversed(attempts):
        limits[attempt.attempt] = limit
        limit = min(limit, attempt.went_back_to)
    counting: list[StepLine] = []
    superseded: list[StepLine] = []
    flaw: str | None = None
    for line in lines:
        if type(line.attempt) is not int or line.attempt not in limits:
            flaw = flaw or f"step {line.step} ({line.place}): run.json knows no such attempt"
        elif line.step <= (begun := attempts[line.attempt - 1].went_back_to):
            flaw = flaw or f"step {line.step} ({line.place}): run.json says that the attempt began after step {begun}"
        else:
            (counting if line.step <= limits[line.attempt] else superseded).append(line)
    steps, gap = _each_step_once(counting, attempts[0].went_back_to + 1)
    return History(attempts, steps, superseded, flaw or gap)


def _each_step_once(lines: list[StepLine], first_step: int) -> tuple[list[StepLine], str | None]:
    """The lines in the order of their steps up to the first that is not there exactly once, and what that is."""
    steps: list[StepLine] = []
    for line in sorted(lines, key=lambda line: (line.step, line.line)):
        wanted = first_step + len(steps)
        if line.step < wanted:
            return steps[:-1], f"step {line.step} has two lines: {steps[-1].place}, and {line.place}"
        if line.step > wanted:
            missing = f"step {wanted} has" if line.step == wanted + 1 else f"steps {wanted} to {line.step - 1} have"
            return steps, f"{missing} no line: next is step {line.step}, {line.place}"
        steps.append(line)
    return steps, None

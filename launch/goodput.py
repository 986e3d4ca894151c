"""Where every second of a run went, over all its attempts: computed from `metrics.jsonl` and `run.json`. Imports no torch.

Within an attempt each second is of one phase of rank 0's training thread (`launch.clock`); between two attempts it was
spent in a queue or in nobody's hands. What an attempt did after the step that a later one went back to was done for nothing.
The rows of an account add up to its time by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.errors import CorruptData
from launch.clock import STEP_PHASES
from launch.history import AttemptRecord, AttemptTime, ClockReading, read_attempts
from launch.tables import format_table
from launch.tracking.metrics_file import END_KEY, FILE_NAME, read_all_lines

ROWS = {
    "start": "start",
    "data": "data",
    "compute": "compute",
    "communication": "communication",
    "save": "save",
    "evaluate": "evaluate",
    "lost": "lost",
    "end": "end",
    "queue": "queue",
    "between": "between",
    "other": "other",
}
"""What a second can have been spent on, and its name in a table."""
MEANING = {
    "start": "from the launcher's or the job's first line to the first step: imports, world, data, model, dry run, checkpoint",
    "data": "steps waited for their batch",
    "compute": "steps, without what they waited for",
    "communication": "rank 0 waited for other ranks within steps, with nothing to do meanwhile",
    "save": "training waited for a checkpoint",
    "evaluate": "evaluations",
    "lost": "steps that a later attempt did again, and what an attempt was in when it died",
    "end": "after the last step and save: the summary, trackers, the workers' end",
    "queue": "a job was submitted and had not begun",
    "between": "no attempt ran and none was queued, or one ended before it was on record",
    "other": "the wall clock went on and the process did not: the machine slept, or its clock was set",
}
_PRODUCTIVE = ("data", "compute", "communication")
_START_PHASES = ("start", "load")
# The wall clock is steered by up to this much of the time, and read a little beside the other one.
_STEERED = 1e-3


@dataclass
class AttemptAccount:
    """seconds: by the keys of `ROWS`; what came between this attempt and the one before is among them."""

    attempt: int
    began: float
    """When it was launched, or its time in the queue began: seconds since 1970."""
    ended: float
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ROWS, 0.0))
    lost_steps: int = 0


@dataclass(frozen=True)
class Account:
    """A run's time. notes: what a reader must know of it, in sentences."""

    attempts: Sequence[AttemptAccount]
    notes: Sequence[str]

    @property
    def seconds(self) -> dict[str, float]:
        """By the keys of `ROWS`, over all attempts."""
        return {row: sum(attempt.seconds[row] for attempt in self.attempts) for row in ROWS}

    @property
    def total(self) -> float:
        """From the launch of the first attempt, or its submission, to the last sign of life."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time that was spent in steps which counted."""
        return sum(self.seconds[row] for row in _PRODUCTIVE) / self.total if self.total > 0 else 0.0


@dataclass
class _Readings:
    """Of an attempt: its clock at the last line of a step that no later attempt did again, and at its last line of all."""

    kept: ClockReading
    last: ClockReading
    last_step: int
    said_farewell: bool = False


def account_of(run_directory: Path) -> Account:
    """Raises ValueError where there is no run, CorruptData where its files are not what a run writes."""
    attempts = read_attempts(run_directory)
    times = {attempt.attempt: attempt.time for attempt in attempts if attempt.time is not None}
    if len(times) < len(attempts):
        raise CorruptData(f"{run_directory / 'run.json'}: an attempt has no `time`; restore the file")
    readings = _read_clocks(run_directory, attempts, {number: time.clock for number, time in times.items()})
    kept_until = _kept_until(attempts)
    accounts: list[AttemptAccount] = []
    notes: list[str] = []
    kept_until = _kept_until(attempts)
    for attempt in attempts:
        number = attempt.attempt
        time, reading = times[number], readings[number]
        account = AttemptAccount(number, time.launched, reading.last.at)
        account.lost_steps = max(0, reading.last_step - max(kept_until[number], attempt.went_back_to))
        _add_phases(account, reading)
        _add_clock_difference(account, time, reading.last, notes)
        _add_end(account, time, reading)
        _add_wait(account, time, accounts[-1] if accounts else None, notes)
        accounts.append(account)
    if any(attempt.world_size > 1 and readings[attempt.attempt].last.waiting is None for attempt in attempts):
        notes.append(
            "Exposed communication of several ranks is within compute where it cannot be told apart: a thread that drives a GPU "
            "waits for its kernels and for other ranks alike."
        )
    return Account(accounts, notes)


def show_goodput(run_directory: Path) -> str:
    """The account as a table, a line an attempt, and what the names in it mean."""
    account = account_of(run_directory)
    shown = [row for row, seconds in account.seconds.items() if seconds > 0 or row == "lost"]
    rows = [["attempt", *(ROWS[row] for row in shown), "all"], *table_of(account, shown)]
    rows.append(["share", *(format_share(account.seconds[row], account.total) for row in shown), "100.0%"])
    meanings = [[ROWS[row], MEANING[row]] for row in shown]
    lost = sum(attempt.lost_steps for attempt in account.attempts)
    again = f"; {lost} step{'s were' if lost > 1 else ' was'} done again" if lost else ""
    total = format_seconds(account.total, account.total)
    goodput = f"goodput {account.goodput:.1%}: that share of {total} s was spent in steps that counted"
    return "\n".join(
        [f"seconds of {run_directory}{again}", format_table(rows), "", format_table(meanings), *account.notes, goodput]
    )


def table_of(account: Account, shown: Sequence[str]) -> list[list[str]]:
    """A line for each attempt, and one for all: its name, the seconds of each row that is shown, and their sum."""
    parts = [(str(attempt.attempt), attempt.seconds) for attempt in account.attempts]
    if len(parts) > 1:
        parts.append(("all", account.seconds))
    return [
        [name, *(format_seconds(s, account.total) for s in (*(seconds[row] for row in shown), sum(seconds.values())))]
        for name, seconds in parts
    ]


def format_seconds(seconds: float, total: float) -> str:
    """With as many digits as all parts of `total` are told with."""
    return f"{seconds:,.{2 if total < 100 else 1 if total < 10_000 else 0}f}"


def format_share(seconds: float, total: float) -> str:
    return f"{seconds / total:.1%}" if total > 0 else "-"


def _kept_until(attempts: Sequence[AttemptRecord]) -> dict[int, int]:
    """Up to which step the work of each attempt was kept by all later ones. Where one began afresh not even the evaluation
    before the first step was."""
    limits: dict[int, int] = {}
    limit = 1 << 62
    for attempt in reversed(attempts):
        limits[attempt.attempt] = limit
        limit = min(limit, -1 if attempt.resumed_from is None else attempt.went_back_to)
    return limits


def _read_clocks(
    run_directory: Path, attempts: Sequence[AttemptRecord], begun: dict[int, ClockReading]
) -> dict[int, _Readings]:
    """The clock of each attempt's lines. An attempt without a line has that of its beginning."""
    kept_until = _kept_until(attempts)
    readings = {a.attempt: _Readings(begun[a.attempt], begun[a.attempt], a.went_back_to) for a in attempts}
    for number, record in _lines(run_directory):
        reading, attempt = _reading(record, f"{run_directory / FILE_NAME}: line {number}"), record.get("attempt")
        if attempt not in readings:
            raise CorruptData(
                f"{run_directory / FILE_NAME}: line {number}: run.json knows no attempt {attempt}; restore it"
            )
        of_attempt = readings[attempt]
        of_attempt.last, of_attempt.last_step, of_attempt.said_farewell = reading, record["step"], END_KEY in record
        if record["step"] <= kept_until[attempt]:
            of_attempt.kept = reading
    return readings


def _lines(run_directory: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line with its number. CorruptData for one that is none; a torn last one is dropped."""
    try:
        yield from read_all_lines(run_directory)
    except ValueError as error:
        raise CorruptData(str(error)) from None


def _reading(record: dict[str, Any], place: str) -> ClockReading:
    try:
        return ClockReading.model_validate(record.get("clock"))
    except ValidationError as error:
        raise CorruptData(f"{place}: clock: {error.errors()[0]['msg']}; restore the file") from None


def _add_phases(account: AttemptAccount, readings: _Readings) -> None:
    """What rank 0 did, up to its last word. Of what was not kept only the start was no work."""
    kept, last = readings.kept, readings.last
    waiting = kept.waiting or 0.0
    for phase, seconds in kept.phases.items():
        account.seconds[_row(phase)] += seconds
    account.seconds["communication"] += waiting
    account.seconds["compute"] -= waiting
    for phase, seconds in last.phases.items():
        row = "start" if phase in _START_PHASES else "lost"
        account.seconds[row] += seconds - kept.phases.get(phase, 0.0)


def _row(phase: str) -> str:
    if phase in _START_PHASES:
        return "start"
    if phase in STEP_PHASES:
        return "compute"
    return "save" if phase.startswith("save") else phase


def _add_clock_difference(account: AttemptAccount, time: AttemptTime, last: ClockReading, notes: list[str]) -> None:
    """The wall clock may have gone on where the process did not; where it was set back, the other one is believed."""
    by_wall = last.at - time.launched
    difference = by_wall - sum(last.phases.values())
    if difference > 0:
        account.seconds["other"] += difference
    elif -difference > _STEERED * max(1.0, by_wall):
        notes.append(
            f"The wall clock was set back by {-difference:.2f} s during attempt {account.attempt}; "
            "its time is that of the monotonic clock."
        )


def _add_end(account: AttemptAccount, time: AttemptTime, reading: _Readings) -> None:
    """From rank 0's last word to the end that the launcher saw. Where that word was not its farewell, it hung, or was in a step
    that never came to its end."""
    if time.ended is not None and time.ended > account.ended:
        account.seconds["end" if reading.said_farewell else "lost"] += time.ended - account.ended
        account.ended = time.ended


def _add_wait(account: AttemptAccount, time: AttemptTime, before: AttemptAccount | None, notes: list[str]) -> None:
    """What came before the launch: since the end of the attempt before, or since the job was submitted."""
    job = time.job
    free = before.ended if before is not None else float("-inf")
    if time.launched < free <= time.process_began:
        # One launcher began both: what it did before the end of the first is accounted for already.
        account.seconds["start"] -= time.process_began - time.launched
        account.began = time.process_began
    if job is not None and job.began is not None and free <= job.began <= account.began:
        account.seconds["start"] += account.began - job.began
        submitted = job.began if job.submitted is None else min(job.submitted, job.began)
        queued_from = max(free, submitted)
        account.seconds["queue"] += job.began - queued_from
        account.began = queued_from
    if before is None:
        return
    between = account.began - before.ended
    account.seconds["between"] += max(0.0, between)
    if -between > _STEERED:
        notes.append(
            f"By the wall clock attempt {account.attempt} began {-between:.2f} s before the end of the one before: "
            "it was set back, or that attempt ran on; nothing is counted between the two."
        )

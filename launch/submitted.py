"""The runs that were submitted, and the jobs that have taken them up. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.run_directory import RUNS

FOLDER = "slurm"
RECORD_FILE = "submission.json"
JOBS_FILE = "jobs.txt"
LIST_OF_SUBMITTED = RUNS / "submitted.txt"
"""What was submitted from here, a line `DIRECTORY<tab>JOB` each."""


@dataclass(frozen=True)
class SubmittedRun:
    """A run that was submitted, alone or as a row of a sweep."""

    directory: Path
    jobs: tuple[str, ...]
    """As JOB or ARRAY_TASK: the one that was submitted, and those that took the run up or are to do so, the last at the end."""

    @property
    def job(self) -> str:
        return self.jobs[-1]


def was_submitted(directory: Path) -> bool:
    return (directory / FOLDER / RECORD_FILE).is_file()


def remember(directory: Path, job: str) -> None:
    """Puts a submission on the list of this place."""
    RUNS.mkdir(exist_ok=True)
    with LIST_OF_SUBMITTED.open("a", encoding="utf-8") as file:
        file.write(f"{directory}\t{job}\n")


def submitted_from_here() -> dict[Path, str]:
    """The directories, whether they are still there or not, and the jobs that were submitted for them."""
    if not LIST_OF_SUBMITTED.exists():
        return {}
    lines = LIST_OF_SUBMITTED.read_text(encoding="utf-8").splitlines()
    return {Path(directory): job for directory, _, job in (line.partition("\t") for line in lines)}


def runs_of(directory: Path) -> list[SubmittedRun]:
    """The runs of a submission: one, or one for each row of a sweep."""
    record = json.loads((directory / FOLDER / RECORD_FILE).read_text())
    if record["rows"] is None:
        return [_run(directory, record["job"])]
    return [_run(directory / name, f"{record['job']}_{n}") for n, name in enumerate(record["rows"], start=1)]


def last_jobs(job: str) -> list[str]:
    """The jobs that end once what was begun with `job` is done: itself, or, where it is a link of a chain, or was followed by
    another one of the same run, the last one; of a sweep the array and whatever goes on for one of its rows."""
    for directory in filter(was_submitted, submitted_from_here()):
        runs = runs_of(directory)
        for run in runs:
            if job in run.jobs:
                return [run.job]
        array = f"{job}_"
        if any(run.jobs[0].startswith(array) for run in runs):
            return [job, *(run.job for run in runs if not run.job.startswith(array))]
    return [job]


def _run(directory: Path, first: str) -> SubmittedRun:
    path = directory / FOLDER / JOBS_FILE
    later: Sequence[str] = path.read_text().split() if path.exists() else ()
    return SubmittedRun(directory, (first, *later))

"""`lockstep jobs`: how the submitted runs are doing, from their own files and, where it is there, Slurm. Imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.exit_codes import DO_NOT_RESTART, DONE, STOPPED_EARLY, USAGE
from launch.recipe import parse_yaml
from launch.run_directory import OUTCOME_FILE
from launch.slurm import NoAnswer, QueuedJob, find_jobs
from launch.submit_script import format_duration
from launch.submitted import FOLDER, RECORD_FILE, SubmittedRun, runs_of, submitted_from_here, was_submitted
from launch.tables import format_table
from launch.tracking.metrics_file import read_last_step

_HEADINGS = ("job", "run", "state", "step", "loss", "items/s", "left", "limit in", "why")
_ENDED = {DONE: "done", STOPPED_EARLY: "stopped", USAGE: "refused", DO_NOT_RESTART: "given up"}
# What Slurm says of a job that it has ended: why the run ended is in the run's own words.
_OVER = ("COMPLETED", "FAILED")


def show_jobs(directories: Sequence[Path]) -> int:
    """Prints a line for each run, the newest last. Raises ValueError for a directory that was never submitted."""
    gone: dict[Path, str] = {}
    if directories:
        for directory in directories:
            if not was_submitted(directory):
                raise ValueError(f"{directory}: was not submitted by `lockstep submit` (no {FOLDER}/{RECORD_FILE})")
    else:
        submitted = submitted_from_here()
        directories = [directory for directory in submitted if was_submitted(directory)]
        gone = {directory: job for directory, job in submitted.items() if job and not was_submitted(directory)}
    runs = [run for directory in directories for run in runs_of(directory)]
    if not runs and not gone:
        print("no run was submitted from here; `lockstep submit RECIPE ...` submits one")
        return DONE
    try:
        known = find_jobs([*(run.job for run in runs), *gone.values()])
    except NoAnswer as error:
        print(f"lockstep: warning: {error}; runs are shown as their own files say", file=sys.stderr)
        known = {}
    rows = [_row(run, known.get(run.job)) for run in runs]
    rows += [row for directory, job in gone.items() for row in _rows_of_gone(directory, job, known)]
    print(format_table([_HEADINGS, *rows]))
    return DONE


def _rows_of_gone(directory: Path, submitted: str, known: Mapping[str, QueuedJob]) -> list[tuple[str, ...]]:
    """What Slurm still knows of the jobs of a run whose directory is not there any more."""
    return [
        (name, _short(directory), _state(job, {}), "", "", "", "", job.time_left or "", "its directory is gone")
        for name, job in known.items()
        if name == submitted or name.startswith(f"{submitted}_")
    ]


def _row(run: SubmittedRun, job: QueuedJob | None) -> tuple[str, ...]:
    outcome = _read_json(run.directory / OUTCOME_FILE)
    last = read_last_step(run.directory) or {}
    steps = _steps(run.directory)
    step = last.get("step")
    left = ""
    if job is not None and job.time_left is not None and steps and step is not None:
        left = format_duration((steps - step) * last.get("step_seconds", 0.0))
    why = (job.reason if job else None) or (
        outcome.get("reason", "") if _state(job, outcome) in _ENDED.values() else ""
    )
    return (
        run.job,
        _short(run.directory),
        _state(job, outcome),
        "" if step is None else f"{step}/{steps}" if steps else str(step),
        _number(last.get("loss"), "{:.4f}"),
        _number(last.get("items_per_second"), "{:,.0f}"),
        left,
        (job.time_left if job else None) or "",
        why,
    )


def _state(job: QueuedJob | None, outcome: dict[str, Any]) -> str:
    """Slurm's word while the job is in its hands; then, or where nobody knows the job any more, the run's own."""
    ended = _ENDED.get(outcome["exit_code"], "failed") if outcome else None
    if job is not None and not (job.state in _OVER and ended):
        return job.state.lower().replace("_", " ")
    return ended or "unknown"


def _steps(directory: Path) -> int | None:
    """How many steps the run has, once it has begun."""
    path = directory / "recipe.yaml"
    if not path.exists():
        return None
    steps: int = parse_yaml(path.read_text(encoding="utf-8"), str(path))["run"]["steps"]
    return steps


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def _short(directory: Path) -> str:
    return str(directory.relative_to(Path.cwd())) if directory.is_relative_to(Path.cwd()) else str(directory)


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else ""

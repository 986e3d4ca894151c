"""Slurm's own commands, and what they answer. Imports no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.submit_script import parse_time

_REASON = re.compile(r"(?:sbatch: )?(?:error: |fatal: |allocation failure: )*(?:Batch job submission failed: )?(.*)")
# Slurm's own commands try for some seconds, or where they find no configuration for a minute.
_ANSWER_SECONDS = 90.0


class NoAnswer(ValueError):
    """Slurm does not say anything: that a job is not known is an answer."""


@dataclass(frozen=True)
class QueuedJob:
    """A job, or a task of an array, as Slurm knows it."""

    state: str
    time_left: str | None = None
    """Until its time limit, as Slurm writes it; None where it does not run."""
    reason: str | None = None
    """Why it waits."""


def is_there() -> bool:
    """Whether jobs can be submitted from this host."""
    return shutil.which("sbatch") is not None


def refuse_impossible(script: str, options: Sequence[str], directory: Path, time: str) -> str:
    """Asks Slurm whether it could run this batch script, of this time limit, and submits nothing: its own line on where and
    when. Raises ValueError with Slurm's own reason where it never could."""
    done = _run(["sbatch", "--test-only", *options], stdin=script, cwd=directory)
    if done.returncode:
        _refuse_silence(done)
        raise ValueError(f"the cluster cannot run this job: {_reason(done.stderr)}")
    lines = done.stderr.strip().splitlines()
    told = lines[-1].removeprefix("sbatch: ") if lines else ""
    if match := re.search(r"in partition (\S+)", told):
        _refuse_too_long(match[1], time)
    return told


def submit(script: Path, options: Sequence[str], directory: Path) -> str:
    """Submits a batch script; the job's id. Raises ValueError with Slurm's own reason."""
    try:
        done = _run(command_line(script, options), cwd=directory)
    except NoAnswer as error:
        raise NoAnswer(
            f"{error} Look with squeue whether it took the job, whose files are removed, and scancel it"
        ) from None
    if done.returncode:
        _refuse_silence(done)
        raise ValueError(f"sbatch: {_reason(done.stderr)}")
    return done.stdout.strip().partition(";")[0]  # ID;CLUSTER


def command_line(script: Path, options: Sequence[str]) -> list[str]:
    return ["sbatch", "--parsable", *options, str(script)]


def find_jobs(jobs: Sequence[str]) -> dict[str, QueuedJob]:
    """What Slurm knows of these jobs and of the tasks of those that are arrays, by id (JOB or ARRAY_TASK). What neither
    squeue nor sacct knows any more is not among them, nor is anything where there is no Slurm. Raises NoAnswer."""
    found: dict[str, QueuedJob] = {}
    if not jobs or shutil.which("squeue") is None:
        return found
    wanted = ",".join(sorted({job.partition("_")[0] for job in jobs}, key=int))
    done = _run(
        ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%L|%r", f"--jobs={wanted}"],
    )
    # It says so where it knows none of them, and nothing of those that it does not know where it knows others.
    if done.returncode and "Invalid job id" not in done.stderr:
        raise NoAnswer(f"squeue: {_reason(done.stderr)}")
    for line in done.stdout.splitlines():
        name, state, left, reason = line.split("|", 3)
        running = state in ("RUNNING", "COMPLETING", "SUSPENDED")
        found[name] = QueuedJob(state, left if running else None, reason if state == "PENDING" else None)
    for line in _ask_accounting(wanted):
        name, _, state = line.partition("|")
        # What the queue says is newer.
        found.setdefault(name, QueuedJob(state.split()[0]))  # CANCELLED by UID
    return found


def _ask_accounting(jobs: str) -> list[str]:
    """JOB|STATE of each job; nothing where a site has no accounting, which sacct calls a failure."""
    if shutil.which("sacct") is None:
        return []
    try:
        done = _run(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={jobs}"])
    except NoAnswer as error:
        print(f"lockstep: warning: {error}; jobs that the queue has forgotten are not known", file=sys.stderr)
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _refuse_too_long(partition: str, time: str) -> None:
    """A job that is too long for its partition is accepted at most sites, and then waits for ever."""
    done = _run(["sinfo", "--noheader", f"--partition={partition}", "--format=%l"])
    if done.returncode:
        raise NoAnswer(f"sinfo: {_reason(done.stderr)}")
    longest = done.stdout.split()
    if longest and re.fullmatch(r"[\d:-]+", longest[0]) and parse_time(time) > parse_time(longest[0]):
        raise ValueError(
            f"the cluster cannot run this job: --time {time}: partition {partition} gives at most {longest[0]}"
        )


def _refuse_silence(done: subprocess.CompletedProcess[str]) -> None:
    """Raises NoAnswer where sbatch has failed because it reached nobody."""
    if "Unable to contact" in done.stderr or "Socket timed out" in done.stderr or "fatal:" in done.stderr:
        raise NoAnswer(f"sbatch: {_reason(done.stderr)}")


def _reason(text: str) -> str:
    """The one line of a command's complaint that says why; the last."""
    lines = [line for line in text.splitlines() if line.strip()]
    match = _REASON.match(lines[-1] if lines else "it gives no reason")
    assert match is not None
    return match[1]


def _run(command: Sequence[str], stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Raises NoAnswer where the command does not end."""
    try:
        return subprocess.run(
            command, input=stdin, cwd=cwd, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(
            f"{command[0]}: no answer in {_ANSWER_SECONDS:.0f} seconds; is the cluster's controller up?"
        ) from None

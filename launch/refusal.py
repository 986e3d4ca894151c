"""A run that was refused before it began, on record for the job script that started it. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data.errors import CorruptData
from distrib.manifest import write_durably
from launch.exit_codes import USAGE
from launch.run_directory import OUTCOME_FILE, read_identity


def leave_refusal(directory: Path | None, reason: str) -> None:
    """Says in outcome.json that a worker ends with 2: torchrun makes a 1 of it, which would be tried again and again. Nothing
    is made or altered where no run is, where one goes on, and where one has said how it ended."""
    if directory is None or not ((directory / "run.json").exists() or (directory / "slurm").is_dir()):
        return
    outcome = directory / OUTCOME_FILE
    try:
        with (directory / "run.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not outcome.exists():
                told = {
                    "exit_code": USAGE,
                    "reason": reason,
                    "step": 0,
                    "attempt": _attempts(directory),
                    "seconds": 0.0,
                    "pid": os.getpid(),
                }
                write_durably(outcome, json.dumps(told, indent=2).encode() + b"\n")
    except BlockingIOError:
        return  # a run goes on there, or another worker is telling the same
    except OSError as error:
        print(f"lockstep: warning: {outcome}: cannot be written ({error.strerror})", file=sys.stderr)


def directory_in(overrides: Sequence[str]) -> Path | None:
    """The run's directory as `run.directory=DIR` names it, for where the recipe cannot be read."""
    named = [text for key, _, text in (override.partition("=") for override in overrides) if key == "run.directory"]
    return Path(named[-1]) if named else None


def _attempts(directory: Path) -> int:
    try:
        return len(read_identity(directory)["attempts"])
    except (FileNotFoundError, CorruptData):
        return 0

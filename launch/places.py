"""Where the datasets of a run lie. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.plan import Plan
from launch.history import AttemptRecord


def dataset_directories(
    run_directory: Path, attempts: Sequence[AttemptRecord], plan: Plan, given: Sequence[str]
) -> dict[str, str]:
    """The directory of each of the plan's streams: where the newest attempt that read it did, or where `given`, each
    DIR or STREAM=DIR, say. ValueError where one is not there, or is not of the run."""
    names = [stream.name for stream in plan.streams]
    recorded = {name: place for attempt in attempts for name, place in attempt.datasets.items()}
    directories = {name: recorded[name].directory for name in names if name in recorded}
    for text in given:
        name, _, directory = text.rpartition("=")
        if name not in names:
            raise ValueError(f"--dataset {text}: the run's streams are {', '.join(names) or 'one without a name'}")
        directories[name] = directory
    for name, directory in directories.items():
        if not Path(directory).is_dir():
            stream = f"{name}=" if name else ""
            raise ValueError(
                f"{directory}: the dataset of {run_directory} is not there; name its place with --dataset {stream}DIR"
            )
    return directories

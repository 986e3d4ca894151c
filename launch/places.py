"""Where the datasets of a run lie. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.addresses import is_remote, parse_address
from data.plan import Plan
from launch.history import AttemptRecord


def dataset_places(
    run_directory: Path, attempts: Sequence[AttemptRecord], plan: Plan, given: Sequence[str]
) -> dict[str, Path | str]:
    """Where each of the plan's streams lies: where the newest attempt that read it found it, or as `given` says."""
    recorded = {name: place.directory for attempt in attempts for name, place in attempt.datasets.items()}
    known = {stream.name: recorded[stream.name] for stream in plan.streams if stream.name in recorded}
    return present_places(run_directory, known, given)


def present_places(run_directory: Path, known: Mapping[str, str], given: Sequence[str]) -> dict[str, Path | str]:
    """The place of each stream: as it is `known`, or as `given` says, each PLACE or STREAM=PLACE.

    ValueError where a directory is not there, where a stream is none of the run's, or where no place is known.
    """
    places = {name: parse_address(place) for name, place in known.items()}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or "/" in name:  # the equals sign is of a path
            name, place = "", text
        if known and name not in known:
            raise ValueError(f"--dataset {text}: the run's streams are {', '.join(known) or 'one without a name'}")
        places[name] = parse_address(place)
    if not places:
        raise ValueError(f"{run_directory}: does not say which dataset it was trained on; name it with --dataset")
    for address in places.values():
        if not is_remote(address) and not os.path.isdir(address):
            raise ValueError(f"{address}: the dataset of {run_directory} is not there; name its place with --dataset")
    return places

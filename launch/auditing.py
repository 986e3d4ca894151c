"""`lockstep data audit`: whether a run read what its plan says, proved from its log, its plan and the shards.

The log holds a digest a step, chained over what went through forward. Here the same chain is made again from the plan and
the shards, and both are compared. Imports no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.audit import AuditedData, Auditor, Reading, open_audited, position_after, refuse_streamed, stretches
from data.errors import CorruptData
from data.parallel import each
from data.plan import Plan
from data.samples import Dataset
from distrib.manifest import BadCheckpoint, published_checkpoints, read_manifest
from launch.audit_attempts import (
    before_the_line,
    before_the_run,
    foreign_plan,
    plans_of_attempts,
    repeated_lines,
    wrong_attempts,
)
from launch.audit_lines import Before, Fault, Steps, Streams, wrong_line
from launch.config import RunConfig
from launch.exit_codes import DO_NOT_RESTART, DONE, STOPPED_EARLY
from launch.history import History, StepLine, history_of, read_attempts, read_lines, told_of
from launch.places import dataset_places
from launch.planning import read_plan
from launch.recipe import recipe_of_run
from launch.run_directory import OUTCOME_FILE
from launch.tables import Bar, format_table
from launch.tracking.metrics_file import FILE_NAME

# A process takes as long to begin as so many jobs take.
_JOBS_A_WORKER = 16
_MOST_SAMPLES = 1 << 62

Counts = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Told:
    """What a run says of itself, all of it read before any of it is judged."""

    outcome: Mapping[str, Any] | None
    """How its last attempt ended; None while one goes on, or where it was killed."""
    checkpoints: Mapping[str, Mapping[str, Any]]
    history: History
    plan: Plan
    config: RunConfig


def audit_run(run_directory: Path, datasets: Sequence[str], workers: int) -> int:
    """Prints a line for each attempt and the verdict. Returns an exit code; ValueError where there is nothing to audit."""
    try:
        told = read_told(run_directory)
        print(describe_attempts(told.history))
        verdict, proven = _judge(run_directory, told, datasets, workers)
    except (CorruptData, BadCheckpoint) as error:
        verdict, proven = f"not proven: {error}", False
    print(verdict)
    return DONE if proven else DO_NOT_RESTART


def read_told(run_directory: Path) -> Told:
    """Everything that a run's directory says, in an order in which a run that goes on meanwhile contradicts nothing."""
    config = recipe_of_run(run_directory)
    # What a run writes later is read earlier: a checkpoint has its step's line, a line its plan, a plan its attempt.
    outcome = _read_outcome(run_directory)
    checkpoints = _read_checkpoints(run_directory)
    lines = read_lines(run_directory)
    plan = read_plan(run_directory)
    refuse_streamed(plan, str(run_directory))
    attempts = read_attempts(run_directory)
    return Told(outcome, checkpoints, history_of(attempts, lines), plan, config)


def _read_outcome(run_directory: Path) -> Mapping[str, Any] | None:
    path = run_directory / OUTCOME_FILE
    try:
        with told_of(path):
            outcome = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (JSONDecodeError, UnicodeDecodeError, RecursionError):
        outcome = None
    if not isinstance(outcome, dict) or not all(type(outcome.get(k)) is int for k in ("exit_code", "step", "attempt")):
        raise CorruptData(f"{path}: not what a run writes; restore the file")
    return outcome


def _read_checkpoints(run_directory: Path) -> dict[str, Mapping[str, Any]]:
    manifests: dict[str, Mapping[str, Any]] = {}
    for path in published_checkpoints(run_directory / "checkpoints"):
        try:
            with told_of(path):
                manifests[path.name] = read_manifest(path)
        except BadCheckpoint:
            if path.exists():  # else the run has retired it meanwhile
                raise
    return manifests


def _judge(run_directory: Path, told: Told, datasets: Sequence[str], workers: int) -> tuple[str, bool]:
    """The verdict in a line, and whether it is that all is proven."""
    history, plan = told.history, told.plan
    if (fault := foreign_plan(history, plan)) is not None:
        return f"not proven: {fault.text}", False
    if not history.steps and history.flaw is None:
        if beyond := [fault for fault in _wrong_marks(told) if fault.step > history.last_step]:
            return f"not proven: no step is in {FILE_NAME}: {beyond[0].text}", False
        raise ValueError(f"{run_directory}: no step is in its log yet; train it further")
    data = AuditedData(
        plan,
        dataset_places(run_directory, history.attempts, plan, datasets),
        told.config.data,
        history.began.resumed_from_position or 0,
        position_after(plan, history.last_step),
    )
    if data.stop_position >= _MOST_SAMPLES:
        return "not proven: plan.json: its steps have more samples than there can be", False
    opened = open_audited(plan, data.places, data.config)
    begun = time.monotonic()
    counting, counts = _read_again(data, opened, workers)
    faults, unproven = _repeated(told, data, opened, workers)
    seconds = time.monotonic() - begun
    phrases, more = _how_often(data, opened, counts)
    before = before_the_run(history, plan)
    faults += [*more, *_wrong_lines(told, history.steps, data, opened, counting, before), *_wrong_marks(told)]
    if history.flaw is not None:
        faults.append(Fault(history.last_step + 1, history.flaw))
    if faults:
        first = min(faults, key=lambda fault: fault.step)
        return f"not proven: {first.text}", False
    samples = data.stop_position - data.start_position
    parts = [
        f"proven: steps {history.began.went_back_to + 1} to {history.last_step} read {samples:,} samples as planned",
        *phrases,
        *unproven,
        f"{samples / max(seconds, 1e-9):,.0f} samples/s",
    ]
    if history.began.resumed_from is not None:
        parts.insert(1, f"from the digest of {history.began.resumed_from} on, which it began from")
    if told.outcome is None:
        parts.insert(1, "so far: its last attempt goes on, or was killed")
    return "; ".join(parts), True


def _repeated(
    told: Told, data: AuditedData, opened: Mapping[str, Dataset], workers: int
) -> tuple[list[Fault], list[str]]:
    """What is wrong with the attempts and with the lines of steps that a later attempt repeated, and a phrase for each
    attempt whose repeated lines cannot be proven, because it had a plan that is not there any more."""
    history = told.history
    plans = plans_of_attempts(history.attempts, told.plan)
    if (faults := wrong_attempts(history, plans, told.plan)) or history.flaw is not None:
        return faults, []
    unproven = []
    for attempt, lines in repeated_lines(history).items():
        if (plan := plans.get(attempt)) is None:
            unproven.append(
                f"{len(lines)} repeated lines of attempt {attempt} were of a plan that is not there any more"
            )
            continue
        start = position_after(plan, lines[0].step - 1)
        part = replace(data, plan=plan, start_position=start, stop_position=position_after(plan, lines[-1].step))
        steps, _ = _read_again(part, opened, workers)
        faults += _wrong_lines(told, lines, part, opened, steps, before_the_line(history, plan, lines[0]))
    return faults, unproven


def _wrong_lines(
    told: Told,
    lines: Sequence[StepLine],
    data: AuditedData,
    opened: Mapping[str, Dataset],
    steps: Steps,
    before: Before,
) -> list[Fault]:
    plans = plans_of_attempts(told.history.attempts, told.plan)
    streams = Streams(
        data.plan,
        [opened[stream.name].samples if stream.name in opened else None for stream in data.plan.streams],
        frozenset(attempt for attempt, plan in plans.items() if len(plan.streams) > 1),
    )
    counts_targets = told.config.task.kind == "language_modelling"
    fault = wrong_line(lines, steps, before, streams, counts_targets=counts_targets)
    return [] if fault is None else [fault]


def _read_again(data: AuditedData, opened: Mapping[str, Dataset], workers: int) -> tuple[Steps, dict[int, Counts]]:
    """What each step must have read, and how often each sample (samples,) of each of the plan's streams was read by them."""
    steps = Steps([data.start_position], [], [], [], {})
    counts = {
        number: np.zeros(opened[stream.name].samples, dtype=np.uint32)
        for number, stream in enumerate(data.plan.streams)
        if stream.name in opened
    }
    largest = max(dataset.sample_bytes for dataset in opened.values())
    jobs = list(stretches(data.plan, data.start_position, data.stop_position, largest))
    with Bar("reading again", data.stop_position - data.start_position) as bar:
        for reading in each(Auditor, data, jobs, workers=max(1, min(workers, len(jobs) // _JOBS_A_WORKER))):
            _take(steps, reading)
            for stream, (ids, times) in reading.seen.items():
                counts[stream][ids] += times.astype(np.uint32)
            bar.advance(sum(reading.sizes))
    return steps, counts


def _take(steps: Steps, reading: Reading) -> None:
    for number, reason in reading.unreadable.items():
        steps.unreadable[len(steps.folds) + number] = reason
    for size in reading.sizes:
        steps.positions.append(steps.positions[-1] + size)
    steps.folds.extend(reading.folds)
    steps.targets.extend(reading.targets)
    steps.stream_samples.extend(reading.stream_samples)


def _wrong_marks(told: Told) -> list[Fault]:
    """Checkpoints and the outcome that do not agree with the lines."""
    history = told.history
    by_step = {line.step: line for line in history.steps}
    others = {(line.step, line.digest, line.samples) for line in history.superseded}
    faults = []
    for name, manifest in told.checkpoints.items():
        found = manifest.get("step"), manifest.get("digest"), manifest.get("position")
        line = by_step.get(manifest["step"])
        if line is not None and (line.step, line.digest, line.samples) == found:
            if (wrong := _wrong_checkpoint(told, line, manifest)) is not None:
                faults.append(Fault(line.step, f"checkpoint {name}: {wrong}"))
        elif found not in others and not (history.flaw and line is None):
            text = "no line" if line is None else f"{line.place} has {line.digest} at {line.samples}"
            faults.append(
                Fault(manifest["step"], f"checkpoint {name} has digest {found[1]} at position {found[2]}, but {text}")
            )
    outcome, ended = told.outcome, (len(history.attempts), history.last_step)
    if outcome is not None and outcome["exit_code"] in (DONE, STOPPED_EARLY) and history.flaw is None:
        said = (outcome["attempt"], outcome["step"])
        if said != ended:
            text = f"says that attempt {said[0]} ended after step {said[1]}; the log ends with step {ended[1]} of {ended[0]}"
            faults.append(Fault(history.last_step + 1, f"{OUTCOME_FILE}: {text}"))
    return faults


def _wrong_checkpoint(told: Told, line: StepLine, manifest: Mapping[str, Any]) -> str | None:
    """Why a checkpoint whose digest is that of the line was yet not saved by the line's attempt."""
    attempt = told.history.attempts[line.attempt - 1]
    if (manifest.get("world"), manifest.get("engine")) != (attempt.world_size, attempt.engine):
        return (
            f"saved by {manifest.get('world')} workers of {manifest.get('engine')}, but attempt {attempt.attempt} had "
            f"{attempt.world_size} of {attempt.engine}"
        )
    segments = told.plan.segments
    if manifest.get("plan") not in {Plan.of(segments[:count]).hash for count in range(1, len(segments) + 1)}:
        return "was trained by another plan than plan.json"
    return None


def _how_often(
    data: AuditedData, opened: Mapping[str, Dataset], counts: Mapping[int, Counts]
) -> tuple[list[str], list[Fault]]:
    """How often the samples of each stream were read, a phrase each; and a fault where that is not what epochs are."""
    before, after = data.plan.consumed(data.start_position), data.plan.consumed(data.stop_position)
    phrases, faults = [], []
    for number, times in counts.items():
        stream = data.plan.streams[number]
        samples, named = opened[stream.name].samples, f"stream {stream.name}: " if stream.name else ""
        low, high = int(times.min()), int(times.max())
        # Of the epoch that was under way at the start its end was read, then whole ones, then the beginning of one.
        tail = -before[number] % samples
        epochs, more = divmod(max(0, after[number] - before[number] - tail), samples)
        right = int(times.sum(dtype=np.int64)) == after[number] - before[number] and low >= epochs
        if before[number] == 0:
            right = (
                right and int((times == epochs + 1).sum()) == more and int((times == epochs).sum()) == samples - more
            )
        else:
            right = right and high <= epochs + 2
        if not right:
            text = (
                f"{named}samples were read {low} to {high} times, which is not what whole epochs and a part of one give"
            )
            faults.append(Fault(0, text))
        phrases.append(f"{named}{samples:,} samples, {_times(low, high)}")
    return phrases, faults


def _times(low: int, high: int) -> str:
    if high == low:
        return f"each read {'once' if low == 1 else f'{low} times'}"
    return f"each read {low}{' or' if high == low + 1 else ' to'} {high} times"


def describe_attempts(history: History) -> str:
    """A table of the attempts, and which of the steps that count were each one's."""
    rows = [("attempt", "steps", "repeated later", "world", "engine", "began after")]
    for attempt in history.attempts:
        own = [line.step for line in history.steps if line.attempt == attempt.attempt]
        repeated = sum(line.attempt == attempt.attempt for line in history.superseded)
        rows.append(
            (
                str(attempt.attempt),
                f"{own[0]} to {own[-1]}" if own else "none",
                str(repeated),
                str(attempt.world_size),
                attempt.engine,
                "-" if attempt.resumed_from is None else f"step {attempt.resumed_from_step}",
            )
        )
    return format_table(rows)

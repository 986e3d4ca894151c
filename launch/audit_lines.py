"""Whether lines of a run's log say what plan and shards have its steps read. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.digest import EMPTY_DIGEST, chain
from data.plan import Plan
from launch.history import StepLine


@dataclass(frozen=True)
class Fault:
    """Something that does not agree, at the end of which step."""

    step: int
    text: str


@dataclass(frozen=True)
class Steps:
    """Consecutive steps, as plan and shards have them: how many samples each reads, and what its digest is chained from."""

    positions: list[int]
    """Samples consumed after each step, after the one that the first of them follows."""
    folds: list[int]
    targets: list[int]
    """Tokens that each step is to predict."""
    stream_samples: list[list[int]]
    """Samples that each step reads of each of the plan's streams."""
    unreadable: dict[int, str]
    """Why a step cannot be read, by its place in the list."""


@dataclass(frozen=True)
class Before:
    """What is known of the step before the first."""

    digest: str
    tokens: int | None
    """None where it cannot be known."""
    consumed: list[int]
    """Samples of each of the plan's streams."""


@dataclass(frozen=True)
class Streams:
    """The streams of a plan, as lines tell of them."""

    plan: Plan
    samples: list[int | None]
    """Of an epoch of each; None for one that was not opened."""
    mixed_attempts: frozenset[int]
    """Those whose plan had several streams: the lines of others tell of none."""


def wrong_line(
    lines: Sequence[StepLine], steps: Steps, before: Before, streams: Streams, *, counts_targets: bool
) -> Fault | None:
    """The first of consecutive lines that does not say what its step must have read, and why. `counts_targets`: whether the
    task divides by the tokens with a target that the data has."""
    true, tokens, consumed = before.digest, before.tokens, list(before.consumed)
    for number, line in enumerate(lines):
        where = f"step {line.step} ({line.place})"
        if number in steps.unreadable:
            return Fault(line.step, f"{where}: what it read cannot be read again: {steps.unreadable[number]}")
        true = chain(true, steps.folds[number])
        if line.samples != steps.positions[number + 1]:
            return Fault(line.step, f"{where}: says {line.samples} samples, the plan {steps.positions[number + 1]}")
        if line.digest != true:
            why = _why(lines, steps, number, true)
            return Fault(line.step, f"{where}: expected digest {true}, found {line.digest}; {why}")
        if (wrong := _wrong_tokens(tokens if counts_targets else None, line, steps.targets[number])) is not None:
            return Fault(line.step, f"{where}: {wrong}")
        tokens = line.tokens
        consumed = [total + more for total, more in zip(consumed, steps.stream_samples[number], strict=True)]
        first = steps.positions[number]
        told = None
        if line.attempt in streams.mixed_attempts:
            told = _streams_of(streams, first, steps.stream_samples[number], consumed)
        if (found := _without_losses(line.streams)) != told:
            return Fault(line.step, f"{where}: says of its streams {found}, the plan {told}")
    return None


def _why(lines: Sequence[StepLine], steps: Steps, number: int, true: str) -> str:
    """What the line after a wrong digest tells of it."""
    if number + 1 == len(lines):
        return "no line follows it"
    found, following = lines[number].digest, lines[number + 1].digest
    if following == chain(true, steps.folds[number + 1]):
        return "the next line goes on from the expected one: this line was altered"
    if _is_digest(found) and following == chain(found, steps.folds[number + 1]):
        return "the next line goes on from the one found: the step read something else, or all lines from here on were altered"
    return "the next line goes on from neither: other samples or other bytes were read, or the lines are of another run"


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == len(EMPTY_DIGEST) and set(value) <= set("0123456789abcdef")


def _wrong_tokens(before: int | None, line: StepLine, targets: int) -> str | None:
    """Why a line's count of tokens cannot be, as far as data and task alone decide it."""
    if targets == 0:
        return None if line.tokens is None else f"says {line.tokens} tokens, of images"
    if type(line.tokens) is not int:
        return f"says {line.tokens!r} tokens"
    if before is None or line.tokens == before + targets:
        return None
    return f"says {line.tokens} tokens, with its samples there are {before + targets}"


def _streams_of(
    streams: Streams, first: int, step_samples: list[int], consumed: list[int]
) -> dict[str, dict[str, Any]]:
    """What a step's line tells of a mixture's streams but their losses: as `data.stream` and `launch.loop` have it."""
    told = {}
    for stream in streams.plan.segment_at(first).streams:
        number = streams.plan.number_of(stream)
        epoch_samples = streams.samples[number]
        assert epoch_samples is not None, "a stream of a step that was read"
        told[stream.name] = {
            "share": step_samples[number] / sum(step_samples),
            "epoch": consumed[number] / epoch_samples,
        }
    return told


def _without_losses(streams: Any) -> Any:
    if not isinstance(streams, dict):
        return streams
    return {
        name: {key: value for key, value in told.items() if key != "loss"} if isinstance(told, dict) else told
        for name, told in streams.items()
    }

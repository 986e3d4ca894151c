"""What each step of a plan must have read, computed again from the shards: the words that its digest is chained from.

Imports no torch: a run is audited by whoever has its directory and its data, with all cores that there are.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.dataset import open_dataset
from data.digest import STREAM_SHIFT, mix_samples
from data.errors import CorruptData
from data.order import GLOBAL_ORDER
from data.plan import Plan
from data.reading import Reader
from data.samples import Dataset
from data.steps import Integers, StepBlock, Steps
from data.store import open_store, read_manifest
from data.windows import WINDOWED_ORDER

# A job: enough that a process is seldom idle, and little enough that progress is seen and memory is not.
_JOB_SAMPLES = 16384
_JOB_BYTES = 1 << 26


@dataclass(frozen=True)
class AuditedData:
    """A plan, and where the dataset of each of its streams lies. `config` says how they are opened."""

    plan: Plan
    places: Mapping[str, Path | str]
    """By the stream's name."""
    config: DataConfig
    start_position: int
    stop_position: int


def open_audited(plan: Plan, places: Mapping[str, Path | str], config: DataConfig) -> dict[str, Dataset]:
    """The training split of each stream of a plan that has a place; `config` says what the plan does not.

    CorruptData where the files cannot be the ones that the plan was made with.
    """
    datasets: dict[str, Dataset] = {}
    for stream in plan.streams:
        if stream.name not in places:
            continue
        store = open_store(places[stream.name], config)
        found = read_manifest(store).fingerprint
        if found != stream.fingerprint:
            raise CorruptData(
                f"{store.address}: is dataset {found[:12]}, but the run read {stream.fingerprint[:12]}; restore it, or "
                "name the place of that one"
            )
        if stream.sequence_tokens is not None:
            packing = "concatenate" if stream.packing is None else "best_fit"
            config = config.model_copy(update={"sequence_tokens": stream.sequence_tokens, "packing": packing})
        dataset = datasets[stream.name] = open_dataset(store, config, "train")
        if dataset.packing_identity != stream.packing:
            raise CorruptData(
                f"{store.address}: documents are packed as {dataset.packing_identity}, but the run read {stream.packing}; "
                "restore the packing-* files of the run"
            )
    return datasets


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one segment: from which position on, and how many."""

    position: int
    steps: int


@dataclass
class Reading:
    """What a stretch of steps must have read."""

    sizes: list[int]
    folds: list[int]
    """What each step's digest is chained from; 0 where it cannot be read."""
    targets: list[int] = field(default_factory=list)
    """Tokens that each step is to predict; 0 of images."""
    stream_samples: list[list[int]] = field(default_factory=list)
    """Samples that each step has of each of the plan's streams."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Why a step cannot be read, by its number in the stretch."""
    seen: dict[int, tuple[Integers, Integers]] = field(default_factory=dict)
    """By the stream's number: ids, each once, and how often each was read."""


class Auditor:
    """Reads stretches of steps in one process."""

    def __init__(self, data: AuditedData) -> None:
        self._reader = Reader(
            open_audited(data.plan, data.places, data.config), data.plan, data.start_position, data.stop_position
        )
        # Where documents are packed or kept apart, not every token is a target: the samples say which are.
        self._masked = data.config.separate_documents or any(stream.packing for stream in data.plan.streams)
        self._sequence_tokens = np.array([stream.sequence_tokens or 0 for stream in data.plan.streams])
        self._steps = Steps(
            data.plan,
            self._reader.shard_samples,
            rank=0,
            world_size=1,
            # A fold is a sum: in what parts a step was read makes no difference.
            micro_samples=max(segment.global_samples for segment in data.plan.segments),
            stop_position=data.stop_position,
        )

    def __call__(self, stretch: Stretch) -> Reading:
        """Read the samples of these steps and hash them; no image is decoded."""
        block = self._steps.block(stretch.position, stretch.steps)
        assert len(block.step_samples) == stretch.steps, "a stretch lies in one segment"
        reading = Reading(block.step_samples, [], stream_samples=block.stream_samples.tolist())
        try:
            self._read(block, 0, stretch.steps, reading)
        except CorruptData:
            for step in range(stretch.steps):
                try:
                    self._read(block, step, step + 1, reading)
                except CorruptData as error:
                    reading.unreadable[step] = str(error)
                    reading.folds.append(0)
                    reading.targets.append(0)
        for stream in np.unique(block.samples.streams).tolist():
            ids, counts = np.unique(block.samples.ids[block.samples.streams == stream], return_counts=True)
            reading.seen[stream] = ids, counts
        return reading

    def _read(self, block: StepBlock, start: int, stop: int, reading: Reading) -> None:
        """Add steps [start, stop) of a block to what was read; CorruptData, and nothing added, where one cannot be."""
        samples = block.samples.part(block.rows[start], block.rows[stop])
        if self._masked:
            fields, hashes = self._reader.read(block, start, stop)
            targets = fields["loss_mask"].sum(axis=1)
        else:
            hashes = self._reader.content_hashes(samples)
            targets = self._sequence_tokens[samples.streams]
        words = mix_samples(samples.positions, samples.ids + (samples.streams << STREAM_SHIFT), hashes)
        firsts = np.array(block.rows[start:stop]) - block.rows[start]
        reading.folds += np.add.reduceat(words, firsts).view(np.int64).tolist()
        reading.targets += np.add.reduceat(targets, firsts).tolist()


def refuse_streamed(plan: Plan, where: str) -> None:
    """ValueError for a plan that does not say by itself which samples its positions read."""
    for stream in plan.streams:
        if stream.order not in (GLOBAL_ORDER, WINDOWED_ORDER):
            raise ValueError(
                f"{where}: reads a source as it comes (order {stream.order!r}), so that nobody can compute what a step reads; "
                "prepare the data of a run that is to be audited"
            )


def stretches(plan: Plan, position: int, stop_position: int, sample_bytes: int = 1) -> Iterator[Stretch]:
    """The steps from `position` to `stop_position`, where steps must begin, in jobs of some thousand samples."""
    job_samples = min(_JOB_SAMPLES, _JOB_BYTES // sample_bytes)
    while position < stop_position:
        samples = plan.segment_at(position).global_samples
        end = plan.segment_end(position)
        stop = stop_position if end is None else min(end, stop_position)
        steps = min(max(1, job_samples // samples), -(-(stop - position) // samples))
        yield Stretch(position, steps)
        position = min(position + steps * samples, stop)


def position_after(plan: Plan, steps: int) -> int:
    """Samples that the first `steps` steps of a plan consume, in constant time a segment."""
    firsts = _first_steps(plan)
    index = max(0, bisect_right(firsts, steps) - 1)
    segment = plan.segments[index]
    return segment.start_position + (steps - firsts[index]) * segment.global_samples


def _first_steps(plan: Plan) -> list[int]:
    """How many steps lie before each segment."""
    firsts = [0]
    for segment, following in zip(plan.segments, plan.segments[1:], strict=False):
        firsts.append(firsts[-1] + -(-(following.start_position - segment.start_position) // segment.global_samples))
    return firsts

"""Training straight from a `datasets` stream: this rank's micro-batches of each global step, made ready in a thread."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from data.making_time import MakingTime
from data.parts import Part, Place
from data.plan import Plan
from data.prefetch import Prefetch
from data.samples import Fields, Hashes
from data.steps import Samples, Share
from data.stream import CountItems, Cuts, GlobalStep, ReduceItems, cut_micro_batches
from data.streamed import CollectedSamples, StreamedSource


class StreamedSteps:
    """Global steps from `position` up to `stop_position`, read from the parts of a source as they come.

    Of a step of B samples part p of P gives [floor(pB/P), floor((p+1)B/P)). Each rank reads as many parts as the others,
    so what a step reads does not depend on the number of ranks, as long as it divides that of the parts. `places` says
    where each part stands at `position`. The other arguments are those of `data.stream.Stream`.
    """

    def __init__(
        self,
        source: StreamedSource,
        plan: Plan,
        places: Sequence[Place],
        *,
        rank: int,
        world_size: int,
        micro_samples: int,
        position: int,
        stop_position: int,
        count_items: CountItems,
        reduce_items: ReduceItems | None = None,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        assert 0 <= rank < world_size
        assert world_size == 1 or reduce_items is not None, "items must be summed over the ranks"
        assert len(places) % world_size == 0, "ranks read as many parts as each other"
        self._plan, self._parts = plan, len(places)
        self._rank, self._world_size, self._micro_samples = rank, world_size, micro_samples
        self._position, self._stop_position = position, stop_position
        self._count_items, self._reduce_items, self._pin_memory = count_items, reduce_items, pin_memory
        self.making_time = MakingTime()
        each = self._parts // world_size
        seed = plan.segments[0].seed
        self._own = {
            number: Part(source, number, self._parts, seed, places[number])
            for number in range(rank * each, (rank + 1) * each)
        }
        self._places = {number: part.place for number, part in self._own.items()}
        self._prefetch = Prefetch(self._steps, prefetch_steps, together=reduce_items is not None)

    def __iter__(self) -> Iterator[GlobalStep]:
        """Yield the global steps. An exception of the thread is raised here unchanged. A stream is read once."""
        for step, places in self._prefetch:
            self._position, self._places = step.first_position + step.samples, places
            yield step

    def close(self) -> None:
        """End the thread. Steps already permitted are finished first where other ranks may be waiting for them."""
        self._prefetch.close()

    def places(self, position: int) -> dict[int, Place]:
        """Where this rank's parts stand after the last step that was yielded, which ends at `position`."""
        assert position == self._position, f"asked for {position}, at {self._position}"
        return self._places

    def _steps(self) -> Iterator[Callable[[], list[tuple[GlobalStep, dict[int, Place]]]]]:
        position = self._position
        while position < self._stop_position:
            end = self._plan.segment_end(position)
            limit = self._stop_position if end is None else min(end, self._stop_position)
            samples = min(self._plan.segment_at(position).global_samples, limit - position)
            yield partial(self._make_chunk, position, samples)
            position += samples

    def _make_chunk(self, position: int, samples: int) -> list[tuple[GlobalStep, dict[int, Place]]]:
        share = Share.of(samples, self._rank, self._world_size, self._micro_samples)
        with self.making_time.of(1, share.own_samples):
            step = self._make_step(position, samples, share)
        return [(step, {number: part.place for number, part in self._own.items()})]

    def _make_step(self, position: int, samples: int, share: Share) -> GlobalStep:
        fields, hashes = self._take(samples, len(share.offsets))
        tensors = {name: torch.from_numpy(field) for name, field in fields.items()}
        if self._pin_memory:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        own = {name: tensor[: share.own_samples] for name, tensor in tensors.items()}
        items = [self._count_items(own) if share.own_samples else 0]
        if self._reduce_items is not None:
            items = self.making_time.waiting(self._reduce_items, items)
        # A streamed sample has no id but its position.
        positions = position + share.offsets
        read = Samples(positions, np.zeros_like(positions), np.zeros_like(positions), positions)
        _, [micro_batches], [fold] = cut_micro_batches(Cuts([share]), tensors, read, hashes, 1)
        return GlobalStep(position, samples, items[0], micro_batches, fold)

    def _take(self, samples: int, rows: int) -> tuple[Fields, Hashes]:
        """This rank's samples of a step of so many, and rows of zeros for its fillers."""
        given = [
            part.take((number + 1) * samples // self._parts - number * samples // self._parts)
            for number, part in self._own.items()
        ]
        fields: Fields = {}
        for name, first in given[0][0].items():
            parts = [part[name] for part, _ in given]
            fillers = np.zeros((rows - sum(map(len, parts)), *first.shape[1:]), dtype=first.dtype)
            fields[name] = np.concatenate([*parts, fillers])
        hashes = np.concatenate([part_hashes for _, part_hashes in given])
        return fields, np.concatenate([hashes, np.zeros(rows - len(hashes), dtype=np.uint64)])


def describe_stream(source: StreamedSource, parts: int, validation: CollectedSamples) -> list[str]:
    """What a stream promises and what it does not, in plain words, a line each."""
    what = source.what
    if parts == 1:
        split = "in one part"
    elif source.shares_shards(parts):
        split = f"in {parts} parts side by side, each of which reads shards of its own"
    else:
        split = f"in {parts} parts side by side, each of which reads everything and keeps one of {parts} {what}"
    shuffled = (
        f"{what} are shuffled with their neighbours, {source.shuffle_examples:,} together, and not over the whole source"
        if source.shuffle_examples
        else f"{what} come in the order of the source, not shuffled"
    )
    workers = "one worker" if parts == 1 else f"any number of workers that divides {parts}"
    return [
        f"stream: {source.address} is read as it comes, {split} ({source.shards} shards)",
        f"stream: {shuffled}; a part that comes to its end goes on into its next epoch, whatever the others do",
        f"stream: kept: the digest of what was read, and the order and an exact resume with {workers}; with another number of "
        "parts the order is another one",
        "stream: not promised: how many samples and epochs there are, checksums of the source, `lockstep data audit`; what "
        "changes in the source later is noticed only where a run goes on",
        f"stream: validation: {validation.samples:,} samples from the first {validation.examples_read:,} {what}; all that "
        "their hash holds out is left out of training",
    ]

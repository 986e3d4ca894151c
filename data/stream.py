"""The stream: this rank's micro-batches of each global step, made ready ahead of time in one background thread."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data.digest import STREAM_SHIFT, fold_samples, mix_samples
from data.lookahead import LookAhead
from data.making_time import MakingTime
from data.plan import Plan
from data.prefetch import Prefetch
from data.reading import Reader
from data.samples import Dataset, Fields, Hashes
from data.steps import Samples, Share, StepBlock, Steps

CountItems = Callable[[Mapping[str, torch.Tensor]], int]
ReduceItems = Callable[[list[int]], list[int]]

# A chunk is what the thread makes at once: enough small steps that their cost is NumPy's and not Python's.
# Handing one over takes two threads some 50 microseconds, which 4 MiB of samples make 5 % of.
CHUNK_BYTES = 4 * 1024 * 1024
CHUNK_STEPS = 64
# The order is computed for at least so many samples at once, which makes it eight times as cheap.
ORDER_SAMPLES = 32768


# These are named tuples, which are made three times as fast as frozen dataclasses: there may be thousands a second.
class MicroBatch(NamedTuple):
    """What one forward pass takes. `fold` sums over micro-batches and ranks; a filler has weight 0.0 and fold 0.

    Where a plan has several streams, `streams` (n,) int64 are the numbers, below `stream_count`, of those that the
    samples belong to.
    """

    tensors: dict[str, torch.Tensor]
    positions: npt.NDArray[np.int64]
    sample_ids: npt.NDArray[np.int64]
    fold: int
    weight: float
    streams: torch.Tensor | None = None
    stream_count: int = 1

    @property
    def first_position(self) -> int:
        return int(self.positions[0])

    @property
    def samples(self) -> int:
        return len(self.positions)


class StreamShare(NamedTuple):
    """What a stream gave to a global step, over all ranks: samples and items, and the epochs it had given after it."""

    name: str
    number: int
    samples: int
    items: int
    epochs: float


class GlobalStep(NamedTuple):
    """One global step as one rank sees it: `samples` and `items` are of all ranks, `micro_batches` its own, and `fold`
    is the wrapping sum of their folds, which fits an int64 tensor. `streams` is empty where a plan has only one."""

    first_position: int
    samples: int
    items: int
    micro_batches: tuple[MicroBatch, ...]
    fold: int
    streams: tuple[StreamShare, ...] = ()


class Cuts:
    """How consecutive steps are cut into micro-batches: the same for all chunks of as many equal steps."""

    def __init__(self, shares: list[Share]) -> None:
        self.sizes = [size for share in shares for size in share.sizes]
        self.weights = [weight for share in shares for weight in share.weights]
        self.real = np.array(self.weights, dtype=np.bool_)
        stops = np.cumsum(self.sizes).tolist()
        self.starts = [0, *stops[:-1]]
        self.rows = list(map(slice, self.starts, stops))
        self.counts = [len(share.sizes) for share in shares]
        self.first_batches = [0, *itertools.accumulate(self.counts[:-1])]


class Stream:
    """Global steps from `position` (samples consumed) up to `stop_position`; only the very last may be smaller.

    `datasets` holds one for each stream's name, which is empty where a plan has only one. `count_items` counts the items
    of a batch of this rank; `reduce_items` sums a list of counts over all ranks. It is called in the prefetch thread, so
    it needs a process group of its own, and on every rank equally often as long as the ranks consume the same number of
    steps before `close`. None: this is the only rank.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        plan: Plan,
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
        self._plan = plan
        self._world_size, self._micro_samples = world_size, micro_samples
        self._position, self._stop_position = position, stop_position
        self._count_items, self._reduce_items = count_items, reduce_items
        self._pin_memory = pin_memory
        self.making_time = MakingTime()
        self._check_micro_samples()
        self._reader = Reader(datasets, plan, position, stop_position)
        self._steps = Steps(
            plan,
            self._reader.shard_samples,
            rank=rank,
            world_size=world_size,
            micro_samples=micro_samples,
            stop_position=stop_position,
            pairs=self._reader.mixes,
        )
        self._look_ahead = LookAhead(
            self._reader,
            plan,
            rank=rank,
            world_size=world_size,
            micro_samples=micro_samples,
            position=position,
            stop_position=stop_position,
        )
        depth_chunks = math.ceil(prefetch_steps / self._chunk_steps())
        self._cut_shares: list[Share] = []
        self._prefetch = Prefetch(self._chunks, depth_chunks, together=reduce_items is not None)

    def __iter__(self) -> Iterator[GlobalStep]:
        """Yield the global steps. An exception of the thread is raised here unchanged. A stream is read once."""
        return iter(self._prefetch)

    def close(self) -> None:
        """End the thread. Steps already permitted are finished first where other ranks may be waiting for them."""
        self._prefetch.close()

    def _check_micro_samples(self) -> None:
        later = [s for s in self._plan.segments if self._position < s.start_position < self._stop_position]
        for segment in (self._plan.segment_at(self._position), *later):
            if self._micro_samples > segment.global_samples:
                raise ValueError(
                    f"batch.micro_samples {self._micro_samples} is larger than batch.global_samples "
                    f"{segment.global_samples}; lower micro_samples"
                )

    def _part_samples(self) -> int:
        """The largest part of a step that any rank reads."""
        return math.ceil(max(segment.global_samples for segment in self._plan.segments) / self._world_size)

    def _chunk_steps(self) -> int:
        """Steps of a full chunk: the same number on every rank, because it is also how reduce_items is batched."""
        return max(1, min(CHUNK_STEPS, CHUNK_BYTES // (self._part_samples() * self._reader.sample_bytes)))

    def _chunks(self) -> Iterator[Callable[[], Iterator[GlobalStep]]]:
        return (partial(self._make_chunk, *chunk) for chunk in self._ranges())

    def _ranges(self) -> Iterator[tuple[StepBlock, int, int]]:
        """Steps [start, stop) of a block that make a chunk. The first chunks are short: the first step comes soon."""
        position, steps, full = self._position, 1, self._chunk_steps()
        block_steps = max(full, ORDER_SAMPLES // self._part_samples())
        while position < self._stop_position:
            block = self._steps.block(position, block_steps)
            start, count = 0, len(block.firsts)
            while start < count:
                stop = min(start + steps, count)
                yield block, start, stop
                start, steps = stop, min(2 * steps, full)
            position = block.firsts[-1] + block.step_samples[-1]

    def _make_chunk(self, block: StepBlock, start: int, stop: int) -> Iterator[GlobalStep]:
        """Steps [start, stop) of a block. All that takes time is done here, but the consumer makes the tuples, one step at
        a time and while this thread copies samples: both threads need the interpreter to make them."""
        with self.making_time.of(stop - start, block.rows[stop] - block.rows[start]):
            return self._make_steps(block, start, stop)

    def _make_steps(self, block: StepBlock, start: int, stop: int) -> Iterator[GlobalStep]:
        self._look_ahead.go_on(block.firsts[start])
        samples, shares = block.samples.part(block.rows[start], block.rows[stop]), block.shares[start:stop]
        fields, hashes = self._reader.read(block, start, stop)
        tensors = {name: torch.from_numpy(field) for name, field in fields.items()}
        if self._pin_memory:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        several = len(self._plan.streams)
        batches, parts, folds = cut_micro_batches(self._cuts(shares), tensors, samples, hashes, several)
        firsts, step_samples = block.firsts[start:stop], block.step_samples[start:stop]
        if several > 1:
            items = self._reduce(self._count_by_stream(samples, shares, fields))
            given = self._streams_given(block, start, stop, items)
            totals = [sum(items[at : at + several]) for at in range(0, len(items), several)]
            return map(GlobalStep, firsts, step_samples, totals, parts, folds, given)
        counts, row, number = [], 0, 0
        for share in shares:
            counts.append(self._count(batches[number], share, row, tensors))
            row += len(share.offsets)
            number += len(share.sizes)
        return map(GlobalStep, firsts, step_samples, self._reduce(counts), parts, folds)

    def _cuts(self, shares: list[Share]) -> Cuts:
        """The cuts of these steps: made anew only where they differ from those before."""
        if shares != self._cut_shares:
            self._last_cuts, self._cut_shares = Cuts(shares), shares
        return self._last_cuts

    def _reduce(self, counts: list[int]) -> list[int]:
        return counts if self._reduce_items is None else self.making_time.waiting(self._reduce_items, counts)

    def _count(self, first: dict[str, torch.Tensor], share: Share, row: int, tensors: dict[str, torch.Tensor]) -> int:
        """Items of this rank's own samples of a step, which begin at `row` of the tensors, as its `first` batch does."""
        if share.own_samples == 0:
            return 0
        if share.real == 1:
            return self._count_items(first)
        return self._count_items({name: tensor[row : row + share.own_samples] for name, tensor in tensors.items()})

    def _count_by_stream(self, samples: Samples, shares: list[Share], fields: Fields) -> list[int]:
        """Items of this rank's own samples of each step and each of the plan's streams, step after step."""
        counts, row = [], 0
        for share in shares:
            streams = samples.streams[row : row + share.own_samples]
            for stream in range(len(self._plan.streams)):
                chosen = row + np.flatnonzero(streams == stream)
                batch = {name: torch.from_numpy(field[chosen]) for name, field in fields.items()}
                counts.append(self._count_items(batch) if chosen.size else 0)
            row += len(share.offsets)
        return counts

    def _streams_given(
        self, block: StepBlock, start: int, stop: int, items: list[int]
    ) -> Iterator[tuple[StreamShare, ...]]:
        """What the streams gave to each of the steps [start, stop): those of the segment, in its order."""
        segment = self._plan.segment_at(block.firsts[start])
        numbers = [(stream.name, self._plan.number_of(stream)) for stream in segment.streams]
        consumed = np.array(self._plan.consumed(block.firsts[start]), dtype=np.int64)
        for step in range(start, stop):
            samples = block.stream_samples[step]
            consumed = consumed + samples
            at = (step - start) * len(self._plan.streams)
            yield tuple(
                StreamShare(
                    name,
                    number,
                    int(samples[number]),
                    items[at + number],
                    int(consumed[number]) / self._reader.samples_of(number),
                )
                for name, number in numbers
            )


def cut_micro_batches(
    cuts: Cuts, tensors: dict[str, torch.Tensor], samples: Samples, hashes: Hashes, stream_count: int
) -> tuple[list[dict[str, torch.Tensor]], Iterator[tuple[MicroBatch, ...]], list[int]]:
    """Of consecutive steps: the batches, as views of the chunk's tensors, each step's micro-batches and its fold."""
    words = mix_samples(samples.positions, samples.ids + (samples.streams << STREAM_SHIFT), hashes)
    folds = np.add.reduceat(words, cuts.starts).view(np.int64)  # sums that wrap
    folds *= cuts.real
    fields: list[dict[str, torch.Tensor]] = [{} for _ in cuts.sizes]
    for name, tensor in tensors.items():
        for batch, view in zip(fields, tensor.split(cuts.sizes), strict=True):
            batch[name] = view
    places = map(samples.positions.__getitem__, cuts.rows), map(samples.ids.__getitem__, cuts.rows)
    streams: Iterable[torch.Tensor | None] = itertools.repeat(None)
    if stream_count > 1:
        streams = torch.from_numpy(samples.streams).split(cuts.sizes)
    # As MicroBatch(...) makes them, without a call into Python for each.
    batches: Iterator[MicroBatch] = map(
        partial(tuple.__new__, MicroBatch),
        zip(fields, *places, folds.tolist(), cuts.weights, streams, itertools.repeat(stream_count), strict=False),
    )
    if max(cuts.counts) == 1:
        parts: Iterator[tuple[MicroBatch, ...]] = zip(batches, strict=True)
    else:
        parts = (tuple(itertools.islice(batches, count)) for count in cuts.counts)
    return fields, parts, np.add.reduceat(folds, cuts.first_batches).tolist()


def evaluation_batches(
    dataset: Dataset, *, rank: int, world_size: int, micro_samples: int, samples: int | None
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the first `samples` samples (None, or more than there are: all), in stored order.

    Ranks take contiguous parts and all yield the same number of micro-batches; fillers have weight 0.0.
    """
    total = dataset.samples if samples is None else min(samples, dataset.samples)
    share = Share.of(total, rank, world_size, micro_samples)
    for number, ids in enumerate(np.split(share.offsets, np.cumsum(share.sizes)[:-1])):
        fields, hashes = dataset.gather(ids)
        tensors = {name: torch.from_numpy(field) for name, field in fields.items()}
        real = number < share.real
        yield MicroBatch(tensors, ids, ids, fold_samples(ids, ids, hashes) if real else 0, 1.0 if real else 0.0)

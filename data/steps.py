"""Which samples a rank reads in each step: the plan, cut into global steps, shares of ranks and micro-batches."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.mixture import Mixture
from data.order import GLOBAL_ORDER, GlobalOrder, Order
from data.plan import STREAMED_ORDER, Plan, Segment, StreamPart
from data.windows import WINDOWED_ORDER, WindowedOrder

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Share:
    """A rank's share of a step of some size: which of the step's samples it reads and how it cuts them.

    `offsets` (n,) are slots of the step and `sizes` cut them into micro-batches; those from number `real` on are fillers
    of one sample, so that every rank runs the same number of forward passes. Where samples are mixed in pairs,
    `partners` (n,) says which row each one is mixed with, and `guests` are slots whose samples only take part in that:
    row n + i is guest i.
    """

    offsets: Integers
    sizes: tuple[int, ...]
    real: int
    own_samples: int
    guests: Integers
    partners: Integers

    @classmethod
    def of(cls, samples: int, rank: int, world_size: int, micro_samples: int, *, pairs: bool = False) -> "Share":
        """The contiguous part [floor(rB/R), floor((r+1)B/R)) of a step of B samples, for rank r of R.

        `pairs`: slot k is mixed with slot k ^ 1, the last of an odd step with the one before it."""
        start, stop = samples * rank // world_size, samples * (rank + 1) // world_size
        cuts = [*range(start, stop, micro_samples), stop]
        sizes = [after - before for before, after in itertools.pairwise(cuts)]
        fillers = math.ceil(math.ceil(samples / world_size) / micro_samples) - len(sizes)
        offsets = np.concatenate([np.arange(start, stop, dtype=np.int64), np.zeros(fillers, dtype=np.int64)])
        guests = partners = np.empty(0, dtype=np.int64)
        if pairs:
            wanted = np.where((offsets ^ 1) < samples, offsets ^ 1, np.maximum(offsets - 1, 0))
            guests = np.setdiff1d(wanted, offsets)
            rows = np.concatenate([offsets, guests])
            by_slot = np.argsort(rows, kind="stable")
            partners = by_slot[np.searchsorted(rows, wanted, sorter=by_slot)]
        return cls(offsets, (*sizes, *[1] * fillers), len(sizes), stop - start, guests, partners)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """1.0 for each micro-batch, 0.0 for each filler."""
        return tuple(1.0 if number < self.real else 0.0 for number in range(len(self.sizes)))


@dataclass(frozen=True)
class StepBlock:
    """Consecutive steps of one segment as one rank reads them.

    `samples` are its samples of all of them in turn, `guests` those that only take part in mixing;
    `stream_samples` (steps, streams of the plan) counts the samples of all ranks.
    """

    firsts: list[int]
    step_samples: list[int]
    shares: list[Share]
    samples: "Samples"
    guests: "Samples"
    stream_samples: Integers

    @cached_property
    def rows(self) -> list[int]:
        """Where each step begins in `samples`, and the end."""
        return [0, *np.cumsum([len(share.offsets) for share in self.shares]).tolist()]

    @cached_property
    def guest_rows(self) -> list[int]:
        """Where each step begins in `guests`, and the end."""
        return [0, *np.cumsum([len(share.guests) for share in self.shares]).tolist()]


class Samples(NamedTuple):
    """Samples (n,) of a plan: positions, numbers of their streams, epochs and ids within these."""

    positions: Integers
    streams: Integers
    epochs: Integers
    ids: Integers

    def part(self, start: int, stop: int) -> "Samples":
        """Samples [start, stop) of them."""
        return Samples(*(field[start:stop] for field in self))

    def followed_by(self, others: "Samples") -> "Samples":
        """These and then the others."""
        return Samples(*(np.concatenate(pair) for pair in zip(self, others, strict=True)))


class Steps:
    """The steps of a plan up to `stop_position`, as one rank reads them.

    `shard_samples` holds, for each of the plan's streams, the samples of its shards; None for a stream whose segments
    are not asked for.
    """

    def __init__(
        self,
        plan: Plan,
        shard_samples: Sequence[Integers | None],
        *,
        rank: int,
        world_size: int,
        micro_samples: int,
        stop_position: int,
        pairs: bool = False,
    ) -> None:
        self._plan, self._shard_samples, self._pairs = plan, shard_samples, pairs
        self._rank, self._world_size, self._micro_samples = rank, world_size, micro_samples
        self._stop_position = stop_position
        self._shares: dict[int, Share] = {}
        self._orders: dict[int, Order] = {}
        self._readers: dict[int, _SegmentReader] = {}

    def block(self, position: int, count: int) -> StepBlock:
        """The next `count` steps from `position` on, or fewer where the segment or the run ends."""
        reader = self._reader(self._plan.index_at(position))
        sizes = self._sizes(position, count)
        shares = [self._share(size) for size in sizes]
        firsts = position + np.cumsum([0, *sizes[:-1]])
        if reader.needs_whole_steps:
            whole = reader.in_reading_order(position, sizes)
            starts = (firsts - position).tolist()
            positions = whole[np.concatenate([at + share.offsets for at, share in zip(starts, shares, strict=True)])]
            guests = whole[np.concatenate([at + share.guests for at, share in zip(starts, shares, strict=True)])]
        elif len({*sizes}) == 1:
            positions = np.add.outer(firsts, shares[0].offsets).ravel()
            guests = np.add.outer(firsts, shares[0].guests).ravel()
        else:
            positions = np.concatenate([first + share.offsets for first, share in zip(firsts, shares, strict=True)])
            guests = np.concatenate([first + share.guests for first, share in zip(firsts, shares, strict=True)])
        counts = np.zeros((len(sizes), len(self._plan.streams)), dtype=np.int64)
        reader.count_streams(position, sizes, counts)
        return StepBlock(firsts.tolist(), sizes, shares, reader.read(positions), reader.read(guests), counts)

    def _sizes(self, position: int, count: int) -> list[int]:
        """Samples of each of the next steps: a step ends early only where its segment or the run ends."""
        end = self._plan.segment_end(position)
        limit = self._stop_position if end is None else min(end, self._stop_position)
        global_samples = self._plan.segment_at(position).global_samples
        whole, rest = divmod(max(0, limit - position), global_samples)
        sizes = [global_samples] * min(whole, count)
        return [*sizes, rest] if rest and whole < count else sizes

    def _share(self, samples: int) -> Share:
        if samples not in self._shares:
            self._shares[samples] = Share.of(
                samples, self._rank, self._world_size, self._micro_samples, pairs=self._pairs
            )
        return self._shares[samples]

    def _reader(self, index: int) -> "_SegmentReader":
        if index not in self._readers:
            segment = self._plan.segments[index]
            numbers = [self._plan.number_of(stream) for stream in segment.streams]
            orders = [self._order(number, segment.seed) for number in numbers]
            origin = self._plan.order_origin(segment.start_position)
            self._readers[index] = _SegmentReader(segment, origin, numbers, orders, self._plan.consumed(origin))
        return self._readers[index]

    def _order(self, number: int, seed: int) -> Order:
        if number not in self._orders:
            shard_samples = self._shard_samples[number]
            assert shard_samples is not None, "the dataset of a stream that is read"
            self._orders[number] = order_of(self._plan.streams[number], shard_samples, seed)
        return self._orders[number]


def order_of(stream: StreamPart, shard_samples: Integers, seed: int) -> Order:
    """The order of a stream over shards of so many samples (S,); ValueError for one that this Lockstep does not know."""
    if stream.order == WINDOWED_ORDER:
        assert stream.lanes is not None
        assert stream.window_shards is not None
        return WindowedOrder(
            shard_samples, seed, lanes=stream.lanes, window_shards=stream.window_shards, stream=stream.name
        )
    if stream.order != GLOBAL_ORDER:
        raise ValueError(f"plan: order {stream.order!r} is not one that this Lockstep knows; update Lockstep")
    return GlobalOrder(int(shard_samples.sum()), seed, stream.name)


class _SegmentReader:
    """What the positions of one segment read. `consumed` counts each stream's samples before `origin`."""

    def __init__(
        self, segment: Segment, origin: int, numbers: list[int], orders: list[Order], consumed: list[int]
    ) -> None:
        self._origin, self._orders = origin, orders
        self._numbers = np.array(numbers, dtype=np.int64)
        self._bases = np.array([consumed[number] for number in numbers], dtype=np.int64)
        quotas = [stream.quota for stream in segment.streams]
        self._mixture = Mixture(quotas, segment.seed, origin) if len(numbers) > 1 else None
        self.needs_whole_steps = any(isinstance(order, WindowedOrder) for order in orders)

    def read(self, positions: Integers) -> Samples:
        """The samples at positions (n,)."""
        streams, ordinals = self._assign(positions)
        if self._mixture is None:
            return Samples(positions, self._numbers[streams], *self._orders[0].sample_ids(ordinals))
        epochs, ids = np.empty_like(positions), np.empty_like(positions)
        for stream, order in enumerate(self._orders):
            chosen = np.flatnonzero(streams == stream)
            epochs[chosen], ids[chosen] = order.sample_ids(ordinals[chosen])
        return Samples(positions, self._numbers[streams], epochs, ids)

    def count_streams(self, first: int, sizes: list[int], counts: Integers) -> None:
        """Add to `counts` (steps, streams of the plan) the samples of steps of these sizes, the first at `first`."""
        if self._mixture is None:
            counts[:, self._numbers[0]] += sizes
            return
        streams, _ = self._assign(np.arange(first, first + sum(sizes)))
        steps = np.repeat(np.arange(len(sizes)), sizes)
        np.add.at(counts, (steps, self._numbers[streams]), 1)

    def in_reading_order(self, first: int, sizes: list[int]) -> Integers:
        """The positions of steps of these sizes, the first at `first`: within each step by lane, so that the parts that
        ranks read one after the other lie in lanes one after the other, and a node needs few shards."""
        positions = np.arange(first, first + sum(sizes))
        streams, ordinals = self._assign(positions)
        steps = np.repeat(np.arange(len(sizes)), sizes)
        # Where in its step a sample would like to be, from 0 to 2^32: its lane's place among the lanes.
        wishes = np.concatenate([(np.arange(size) << 32) // size for size in sizes])
        for stream, order in enumerate(self._orders):
            if isinstance(order, WindowedOrder):
                chosen = np.flatnonzero(streams == stream)
                wishes[chosen] = (order.lanes_of(ordinals[chosen]) << 32) // order.lanes
        return positions[np.lexsort((wishes, steps))]

    def _assign(self, positions: Integers) -> tuple[Integers, Integers]:
        """Streams of this segment and ordinals within them, both (n,)."""
        offsets = positions - self._origin
        if self._mixture is None:
            return np.zeros_like(positions), offsets + self._bases[0]
        streams, ordinals = self._mixture.assign(offsets)
        return streams, ordinals + self._bases[streams]


def samples_of_step(plan: Plan, shard_samples: Sequence[Integers | None], stop_position: int) -> list[tuple[str, int]]:
    """The samples of the step that ends at `stop_position`, each as (name of its stream, id), in reading order."""
    segment = plan.segment_at(stop_position - 1)
    begun = (stop_position - 1 - segment.start_position) // segment.global_samples
    first = segment.start_position + begun * segment.global_samples
    if segment.streams[0].order == STREAMED_ORDER:  # its samples have no ids but their positions
        return [("", position) for position in range(first, stop_position)]
    steps = Steps(plan, shard_samples, rank=0, world_size=1, micro_samples=1, stop_position=stop_position)
    samples = steps.block(first, 1).samples
    names = [plan.streams[stream].name for stream in samples.streams]
    return list(zip(names, samples.ids.tolist(), strict=True))

"""The stream: this rank's micro-batches of each global step, made ready ahead of time in one background thread."""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from data.dataset import Dataset
from data.digest import fold_samples, mix_samples, to_int64
from data.order import ORDER_VERSION, Order
from data.plan import Plan

CountItems = Callable[[Mapping[str, torch.Tensor]], int]
ReduceItems = Callable[[list[int]], list[int]]

# A chunk is what the thread makes at once: enough small steps that their cost is NumPy's and not Python's.
CHUNK_BYTES = 2 * 1024 * 1024
CHUNK_STEPS = 64


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass takes. `fold` sums over micro-batches and ranks; a filler has weight 0.0 and fold 0."""

    tensors: dict[str, torch.Tensor]
    positions: npt.NDArray[np.int64]
    sample_ids: npt.NDArray[np.int64]
    fold: int
    weight: float

    @property
    def first_position(self) -> int:
        return int(self.positions[0])

    @property
    def samples(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class GlobalStep:
    """One global step as one rank sees it: `samples` and `items` are of all ranks, `micro_batches` its own."""

    first_position: int
    samples: int
    items: int
    micro_batches: tuple[MicroBatch, ...]

    @property
    def fold(self) -> int:
        """The wrapping sum of the micro-batches' folds, which fits an int64 tensor."""
        return to_int64(sum(batch.fold for batch in self.micro_batches))


@dataclass(frozen=True)
class Share:
    """A rank's share of a step of some size: which of the step's samples it reads and how it cuts them.

    `offsets` (n,) are relative to the step's first position; `cuts` delimit micro-batches in `offsets`; those from
    number `real` on are fillers, so that every rank runs the same number of forward passes.
    """

    offsets: npt.NDArray[np.int64]
    cuts: tuple[int, ...]
    real: int
    own_samples: int

    @classmethod
    def of(cls, samples: int, rank: int, world_size: int, micro_samples: int) -> "Share":
        start, stop = samples * rank // world_size, samples * (rank + 1) // world_size
        count = math.ceil(math.ceil(samples / world_size) / micro_samples)
        real = math.ceil((stop - start) / micro_samples)
        fillers = count - real
        cuts = [min(number * micro_samples, stop - start) for number in range(real + 1)]
        cuts += [cuts[-1] + filler + 1 for filler in range(fillers)]
        offsets = np.concatenate([np.arange(start, stop), np.zeros(fillers, dtype=np.int64)])
        return cls(offsets.astype(np.int64), tuple(cuts), real, stop - start)


class Stream:
    """Global steps from `position` (samples consumed) up to `stop_position`; only the very last may be smaller.

    `count_items` counts the items of a batch of this rank; `reduce_items` sums a list of counts over all ranks. It is
    called in the prefetch thread, so it needs a process group of its own, and on every rank equally often as long
    as the ranks consume the same number of steps before `close`. None: this is the only rank.
    """

    def __init__(
        self,
        dataset: Dataset,
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
        self._dataset, self._plan = dataset, plan
        self._rank, self._world_size, self._micro_samples = rank, world_size, micro_samples
        self._position, self._stop_position = position, stop_position
        self._count_items, self._reduce_items = count_items, reduce_items
        self._prefetch_steps, self._pin_memory = prefetch_steps, pin_memory
        self._check_plan()
        self._shares: dict[int, Share] = {}
        self._orders: dict[tuple[int, int], Order] = {}
        # First in, first out: permits to make one more chunk (True), then at most one request to end (False). Ranks
        # that stop at the same step have given the same permits, so their threads make the same calls of reduce_items.
        self._permits: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._chunks: queue.SimpleQueue[list[GlobalStep] | BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def __iter__(self) -> Iterator[GlobalStep]:
        """Yield the global steps. An exception of the thread is raised here unchanged. A stream is read once."""
        if self._thread is not None:
            raise ValueError("a Stream is read once; make another one at the position to continue from")
        if self._closed:
            return
        self._thread = threading.Thread(target=self._run, name="lockstep-prefetch", daemon=True)
        for _ in range(self._depth_chunks()):
            self._permits.put(True)
        self._thread.start()
        while (chunk := self._chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            self._permits.put(True)
            yield from chunk

    def close(self) -> None:
        """End the thread. Steps already permitted are finished first where other ranks may be waiting for them."""
        if self._closed:
            return
        self._closed = True
        self._permits.put(False)
        if self._thread is not None and self._thread is not threading.current_thread():
            # If another rank has died, the thread may wait in reduce_items for ever; it is a daemon for that case.
            self._thread.join(timeout=10.0)

    def _check_plan(self) -> None:
        later = [s for s in self._plan.segments if self._position < s.start_position < self._stop_position]
        segments = [self._plan.segment_at(self._position), *later]
        sequence_tokens = self._dataset.facts.sequence_tokens
        for segment in segments:
            if segment.fingerprints != (self._dataset.fingerprint,):
                raise ValueError(
                    f"plan: from position {segment.start_position} on it reads dataset "
                    f"{segment.fingerprints[0][:12]}, but {self._dataset.directory} is "
                    f"{self._dataset.fingerprint[:12]}; use the dataset the run began with"
                )
            if segment.sequence_tokens != sequence_tokens or segment.order != ORDER_VERSION:
                raise ValueError(
                    f"plan: from position {segment.start_position} on it has sequence_tokens "
                    f"{segment.sequence_tokens} and order {segment.order!r}; this stream has "
                    f"{sequence_tokens} and {ORDER_VERSION!r}"
                )
            if self._micro_samples > segment.global_samples:
                raise ValueError(
                    f"batch.micro_samples {self._micro_samples} is larger than batch.global_samples "
                    f"{segment.global_samples}; lower micro_samples"
                )

    def _chunk_steps(self) -> int:
        """Steps of a full chunk: the same number on every rank, because it is also how reduce_items is batched."""
        global_samples = max(segment.global_samples for segment in self._plan.segments)
        step_bytes = math.ceil(global_samples / self._world_size) * self._dataset.sample_bytes
        return max(1, min(CHUNK_STEPS, CHUNK_BYTES // step_bytes))

    def _depth_chunks(self) -> int:
        return math.ceil(self._prefetch_steps / self._chunk_steps())

    def _run(self) -> None:
        try:
            position, steps, full = self._position, 1, self._chunk_steps()
            while position < self._stop_position and self._permits.get():
                if self._closed and self._reduce_items is None:
                    break
                sizes = self._step_sizes(position, steps)
                self._chunks.put(self._make_chunk(position, sizes))
                position += sum(sizes)
                steps = min(2 * steps, full)  # short chunks at first: the first step must not wait for many others
            self._chunks.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._chunks.put(error)

    def _step_sizes(self, position: int, steps: int) -> list[int]:
        """Samples of each of the next steps: a step ends early only where its segment or the run ends."""
        sizes: list[int] = []
        while len(sizes) < steps and position < self._stop_position:
            end = self._plan.segment_end(position)
            limit = self._stop_position if end is None else min(end, self._stop_position)
            sizes.append(min(self._plan.segment_at(position).global_samples, limit - position))
            position += sizes[-1]
        return sizes

    def _share(self, samples: int) -> Share:
        if samples not in self._shares:
            self._shares[samples] = Share.of(samples, self._rank, self._world_size, self._micro_samples)
        return self._shares[samples]

    def _sample_ids(self, positions: npt.NDArray[np.int64], first: int, stop: int) -> npt.NDArray[np.int64]:
        """Sample ids (n,) of positions (n,), all of them in [first, stop)."""
        end = self._plan.segment_end(first)
        if end is not None and end < stop:
            before = positions < end
            ids = np.empty_like(positions)
            ids[before] = self._sample_ids(positions[before], first, end)
            ids[~before] = self._sample_ids(positions[~before], end, stop)
            return ids
        origin, seed = self._plan.order_origin(first), self._plan.segment_at(first).seed
        order = self._orders.setdefault((origin, seed), Order(self._dataset.samples, seed))
        return order.sample_ids(positions - origin)[1]

    def _make_chunk(self, position: int, sizes: list[int]) -> list[GlobalStep]:
        shares = [self._share(size) for size in sizes]
        firsts = [position + before for before in np.cumsum([0, *sizes[:-1]]).tolist()]
        positions = np.concatenate([first + share.offsets for first, share in zip(firsts, shares, strict=True)])
        ids = self._sample_ids(positions, position, position + sum(sizes))
        fields, hashes = self._dataset.gather(ids)
        tensors = {name: torch.from_numpy(field) for name, field in fields.items()}
        if self._pin_memory:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        # Wrapping prefix sums: the fold of samples [a, b) is sums[b] - sums[a].
        sums = [0, *np.cumsum(mix_samples(positions, ids, hashes), dtype=np.uint64).tolist()]
        parts: list[tuple[MicroBatch, ...]] = []
        items: list[int] = []
        start = 0
        for share in shares:
            parts.append(_cut(share, start, tensors, positions, ids, sums))
            items.append(self._count(parts[-1], share, start, tensors))
            start += len(share.offsets)
        if self._reduce_items is not None:
            items = self._reduce_items(items)
        return [GlobalStep(*step) for step in zip(firsts, sizes, items, parts, strict=True)]

    def _count(
        self, micro_batches: tuple[MicroBatch, ...], share: Share, start: int, tensors: dict[str, torch.Tensor]
    ) -> int:
        if share.own_samples == 0:
            return 0
        if share.real == 1:
            return self._count_items(micro_batches[0].tensors)
        stop = start + share.own_samples
        return self._count_items({name: tensor[start:stop] for name, tensor in tensors.items()})


def _cut(
    share: Share,
    start: int,
    tensors: dict[str, torch.Tensor],
    positions: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64],
    sums: list[int],
) -> tuple[MicroBatch, ...]:
    """The micro-batches of one step, as views of the chunk's tensors; the step's samples begin at row `start`."""
    micro_batches = []
    for number in range(len(share.cuts) - 1):
        first, stop = start + share.cuts[number], start + share.cuts[number + 1]
        real = number < share.real
        micro_batches.append(
            MicroBatch(
                {name: tensor[first:stop] for name, tensor in tensors.items()},
                positions[first:stop],
                ids[first:stop],
                to_int64(sums[stop] - sums[first]) if real else 0,
                1.0 if real else 0.0,
            )
        )
    return tuple(micro_batches)


def evaluation_batches(
    dataset: Dataset, *, rank: int, world_size: int, micro_samples: int, samples: int | None
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the first `samples` samples (None, or more than there are: all), in stored order.

    Ranks take contiguous parts and all yield the same number of micro-batches; fillers have weight 0.0.
    """
    total = dataset.samples if samples is None else min(samples, dataset.samples)
    share = Share.of(total, rank, world_size, micro_samples)
    for number in range(len(share.cuts) - 1):
        ids = share.offsets[share.cuts[number] : share.cuts[number + 1]]
        fields, hashes = dataset.gather(ids)
        tensors = {name: torch.from_numpy(field) for name, field in fields.items()}
        real = number < share.real
        yield MicroBatch(tensors, ids, ids, fold_samples(ids, ids, hashes) if real else 0, 1.0 if real else 0.0)

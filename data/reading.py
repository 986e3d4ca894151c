"""What the samples of a plan hold: read from the datasets of its streams, and mixed in pairs where a recipe asks for it."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from data.digest import mix64
from data.order import GLOBAL_ORDER, derive_key
from data.plan import Plan, StreamPart
from data.samples import Choices, Dataset, Fields, Hashes
from data.steps import Integers, Samples, StepBlock
from data.windows import WINDOWED_ORDER


class Reader:
    """Reads samples of the segments of a plan that begin before `stop_position`, from `position` on.

    `datasets` holds one for each stream's name. ValueError where it is not the one that the plan was made with.
    """

    def __init__(self, datasets: Mapping[str, Dataset], plan: Plan, position: int, stop_position: int) -> None:
        self._plan = plan
        self._datasets: list[Dataset | None] = [None] * len(plan.streams)
        later = [s for s in plan.segments if position < s.start_position < stop_position]
        for segment in (plan.segment_at(position), *later):
            for stream in segment.streams:
                _check_stream(stream, datasets.get(stream.name), segment.start_position)
                self._datasets[plan.number_of(stream)] = datasets[stream.name]
        used = [dataset for dataset in self._datasets if dataset is not None]
        self._first = used[0]
        self.mixes = self._first.mixes
        self.sample_bytes = max(dataset.sample_bytes for dataset in used)

    @property
    def shard_samples(self) -> Sequence[Integers | None]:
        """Samples of each shard (S,) of each of the plan's streams; None for those that are not read."""
        return [None if dataset is None else dataset.shard_samples for dataset in self._datasets]

    def samples_of(self, stream: int) -> int:
        """Samples of an epoch of a stream that is read."""
        dataset = self._datasets[stream]
        assert dataset is not None
        return dataset.samples

    def looks_ahead_samples(self, stream: int) -> int:
        """How far it is worth to look ahead in a stream; 0: not at all."""
        dataset = self._datasets[stream]
        return 0 if dataset is None else dataset.looks_ahead_samples

    def expect(self, start: int, stop: int, samples: Samples) -> None:
        """Samples (n,) that will be read between two positions, or some of them."""
        for stream in np.unique(samples.streams).tolist():
            dataset = self._datasets[stream]
            assert dataset is not None, "a stream of a segment that is not read"
            dataset.expect(start, stop, samples.ids[samples.streams == stream])

    def reached(self, position: int) -> None:
        """What lies before `position` has been read."""
        for dataset in self._datasets:
            if dataset is not None:
                dataset.reached(position)

    def read(self, block: StepBlock, start: int, stop: int) -> tuple[Fields, Hashes]:
        """The fields of steps [start, stop) of a block, and the hash (n,) of each sample's stored content."""
        rows, guest_rows = block.rows, block.guest_rows
        own = block.samples.part(rows[start], rows[stop])
        guests = block.guests.part(guest_rows[start], guest_rows[stop])
        count = len(own.ids)
        fields, hashes = self._gather(own if not guests.ids.size else own.followed_by(guests))
        if self.mixes:
            fields = self._first.mix(fields, _partners(block, start, stop), self._mix_words(block, start, stop))
        return fields, hashes[:count]

    def content_hashes(self, samples: Samples) -> Hashes:
        """The hash (n,) of each sample's stored content, as `read` gives it, without decoding anything."""
        hashes = np.empty(len(samples.ids), dtype=np.uint64)
        for stream in np.unique(samples.streams).tolist():
            dataset = self._datasets[stream]
            assert dataset is not None, "a stream of a segment that is not read"
            chosen = np.flatnonzero(samples.streams == stream)
            hashes[chosen] = dataset.content_hashes(samples.ids[chosen])
        return hashes

    def _gather(self, samples: Samples) -> tuple[Fields, Hashes]:
        if len(self._datasets) == 1:
            return self._gather_stream(0, samples)
        fields: Fields = {}
        hashes = np.empty(len(samples.ids), dtype=np.uint64)
        for stream in np.unique(samples.streams).tolist():
            chosen = np.flatnonzero(samples.streams == stream)
            part, hashes[chosen] = self._gather_stream(stream, Samples(*(field[chosen] for field in samples)))
            for name, values in part.items():
                if name not in fields:
                    fields[name] = np.empty((len(samples.ids), *values.shape[1:]), dtype=values.dtype)
                fields[name][chosen] = values
        return fields, hashes

    def _gather_stream(self, stream: int, samples: Samples) -> tuple[Fields, Hashes]:
        dataset = self._datasets[stream]
        assert dataset is not None, "a stream of a segment that is not read"
        name, seed = self._plan.streams[stream].name, self._plan.segments[0].seed
        if name:  # sample 5 of one stream is not altered as sample 5 of another
            seed = derive_key(seed=seed, epoch=0, stream=name, purpose="choices")
        return dataset.gather(samples.ids, Choices(seed, samples.epochs))

    def _mix_words(self, block: StepBlock, start: int, stop: int) -> npt.NDArray[np.uint64]:
        """A random word (n,) for each sample, keyed by the seed, its step and its slot in it."""
        shares = block.shares[start:stop]
        seed = self._plan.segments[0].seed
        keys = [derive_key(seed=seed, epoch=first, purpose="mix") for first in block.firsts[start:stop]]
        words = [np.uint64(key) + share.offsets.astype(np.uint64) for key, share in zip(keys, shares, strict=True)]
        return mix64(mix64(np.concatenate(words)))


def _partners(block: StepBlock, start: int, stop: int) -> Integers:
    """The row (n,) that each sample of steps [start, stop) is mixed with: their samples in turn, then their guests."""
    first, first_guest = block.rows[start], block.guest_rows[start]
    count = block.rows[stop] - first
    partners = []
    for number in range(start, stop):
        share = block.shares[number]
        row, guest = block.rows[number] - first, count + block.guest_rows[number] - first_guest
        own = len(share.offsets)
        partners.append(np.where(share.partners < own, row + share.partners, guest + share.partners - own))
    return np.concatenate(partners)


def _check_stream(stream: StreamPart, dataset: Dataset | None, position: int) -> None:
    where = f"plan: from position {position} on"
    named = f" of stream {stream.name}" if stream.name else ""
    if dataset is None:
        raise ValueError(f"{where} it reads a stream {stream.name!r} that is not there; use the streams of the run")
    if stream.fingerprint != dataset.fingerprint:
        raise ValueError(
            f"{where} it reads dataset {stream.fingerprint[:12]}{named}, but {dataset.address} is "
            f"{dataset.fingerprint[:12]}; use the dataset the run began with"
        )
    if stream.sequence_tokens != dataset.facts.sequence_tokens:
        raise ValueError(
            f"{where} it has sequence_tokens {stream.sequence_tokens}{named}; this stream has "
            f"{dataset.facts.sequence_tokens}"
        )
    if stream.packing != dataset.packing_identity:
        raise ValueError(
            f"{where} its documents are packed as {stream.packing}{named}, and those of {dataset.address} as "
            f"{dataset.packing_identity}; use the packing-* files of the run"
        )
    if stream.order not in (GLOBAL_ORDER, WINDOWED_ORDER):
        raise ValueError(f"{where} it has order {stream.order!r}{named}, which this Lockstep does not know; update it")

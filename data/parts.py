"""Parts of a streamed source: which examples each gives in which order, and where it stands, so that it can go on there.

A part reads its examples in groups. Where it stands is the place in the source before a group, as `datasets` tells it,
and how much of the group was given: to go on, the group is read again and what was given is left out. Its hash shows
whether that is the same group.
"""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xxhash

from data.errors import CorruptData
from data.order import derive_key, permute
from data.samples import Fields, Hashes
from data.streamed import Example, StreamedSource, Units

log = logging.getLogger("lockstep")

# A group of examples that come as they are is closed at either: enough for the tokenizer's threads, little in memory.
GROUP_EXAMPLES = 64
GROUP_BYTES = 1_000_000


@dataclass(frozen=True)
class Place:
    """Where a part stands: `used` units of group `group` of its epoch were given, which begins at example `examples`.

    `source` is the state of the `datasets` stream before the group, None at the beginning of an epoch; `content` the
    group's hash, None where it was not read yet.
    """

    epoch: int = 0
    group: int = 0
    examples: int = 0
    source: dict[str, Any] | None = None
    used: int = 0
    content: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Group:
    """The training examples of a group, already units, and the place before it."""

    place: Place
    units: Units


@dataclass
class _Gathering:
    """A group that is being read."""

    examples: list[Example] = field(default_factory=list)
    hash: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    size_bytes: int = 0

    def add(self, example: Example, content: bytes) -> None:
        self.examples.append(example)
        self.hash.update(len(content).to_bytes(8, "little") + content)
        self.hash.update(str(getattr(example, "label", "")).encode())
        self.size_bytes += len(content)


class Part:
    """One part of a source from a place on, epoch after epoch."""

    def __init__(self, source: StreamedSource, number: int, parts: int, seed: int, place: Place) -> None:
        self._source, self._form = source, source.form
        self._number, self._parts, self._seed = number, parts, seed
        self._start = place
        self._groups: deque[_Group] = deque()
        self._used = place.used
        self._reader = self._read()

    @property
    def place(self) -> Place:
        """Where this part stands: before the next sample it gives."""
        if not self._groups:
            return self._start
        place = self._groups[0].place
        return Place(place.epoch, place.group, place.examples, place.source, self._used, place.content)

    def take(self, count: int) -> tuple[Fields, Hashes]:
        """The next `count` samples: their fields, and the hash (count,) of what was read of each."""
        wanted = count * self._form.stride + self._form.overlap if count else 0
        pieces: list[Units] = []
        at, group = self._used, 0
        while wanted:
            if group == len(self._groups):
                self._groups.append(next(self._reader))
            piece = self._groups[group].units[at : at + wanted]
            pieces.append(piece)
            wanted -= len(piece)
            at, group = 0, group + 1
        units = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
        self._used += count * self._form.stride
        while len(self._groups) > 1 and self._used >= len(self._groups[0].units):
            self._used -= len(self._groups.popleft().units)
        return self._form.samples(units, count)

    def _read(self) -> Iterator[_Group]:
        """The groups from the start on. The first is the one in which this part stood, which must be as it was."""
        place = Place(self._start.epoch, self._start.group, self._start.examples, self._start.source)
        wanted = self._start.content
        while True:
            for group in self._read_epoch(place):
                if wanted is not None and group.place.content != wanted:
                    raise CorruptData(
                        f"source {self._source.address}: part {self._number} of {self._parts} cannot go on where it stopped "
                        f"(epoch {place.epoch}, example {place.examples}): other {self._source.what} are there now; "
                        "restore the source, or start a new run"
                    )
                wanted = None
                yield group
            place = Place(place.epoch + 1)
            log.info("stream: part %d of %d begins its epoch %d", self._number, self._parts, place.epoch)

    def _read_epoch(self, place: Place) -> Iterator[_Group]:
        """The groups of an epoch from a place between two of them on. The stream is split anew for each epoch: no state
        of the one before it is left in it."""
        part = self._source.part(self._number, self._parts)
        if place.source is not None:
            part.load_state_dict(place.source)
        begins = place.source is None
        gathering, examples = _Gathering(), place.examples
        for found in self._source.read(part, "train"):
            examples += 1
            if found is not None:
                gathering.add(*found)
            if self._is_full(gathering):
                yield self._close(gathering, place)
                place = Place(place.epoch, place.group + 1, examples, part.state_dict())
                gathering, begins = _Gathering(), False
        if gathering.examples:
            yield self._close(gathering, place)
        elif begins:
            raise ValueError(
                f"source {self._source.address}: part {self._number} of {self._parts} holds no training "
                f"{self._source.what}; lower data.streaming_parts or the number of workers"
            )

    def _is_full(self, gathering: _Gathering) -> bool:
        count = len(gathering.examples)
        if self._source.shuffle_examples:
            return count >= self._source.shuffle_examples
        return count >= GROUP_EXAMPLES or gathering.size_bytes >= GROUP_BYTES

    def _close(self, gathering: _Gathering, place: Place) -> _Group:
        """The group as it will be given: in an order of its own where the recipe asks for it."""
        examples = gathering.examples
        if self._source.shuffle_examples and len(examples) > 1:
            purpose = f"streamed part={self._number} parts={self._parts} group={place.group}"
            key = derive_key(seed=self._seed, epoch=place.epoch, purpose=purpose)
            order = permute(np.arange(len(examples)), len(examples), np.array([key], dtype=np.uint64))
            examples = [examples[number] for number in order.tolist()]
        content = gathering.hash.hexdigest()
        before = Place(place.epoch, place.group, place.examples, place.source, 0, content)
        return _Group(before, self._form.units(examples))

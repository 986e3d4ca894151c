"""The plan: which samples a run reads at which positions. Append-only, hashed, checkpointed."""

import hashlib
import itertools
import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.mixture import BLOCK_SAMPLES, MIXTURE_VERSION, Mixture
from data.order import GLOBAL_ORDER
from data.windows import WINDOWED_ORDER

PLAN_VERSION = 2
# The order of a source that is read as it comes, see data/streaming.py: no function of the plan alone.
STREAMED_ORDER = "streamed-1"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StreamPart(_Part):
    """One stream of a segment: a dataset, its order, and its share of the positions.

    `name` is empty where a recipe has one stream without a name; `quota` counts positions of a block of 4,096.
    `lanes` and `window_shards` belong to the windowed order. `sequence_tokens` is None for images, `packing` says how
    documents became samples where that is not by concatenation.
    """

    name: str = ""
    fingerprint: str
    quota: int = Field(BLOCK_SAMPLES, ge=1, le=BLOCK_SAMPLES)
    order: str = GLOBAL_ORDER
    lanes: int | None = Field(None, ge=1)
    window_shards: int | None = Field(None, ge=1)
    sequence_tokens: int | None = Field(ge=1)
    packing: str | None = None

    @model_validator(mode="after")
    def _windows_belong_to_their_order(self) -> "StreamPart":
        windowed = self.order == WINDOWED_ORDER
        if windowed != (self.lanes is not None) or windowed != (self.window_shards is not None):
            raise ValueError(f"order {self.order!r} with lanes {self.lanes} and window_shards {self.window_shards}")
        return self

    def continues(self, other: "StreamPart") -> bool:
        """Whether this is the same stream further on: only its share may differ."""
        return self.model_copy(update={"quota": 1}) == other.model_copy(update={"quota": 1})


class Segment(_Part):
    """What holds from `start_position` (samples consumed) on, until the next segment starts."""

    start_position: int = Field(ge=0)
    streams: tuple[StreamPart, ...] = Field(min_length=1)
    mixture: Literal["blocks-1"] = MIXTURE_VERSION
    seed: int
    global_samples: int = Field(ge=1)

    @model_validator(mode="after")
    def _streams_share_a_block(self) -> "Segment":
        if len({stream.name for stream in self.streams}) != len(self.streams):
            raise ValueError("two streams have one name")
        quotas = [stream.quota for stream in self.streams]
        if sum(quotas) != BLOCK_SAMPLES:
            raise ValueError(f"the streams' quotas {quotas} do not sum to {BLOCK_SAMPLES}")
        return self

    def reads_as(self, other: "Segment") -> bool:
        """Whether both read the same samples in the same order: only the size of a step may differ."""
        changes = {"start_position": 0, "global_samples": 1}
        return self.model_copy(update=changes) == other.model_copy(update=changes)


class Plan(_Part):
    """Segments by rising `start_position`, the first at 0. The sample at a position is a function of the plan alone."""

    version: int = PLAN_VERSION
    segments: tuple[Segment, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _segments_rise_from_zero(self) -> "Plan":
        if self.version != PLAN_VERSION:
            raise ValueError(f"plan version {self.version}; this Lockstep reads version {PLAN_VERSION}")
        starts = [segment.start_position for segment in self.segments]
        if starts[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
            raise ValueError(f"segments start at {starts}; they must start at 0 and rise")
        if len({segment.seed for segment in self.segments}) != 1:
            raise ValueError(
                "segments have different seeds; a stream that goes on would begin another order in mid-epoch"
            )
        return self

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> "Plan":
        """The plan of these segments."""
        return cls(segments=tuple(segments))

    def append(self, segment: Segment) -> "Plan":
        """The plan with one more segment at its end; positions before its start keep their samples."""
        last = self.segments[-1].start_position
        if segment.start_position <= last:
            raise ValueError(f"a segment at position {segment.start_position} cannot follow one at {last}")
        return Plan(segments=(*self.segments, segment))

    def index_at(self, position: int) -> int:
        """The number of the segment that a position belongs to."""
        if position < 0:
            raise ValueError(f"position {position} is before the start of the run")
        return bisect_right(self._starts, position) - 1

    def segment_at(self, position: int) -> Segment:
        """The segment that a position belongs to."""
        return self.segments[self.index_at(position)]

    def segment_end(self, position: int) -> int | None:
        """The position at which the segment of `position` ends; None for the last one."""
        following = self.index_at(position) + 1
        return self._starts[following] if following < len(self.segments) else None

    def order_origin(self, position: int) -> int:
        """The position from which the mixture that holds at `position` counts its blocks.

        A segment that changes only the size of a step goes on in the block before it.
        """
        index = self.index_at(position)
        while index > 0 and self.segments[index - 1].reads_as(self.segments[index]):
            index -= 1
        return self._starts[index]

    @cached_property
    def streams(self) -> tuple[StreamPart, ...]:
        """Every stream of the plan once, by its first appearance: a stream's place here is its number."""
        distinct: list[StreamPart] = []
        for stream in itertools.chain.from_iterable(segment.streams for segment in self.segments):
            if not any(stream.continues(known) for known in distinct):
                distinct.append(stream)
        return tuple(distinct)

    def number_of(self, stream: StreamPart) -> int:
        """A stream's number in `streams`."""
        return next(number for number, known in enumerate(self.streams) if stream.continues(known))

    def consumed(self, position: int) -> list[int]:
        """How many samples of each of `streams` lie before a position: also the next ordinal of each."""
        counts = [0] * len(self.streams)
        for index, segment in enumerate(self.segments):
            start = segment.start_position
            if start >= position:
                break
            end = min(position, self._starts[index + 1] if index + 1 < len(self.segments) else position)
            if len(segment.streams) == 1:
                counts[self.number_of(segment.streams[0])] += end - start
                continue
            origin = self.order_origin(start)
            mixture = Mixture([stream.quota for stream in segment.streams], segment.seed, origin)
            share = mixture.counts(end - origin) - mixture.counts(start - origin)
            for stream, count in zip(segment.streams, share.tolist(), strict=True):
                counts[self.number_of(stream)] += count
        return counts

    @cached_property
    def _starts(self) -> list[int]:
        return [segment.start_position for segment in self.segments]

    @property
    def hash(self) -> str:
        """sha256, in hex, of the plan's canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote; a ValueError of one line if it is not one."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "plan"
            raise ValueError(f"plan: {where}: {first['msg']}") from None

"""The plan: which samples a run reads at which positions. Append-only, hashed, checkpointed."""

import hashlib
import itertools
import json
from bisect import bisect_right
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PLAN_VERSION = 1


class Segment(BaseModel):
    """What holds from `start_position` (samples consumed) on, until the next segment starts.

    One stream so far: `fingerprints` and `weights` have one entry. `sequence_tokens` is None for images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    start_position: int = Field(ge=0)
    fingerprints: tuple[str, ...] = Field(min_length=1)
    weights: tuple[int, ...] = (1,)
    order: str
    sequence_tokens: int | None = Field(ge=1)
    seed: int
    global_samples: int = Field(ge=1)

    @model_validator(mode="after")
    def _a_weight_for_each_stream(self) -> "Segment":
        if len(self.weights) != len(self.fingerprints) or any(weight < 1 for weight in self.weights):
            raise ValueError(f"weights {self.weights} do not give {len(self.fingerprints)} streams a weight each")
        return self

    def reads_as(self, other: "Segment") -> bool:
        """Whether both read the same samples in the same order: only the size of a step may differ."""
        changes = {"start_position": 0, "global_samples": 1}
        return self.model_copy(update=changes) == other.model_copy(update=changes)


class Plan(BaseModel):
    """Segments by rising `start_position`, the first at 0. The sample at a position is a function of the plan alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = PLAN_VERSION
    segments: tuple[Segment, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _segments_rise_from_zero(self) -> "Plan":
        if self.version != PLAN_VERSION:
            raise ValueError(f"plan version {self.version}; this Lockstep reads version {PLAN_VERSION}")
        starts = [segment.start_position for segment in self.segments]
        if starts[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
            raise ValueError(f"segments start at {starts}; they must start at 0 and rise")
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

    def segment_at(self, position: int) -> Segment:
        """The segment that position belongs to."""
        return self.segments[self._index(position)]

    def segment_end(self, position: int) -> int | None:
        """The position at which the segment of `position` ends; None for the last one."""
        following = self._index(position) + 1
        return self.segments[following].start_position if following < len(self.segments) else None

    def order_origin(self, position: int) -> int:
        """The position at which the order that holds at `position` counts zero.

        A segment that changes only the size of a step continues the epoch; one with other data starts its own.
        """
        index = self._index(position)
        while index > 0 and self.segments[index - 1].reads_as(self.segments[index]):
            index -= 1
        return self.segments[index].start_position

    def _index(self, position: int) -> int:
        if position < 0:
            raise ValueError(f"position {position} is before the start of the run")
        return bisect_right([segment.start_position for segment in self.segments], position) - 1

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

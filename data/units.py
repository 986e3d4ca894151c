"""The plan of a preparation: sources are cut into units of input, and consecutive units make a group.

Units are what workers take; a group is what shards are made of, never across its ends. Both are cut by amounts of input
that are part of the format, so that whoever prepares which group, on whichever machine, writes the same bytes. The plan is
hashed: what was prepared under another one is never mixed in.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from data.config import DataConfig
from data.manifest import FORMAT_VERSION
from data.naming import fraction_of
from data.source_reading import UnitInput
from data.sources import Source, common_class_names

UNIT_BYTES = 1 << 21
# Bytes of a shard that a byte of input becomes, about: they decide how much input a group takes, not how large a shard is.
# Two bytes stand for a byte of text; a token of a vocabulary that fits in two bytes for four or so, and so does one of four.
OUTPUT_RATIO = {"bytes": 2.0, "uint16": 0.5, "uint32": 1.0, "images": 1.0}


class Unit(NamedTuple):
    """Places from (file `first`, place `start`) to (file `last`, place `stop`) of a source; bytes of input, if known."""

    source: int
    first: int
    start: int
    last: int
    stop: int
    weight: int | None


class PlannedSource(BaseModel):
    """A source in the plan. `state` is a hash of its files as they were when the plan was made, and `seen` of what is told of a
    local source by its files alone, so that another look is cheap; see data/origin.py."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    given: str
    description: str
    state: str
    seen: str | None


class Plan(BaseModel):
    """All that determines the bytes of a dataset. `tokenizer` says which one and which version of it; None for images.

    `units` is how many there are and a hash of them; group k is the units from `groups[k]` to the next one's beginning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = FORMAT_VERSION
    kind: Literal["tokens", "images"]
    sources: tuple[PlannedSource, ...]
    splits: tuple[str, ...]
    class_names: tuple[str, ...] | None
    tokenizer_spec: str | None
    tokenizer: str | None
    dtype: Literal["uint16", "uint32"] | None
    validation_fraction: float | None
    shard_bytes: int
    unit_bytes: int
    units: int
    units_hash: str
    groups: tuple[int, ...]

    @property
    def hash(self) -> str:
        """What names the plan, and the place where it is carried out."""
        return _hash_of(self.model_dump(mode="json"))

    def to_bytes(self) -> bytes:
        """The form in which the plan lies on disk."""
        return (json.dumps({"hash": self.hash, "plan": self.model_dump(mode="json")}, indent=1) + "\n").encode()

    def units_of(self, group: int) -> range:
        """The numbers of a group's units."""
        ends = (*self.groups[1:], self.units)
        return range(self.groups[group], ends[group])


def parse_plan(content: bytes) -> Plan | None:
    """Read a plan back; None if any of it was altered or another version wrote it."""
    try:
        plan = Plan.model_validate(json.loads(content)["plan"])
    except (ValueError, ValidationError, RecursionError, LookupError, TypeError):
        return None
    return plan if plan.to_bytes() == content else None


def plan_units(sources: Sequence[Source]) -> list[Unit]:
    """The units of all sources, in order: each as many whole pieces as make UNIT_BYTES or less, but at least one."""
    units: list[Unit] = []
    for number, source in enumerate(sources):
        unit: Unit | None = None
        for piece in source.pieces(UNIT_BYTES):
            if unit is not None and unit.weight is not None and piece.weight is not None:
                together = unit.weight + piece.weight
                if together <= UNIT_BYTES:
                    unit = unit._replace(last=piece.file, stop=piece.stop, weight=together)
                    continue
            if unit is not None:
                units.append(unit)
            unit = Unit(number, piece.file, piece.start, piece.file, piece.stop, piece.weight)
        if unit is not None:
            units.append(unit)
    return units


def plan_groups(units: Sequence[Unit], group_bytes: float) -> tuple[int, ...]:
    """Where groups begin: each takes units of `group_bytes` or less, but at least one; of unknown size, one."""
    starts: list[int] = []
    room = 0.0
    for number, unit in enumerate(units):
        weight = group_bytes if unit.weight is None else unit.weight
        if not starts or weight > room:
            starts.append(number)
            room = group_bytes
        room -= weight
    return tuple(starts)


def make_plan(
    config: DataConfig,
    sources: Sequence[Source],
    seen: Sequence[str | None],
    units: Sequence[Unit],
    tokenizer: str | None,
    dtype: Literal["uint16", "uint32"] | None,
) -> Plan:
    """The plan of a dataset. `seen` is of each source, `tokenizer` identifies it, `dtype` is that of its tokens; None for
    images."""
    class_names = common_class_names(sources)
    ratio = OUTPUT_RATIO["bytes" if config.tokenizer == "bytes" and dtype else dtype or "images"]
    return Plan(
        kind="tokens" if class_names is None else "images",
        sources=tuple(map(_planned, sources, seen)),
        splits=config.splits,
        class_names=class_names,
        tokenizer_spec=None if dtype is None else config.tokenizer,
        tokenizer=tokenizer,
        dtype=dtype,
        validation_fraction=fraction_of(config),
        shard_bytes=config.shard_bytes,
        unit_bytes=UNIT_BYTES,
        units=len(units),
        units_hash=_hash_of(units),
        groups=plan_groups(units, config.shard_bytes / ratio),
    )


def _planned(source: Source, seen: str | None) -> PlannedSource:
    state = _hash_of([source.form, source.state, source.class_names, source.files, source.parts])
    return PlannedSource(given=source.given.given, description=source.description, state=state, seen=seen)


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def input_of(unit: Unit, sources: Sequence[Source], class_names: tuple[str, ...] | None) -> UnitInput:
    """What a worker needs to read a unit. Labels are numbered as in the whole dataset."""
    source = sources[unit.source]
    files = source.files[unit.first : unit.last + 1]
    if source.form == "images" and class_names != source.class_names:
        assert source.class_names is not None
        assert class_names is not None
        place = {name: number for number, name in enumerate(class_names)}
        files = tuple(
            file._replace(label=place[source.class_names[file.label]]) for file in files if file.label is not None
        )
    return UnitInput(source.given.given, source.form, source.state, files, unit.start, unit.stop)

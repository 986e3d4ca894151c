"""The recipe's `data` section, and the grammar of source addresses. Imports no torch and no numpy."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, field_validator, model_validator

from data.addresses import is_remote, parse_address
from data.image_config import AugmentationConfig

SourceKind = Literal["stdlib", "digits", "text", "jsonl", "parquet", "images", "csv", "hf"]

Packing = Literal["concatenate", "best_fit"]

SOURCE_FORMS = (
    "stdlib, digits, text:PATH, jsonl:PATH#FIELD, parquet:PATH#COLUMN, images:DIR, csv:FILE#IMAGE_COLUMN,LABEL_COLUMN, "
    "hf:NAME[:CONFIG][@SPLIT][#COLUMN[,LABEL_COLUMN]]; each may be put into one split by SPLIT= before it"
)
IMAGE_KINDS = ("digits", "images", "csv")
SPLIT_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,31}$"
# What a source without SPLIT= is divided into.
DIVIDED = ("train", "validation")

# Keys that mean nothing to text, and to images.
IMAGE_OPTIONS = (
    "image_size_pixels", "image_channels", "shorter_side_pixels", "interpolation", "augmentation", "workers",
)  # fmt: skip
TOKEN_OPTIONS = ("tokenizer", "sequence_tokens", "packing", "separate_documents")

# Protocols whose implementations in fsspec take a timeout.
TIMED_PROTOCOLS = ("http://", "https://", "s3://", "s3a://", "gs://", "gcs://")

# 256 bytes and the end-of-document token: the smallest vocabulary a byte-level BPE can have.
MINIMUM_BPE_SIZE = 257


# Keys that say how a dataset is prepared or ordered, and those that only a stream without either has.
_ONLY_PREPARED = (
    "directory", "streams", "max_epochs", "order", "lanes", "window_shards", "shard_bytes", "packing",
    "separate_documents", "augmentation", "workers",
)  # fmt: skip
_ONLY_STREAMED = ("streaming_parts", "shuffle_buffer_samples")


@dataclass(frozen=True)
class SourceAddress:
    """A parsed source address.

    `location` is the path or hub name ("" for built-in sources), `column` the JSONL field or the column of text or
    images, `label_column` that of the labels; `config` and `split` only of `hf:` addresses.
    """

    kind: SourceKind
    location: str = ""
    column: str | None = None
    config: str | None = None
    split: str = "train"
    label_column: str | None = None


@dataclass(frozen=True)
class GivenSource:
    """A source as it was given: all of it goes into the split `into`, or, if None, it is divided by content."""

    given: str
    into: str | None
    address: SourceAddress


def parse_given(given: str) -> GivenSource:
    """Parse an address that may have SPLIT= before it; a ValueError lists the valid forms."""
    into, equals, address = given.partition("=")
    # An `=` further back belongs to the address: text:a=b.
    if equals and re.match(SPLIT_PATTERN, into):
        return GivenSource(given, into, parse_source(address))
    return GivenSource(given, None, parse_source(given))


def parse_source(address: str) -> SourceAddress:
    """Parse a source address such as `jsonl:corpus/*.jsonl#text`; a ValueError lists the valid forms."""
    kind, colon, rest = address.partition(":")
    if kind in ("stdlib", "digits") and not colon:
        return SourceAddress(kind=kind)  # type: ignore[arg-type]
    if kind in ("text", "images") and rest:
        return SourceAddress(kind=kind, location=rest)  # type: ignore[arg-type]
    if kind in ("jsonl", "parquet"):
        path, _, column = rest.rpartition("#")
        if path and column:
            return SourceAddress(kind=kind, location=path, column=column)  # type: ignore[arg-type]
    if kind == "csv":
        path, _, columns = rest.rpartition("#")
        image, _, label = columns.partition(",")
        if path and image and label:
            return SourceAddress(kind="csv", location=path, column=image, label_column=label)
    if kind == "hf" and rest:
        return _parse_hugging_face(address, rest)
    raise ValueError(f"source {address!r} is not an address; the forms are {SOURCE_FORMS}")


def _parse_hugging_face(address: str, rest: str) -> SourceAddress:
    head, hash_mark, columns = rest.partition("#")
    head, at, split = head.partition("@")
    name, colon, config = head.partition(":")
    column, comma, label = columns.partition(",")
    if not name or (hash_mark and not column) or (at and not split) or (colon and not config) or (comma and not label):
        raise ValueError(f"source {address!r} has an empty part; the forms are {SOURCE_FORMS}")
    return SourceAddress(
        kind="hf",
        location=name,
        column=column or None,
        config=config or None,
        split=split or "train",
        label_column=label or None,
    )


def _parse_all(source: str | tuple[str, ...]) -> tuple[GivenSource, ...]:
    """Parse one source or a list of them; a ValueError if there is none."""
    if not source:
        raise ValueError(f"source is empty; the forms are {SOURCE_FORMS}")
    return tuple(parse_given(given) for given in ((source,) if isinstance(source, str) else source))


def _parse_place(place: object) -> Path | str | None:
    if place is not None and not isinstance(place, str | Path):
        raise ValueError(f"{place!r} is neither a path nor an address")
    return None if place is None else parse_address(place)


# Pydantic itself would make a path of an address, in which two slashes are as good as one.
Place = Annotated[Path | str | None, PlainValidator(_parse_place)]


def _default_order(data: dict[str, Any]) -> Literal["global", "windowed"]:
    """Windows for what must be fetched. `data` holds the fields that come before the order."""
    places = [data.get("directory"), *(stream.directory for stream in data.get("streams", {}).values())]
    return "windowed" if any(map(is_remote, places)) else "global"


class StreamConfig(BaseModel):
    """One stream of a mixture: a dataset of its own, and its share of the samples."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str | tuple[str, ...] = Field(description="as data.source")
    directory: Place = Field(None, description="as data.directory")
    weight: float = Field(gt=0, description="share of the samples, relative to the other streams' weights")
    max_epochs: float | None = Field(None, gt=0, description="as data.max_epochs")

    @field_validator("source")
    @classmethod
    def _sources_have_a_form(cls, source: str | tuple[str, ...]) -> str | tuple[str, ...]:
        _parse_all(source)
        return source


StreamName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=40)]


class DataConfig(BaseModel):
    """What to train on. A dataset is prepared once; what only the reading needs does not enter its identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | tuple[str, ...] = Field(
        "stdlib", description=f"source address, or a list of them for one dataset: {SOURCE_FORMS}"
    )
    directory: Place = Field(
        None,
        description="the prepared dataset to use or create, or the address to read one at (s3://, gs://, hf://, "
        "https://, file://, ...); null: under prepared/, named by its contents",
    )
    streams: dict[StreamName, StreamConfig] = Field(
        {}, description="a mixture: name -> {source, directory, weight, max_epochs}, instead of source and directory"
    )
    max_epochs: float | None = Field(
        None, gt=0, description="refuse a run that would read a sample more often than this; null: no limit"
    )
    order: Literal["global", "windowed"] = Field(
        default_factory=_default_order,
        description="one shuffle of all samples, or of windows of a few shards, for data that must be fetched; the default "
        "is windowed where a data.directory is an address",
    )
    lanes: int = Field(32, ge=1, description="windowed order: windows that are read side by side")
    window_shards: int = Field(8, ge=1, description="windowed order: shards that are shuffled together")
    tokenizer: str = Field("bytes", description="bytes, bpe:SIZE, the path of a tokenizer.json, or a hub name")
    validation_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of documents held out, chosen by each document's content hash"
    )
    sequence_tokens: int = Field(256, ge=1, description="tokens a sample predicts (token datasets)")
    packing: Packing = Field(
        "concatenate",
        description="concatenate: documents one after the other, cut into sequences; best_fit: whole documents, "
        "packed into sequences so that few are cut, no loss across their ends, the room left over unused",
    )
    separate_documents: bool = Field(
        False, description="attention and positions start anew at each document, and no loss is taken across its end"
    )
    image_size_pixels: int | None = Field(
        None, ge=1, description="resize images to this square; null: as stored, where all must agree"
    )
    image_channels: Literal[1, 3] | None = Field(None, description="grey or RGB; null: as stored")
    shorter_side_pixels: int | None = Field(
        None,
        ge=1,
        description="where no random part is cut out, resize the shorter side to this and cut image_size_pixels out of the "
        "middle; null: resize the whole image to the square, whatever its shape",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="how images are resized, antialiased")
    augmentation: AugmentationConfig | None = Field(None, description="how training images are altered; null: not")
    workers: int = Field(
        0, ge=0, le=256, description="threads per rank that decode and augment images; 0: the prefetch thread itself"
    )
    streaming: bool = Field(
        False,
        description="read hf:NAME as it comes while training, without preparing it; see README for what that costs",
    )
    streaming_parts: int | None = Field(
        None,
        ge=1,
        description="streaming: parts that are read side by side; null: one for each worker of the first start",
    )
    shuffle_buffer_samples: int = Field(
        0, ge=0, description="streaming: documents or images of a part that are shuffled together; 0: as they come"
    )
    prefetch_steps: int = Field(2, ge=1, description="global steps made ready ahead of the training step")
    shard_bytes: int = Field(67_108_864, ge=1, description="a shard is closed before a document would pass this")
    cache_directory: Path | None = Field(
        None,
        description="where files of a remote dataset are kept, a local disk of the node; null: ~/.cache/lockstep/shards",
    )
    cache_bytes: int = Field(50_000_000_000, ge=1, description="what the cache may hold; it is shared by all runs")
    download_threads: int = Field(4, ge=1, description="files fetched ahead at once by each worker")
    download_retries: int = Field(8, ge=0, description="tries after the first that make no progress, for each file")
    download_pause_seconds: float = Field(0.5, ge=0, description="before the first retry; doubled each time, up to 30")
    download_timeout_seconds: float = Field(
        60.0, gt=0, description="a server that sends nothing for so long is tried again (http, s3, gs)"
    )

    @property
    def sources(self) -> tuple[GivenSource, ...]:
        """The sources, in the order in which they were given."""
        return _parse_all(self.source)

    @property
    def source_text(self) -> str:
        """The sources as messages name them."""
        return ", ".join(source.given for source in self.sources)

    def shared_between_splits(self) -> dict[str, list[str]]:
        """The addresses of sources that are given for more than one split, and for which ones."""
        places: dict[str, list[str]] = {}
        for source in self.sources:
            into = [source.into] if source.into is not None else [" and ".join(DIVIDED)]
            address = source.given.removeprefix(f"{source.into}=")
            places[address] = [*places.get(address, []), *into]
        return {address: splits for address, splits in places.items() if len(set(splits)) > 1}

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that preparing makes, sorted."""
        divided = DIVIDED if any(source.into is None for source in self.sources) else ()
        return tuple(sorted({*divided, *(source.into for source in self.sources if source.into is not None)}))

    @model_validator(mode="after")
    def _refuse_what_streaming_cannot(self) -> "DataConfig":
        keys = (*_ONLY_PREPARED, *self._remote_keys()) if self.streaming else _ONLY_STREAMED
        defaults = {name: type(self).model_fields[name].default for name in keys}
        # Where the place is an address, that is what is refused, and not the order that follows from it.
        defaults |= {"order": _default_order(dict(self))} if self.streaming else {}
        given = [name for name in keys if getattr(self, name) != defaults[name]]
        if given:
            state = "true" if self.streaming else "false"
            raise ValueError(f"{', '.join(given)} has no effect with data.streaming={state}; remove it")
        if not self.streaming:
            return self
        if len(self.sources) > 1:
            raise ValueError(
                f"data.streaming=true reads one source, not several ({self.source_text}); name one, or prepare them"
            )
        [source] = self.sources
        if source.into is not None:
            raise ValueError(
                f"data.source={source.given}: with data.streaming=true a source is always divided by content; remove "
                f"{source.into}="
            )
        if source.address.kind != "hf":
            raise ValueError(
                f"data.streaming=true reads hf:NAME only, not {source.given!r}; prepare it, or name it as hf:PATH"
            )
        if self.tokenizer.startswith("bpe:"):
            raise ValueError(
                f"data.tokenizer={self.tokenizer} is trained on the whole corpus, which data.streaming=true does not read "
                "first; use bytes, a tokenizer.json or a hub name"
            )
        return self

    @model_validator(mode="after")
    def _refuse_options_of_other_data(self) -> "DataConfig":
        if self.separate_documents and self.sequence_tokens < 2:
            raise ValueError(
                f"separate_documents needs sequence_tokens of at least 2, not {self.sequence_tokens}: of a sequence of "
                "one token nothing may be left to learn; raise it"
            )
        sources = [source for stream in self.streams.values() for source in _parse_all(stream.source)] or self.sources
        if is_remote(self.directory) and self.source == type(self).model_fields["source"].default:
            return self  # what lies there is found out there
        given = ", ".join(source.given for source in sources)
        kinds = {source.address.kind for source in sources} - {"hf"}  # what that holds is known once it is opened
        are_images = {kind in IMAGE_KINDS for kind in kinds}
        if len(are_images) > 1:
            raise ValueError(f"text and images cannot be mixed: {given}; give each a run of its own")
        if are_images:
            held: Literal["images", "text"] = "images" if are_images.pop() else "text"
            self.refuse_options_of_other_data(held, f"data.source={given}")
        whole = all(source.into is not None for source in sources)
        if whole and self.validation_fraction != type(self).model_fields["validation_fraction"].default:
            raise ValueError(
                f"validation_fraction means nothing to data.source={given}: each source goes into one split as a whole; "
                "remove it"
            )
        return self

    def refuse_options_of_other_data(self, held: Literal["images", "text"], where: str) -> None:
        """A ValueError that names the keys which mean nothing to the kind of data that `where` holds."""
        foreign = IMAGE_OPTIONS if held == "text" else TOKEN_OPTIONS
        # Compared with the defaults, not with what was written: the resolved recipe of a run spells out every key.
        given = [name for name in foreign if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)} means nothing to {where}, which is {held}; remove it")

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> "DataConfig":
        fields = type(self).model_fields
        windows = [name for name in ("lanes", "window_shards") if getattr(self, name) != fields[name].default]
        if self.order == "global" and windows:
            raise ValueError(f"{', '.join(windows)} has no effect with data.order=global; remove it")
        single = ("source", "directory", "max_epochs")
        given = [name for name in single if getattr(self, name) != fields[name].default]
        if self.streams and given:
            raise ValueError(f"{', '.join(given)} has no effect beside data.streams; give it to each stream")
        if self.shorter_side_pixels is not None and self.shorter_side_pixels < (self.image_size_pixels or math.inf):
            raise ValueError(
                f"shorter_side_pixels {self.shorter_side_pixels} has no square of image_size_pixels "
                f"{self.image_size_pixels} in it; set image_size_pixels to as much or less"
            )
        return self

    def by_stream(self) -> dict[str, "DataConfig"]:
        """The configuration of each stream on its own; of the only one, whose name is empty, where there is no mixture."""
        if not self.streams:
            return {"": self}
        common = self.model_dump(exclude={"streams"})
        local = {name: value for name, value in common.items() if name not in self._remote_keys()}
        own = {name: stream.model_dump(exclude={"weight"}) for name, stream in self.streams.items()}
        for values in own.values():
            if all(source.into is not None for source in _parse_all(values["source"])):
                values["validation_fraction"] = type(self).model_fields["validation_fraction"].default
        return {
            name: type(self).model_validate((common if is_remote(values["directory"]) else local) | values)
            for name, values in own.items()
        }

    @model_validator(mode="after")
    def _refuse_what_only_remote_data_has(self) -> "DataConfig":
        places = [stream.directory for stream in self.streams.values()] or [self.directory]
        remote = [place for place in places if is_remote(place)]
        names = self._remote_keys()
        if remote:
            timed = any(place.startswith(TIMED_PROTOCOLS) for place in remote)
            names = [] if timed else ["download_timeout_seconds"]
        given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)} means nothing to data.directory={places[0]}; remove it")
        return self

    @classmethod
    def _remote_keys(cls) -> list[str]:
        return [name for name in cls.model_fields if name.startswith(("cache_", "download_"))]

    @field_validator("source")
    @classmethod
    def _sources_have_a_form(cls, source: str | tuple[str, ...]) -> str | tuple[str, ...]:
        _parse_all(source)
        return source

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_has_a_form(cls, spec: str) -> str:
        if not spec:
            raise ValueError("tokenizer is empty; use bytes, bpe:SIZE, the path of a tokenizer.json, or a hub name")
        if spec.startswith("bpe:"):
            bpe_size(spec)
        return spec


def bpe_size(spec: str) -> int:
    """The vocabulary size asked for by `bpe:SIZE`, the end-of-document token included."""
    size = spec.removeprefix("bpe:")
    if not (size.isascii() and size.isdigit()) or int(size) < MINIMUM_BPE_SIZE:
        raise ValueError(f"tokenizer {spec!r}: SIZE must be a whole number of at least {MINIMUM_BPE_SIZE}")
    return int(size)

"""Datasets of the Hugging Face hub, or any local folder that `datasets` can load, as streams: to prepare, or to train on."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from data.config import GivenSource, SourceAddress, parse_given
from data.errors import Unavailable
from data.source_reading import Document, EncodedImage, UnitInput
from data.sources import Source, SourceFile

# What the library raises where it cannot open a dataset, or cannot read on.
_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, pa.ArrowException, datasets.exceptions.DatasetsError)


@dataclass(frozen=True)
class HubStream:
    """A split as `datasets` streams it: only the columns that are used, images as they are stored.

    `label` is None for text; `class_names` is None for text too, and () for images whose labels are mere numbers. `state`
    changes when the dataset does: of a dataset on the hub it is the commit. `size_bytes` is None where nobody says it.
    """

    name: str
    dataset: datasets.IterableDataset
    column: str
    label: str | None
    class_names: tuple[str, ...] | None
    state: str
    size_bytes: int | None

    def read(self, part: datasets.IterableDataset, name: str) -> Iterator[Document | EncodedImage]:
        """The documents or images of `dataset`, or of a part of it, which messages call `name`. Raises ValueError for a row
        that holds none."""
        for row, example in self._examples(part, name):
            content, where = example[self.column], f"{name}, row {row}"
            if self.label is None:
                if not isinstance(content, str):
                    raise ValueError(f"source {where}: column {self.column!r} is not text but {content!r:.40}")
                yield Document(content, where)
                continue
            label = example[self.label]
            if type(label) is not int or label < 0 or content is None:
                raise ValueError(f"source {where}: needs an image and a class number, not label {label!r}")
            yield EncodedImage(_encoded(content, where), label, where)

    def _examples(self, part: datasets.IterableDataset, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows and their numbers. A ValueError of one line where `datasets` finds damage, and Unavailable where the source
        cannot be had now."""
        row, examples = 0, iter(part)
        while True:
            try:
                example = next(examples, None)
            except _UNREADABLE as error:
                told = f"source {name}: `datasets` cannot read on at row {row} or soon after it ({_in_one_line(error)})"
                if _is_damage(error):
                    raise ValueError(f"{told}; replace what is damaged") from error
                raise Unavailable(f"{told}; see whether the source can be reached, and start again") from error
            if example is None:
                return
            yield row, example
            row += 1


def _encoded(image: dict[str, Any], where: str) -> bytes:
    if image["bytes"] is not None:
        return bytes(image["bytes"])
    try:
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise ValueError(f"source {where}: its image {image['path']} cannot be read ({error.strerror})") from None


def _is_damage(error: Exception) -> bool:
    """Whether it is of what was read, and not of reading it. What Arrow cannot decode is an OSError without a number."""
    first = error.__cause__ or error
    return isinstance(first, ValueError | pa.ArrowException) or (type(first) is OSError and first.errno is None)


def _in_one_line(error: Exception) -> str:
    """An exception, and what it came of: `datasets` says most often only that there was one."""
    causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
    return ", of ".join(" ".join(f"{type(one).__name__}: {one}".split()) for one in causes)


def open_hub_stream(address: SourceAddress) -> HubStream:
    """Open `hf:NAME[:CONFIG][@SPLIT][#COLUMN[,LABEL_COLUMN]]`: images where it has an image column, otherwise text.

    Without #COLUMN: the one image column, the column `text`, or the only column that holds text.
    """
    path = Path(address.location).expanduser()
    name = str(path) if path.exists() else address.location
    try:
        builder = datasets.load_dataset_builder(name, address.config)
        stream = builder.as_streaming_dataset(split=address.split)
        first = next(iter(stream), None) if stream.features is None else None
    except _UNREADABLE as error:
        raise ValueError(
            f"source hf:{address.location}: `datasets` cannot load split {address.split!r} "
            f"({_in_one_line(error)}); check name, config and split"
        ) from error
    columns = _columns_of_example(first, name) if stream.features is None else dict(stream.features)
    column = address.column or _default_column(columns, name)
    if column not in columns:
        raise ValueError(f"source hf:{name}: no column {column!r}; its columns are {sorted(columns)}")
    split = (builder.info.splits or {}).get(address.split)
    state, size_bytes = str(builder.hash), split.num_bytes or None if split else None
    if not isinstance(columns[column], datasets.Image):
        if address.label_column is not None:
            raise ValueError(
                f"source hf:{name}: column {column!r} is text, which has no labels; remove the second column"
            )
        return HubStream(name, stream.select_columns([column]), column, None, None, state, size_bytes)
    label = address.label_column or _default_label_column(columns, name)
    if label not in columns:
        raise ValueError(f"source hf:{name}: no column {label!r}; it has {sorted(columns)}")
    names = columns[label].names if isinstance(columns[label], datasets.ClassLabel) else ()
    encoded = stream.select_columns([column, label]).cast_column(column, datasets.Image(decode=False))
    return HubStream(name, encoded, column, label, tuple(names), state, size_bytes)


def open_hugging_face(given: GivenSource) -> Source:
    """A stream as a source to prepare. A unit is one of the shards that `datasets` streams, most often a file."""
    stream = open_hub_stream(given.address)
    shards = stream.dataset.num_shards
    size = None if stream.size_bytes is None else stream.size_bytes // shards
    files, parts = (SourceFile("", 0, 0),), (((size,) * shards),)
    description = f"`datasets` split {given.address.split}"
    return Source(given, "hub", description, files, stream.state, stream.class_names, parts)


def read_shards(unit: UnitInput) -> Iterator[Document | EncodedImage]:
    """The documents or images of shards [start, stop) of the stream."""
    stream = open_hub_stream(parse_given(unit.given).address)
    if stream.state != unit.state:
        raise ValueError(f"source hf:{stream.name}: was changed while it was being prepared; prepare again")
    shards = stream.dataset.num_shards
    return itertools.chain.from_iterable(
        stream.read(stream.dataset.shard(shards, shard), f"hf:{stream.name}, shard {shard}")
        for shard in range(unit.start, unit.stop)
    )


def _columns_of_example(example: dict[str, Any] | None, name: str) -> dict[str, Any]:
    if example is None:
        raise ValueError(f"source hf:{name}: the split is empty")
    return {key: datasets.Value("string") if isinstance(value, str) else None for key, value in example.items()}


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _default_column(columns: dict[str, Any], name: str) -> str:
    images = [column for column, feature in columns.items() if isinstance(feature, datasets.Image)]
    texts = [column for column, feature in columns.items() if _is_text(feature)]
    candidates = images or (["text"] if "text" in texts else texts)
    if len(candidates) != 1:
        raise ValueError(f"source hf:{name}: name the column to use as #COLUMN; its columns are {sorted(columns)}")
    return candidates[0]


def _default_label_column(columns: dict[str, Any], name: str) -> str:
    labelled = [key for key, feature in columns.items() if isinstance(feature, datasets.ClassLabel)]
    if not labelled and "label" in columns:
        labelled = ["label"]
    if len(labelled) != 1:
        raise ValueError(
            f"source hf:{name}: needs one ClassLabel column, or `label`; it has {sorted(columns)}; name it as "
            "#COLUMN,LABEL_COLUMN"
        )
    return labelled[0]

"""Datasets of the Hugging Face hub, or any local folder that `datasets` can load, streamed while preparing."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from data.config import GivenSource, SourceAddress, parse_given
from data.source_reading import Document, EncodedImage, UnitInput
from data.sources import Source, SourceFile


@dataclass(frozen=True)
class _Opened:
    """A split as a stream, with its columns. `state` changes when the dataset does: on the hub it is the commit."""

    name: str
    stream: datasets.IterableDataset
    columns: dict[str, Any]
    state: str
    size_bytes: int | None


def open_hugging_face(given: GivenSource) -> Source:
    """Look at `hf:NAME[:CONFIG][@SPLIT][#COLUMN[,LABEL_COLUMN]]`: images where it has an image column, otherwise text.

    Without #COLUMN: the one image column, the column `text`, or the only column that holds text. A unit is one of the shards
    that `datasets` streams, most often a file.
    """
    address = given.address
    opened = _open(address)
    column = _column(address, opened)
    shards = opened.stream.num_shards
    size = None if opened.size_bytes is None else opened.size_bytes // shards
    files, parts = (SourceFile("", 0, 0),), (((size,) * shards),)
    description = f"`datasets` split {address.split}"
    class_names: tuple[str, ...] | None = None
    if isinstance(opened.columns[column], datasets.Image):
        feature = opened.columns[_label_column(address, opened)]
        class_names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
    elif address.label_column is not None:
        raise ValueError(
            f"source hf:{opened.name}: column {column!r} is text, which has no labels; remove the second column"
        )
    return Source(given, "hub", description, files, opened.state, class_names, parts)


def read_shards(unit: UnitInput) -> Iterator[Document] | Iterator[EncodedImage]:
    """The documents or images of shards [start, stop) of the stream."""
    address = parse_given(unit.given).address
    opened = _open(address)
    if opened.state != unit.state:
        raise ValueError(f"source hf:{opened.name}: was changed while it was being prepared; prepare again")
    column = _column(address, opened)
    shards = opened.stream.num_shards
    if isinstance(opened.columns[column], datasets.Image):
        label = _label_column(address, opened)
        encoded = opened.stream.cast_column(column, datasets.Image(decode=False))
        streams = (encoded.shard(shards, index) for index in range(unit.start, unit.stop))
        return _images(streams, unit.start, column, label, opened.name)
    streams = (opened.stream.shard(shards, index) for index in range(unit.start, unit.stop))
    return _texts(streams, unit.start, column, opened.name)


def _open(address: SourceAddress) -> _Opened:
    path = Path(address.location).expanduser()
    name = str(path) if path.exists() else address.location
    try:
        builder = datasets.load_dataset_builder(name, address.config)
        stream = builder.as_streaming_dataset(split=address.split)
        first = next(iter(stream), None) if stream.features is None else None
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source hf:{address.location}: `datasets` cannot load split {address.split!r} "
            f"({type(error).__name__}: {' '.join(str(error).split())}); check name, config and split"
        ) from error
    columns = _columns_of_example(first, name) if stream.features is None else dict(stream.features)
    size = (builder.info.splits or {}).get(address.split)
    return _Opened(name, stream, columns, str(builder.hash), size.num_bytes if size and size.num_bytes else None)


def _columns_of_example(example: dict[str, Any] | None, name: str) -> dict[str, Any]:
    if example is None:
        raise ValueError(f"source hf:{name}: the split is empty")
    return {key: datasets.Value("string") if isinstance(value, str) else None for key, value in example.items()}


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _column(address: SourceAddress, opened: _Opened) -> str:
    column = address.column or _default_column(opened.columns, opened.name)
    if column not in opened.columns:
        raise ValueError(f"source hf:{opened.name}: no column {column!r}; its columns are {sorted(opened.columns)}")
    return column


def _default_column(columns: dict[str, Any], name: str) -> str:
    images = [column for column, feature in columns.items() if isinstance(feature, datasets.Image)]
    texts = [column for column, feature in columns.items() if _is_text(feature)]
    candidates = images or (["text"] if "text" in texts else texts)
    if len(candidates) != 1:
        raise ValueError(f"source hf:{name}: name the column to use as #COLUMN; its columns are {sorted(columns)}")
    return candidates[0]


def _label_column(address: SourceAddress, opened: _Opened) -> str:
    columns = opened.columns
    if address.label_column is not None:
        if address.label_column not in columns:
            raise ValueError(f"source hf:{opened.name}: no column {address.label_column!r}; it has {sorted(columns)}")
        return address.label_column
    labelled = [key for key, feature in columns.items() if isinstance(feature, datasets.ClassLabel)]
    if not labelled and "label" in columns:
        labelled = ["label"]
    if len(labelled) != 1:
        raise ValueError(
            f"source hf:{opened.name}: needs one ClassLabel column, or `label`; it has {sorted(columns)}; name it as "
            "#COLUMN,LABEL_COLUMN"
        )
    return labelled[0]


def _texts(streams: Iterator[datasets.IterableDataset], first: int, column: str, name: str) -> Iterator[Document]:
    for shard, stream in enumerate(streams, start=first):
        for row, example in enumerate(stream):
            text, where = example[column], f"hf:{name}, shard {shard}, row {row}"
            if not isinstance(text, str):
                raise ValueError(f"source {where}: column {column!r} is not text but {text!r:.40}")
            yield Document(text, where)


def _images(
    streams: Iterator[datasets.IterableDataset], first: int, column: str, label: str, name: str
) -> Iterator[EncodedImage]:
    for shard, stream in enumerate(streams, start=first):
        for row, example in enumerate(stream):
            where, number, image = f"hf:{name}, shard {shard}, row {row}", example[label], example[column]
            if type(number) is not int or number < 0 or image is None:
                raise ValueError(f"source {where}: needs an image and a class number, not label {number!r}")
            content = image["bytes"]
            yield EncodedImage(Path(image["path"]).read_bytes() if content is None else content, number, where)

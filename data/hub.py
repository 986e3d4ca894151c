"""Datasets of the Hugging Face hub, or any local folder that `datasets` can load, streamed while preparing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from data.config import SourceAddress
from data.sources import Document, EncodedImage, ImageSource, TextSource


def open_hugging_face(address: SourceAddress) -> TextSource | ImageSource:
    """Open `hf:NAME[:CONFIG][@SPLIT][#COLUMN]`: an image dataset where it has an image column, otherwise text.

    Without #COLUMN: the one image column, the column `text`, or the only column that holds text.
    """
    path = Path(address.location).expanduser()
    name = str(path) if path.exists() else address.location
    try:
        stream = datasets.load_dataset(name, address.config, split=address.split, streaming=True)
        first = next(iter(stream), None) if stream.features is None else None
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source hf:{address.location}: `datasets` cannot load split {address.split!r} "
            f"({type(error).__name__}: {' '.join(str(error).split())}); check name, config and split"
        ) from error
    columns = _columns_of_example(first, name) if stream.features is None else dict(stream.features)
    description = f"`datasets` split {address.split}"
    column = address.column or _default_column(columns, name)
    if column not in columns:
        raise ValueError(f"source hf:{name}: no column {column!r}; its columns are {sorted(columns)}")
    if isinstance(columns[column], datasets.Image):
        return _images(stream, columns, column, name, description)
    return TextSource(description, lambda: _texts(stream, column, name), None)


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


def _texts(stream: datasets.IterableDataset, column: str, name: str) -> Iterator[Document]:
    for row, example in enumerate(stream):
        text = example[column]
        if not isinstance(text, str):
            raise ValueError(f"source hf:{name}: row {row} of column {column!r} is not text but {text!r:.40}")
        yield Document(text, f"hf:{name}, row {row}")


def _images(
    stream: datasets.IterableDataset, columns: dict[str, Any], column: str, name: str, description: str
) -> ImageSource:
    labelled = [key for key, feature in columns.items() if isinstance(feature, datasets.ClassLabel)]
    if not labelled and "label" in columns:
        labelled = ["label"]
    if len(labelled) != 1:
        raise ValueError(f"source hf:{name}: needs one ClassLabel column, or `label`; it has {sorted(columns)}")
    label = labelled[0]
    names = columns[label].names if isinstance(columns[label], datasets.ClassLabel) else None
    encoded = stream.cast_column(column, datasets.Image(decode=False))

    def images() -> Iterator[EncodedImage]:
        for row, example in enumerate(encoded):
            where, number, image = f"hf:{name}, row {row}", example[label], example[column]
            if type(number) is not int or number < 0 or image is None:
                raise ValueError(f"source {where}: needs an image and a class number, not label {number!r}")
            content = image["bytes"]
            yield EncodedImage(Path(image["path"]).read_bytes() if content is None else content, number, where)

    return ImageSource(description, tuple(names) if names else None, images, None)

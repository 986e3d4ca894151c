"""Local sources of every kind that `datasets` streams, and reading parts of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.build import split_of
from data.config import DataConfig
from data.parts import Part, Place
from data.streamed import StreamedSource

SEQUENCE_TOKENS = 16
FRACTION = 0.2
KINDS = ("parquet", "jsonl", "text", "images")


def line(number: int) -> str:
    """A text that differs for every number, some shorter than a sequence and some longer."""
    return f"document {number}: " + " ".join(str(number * word % 97) for word in range(number % 13))


def write_source(root: Path, kind: str, *, shards: int = 4, first: int = 0) -> Path:
    """A folder of `shards` files, each a little larger than the one before; images lie in two classes."""
    root.mkdir(parents=True)
    if kind == "images":
        for number in range(40):
            place = root / ("dog" if number % 3 else "cat")
            place.mkdir(exist_ok=True)
            Image.fromarray(np.full((6, 6, 3), number + first, dtype=np.uint8)).save(place / f"{number:03d}.png")
        return root
    number = first
    for shard in range(shards):
        texts = [line(number + row) for row in range(9 + shard)]
        number += len(texts)
        if kind == "parquet":
            table = pa.table({"text": texts, "other": list(range(len(texts)))})
            pq.write_table(table, root / f"{shard}.parquet", row_group_size=4)
        elif kind == "jsonl":
            records = [json.dumps({"text": text, "other": 1}) + "\n" for text in texts]
            (root / f"{shard}.jsonl").write_text("".join(records))
        else:
            (root / f"{shard}.txt").write_text("\n".join(texts) + "\n")
    return root


def streamed_config(path: Path, kind: str, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"source": f"hf:{path}", "streaming": True, "validation_fraction": FRACTION}
    own = {"image_size_pixels": 6, "image_channels": 3} if kind == "images" else {"sequence_tokens": SEQUENCE_TOKENS}
    return DataConfig.model_validate(values | own | changes)


def documents_of(path: Path, kind: str, split: str) -> list[Any]:
    """What a split must hold, read without `datasets`: texts, or the grey of each image."""
    if kind == "images":
        files = sorted(path.rglob("*.png"))
        return [
            int(np.asarray(Image.open(file))[0, 0, 0])
            for file in files
            if split_of(file.read_bytes(), FRACTION) == split
        ]
    texts: list[str] = []
    for file in sorted(path.iterdir()):
        if kind == "parquet":
            texts += pq.read_table(file).column("text").to_pylist()
        elif kind == "jsonl":
            texts += [json.loads(row)["text"] for row in file.read_text().splitlines()]
        else:
            texts += file.read_text().splitlines()
    return [text for text in texts if split_of(text.encode(), FRACTION) == split]


def documents_in(fields: dict[str, Any]) -> list[Any]:
    """The documents that samples, one after the other, hold; of a text the last one is left out, as it may go on."""
    if "images" in fields:
        return [int(image[0, 0, 0]) for image in fields["images"]]
    tokens = fields["tokens"][:, :-1].ravel().tolist()
    documents, begun = [], list[int]()
    for token in tokens:
        if token == 256:
            documents.append(bytes(begun).decode())
            begun = []
        else:
            begun.append(token)
    return documents


def part_of(source: StreamedSource, number: int, parts: int, place: Place | None = None) -> Part:
    return Part(source, number, parts, 5, place or Place())

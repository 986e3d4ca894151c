"""Writes the corpora of `loaders.py` in a peer's own format, in that peer's environment: `loader_formats.py FORMAT KIND DIR`."""

from __future__ import annotations

import functools
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_TOKENS = 1025
TOKEN_SHARDS = 8
IMAGE_SHARDS = 4


def blocks_of(directory: Path) -> np.ndarray[Any, Any]:
    """All blocks (n, 1025) uint16."""
    return np.asarray(np.memmap(directory / "blocks.bin", dtype=np.uint16, mode="r")).reshape(-1, BLOCK_TOKENS)


def jpegs_of(directory: Path) -> list[tuple[bytes, int]]:
    """All images, encoded, and their labels, in an order that mixes the classes."""
    files = sorted(directory.glob("jpegs/*/*.jpg"), key=lambda file: file.name)
    classes = sorted({file.parent.name for file in files})
    return [(file.read_bytes(), classes.index(file.parent.name)) for file in files]


def parts(samples: Any, count: int) -> Iterator[tuple[int, Any]]:
    """The samples of each of `count` shards."""
    for number in range(count):
        yield number, samples[len(samples) * number // count : len(samples) * (number + 1) // count]


def write_mds(kind: str, directory: Path, target: Path) -> None:
    from PIL import Image
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{BLOCK_TOKENS}"} if kind == "tokens" else {"image": "jpeg", "label": "int"}
    with MDSWriter(out=str(target), columns=columns) as writer:
        if kind == "tokens":
            for block in blocks_of(directory):
                writer.write({"tokens": block})
        else:
            for encoded, label in jpegs_of(directory):
                writer.write({"image": Image.open(io.BytesIO(encoded)), "label": label})


def _litdata_tokens(number: int, directory: str) -> Iterator[Any]:
    import torch

    for at, part in parts(blocks_of(Path(directory)), TOKEN_SHARDS):
        if at == number:
            yield torch.from_numpy(part.ravel().copy())


def _litdata_images(number: int, directory: str) -> Iterator[Any]:
    for at, part in parts(jpegs_of(Path(directory)), IMAGE_SHARDS):
        if at == number:
            yield from part


def write_litdata(kind: str, directory: Path, target: Path) -> None:
    from litdata import TokensLoader, optimize

    if kind == "tokens":
        function, options = _litdata_tokens, {"chunk_size": BLOCK_TOKENS * 8192, "item_loader": TokensLoader()}
        inputs = list(range(TOKEN_SHARDS))
    else:
        function, options, inputs = _litdata_images, {"chunk_bytes": "64MB"}, list(range(IMAGE_SHARDS))
    optimize(functools.partial(function, directory=str(directory)), inputs, str(target), num_workers=1, **options)


def write_webdataset(kind: str, directory: Path, target: Path) -> None:
    target.mkdir()
    samples, count = (blocks_of(directory), TOKEN_SHARDS) if kind == "tokens" else (jpegs_of(directory), IMAGE_SHARDS)
    for number, part in parts(samples, count):
        with tarfile.open(target / f"{number:03d}.tar", "w") as archive:
            for at, sample in enumerate(part):
                files = {"bin": sample.tobytes()} if kind == "tokens" else {"jpg": sample[0], "cls": b"%d" % sample[1]}
                for suffix, content in files.items():
                    entry = tarfile.TarInfo(f"{number:03d}{at:06d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def _hf_dataset(kind: str, directory: Path) -> Any:
    import datasets

    if kind == "tokens":
        import pyarrow as pa

        blocks = blocks_of(directory)
        column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), BLOCK_TOKENS)
        return datasets.Dataset(pa.table({"tokens": column}))
    images = jpegs_of(directory)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {
        "image": [{"bytes": image, "path": None} for image, _ in images],
        "label": [label for _, label in images],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def write_hf(kind: str, directory: Path, target: Path) -> None:
    _hf_dataset(kind, directory).save_to_disk(str(target))


def write_parquet(kind: str, directory: Path, target: Path) -> None:
    target.mkdir()
    dataset, count = _hf_dataset(kind, directory), TOKEN_SHARDS if kind == "tokens" else IMAGE_SHARDS
    for number in range(count):
        dataset.shard(count, number, contiguous=True).to_parquet(str(target / f"{number:03d}.parquet"))


def write_arrayrecord(kind: str, directory: Path, target: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    target.mkdir()
    samples, count = (blocks_of(directory), TOKEN_SHARDS) if kind == "tokens" else (jpegs_of(directory), IMAGE_SHARDS)
    for number, part in parts(samples, count):
        # One record a group, as ArrayRecord's documentation advises for random access; nothing to compress in a JPEG.
        writer = ArrayRecordWriter(str(target / f"{number:03d}.arecord"), "group_size:1,uncompressed")
        for sample in part:
            writer.write(sample.tobytes() if kind == "tokens" else int(sample[1]).to_bytes(8, "little") + sample[0])
        writer.close()


WRITERS = {
    "mds": write_mds,
    "litdata": write_litdata,
    "webdataset": write_webdataset,
    "hf": write_hf,
    "parquet": write_parquet,
    "arrayrecord": write_arrayrecord,
}

if __name__ == "__main__":
    name, corpus_kind, folder = sys.argv[1:]
    WRITERS[name](corpus_kind, Path(folder), Path(folder) / f"{name}-{corpus_kind}")

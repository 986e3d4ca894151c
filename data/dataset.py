"""A prepared dataset opened for reading: random access by sample id, checked as it is read."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image

from data.config import DataConfig
from data.errors import CorruptData
from data.manifest import RESTORE, ImagesEntry, Manifest, Split, check_file, read_manifest
from data.shards import ImageShard, TokenShard, samples_of

SampleIds = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Fields = dict[str, npt.NDArray[Any]]

# What is copied out of a shard at once: it is hashed and put in its place while it is in the processor's cache.
PIECE_BYTES = 256 * 1024


@dataclass(frozen=True)
class DatasetFacts:
    """What a model or task must know of a dataset; None where it does not apply."""

    kind: Literal["tokens", "images"]
    vocabulary_size: int | None = None
    sequence_tokens: int | None = None
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    channels: int | None = None
    image_size_pixels: int | None = None


class Dataset(Protocol):
    """What the stream needs of a dataset."""

    @property
    def directory(self) -> Path: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def facts(self) -> DatasetFacts: ...
    @property
    def sample_bytes(self) -> int: ...

    def gather(self, sample_ids: SampleIds) -> tuple[Fields, Hashes]: ...


class TokenDataset:
    """Tokens of one split. A sample is T tokens and the one after them; samples never cross shards."""

    def __init__(self, directory: Path, manifest: Manifest, split: Split, sequence_tokens: int) -> None:
        assert manifest.tokenizer is not None
        assert manifest.dtype is not None
        self.directory = directory
        self.fingerprint = manifest.fingerprint
        self._dtype = manifest.dtype
        self._sequence_tokens = sequence_tokens
        self._entries = manifest.splits[split].shards
        for entry in self._entries:
            for file in entry.files():
                check_file(directory, file)
        counts = [samples_of(entry.tokens or 0, sequence_tokens) for entry in self._entries]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.samples = int(self._ends[-1])
        if self.samples == 0:
            longest = max(entry.tokens or 0 for entry in self._entries)
            raise ValueError(
                f"data.sequence_tokens {sequence_tokens} is longer than the {split} data of {directory}, whose longest "
                f"shard has {longest} tokens (one more than a sequence is needed); lower it or add data"
            )
        self._shards: list[TokenShard | None] = [None] * len(self._entries)
        self.sample_bytes = (sequence_tokens + 1) * np.dtype(manifest.dtype).itemsize
        self.facts = DatasetFacts(
            kind="tokens", vocabulary_size=manifest.tokenizer.vocabulary_size, sequence_tokens=sequence_tokens
        )

    def gather(self, sample_ids: SampleIds) -> tuple[Fields, Hashes]:
        """`tokens` (n, T + 1) in the stored dtype, and the xxh3-64 of each sample's bytes (n,)."""
        _check_range(sample_ids, self.samples)
        rows = np.empty(len(sample_ids), dtype=f"V{self.sample_bytes}")
        hashes = np.empty(len(sample_ids), dtype=np.uint64)
        for shard, slots, shard_rows in self._pieces(sample_ids):
            piece = shard.gather(shard_rows)
            hashes[slots] = _hash_rows(piece)
            rows[slots] = piece
        return {"tokens": rows.view(self._dtype).reshape(len(rows), self._sequence_tokens + 1)}, hashes

    def _pieces(self, sample_ids: SampleIds) -> Iterator[tuple[TokenShard, SampleIds, SampleIds]]:
        """Cut a request into pieces of one shard each: the shard, where its samples are wanted, and its rows."""
        shard_of = np.searchsorted(self._ends, sample_ids, side="right")
        # NumPy sorts 16-bit integers by radix, several times faster than wider ones.
        by_shard = np.argsort(shard_of.astype(np.uint16) if len(self._shards) < 1 << 16 else shard_of, kind="stable")
        counts = np.bincount(shard_of)
        piece_samples = max(1, PIECE_BYTES // self.sample_bytes)
        start = 0
        for number in np.flatnonzero(counts).tolist():
            shard, stop = self._shard(number), start + int(counts[number])
            first_id = self._ends[number] - shard.samples
            for at in range(start, stop, piece_samples):
                slots = by_shard[at : min(at + piece_samples, stop)]
                yield shard, slots, sample_ids[slots] - first_id
            start = stop

    def _shard(self, number: int) -> TokenShard:
        shard = self._shards[number]
        if shard is None:
            shard = TokenShard(self.directory, self._entries[number], self._dtype, self._sequence_tokens)
            self._shards[number] = shard
        return shard


class ImageDataset:
    """Images of one split, decoded with Pillow to one size and number of channels."""

    def __init__(self, directory: Path, manifest: Manifest, split: Split, config: DataConfig) -> None:
        assert manifest.images is not None
        self.directory = directory
        self.fingerprint = manifest.fingerprint
        self._entries = manifest.splits[split].shards
        for entry in self._entries:
            check_file(directory, entry.data)
        self._ends = np.cumsum([entry.documents for entry in self._entries], dtype=np.int64)
        self.samples = int(self._ends[-1])
        self._shards: list[ImageShard | None] = [None] * len(self._entries)
        channels, size = _image_shape(directory, manifest.images, config)
        self._mode = "L" if channels == 1 else "RGB"
        self._size = size
        self.sample_bytes = channels * size * size
        self.facts = DatasetFacts(
            kind="images",
            classes=len(manifest.images.class_names),
            class_names=manifest.images.class_names,
            channels=channels,
            image_size_pixels=size,
        )

    def gather(self, sample_ids: SampleIds) -> tuple[Fields, Hashes]:
        """`images` uint8 (n, C, H, W), `labels` int64 (n,), and the hash (n,) of each sample's bytes and label."""
        _check_range(sample_ids, self.samples)
        count, size, channels = len(sample_ids), self._size, len(self._mode)
        images = np.empty((count, size, size, channels), dtype=np.uint8)
        labels = np.empty(count, dtype=np.int64)
        hashes = np.empty(count, dtype=np.uint64)
        for slot, number in enumerate(np.searchsorted(self._ends, sample_ids, side="right").tolist()):
            shard = self._shard(number)
            row = int(sample_ids[slot] - (self._ends[number] - shard.rows))
            encoded, labels[slot] = shard.read(row)
            # The label is the seed, so that an altered label changes the hash too.
            hashes[slot] = xxhash.xxh3_64_intdigest(encoded, seed=int(labels[slot]))
            images[slot] = self._decode(encoded, int(sample_ids[slot])).reshape(size, size, channels)
        # (n, H, W, C) -> (n, C, H, W)
        return {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2)), "labels": labels}, hashes

    def _decode(self, encoded: memoryview, sample_id: int) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(encoded)) as stored:
                image = stored.convert(self._mode)
        except OSError as error:
            raise CorruptData(f"{self.directory}: image {sample_id} cannot be decoded ({error}); {RESTORE}") from None
        if image.size != (self._size, self._size):
            image = image.resize((self._size, self._size), Image.Resampling.BILINEAR)
        return np.asarray(image)

    def _shard(self, number: int) -> ImageShard:
        shard = self._shards[number]
        if shard is None:
            shard = self._shards[number] = ImageShard(self.directory, self._entries[number])
        return shard


def _hash_rows(rows: npt.NDArray[np.void]) -> Hashes:
    """The xxh3-64 of each of the rows (n,)."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, rows.tolist()), np.uint64, len(rows))


def _check_range(sample_ids: SampleIds, samples: int) -> None:
    if sample_ids.size and not (sample_ids.min() >= 0 and sample_ids.max() < samples):
        raise IndexError(f"sample ids reach from {sample_ids.min()} to {sample_ids.max()}; there are {samples} samples")


def _image_shape(directory: Path, entry: ImagesEntry, config: DataConfig) -> tuple[int, int]:
    """Channels and side in pixels, from the recipe or, where it leaves them open, as stored."""
    channels = config.image_channels or entry.channels
    if channels is None:
        raise ValueError(f"{directory}: grey and colour images are mixed; set data.image_channels to 1 or 3")
    if config.image_size_pixels is not None:
        return channels, config.image_size_pixels
    if entry.height_pixels is None or entry.height_pixels != entry.width_pixels:
        raise ValueError(f"{directory}: images are not squares of one size as stored; set data.image_size_pixels")
    return channels, entry.height_pixels


def open_dataset(directory: Path, config: DataConfig, split: Split) -> TokenDataset | ImageDataset:
    """Open one split of a prepared dataset.

    ValueError (CorruptData where the stored bytes are at fault): not a dataset, of a newer format, damaged, too short
    for `config.sequence_tokens`, or of images whose shape the recipe leaves open.
    """
    manifest = read_manifest(directory)
    if manifest.kind == "tokens":
        return TokenDataset(directory, manifest, split, config.sequence_tokens)
    return ImageDataset(directory, manifest, split, config)

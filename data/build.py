"""Building: the documents of a unit are tokenized or checked, and the units of a group become its shards."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from data.image_shards import ImageShard, ImageShardWriter
from data.manifest import ShardEntry, TokenizerEntry, check_shard
from data.pictures import GREY_MODES, decode
from data.shards import TokenShardWriter
from data.source_reading import Document, EncodedImage, UnitInput, read_unit
from data.store import LocalStore
from data.tokenizers import Tokenizer, open_tokenizer
from data.workspace import (
    Content,
    GroupRecord,
    PartEntry,
    PartName,
    Shape,
    UnitRecord,
    Workspace,
    common_shape,
    is_intact,
    tokenizer_hash,
)

# documents, tokens and bytes of a unit since the last call
Report = Callable[[int, int, int], None]

# Documents are tokenized together in batches of about this size: little in memory, and seldom told of.
BATCH_CHARACTERS = 1 << 19
IMAGES_PER_REPORT = 64


def split_of(content: bytes, validation_fraction: float) -> str:
    """The split of a document: a function of its content alone, so neither order nor neighbours matter."""
    key = hashlib.blake2b(content, digest_size=8, person=b"lockstep split").digest()
    return "validation" if int.from_bytes(key, "little") < int(validation_fraction * 2**64) else "train"


@dataclass(frozen=True)
class Job:
    """What every task of a preparation needs to know. `tokenizer` lies in the workspace's dataset/; None for images."""

    root: str
    validation_fraction: float | None
    shard_bytes: int
    dtype: Literal["uint16", "uint32"] | None
    tokenizer: TokenizerEntry | None


@dataclass
class _Part:
    """One of a unit's files, written as it grows. It need not reach the disk: its hash tells whether it did."""

    path: Path
    file: BinaryIO
    hash: Any = field(default_factory=xxhash.xxh3_128)
    bytes: int = 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self.file.write(view)
        self.hash.update(view)
        self.bytes += len(view)


class Builder:
    """Carries out the tasks of one job in one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.workspace = Workspace(Path(job.root))
        self.tokenizer_hash = tokenizer_hash(job.tokenizer)
        self._tokenizer: Tokenizer | None = None
        if job.tokenizer is not None:
            self._tokenizer = open_tokenizer(LocalStore(self.workspace.dataset), job.tokenizer)

    def build_unit(self, number: int, unit: UnitInput, report: Report) -> UnitRecord:
        """Read a unit and write its documents, those of each split one after the other, and then its record."""
        with contextlib.ExitStack() as files:
            parts: dict[str, dict[PartName, _Part]] = {}

            def part(split: str, name: PartName) -> _Part:
                of_split = parts.setdefault(split, {})
                if name not in of_split:
                    path = self.workspace.temporary(self.workspace.part_path(number, split, name).name)
                    of_split[name] = _Part(path, files.enter_context(path.open("wb")))
                return of_split[name]

            documents = read_unit(unit)
            if self._tokenizer is not None:
                content = self._add_texts(documents, unit.into, part, report)  # type: ignore[arg-type]
            else:
                content = self._add_images(documents, unit.into, part, report)  # type: ignore[arg-type]
        for split, of_split in parts.items():
            for name, written in of_split.items():
                self.workspace.publish(written.path, self.workspace.part_path(number, split, name))
        record = UnitRecord(
            unit=number,
            tokenizer=self.tokenizer_hash,
            content=content,
            splits={
                split: {name: PartEntry(bytes=p.bytes, xxh3=p.hash.hexdigest()) for name, p in of_split.items()}
                for split, of_split in parts.items()
            },
        )
        self.workspace.write_record(record, self.workspace.unit_path(number))
        return record

    def _split(self, content: bytes, into: str | None) -> str:
        if into is not None:
            return into
        assert self.job.validation_fraction is not None
        return split_of(content, self.job.validation_fraction)

    def _add_texts(
        self, texts: Iterator[Document], into: str | None, part: Callable[[str, PartName], _Part], report: Report
    ) -> Content:
        assert self._tokenizer is not None
        end = np.array([self._tokenizer.end_of_document], dtype=self._tokenizer.dtype)
        content, lengths = Content(), dict[str, int]()
        for batch, empty in _batches(texts):
            content = Content.together([content, Content(empty=empty)])
            if not batch:
                continue
            encoded = self._tokenizer.encode_batch([document.text for document in batch])
            pieces: dict[str, list[npt.NDArray[Any]]] = {}
            size_bytes = 0
            for document, tokens in zip(batch, encoded, strict=True):
                text = utf8(document)
                size_bytes += len(text)
                pieces.setdefault(self._split(text, into), []).extend((tokens, end))
            for split, arrays in pieces.items():
                sizes = np.array([len(array) for array in arrays], dtype="<u8").reshape(-1, 2).sum(axis=1)
                ends = np.cumsum(sizes, dtype="<u8") + np.uint64(lengths.get(split, 0))
                lengths[split] = int(ends[-1])
                part(split, "data").write(np.concatenate(arrays).astype(end.dtype.newbyteorder("<"), copy=False))
                part(split, "ends").write(ends)
            count = sum(len(array) for arrays in pieces.values() for array in arrays)
            report(len(batch), count, size_bytes)
            content = Content.together([content, Content(documents=len(batch), tokens=count, size_bytes=size_bytes)])
        return content

    def _add_images(
        self, images: Iterator[EncodedImage], into: str | None, part: Callable[[str, PartName], _Part], report: Report
    ) -> Content:
        content, lengths = Content(), dict[str, int]()
        while some := list(itertools.islice(images, IMAGES_PER_REPORT)):
            shape = common_shape([_shape(image) for image in some])  # each is decoded once, as a check
            for image in some:
                split = self._split(image.encoded, into)
                lengths[split] = lengths.get(split, 0) + len(image.encoded)
                part(split, "data").write(image.encoded)
                part(split, "ends").write(np.array([lengths[split]], dtype="<u8"))
                part(split, "labels").write(np.array([image.label], dtype="<i8"))
            size_bytes = sum(len(image.encoded) for image in some)
            report(len(some), 0, size_bytes)
            highest = max(image.label for image in some)
            found = Content(documents=len(some), size_bytes=size_bytes, shape=shape, highest_label=highest)
            content = Content.together([content, found])
        return content

    def build_group(self, group: int, units: Iterable[int]) -> GroupRecord | list[int]:
        """Write a group's shards and its record, and remove its units; or tell which units must be made again."""
        series = _Series(self, group)
        contents: list[Content] = []
        records = [(unit, self.workspace.unit_record(unit, self.tokenizer_hash)) for unit in units]
        bad = [unit for unit, record in records if record is None or not self._parts_intact(record)]
        if bad:
            return bad
        with contextlib.closing(series):
            for _, record in records:
                assert record is not None
                contents.append(record.content)
                for split in sorted(record.splits):
                    series.extend(split, *self._open_parts(record, split))
            splits = series.finish()
        made = GroupRecord(
            group=group, tokenizer=self.tokenizer_hash, content=Content.together(contents), splits=splits
        )
        self.workspace.write_record(made, self.workspace.group_path(group))
        for _, record in records:
            assert record is not None
            self.workspace.drop_unit(record)
        return made

    def _parts_intact(self, record: UnitRecord) -> bool:
        """Whether a unit's files are as they were written, and hold what the record says."""
        documents = tokens = 0
        for split, parts in record.splits.items():
            if set(parts) != ({"data", "ends"} if self.job.dtype else {"data", "ends", "labels"}):
                return False
            for name, entry in parts.items():
                try:
                    content = _map(self.workspace.part_path(record.unit, split, name), "u1")
                except (OSError, ValueError):
                    return False
                if content.size != entry.bytes or xxhash.xxh3_128_hexdigest(content.data) != entry.xxh3:
                    return False
            if parts["ends"].bytes % 8 or (self.job.dtype and parts["data"].bytes % np.dtype(self.job.dtype).itemsize):
                return False
            data, ends, labels = self._open_parts(record, split)
            rising = bool((ends[1:] > ends[:-1]).all()) and ends[0] > 0
            if not rising or int(ends[-1]) != data.size or (labels is not None and labels.size != ends.size):
                return False
            documents += ends.size
            tokens += data.size if self.job.dtype else 0
        return (documents, tokens) == (record.content.documents, record.content.tokens)

    def _open_parts(
        self, record: UnitRecord, split: str
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64], npt.NDArray[np.int64] | None]:
        def part(name: str, dtype: str) -> npt.NDArray[Any]:
            return _map(self.workspace.part_path(record.unit, split, name), dtype)

        data = part("data", "u1" if self.job.dtype is None else np.dtype(self.job.dtype).newbyteorder("<").str)
        return data, part("ends", "<u8"), part("labels", "<i8") if self.job.dtype is None else None

    def verify_group(self, group: int) -> GroupRecord | None:
        """A finished group whose every byte is as it was written; None if it must be made again."""
        record = self.workspace.group_record(group, self.tokenizer_hash)
        if record is None:
            return None
        for split, shards in record.splits.items():
            for number, shard in enumerate(shards):
                expected = [stem_of(split, group, number) + suffix for suffix in self._suffixes]
                if [file.name for file in shard.files()] != expected:
                    return None
                if not all(is_intact(self.workspace.dataset, file) for file in shard.files()):
                    return None
                if not self._counts_agree(shard):
                    return None
        return record

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return (".arrow",) if self.job.dtype is None else (".bin", ".docs")

    def _counts_agree(self, shard: ShardEntry) -> bool:
        try:
            check_shard(shard, self.job.dtype)
            if self.job.dtype is None:
                # How many classes there are is known once all groups are made: any label will do here.
                image_shard = ImageShard(LocalStore(self.workspace.dataset), shard, classes=1 << 62)
                for row in range(shard.documents):
                    image_shard.read(row)
        except (ValueError, IndexError):  # CorruptData among them
            return False
        return True


def stem_of(split: str, group: int, number: int) -> str:
    """The name, without its suffix, of the shard `number` of a group: `train-00003`, `train-00003_001`, ..."""
    return f"{split}-{group:05d}" + (f"_{number:03d}" if number else "")


class _Series:
    """The shards of a group: in each split, one is closed before a document would make it larger than it may be."""

    def __init__(self, builder: Builder, group: int) -> None:
        self._workspace = builder.workspace
        self._job = builder.job
        self._group = group
        self._writers: dict[str, TokenShardWriter | ImageShardWriter] = {}
        self._entries: dict[str, list[ShardEntry]] = {}

    def extend(
        self,
        split: str,
        data: npt.NDArray[Any],
        ends: npt.NDArray[np.uint64],
        labels: npt.NDArray[np.int64] | None,
    ) -> None:
        """Append documents to a split: `ends` counts elements of `data`."""
        # As signed integers: differences of unsigned ones would wrap.
        stops = ends.astype(np.int64)
        first = 0
        while first < len(stops):
            writer = self._writers.get(split) or self._begin(split)
            start = int(stops[first - 1]) if first else 0
            room = (self._job.shard_bytes - writer.bytes) // data.itemsize
            last = int(np.searchsorted(stops, start + room, side="right"))
            if last <= first:
                if writer.bytes:
                    self._end(split)
                    continue
                last = first + 1  # larger than a shard may be: it has one to itself
            part, inside = data[start : int(stops[last - 1])], stops[first:last] - start
            if isinstance(writer, TokenShardWriter):
                writer.extend(part, inside.astype(np.uint64))
            else:
                assert labels is not None
                begins = [0, *inside[:-1].tolist()]
                for begin, end, label in zip(begins, inside.tolist(), labels[first:last].tolist(), strict=True):
                    writer.add(part[begin:end].tobytes(), label)
            first = last

    def _begin(self, split: str) -> TokenShardWriter | ImageShardWriter:
        entries = self._entries.setdefault(split, [])
        stem = self._workspace.temporary(stem_of(split, self._group, len(entries)))
        dtype = self._job.dtype
        self._writers[split] = ImageShardWriter(stem) if dtype is None else TokenShardWriter(stem, dtype)
        return self._writers[split]

    def _end(self, split: str) -> None:
        entry = self._writers.pop(split).finish()
        for file in entry.files():
            self._workspace.publish(self._workspace.temporary(file.name), self._workspace.dataset / file.name)
        self._entries[split].append(entry)

    def finish(self) -> dict[str, tuple[ShardEntry, ...]]:
        """Close the last shards."""
        for split in list(self._writers):
            self._end(split)
        return {split: tuple(entries) for split, entries in self._entries.items()}

    def close(self) -> None:
        """Give up what is open."""
        for writer in self._writers.values():
            writer.close()


def _map(path: Path, dtype: str) -> npt.NDArray[Any]:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _batches(texts: Iterator[Document]) -> Iterator[tuple[list[Document], int]]:
    """Batches of texts, and how many empty ones were left out of each: there is nothing to learn from many `__init__.py`."""
    batch: list[Document] = []
    characters = empty = 0
    for document in texts:
        if not document.text:
            empty += 1
            continue
        utf8(document)
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch, empty
            batch, characters, empty = [], 0, 0
    if batch or empty:
        yield batch, empty


def utf8(document: Document) -> bytes:
    """A document's bytes; a ValueError for text that is none."""
    try:
        return document.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"source {document.where}: character {error.start} is half of a surrogate pair, which no text can hold; "
            "correct the document or remove it"
        ) from None


def _shape(image: EncodedImage) -> Shape:
    """Channels, height and width of an image that can be decoded; a ValueError for one that cannot."""
    try:
        decoded = decode(image.encoded)
    except ValueError as error:
        raise ValueError(f"source {image.where}: cannot be decoded ({error}); convert the file or remove it") from None
    return 1 if decoded.mode in GREY_MODES else 3, decoded.height, decoded.width

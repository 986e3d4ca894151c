"""Building a dataset in an empty directory: documents are split, tokenized or checked, and written to shards."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.config import DataConfig
from data.manifest import SPLITS, ImagesEntry, Manifest, ShardEntry, SourceEntry, Split, SplitEntry
from data.pictures import GREY_MODES, decode
from data.shards import ImageShardWriter, TokenShardWriter
from data.sources import Document, EncodedImage, ImageSource, TextSource
from data.tokenizers import ByteTokenizer, Tokenizer, load_published, tokenizer_entry, train_bpe

Progress = Callable[[int, int], None]

# Documents are tokenized together in groups of about this size: enough for the library's threads, little in memory.
GROUP_CHARACTERS = 4_000_000


def split_of(content: bytes, validation_fraction: float) -> Split:
    """The split of a document: a function of its content alone, so neither order nor neighbours matter."""
    key = hashlib.blake2b(content, digest_size=8, person=b"lockstep split").digest()
    return "validation" if int.from_bytes(key, "little") < int(validation_fraction * 2**64) else "train"


@dataclass
class _ShardSeries:
    """The shards of one split: a shard is closed before a document would make it larger than it may be."""

    new_writer: Callable[[Path], TokenShardWriter | ImageShardWriter]
    workspace: Path
    split: Split
    shard_bytes: int
    entries: list[ShardEntry] = field(default_factory=list)
    writer: TokenShardWriter | ImageShardWriter | None = None

    def writer_for(self, document_bytes: int) -> TokenShardWriter | ImageShardWriter:
        """The writer that a document of so many bytes goes to."""
        if self.writer is not None and self.writer.bytes + document_bytes > self.shard_bytes:
            self._end_shard()
        if self.writer is None:
            self.writer = self.new_writer(self.workspace / f"{self.split}-{len(self.entries):05d}")
        return self.writer

    def _end_shard(self) -> None:
        assert self.writer is not None
        self.entries.append(self.writer.finish())
        self.writer = None

    def finish(self) -> SplitEntry:
        """Close the last shard and sum up."""
        self._end_shard()
        tokens = [entry.tokens for entry in self.entries if entry.tokens is not None]
        documents = sum(entry.documents for entry in self.entries)
        return SplitEntry(documents=documents, tokens=sum(tokens) if tokens else None, shards=tuple(self.entries))

    def close(self) -> None:
        """Give up what is open."""
        if self.writer is not None:
            self.writer.close()


@contextlib.contextmanager
def _series(
    config: DataConfig, workspace: Path, new_writer: Callable[[Path], TokenShardWriter | ImageShardWriter]
) -> Iterator[dict[Split, _ShardSeries]]:
    series: dict[Split, _ShardSeries] = {
        split: _ShardSeries(new_writer, workspace, split, config.shard_bytes) for split in SPLITS
    }
    try:
        yield series
    finally:
        for one in series.values():
            one.close()


def _finish(series: dict[Split, _ShardSeries], config: DataConfig, what: str, count: int) -> dict[Split, SplitEntry]:
    empty = [split for split in SPLITS if series[split].writer is None]
    if len(empty) == len(SPLITS):
        raise ValueError(f"source {config.source}: empty, there are no {what} in it; correct data.source")
    if empty:
        raise ValueError(
            f"source {config.source}: no {what} for {empty[0]} with data.validation_fraction "
            f"{config.validation_fraction} (each of the {count} goes to one side, by its hash); change the "
            f"fraction or give more {what}"
        )
    return {split: one.finish() for split, one in series.items()}


def build_tokens(source: TextSource, config: DataConfig, workspace: Path, progress: Progress | None) -> Manifest:
    """Tokenize a text source into shards in `workspace`. BPE is trained on the training documents alone."""
    tokenizer = _make_tokenizer(source, config)
    entry = tokenizer_entry(tokenizer, config.tokenizer, workspace)
    documents = size_bytes = 0
    with _series(config, workspace, lambda stem: TokenShardWriter(stem, tokenizer.dtype)) as series:
        for group in _groups(source):
            encoded = tokenizer.encode_batch([document.text for document in group])
            for document, tokens in zip(group, encoded, strict=True):
                content = _utf8(document)
                writer = series[split_of(content, config.validation_fraction)].writer_for(
                    tokens.nbytes + tokens.itemsize
                )
                assert isinstance(writer, TokenShardWriter)
                writer.add(tokens, tokenizer.end_of_document)
                documents += 1
                size_bytes += len(content)
            if progress:
                progress(documents, size_bytes)
        splits = _finish(series, config, "documents", documents)
    return Manifest(
        kind="tokens",
        source=SourceEntry(address=config.source, description=source.description),
        validation_fraction=config.validation_fraction,
        shard_bytes=config.shard_bytes,
        dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
        tokenizer=entry,
        splits=splits,
    )


def _documents(source: TextSource) -> Iterator[Document]:
    """The source's documents but the empty ones, which hold nothing to learn from (many `__init__.py`)."""
    return (document for document in source.documents() if document.text)


def _groups(source: TextSource) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in _documents(source):
        _utf8(document)
        group.append(document)
        characters += len(document.text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _utf8(document: Document) -> bytes:
    try:
        return document.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"source {document.where}: character {error.start} is half of a surrogate pair, which no text can hold; "
            "correct the document or remove it"
        ) from None


def _make_tokenizer(source: TextSource, config: DataConfig) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if not config.tokenizer.startswith("bpe:"):
        return load_published(config.tokenizer)
    training = (
        document.text
        for document in _documents(source)
        if split_of(_utf8(document), config.validation_fraction) == "train"
    )
    return train_bpe(config.tokenizer, training)


def build_images(source: ImageSource, config: DataConfig, workspace: Path, progress: Progress | None) -> Manifest:
    """Write the images of a source into shards in `workspace`, as they are encoded; each is decoded once as a check."""
    images = size_bytes = highest_label = 0
    shapes: set[tuple[Literal[1, 3], int, int]] = set()
    with _series(config, workspace, ImageShardWriter) as series:
        for image in source.images():
            shapes.add(_shape(image))
            writer = series[split_of(image.encoded, config.validation_fraction)].writer_for(len(image.encoded))
            assert isinstance(writer, ImageShardWriter)
            writer.add(image.encoded, image.label)
            highest_label = max(highest_label, image.label)
            images += 1
            size_bytes += len(image.encoded)
            if progress and images % 256 == 0:
                progress(images, size_bytes)
        splits = _finish(series, config, "images", images)
    if progress:
        progress(images, size_bytes)
    names = source.class_names or tuple(str(label) for label in range(highest_label + 1))
    if highest_label >= len(names):
        raise ValueError(f"source {config.source}: label {highest_label}, but there are only {len(names)} classes")
    return Manifest(
        kind="images",
        source=SourceEntry(address=config.source, description=source.description),
        validation_fraction=config.validation_fraction,
        shard_bytes=config.shard_bytes,
        images=_common_shape(names, shapes),
        splits=splits,
    )


def _shape(image: EncodedImage) -> tuple[Literal[1, 3], int, int]:
    """Channels, height and width of an image that can be decoded; a ValueError for one that cannot."""
    try:
        decoded = decode(image.encoded)
    except ValueError as error:
        raise ValueError(f"source {image.where}: cannot be decoded ({error}); convert the file or remove it") from None
    return 1 if decoded.mode in GREY_MODES else 3, decoded.height, decoded.width


def _common_shape(names: tuple[str, ...], shapes: set[tuple[Literal[1, 3], int, int]]) -> ImagesEntry:
    channels, heights, widths = ({shape[axis] for shape in shapes} for axis in range(3))
    return ImagesEntry(
        class_names=names,
        channels=channels.pop() if len(channels) == 1 else None,  # type: ignore[arg-type]
        height_pixels=heights.pop() if len(heights) == 1 else None,
        width_pixels=widths.pop() if len(widths) == 1 else None,
    )

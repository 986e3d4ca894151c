"""A source that is read as it comes, without preparation: its documents, its identity, and its validation samples."""

import hashlib
import json
from collections.abc import Iterator
from typing import Literal, Protocol

import datasets
import numpy as np
import numpy.typing as npt
import xxhash
from datasets.distributed import split_dataset_by_node
from PIL import Image

from data.augment import evaluated
from data.build import split_of
from data.config import DataConfig
from data.errors import CorruptData, Unavailable
from data.hub import HubStream, open_hub_stream
from data.pictures import Mode, decode
from data.plan import STREAMED_ORDER
from data.samples import Choices, DatasetFacts, Fields, Hashes, SampleIds, check_range
from data.source_reading import Document, EncodedImage
from data.tokenizers import ByteTokenizer, SubwordTokenizer, Tokenizer, load_published

Example = Document | EncodedImage
Units = npt.NDArray[np.generic]
"""Tokens, or encoded images as objects (n,): what samples are cut from."""

# A part that has at least so many shards may have one more than another: below that, their epochs would differ too much.
UNEVEN_SHARDS = 8


class Form(Protocol):
    """How documents become samples: sample k is `stride + overlap` units from unit k x stride on."""

    facts: DatasetFacts
    stride: int
    overlap: int

    def content(self, example: Example) -> bytes:
        """What a document is to its hash, which decides its split."""
        ...

    def units(self, examples: list[Example]) -> Units:
        """The units (n,) of documents, one after the other."""
        ...

    def samples(self, units: Units, count: int) -> tuple[Fields, Hashes]:
        """The fields of `count` samples cut from units, as a dataset gives them, and the hash (count,) of each."""
        ...


class TokenForm:
    """Tokens and the end of each document, cut into sequences of T tokens and the one after them; nothing is padded."""

    overlap = 1

    def __init__(self, tokenizer: Tokenizer, sequence_tokens: int) -> None:
        self.tokenizer, self.stride = tokenizer, sequence_tokens
        self.facts = DatasetFacts(
            kind="tokens", vocabulary_size=tokenizer.vocabulary_size, sequence_tokens=sequence_tokens
        )

    def content(self, example: Example) -> bytes:
        assert isinstance(example, Document)
        try:
            return example.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"source {example.where}: character {error.start} is half of a surrogate pair, which no text can hold"
            ) from None

    def units(self, examples: list[Example]) -> Units:
        encoded = self.tokenizer.encode_batch([example.text for example in examples if isinstance(example, Document)])
        end = np.array([self.tokenizer.end_of_document], dtype=self.tokenizer.dtype)
        return np.concatenate([piece for tokens in encoded for piece in (tokens, end)])

    def samples(self, units: Units, count: int) -> tuple[Fields, Hashes]:
        """`tokens` (count, T + 1) and the xxh3-64 of each sample's bytes."""
        length = self.stride + 1
        tokens = np.empty((count, length), dtype=self.tokenizer.dtype)
        for row in range(count):
            tokens[row] = units[row * self.stride : row * self.stride + length]
        rows = tokens.view(f"V{length * tokens.itemsize}").ravel()
        return {"tokens": tokens}, np.fromiter(map(xxhash.xxh3_64_intdigest, rows.tolist()), np.uint64, count)


class ImageForm:
    """Encoded images with their class, decoded with Pillow to one size and number of channels."""

    stride, overlap = 1, 0

    def __init__(self, class_names: tuple[str, ...], config: DataConfig) -> None:
        channels, size_pixels = config.image_channels, config.image_size_pixels
        assert channels is not None
        assert size_pixels is not None
        self._mode: Mode = "L" if channels == 1 else "RGB"
        self._size, self._shorter_side = size_pixels, config.shorter_side_pixels
        self._resample = Image.Resampling[config.interpolation.upper()]
        self.facts = DatasetFacts(
            kind="images",
            classes=len(class_names),
            class_names=class_names,
            channels=channels,
            image_size_pixels=size_pixels,
        )

    def content(self, example: Example) -> bytes:
        assert isinstance(example, EncodedImage)
        return example.encoded

    def units(self, examples: list[Example]) -> Units:
        units = np.empty(len(examples), dtype=object)
        units[:] = examples
        return units

    def samples(self, units: Units, count: int) -> tuple[Fields, Hashes]:
        """`images` uint8 (count, C, H, W), `labels` int64 (count,), and the hash of each image's bytes and label."""
        images = np.empty((count, len(self._mode), self._size, self._size), dtype=np.uint8)
        labels, hashes = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.uint64)
        for row, image in enumerate(units.tolist()):
            images[row], labels[row] = self._decode(image), image.label
            hashes[row] = xxhash.xxh3_64_intdigest(image.encoded, seed=image.label)
        return {"images": images, "labels": labels}, hashes

    def _decode(self, image: EncodedImage) -> npt.NDArray[np.uint8]:
        if image.label >= len(self.facts.class_names):
            raise CorruptData(
                f"source {image.where}: label {image.label}, but there are {self.facts.classes} classes; correct the data"
            )
        try:
            decoded = decode(image.encoded, self._mode)
        except ValueError as error:
            raise CorruptData(f"source {image.where}: an image that cannot be decoded ({error}); remove it") from None
        square = evaluated(decoded, self._size, self._shorter_side, self._resample)
        # (H, W, C) or, grey, (H, W) -> (C, H, W)
        return np.moveaxis(np.atleast_3d(np.asarray(square)), 2, 0)


class StreamedSource:
    """A `datasets` stream that a run reads as it comes. Ranks read parts of it, see data/parts.py."""

    def __init__(self, config: DataConfig) -> None:
        """Opens `config.source`. ValueError where it cannot be loaded, or the recipe does not fit it."""
        [given] = config.sources
        self.address = given.given
        self.packing_identity: str | None = None
        self._stream: HubStream = open_hub_stream(given.address)
        self._validation_fraction = config.validation_fraction
        self.shuffle_examples = config.shuffle_buffer_samples
        self.tokenizer = None if self._stream.label else _tokenizer(config.tokenizer)
        if self.tokenizer is not None:
            config.refuse_options_of_other_data("text", f"data.source={self.address}")
            self.form: Form = TokenForm(self.tokenizer, config.sequence_tokens)
        else:
            config.refuse_options_of_other_data("images", f"data.source={self.address}")
            self.form = _image_form(self._stream, config)
        self.facts = self.form.facts
        self.fingerprint = _fingerprint(config, self._stream, self.tokenizer)

    @property
    def what(self) -> str:
        """What the source holds, in the plural."""
        return "documents" if self.tokenizer is not None else "images"

    @property
    def shards(self) -> int:
        """The files, or parts of files, that `datasets` can read side by side."""
        return int(self._stream.dataset.num_shards)

    def shares_shards(self, parts: int) -> bool:
        """Whether each of so many parts reads shards of its own; if not, all read everything and keep one example in
        `parts`."""
        return self.shards % parts == 0 or self.shards >= UNEVEN_SHARDS * parts

    def part(self, number: int, parts: int) -> datasets.IterableDataset:
        """Part `number` of `parts`: together they hold every example once."""
        strategy: Literal["shards", "examples"] = "shards" if self.shares_shards(parts) else "examples"
        # The one shard of one is the whole stream again, with a state of its own: parts that are split from one stream and read
        # side by side would all count in the same state, and a resume would lose examples (datasets 5.2.0).
        whole = self._stream.dataset.shard(num_shards=1, index=0)
        return split_dataset_by_node(whole, number, parts, strategy)

    def read(self, part: datasets.IterableDataset, split: str) -> Iterator[tuple[Example, bytes] | None]:
        """The examples of a part, each with its content; None for one that is empty or belongs to another split.

        CorruptData where the source holds what cannot be read, whichever library finds that.
        """
        try:
            for example in self._stream.read(part, f"hf:{self._stream.name}"):
                content = self.form.content(example)
                yield (example, content) if content and split_of(content, self._validation_fraction) == split else None
        except Unavailable:
            raise
        except ValueError as error:
            told = " ".join(str(error).split())
            raise CorruptData(told if told.startswith("source ") else f"source {self.address}: {told}") from error

    def validation(self, samples: int) -> "CollectedSamples":
        """The first `samples` validation samples from the beginning of the stream, or as many as there are."""
        chosen: list[Units] = []
        read = units = 0
        wanted = samples * self.form.stride + self.form.overlap
        for found in self.read(self.part(0, 1), "validation"):
            read += 1
            if found is not None:
                chosen.append(self.form.units([found[0]]))
                units += len(chosen[-1])
            if units >= wanted:
                break
        count = min(samples, (units - self.form.overlap) // self.form.stride)
        if count < 1:
            raise ValueError(
                f"source {self.address}: no validation sample among its {read} {self.what} with data.validation_fraction "
                f"{self._validation_fraction}; raise the fraction, lower data.sequence_tokens, or give more data"
            )
        taken = np.concatenate(chosen)[: count * self.form.stride + self.form.overlap]
        return CollectedSamples(self, *self.form.samples(taken, count), read)


class CollectedSamples:
    """Validation samples that are kept in memory, as a dataset."""

    mixes = False
    packing_identity: str | None = None
    looks_ahead_samples = 0

    def __init__(self, source: StreamedSource, fields: Fields, hashes: Hashes, examples_read: int) -> None:
        self.address, self.fingerprint, self.facts = source.address, source.fingerprint, source.facts
        self._fields, self._hashes, self.examples_read = fields, hashes, examples_read
        self.samples = len(hashes)
        self.shard_samples = np.array([self.samples], dtype=np.int64)
        size_bytes = sum(field.nbytes for field in fields.values())
        self.shard_bytes = np.array([size_bytes], dtype=np.int64)
        self.sample_bytes = size_bytes // self.samples

    def gather(self, sample_ids: SampleIds, choices: Choices | None = None) -> tuple[Fields, Hashes]:
        hashes = self.content_hashes(sample_ids)
        return {name: field[sample_ids] for name, field in self._fields.items()}, hashes

    def content_hashes(self, sample_ids: SampleIds) -> Hashes:
        check_range(sample_ids, self.samples)
        return self._hashes[sample_ids]

    def mix(self, fields: Fields, partners: SampleIds, words: Hashes) -> Fields:
        raise AssertionError("validation samples are not mixed")

    def expect(self, start: int, stop: int, sample_ids: SampleIds) -> None:
        """Nothing: the samples are here."""

    def reached(self, position: int) -> None:
        """Nothing: the samples stay."""


def _tokenizer(spec: str) -> Tokenizer:
    return ByteTokenizer() if spec == "bytes" else load_published(spec)


def _image_form(stream: HubStream, config: DataConfig) -> ImageForm:
    if not stream.class_names:
        raise ValueError(
            f"source {config.source_text}: column {stream.label!r} holds numbers and not class names, so that a stream cannot "
            "know how many classes there are; give it a ClassLabel column, or prepare it"
        )
    if config.image_channels is None or config.image_size_pixels is None:
        raise ValueError(
            f"source {config.source_text}: with data.streaming=true the shape of its images is not known beforehand; set "
            "data.image_size_pixels and data.image_channels"
        )
    return ImageForm(stream.class_names, config)


def _fingerprint(config: DataConfig, stream: HubStream, tokenizer: Tokenizer | None) -> str:
    """sha256 of the address, of what `datasets` knows of the source's state, and of the options that shape its samples."""
    identity = {
        "order": STREAMED_ORDER,
        "source": config.source_text,
        "state": stream.state,
        "classes": stream.class_names,
        "validation_fraction": config.validation_fraction,
        "shuffle_buffer_samples": config.shuffle_buffer_samples,
        "image": [config.image_channels, config.image_size_pixels, config.shorter_side_pixels, config.interpolation],
        "tokenizer": tokenizer.to_json() if isinstance(tokenizer, SubwordTokenizer) else None,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

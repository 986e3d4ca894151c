"""`manifest.json`: what a prepared dataset consists of, and the hashes that everything read from it is checked against.

The file is `{"fingerprint": ..., "manifest": {...}}`; the fingerprint is the sha256 of the manifest's canonical JSON
(sorted keys, no white space) and is the identity of the dataset. The file is written in one form only, and read back
only in that form, so that no altered byte goes unseen.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.config import SPLIT_PATTERN
from data.errors import CorruptData

FORMAT_VERSION: Literal[2] = 2
MANIFEST_NAME = "manifest.json"
BLOCK_BYTES = 1 << 20
_LONGEST_NAME = 255
_TOKEN_BYTES = {"uint16": 2, "uint32": 4}
RESTORE = "re-run `lockstep prepare` into a new directory or restore the file"


def _plain_name(name: str) -> str:
    if name != PurePath(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the plain name of a file in the dataset's directory")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"a file's name of {len(name)} characters is longer than any file system takes")
    return name


PlainName = Annotated[str, AfterValidator(_plain_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Field(ge=1, lt=1 << 62)]
Split = Annotated[str, Field(pattern=SPLIT_PATTERN)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Entry):
    """One file: its size, its sha256, and the xxh3-64 of each of its blocks of 1 MiB (the last may be shorter)."""

    name: PlainName
    bytes: Count
    sha256: Sha256
    blocks: tuple[Xxh3, ...]

    @model_validator(mode="after")
    def _a_hash_for_each_block(self) -> "FileEntry":
        if len(self.blocks) != -(-self.bytes // BLOCK_BYTES):
            raise ValueError(f"{self.name}: {len(self.blocks)} block hashes do not cover {self.bytes} bytes")
        return self


class ShardEntry(_Entry):
    """One shard. Tokens: `data` is the `.bin`, `docs` the ends of its documents in tokens, uint64 little-endian.

    Images: `data` is an Arrow IPC file of `documents` rows; `batch_offsets` are the byte offsets at which its record
    batches begin, and the one at which the last ends, so that each can be checked before Arrow parses it.
    """

    documents: Count
    tokens: Count | None = None
    data: FileEntry
    docs: FileEntry | None = None
    batch_offsets: tuple[int, ...] | None = None

    def files(self) -> Iterator[FileEntry]:
        """The shard's files."""
        yield self.data
        if self.docs is not None:
            yield self.docs


class SplitEntry(_Entry):
    """The shards of one split, in stored order, and their counts; `tokens` is None for images."""

    documents: Count
    tokens: Count | None = None
    shards: tuple[ShardEntry, ...] = Field(min_length=1)


class TokenizerEntry(_Entry):
    """The tokenizer the tokens were made with; `file` is None for bytes, which need none."""

    spec: str
    file: FileEntry | None = None
    vocabulary_size: Count
    end_of_document: Annotated[int, Field(ge=0)]


class ImagesEntry(_Entry):
    """What holds for all images as stored; None where they differ. Class k is `class_names[k]`."""

    class_names: tuple[str, ...] = Field(min_length=1)
    channels: Literal[1, 3] | None
    height_pixels: Count | None
    width_pixels: Count | None


class SourceEntry(_Entry):
    """Where documents came from: the address as given, SPLIT= included, and what it stood for."""

    address: str
    description: str


class Manifest(_Entry):
    """A prepared dataset. `tokenizer` and `dtype` for tokens, `images` for images.

    `validation_fraction` is None where every source went into one split as a whole.
    """

    format_version: Literal[2] = FORMAT_VERSION
    kind: Literal["tokens", "images"]
    sources: tuple[SourceEntry, ...] = Field(min_length=1)
    validation_fraction: float | None
    shard_bytes: Count
    dtype: Literal["uint16", "uint32"] | None = None
    tokenizer: TokenizerEntry | None = None
    images: ImagesEntry | None = None
    splits: dict[Split, SplitEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _counts_agree(self) -> "Manifest":
        tokens = self.kind == "tokens"
        if tokens != (self.tokenizer is not None) or tokens != (self.dtype is not None) or tokens == bool(self.images):
            raise ValueError(f"a dataset of {self.kind} has the wrong parts")
        names = [entry.name for entry in self.files()]
        if len(set(names)) != len(names):
            raise ValueError("two files have one name")
        for split in self.splits.values():
            if split.documents != sum(shard.documents for shard in split.shards):
                raise ValueError("a split's documents are not the sum of its shards'")
            if split.tokens != (sum(shard.tokens or 0 for shard in split.shards) if tokens else None):
                raise ValueError("a split's tokens are not the sum of its shards'")
            for shard in split.shards:
                check_shard(shard, self.dtype)
        return self

    def files(self) -> Iterator[FileEntry]:
        """Every file but the manifest itself."""
        if self.tokenizer is not None and self.tokenizer.file is not None:
            yield self.tokenizer.file
        for split in sorted(self.splits):
            for shard in self.splits[split].shards:
                yield from shard.files()

    def split(self, name: str, where: str) -> SplitEntry:
        """The split of that name of the dataset at `where`; a ValueError tells which there are."""
        if name not in self.splits:
            raise ValueError(
                f"{where}: no split {name!r}, only {', '.join(sorted(self.splits))}; prepare it with a source for it, such "
                f"as {name}=ADDRESS"
            )
        return self.splits[name]

    def as_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return self.model_dump(mode="json")

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the canonical JSON: the identity of the dataset."""
        return fingerprint_of(self.as_json())

    def to_bytes(self) -> bytes:
        """The one form in which manifest.json is written."""
        return _file_bytes(self.as_json())


def check_shard(shard: ShardEntry, dtype: str | None) -> None:
    """A ValueError for an entry whose counts and sizes cannot be those of a shard; `dtype` of tokens, None for images."""
    if dtype is None:
        offsets = shard.batch_offsets
        good = shard.tokens is None and shard.docs is None and offsets is not None and len(offsets) >= 2
        if offsets is None or not good or not 0 < offsets[0] < offsets[-1] < shard.data.bytes:
            raise ValueError(f"{shard.data.name}: not the entry of an image shard")
        if any(stop <= start for start, stop in itertools.pairwise(offsets)):
            raise ValueError(f"{shard.data.name}: batch_offsets do not rise")
    else:
        if shard.tokens is None or shard.docs is None or shard.batch_offsets is not None:
            raise ValueError(f"{shard.data.name}: not the entry of a token shard")
        if shard.data.bytes != shard.tokens * _TOKEN_BYTES[dtype]:
            raise ValueError(f"{shard.data.name}: its size is not that of {shard.tokens} {dtype} tokens")
        if shard.docs.bytes != shard.documents * 8:
            raise ValueError(f"{shard.docs.name}: {shard.docs.bytes} bytes are not {shard.documents} offsets")


def fingerprint_of(manifest: object) -> str:
    """sha256, in hex, of the canonical JSON of a manifest given as plain JSON values."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _file_bytes(manifest: object) -> bytes:
    document = {"fingerprint": fingerprint_of(manifest), "manifest": manifest}
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def parse_manifest(content: bytes, path: str) -> Manifest:
    """Read and check a dataset's `manifest.json`.

    CorruptData if any byte of it was altered; ValueError if another version of Lockstep wrote it.
    """
    damaged = f"{path}: altered or damaged; {RESTORE}"
    try:
        document = json.loads(content)
        stored = document["manifest"]
        version = stored["format_version"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise CorruptData(damaged) from None
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {version} is newer than the {FORMAT_VERSION} that this Lockstep reads; "
            "update Lockstep"
        )
    if type(version) is int and version < FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {version} is older than the {FORMAT_VERSION} that this Lockstep reads; prepare the "
            "dataset again, into a new directory"
        )
    if _file_bytes(stored) != content:
        raise CorruptData(damaged)
    try:
        return Manifest.model_validate_json(json.dumps(stored))
    except ValidationError as error:
        first = error.errors()[0]
        where = repr(".".join(str(part) for part in first["loc"]))[1:-1]  # a key may hold line ends
        raise CorruptData(f"{path}: {where}: {first['msg']}; {RESTORE}") from None

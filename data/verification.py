"""Every byte of a prepared dataset against its manifest, and what lies in the shards against what readers rely on."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data.errors import CorruptData
from data.manifest import BLOCK_BYTES, MANIFEST_NAME, RESTORE, FileEntry, Manifest, ShardEntry
from data.shards import CheckedFile, ImageShard, read_document_ends
from data.store import LocalStore, read_manifest
from data.tokenizers import load_tokenizer

_SHOWN_BLOCKS = 8


@dataclass(frozen=True)
class Item:
    """What is verified at once: a shard, or None for the tokenizer."""

    shard: ShardEntry | None
    bytes: int


@dataclass(frozen=True)
class Found:
    """What was found out about an item: every problem in a line."""

    item: Item
    problems: tuple[str, ...]


def items_of(manifest: Manifest) -> Iterator[Item]:
    """All that there is to verify, in stored order."""
    if manifest.tokenizer is not None and manifest.tokenizer.file is not None:
        yield Item(None, manifest.tokenizer.file.bytes)
    for split in manifest.splits.values():
        for shard in split.shards:
            yield Item(shard, sum(file.bytes for file in shard.files()))


def unlisted_files(directory: Path, manifest: Manifest) -> list[str]:
    """Names in a dataset's directory that its manifest does not have: nothing reads them."""
    return sorted(set(os.listdir(directory)) - {MANIFEST_NAME} - {entry.name for entry in manifest.files()})


class Verifier:
    """Verifies items of one dataset, in one process."""

    def __init__(self, directory: str) -> None:
        self._store = LocalStore(Path(directory))
        self._manifest = read_manifest(self._store)

    def __call__(self, item: Item) -> Found:
        """Read every byte of an item."""
        tokenizer = self._manifest.tokenizer
        if item.shard is not None:
            files = list(item.shard.files())
        else:
            assert tokenizer is not None
            assert tokenizer.file is not None
            files = [tokenizer.file]
        problems = [problem for file in files for problem in self._verify_file(file)]
        if not problems:  # what is not as it was prepared says nothing about how it was prepared
            try:
                self._verify_contents(item.shard)
            except ValueError as error:
                problems.append(str(error))
        return Found(item, tuple(problems))

    def _verify_file(self, entry: FileEntry) -> Iterator[str]:
        try:
            file = CheckedFile(self._store, entry)
        except CorruptData as error:
            yield str(error)
            return
        whole, altered = hashlib.sha256(), []
        with memoryview(file.map) as view:
            for number, expected in enumerate(entry.blocks):
                with view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES] as block:
                    whole.update(block)
                    if xxhash.xxh3_64_hexdigest(block) != expected:
                        altered.append(number)
        if altered:
            shown = ", ".join(map(str, altered[:_SHOWN_BLOCKS]))
            more = f" and {len(altered) - _SHOWN_BLOCKS} more" if len(altered) > _SHOWN_BLOCKS else ""
            word = "block" if len(altered) == 1 else "blocks"
            yield f"{file.path}: {word} {shown}{more} of {len(entry.blocks)} (1 MiB each) altered; {RESTORE}"
        elif whole.hexdigest() != entry.sha256:
            yield f"{file.path}: its sha256 is not the manifest's, though each block's hash is; {RESTORE}"

    def _verify_contents(self, shard: ShardEntry | None) -> None:
        """CorruptData where a shard is as it was written, and yet not what readers rely on."""
        if shard is None:
            load_tokenizer(self._store)
        elif shard.docs is not None:
            read_document_ends(self._store, shard)
        else:
            images = ImageShard(self._store, shard)
            for row in range(images.rows):
                images.read(row)

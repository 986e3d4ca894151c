"""Every byte of a prepared dataset against its manifest, and what lies in the shards against what readers rely on."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from data.errors import CorruptData, NoRoom, Unavailable
from data.image_shards import ImageShard
from data.manifest import BLOCK_BYTES, MANIFEST_NAME, RESTORE, FileEntry, Manifest, ShardEntry
from data.origin import ORIGIN_NAME
from data.packed_shard import PackedShard
from data.packing import LOCK_NAME, PackedShardEntry, head_name, read_packing
from data.shards import CheckedFile, read_document_ends
from data.store import Store, open_fresh_store, read_manifest
from data.tokenizers import load_tokenizer

_SHOWN_BLOCKS = 8


@dataclass(frozen=True)
class Item:
    """What is verified at once: a shard, a shard's packing into sequences of so many tokens, or else the tokenizer."""

    files: tuple[FileEntry, ...]
    shard: ShardEntry | None = None
    packed: PackedShardEntry | None = None
    sequence_tokens: int = 0

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Found:
    """What was found out about an item: every problem in a line."""

    item: Item
    problems: tuple[str, ...]


def items_of(manifest: Manifest) -> Iterator[Item]:
    """What the manifest lists, in stored order."""
    if manifest.tokenizer is not None and manifest.tokenizer.file is not None:
        yield Item((manifest.tokenizer.file,))
    for split in manifest.splits.values():
        for shard in split.shards:
            yield Item(tuple(shard.files()), shard)


def packings_among(names: Iterable[str]) -> set[int]:
    """The lengths of sequences, in tokens, for which files of these names say how documents are packed."""
    found = (re.fullmatch(r"packing-best_fit-T([1-9][0-9]{0,15})\.json", name) for name in names)
    return {int(match[1]) for match in found if match is not None}


def packed_items(
    store: Store, manifest: Manifest, sequence_tokens: Iterable[int], problems: list[str]
) -> Iterator[Item]:
    """The packing indexes for sequences of so many tokens; to `problems` what is wrong with their heads."""
    shards = {shard.data.name: shard for split in manifest.splits.values() for shard in split.shards}
    for tokens in sorted(sequence_tokens):
        try:
            packing = read_packing(store, manifest, tokens)
        except (Unavailable, NoRoom):
            raise
        except ValueError as error:
            problems.append(str(error))
            continue
        for entry in (entry for entries in packing.splits.values() for entry in entries):
            yield Item((entry.index,), shards[entry.shard], entry, packing.sequence_tokens)


def unlisted_files(names: Iterable[str], items: Collection[Item]) -> list[str]:
    """Those of the names beside a dataset's manifest that nothing lists, so that nothing reads them."""
    listed = {file.name for item in items for file in item.files}
    heads = {head_name(item.sequence_tokens) for item in items if item.packed is not None}
    return sorted(set(names) - {MANIFEST_NAME, LOCK_NAME, ORIGIN_NAME} - listed - heads)


class Verifier:
    """Verifies items of one dataset, in one process."""

    def __init__(self, address: Path | str) -> None:
        self._store = open_fresh_store(address)
        self._manifest = read_manifest(self._store)

    def __call__(self, item: Item) -> Found:
        """Read every byte of an item."""
        problems = [problem for file in item.files for problem in self._verify_file(file)]
        if not problems:  # what is not as it was prepared says nothing about how it was prepared
            try:
                self._verify_contents(item)
            except (Unavailable, NoRoom):
                raise
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

    def _verify_contents(self, item: Item) -> None:
        """CorruptData where files are as they were written, and yet not what readers rely on."""
        if item.shard is None:
            load_tokenizer(self._store)
        elif item.packed is not None:
            self._verify_packing(item.shard, item.packed, item.sequence_tokens)
        elif item.shard.docs is not None:
            self._verify_tokens(item.shard, read_document_ends(self._store, item.shard))
        else:
            assert self._manifest.images is not None
            images = ImageShard(self._store, item.shard, len(self._manifest.images.class_names))
            for row in range(images.rows):
                images.read(row)

    def _verify_tokens(self, shard: ShardEntry, ends: npt.NDArray[np.int64]) -> None:
        tokenizer, file = self._manifest.tokenizer, CheckedFile(self._store, shard.data)
        assert tokenizer is not None
        assert self._manifest.dtype is not None
        tokens = np.frombuffer(file.map, np.dtype(self._manifest.dtype).newbyteorder("<"))
        if (largest := int(tokens.max())) >= tokenizer.vocabulary_size:
            raise CorruptData(
                f"{file.path}: token {largest} is beyond the vocabulary of {tokenizer.vocabulary_size}; {RESTORE}"
            )
        if (tokens[ends - 1] != tokenizer.end_of_document).any():
            raise CorruptData(f"{file.path}: documents without the token that ends them; {RESTORE}")

    def _verify_packing(self, shard: ShardEntry, packed: PackedShardEntry, sequence_tokens: int) -> None:
        tokenizer, dtype = self._manifest.tokenizer, self._manifest.dtype
        assert tokenizer is not None
        assert dtype is not None
        try:
            self._store.open(shard.data).close()
        except CorruptData:
            return  # told of the shard; without it an index cannot be followed
        end = tokenizer.end_of_document
        PackedShard(self._store, shard, packed, dtype, sequence_tokens, end_of_document=end, separate_documents=False)

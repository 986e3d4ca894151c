"""Tokens of a prepared dataset, cut into samples of one length: random access by sample id, checked as they are read."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from data.buffers import RowBuffers
from data.config import DataConfig
from data.manifest import Manifest, Split
from data.mapped_rows import MappedRows, address_of
from data.open_shards import OpenShards
from data.packed_shard import PackedShard, index_errors
from data.packing import PackedShardEntry, read_packing
from data.samples import Choices, DatasetFacts, Fields, Hashes, SampleIds, check_range
from data.shards import TokenShard, document_dtype, samples_of
from data.store import Store

# What a shard makes at once: it is put in its place while it is in the processor's cache.
PIECE_BYTES = 256 * 1024


class TokenDataset:
    """Tokens of one split. A sample is T tokens and the one after them; samples never cross shards.

    Concatenated, sample i of a shard is its tokens [iT, iT + T]. Packed by best fit, it is a bin of `data.packing`'s index:
    every token that is not its document's first is a target exactly once, and no other is.
    """

    def __init__(self, store: Store, manifest: Manifest, split: Split, config: DataConfig) -> None:
        assert manifest.tokenizer is not None
        assert manifest.dtype is not None
        self.address = store.address
        self._store = store
        self.fingerprint = manifest.fingerprint
        self._dtype = manifest.dtype
        self._end_of_document = manifest.tokenizer.end_of_document
        self._sequence_tokens = sequence_tokens = config.sequence_tokens
        self._separate_documents = config.separate_documents
        self._entries = manifest.split(split, store.address).shards
        files = [[*entry.files()] for entry in self._entries]
        self.packing_identity: str | None = None
        self._packed: tuple[PackedShardEntry, ...] | None = None
        left_out_tokens = 0
        if config.packing == "best_fit":
            packing = read_packing(store, manifest, sequence_tokens)
            self.packing_identity, self._packed = packing.identity, packing.splits[split]
            for shard_files, packed in zip(files, self._packed, strict=True):
                with index_errors(sequence_tokens):
                    store.check(packed.index)
                shard_files.append(packed.index)
            counts = [packed.bins for packed in self._packed]
        else:
            counts = [samples_of(entry.tokens or 0, sequence_tokens) for entry in self._entries]
            targets = [(entry.tokens or 1) - 1 for entry in self._entries]
            left_out_tokens = sum(targets) - sum(counts) * sequence_tokens
        self._shards = OpenShards(store, files, self._open)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.shard_samples = np.diff(self._ends, prepend=0)
        self.samples = int(self._ends[-1])
        self.mixes = False
        if self.samples == 0:
            longest = max(entry.tokens or 0 for entry in self._entries)
            raise ValueError(
                f"data.sequence_tokens {sequence_tokens} is longer than the {split} data of {store.address}, whose longest "
                f"shard has {longest} tokens (one more than a sequence is needed); lower it or add data"
            )
        self.shard_bytes = self._shards.bytes
        self.looks_ahead_samples = self._shards.looks_ahead_samples(self.samples)
        item_bytes = np.dtype(manifest.dtype).itemsize
        row_bytes = (sequence_tokens + 1) * item_bytes
        self._stride_bytes = sequence_tokens * item_bytes
        self._checked = np.zeros(len(self._entries), dtype=np.bool_)  # shards of which every block is
        # Where sample 0 would lie if all samples lay one after the other as they do in this shard.
        self._origins = np.zeros(len(self._entries), dtype=np.int64)
        self._mapped = MappedRows(sequence_tokens + 1, self._dtype)
        self._buffers = RowBuffers(row_bytes)
        self._boundary_fields: dict[str, np.dtype[Any]] = {}
        if config.separate_documents:
            self._boundary_fields["documents"] = document_dtype(sequence_tokens)
        if config.separate_documents or self._packed is not None:
            self._boundary_fields["loss_mask"] = np.dtype(np.bool_)
        boundary_bytes = sum(dtype.itemsize for dtype in self._boundary_fields.values())
        self.sample_bytes = row_bytes + boundary_bytes * sequence_tokens
        self.facts = DatasetFacts(
            kind="tokens",
            vocabulary_size=manifest.tokenizer.vocabulary_size,
            sequence_tokens=sequence_tokens,
            left_out_tokens=left_out_tokens,
            separate_documents=config.separate_documents,
        )

    def gather(self, sample_ids: SampleIds, choices: Choices | None = None) -> tuple[Fields, Hashes]:
        """`tokens` (n, T + 1) in the stored dtype, and the xxh3-64 of each sample's bytes (n,), padding included.

        Where documents are packed or kept apart, `loss_mask` (n, T) bool; kept apart, `documents` (n, T) int16 or int32.
        """
        samples = len(sample_ids)
        boundaries: Fields = {
            name: np.empty((samples, self._sequence_tokens), dtype) for name, dtype in self._boundary_fields.items()
        }
        tokens, hashes = self._read(sample_ids, boundaries)
        return {"tokens": tokens} | boundaries, hashes

    def content_hashes(self, sample_ids: SampleIds) -> Hashes:
        """The xxh3-64 of the bytes of samples (n,), padding included."""
        return self._read(sample_ids, {})[1]

    def _read(self, sample_ids: SampleIds, boundaries: Fields) -> tuple[npt.NDArray[np.integer], Hashes]:
        """The tokens (n, T + 1) of samples and their hashes (n,); fills what is asked for of where documents end."""
        check_range(sample_ids, self.samples)
        self._forget(self._shards.close_some(lambda: np.searchsorted(self._ends, sample_ids, side="right")))
        return self._shards.read(lambda: self._read_open(sample_ids, boundaries), self._forget)

    def _read_open(self, sample_ids: SampleIds, boundaries: Fields) -> tuple[npt.NDArray[np.integer], Hashes]:
        rows, views = self._buffers.take(len(sample_ids))
        tokens = rows.view(self._dtype).reshape(len(sample_ids), self._sequence_tokens + 1)
        by_shard = boundaries if self._packed is None else boundaries | {"tokens": tokens}
        if self._packed is None:
            self._copy(sample_ids, tokens)
        if by_shard:
            for shard, slots, shard_rows in self._pieces(sample_ids):
                piece = shard.gather(shard_rows)
                for name, field in by_shard.items():
                    field[slots] = piece[name]
        digests = b"".join(map(xxhash.xxh3_64_digest, views[: len(sample_ids)]))
        return tokens, np.frombuffer(digests, ">u8").astype(np.uint64)

    def _copy(self, sample_ids: SampleIds, tokens: npt.NDArray[np.integer]) -> None:
        """Copy samples (n,) into tokens (n, T + 1), once their shards are mapped and their blocks checked."""
        shard_of = np.searchsorted(self._ends, sample_ids, side="right")
        unchecked = ~self._checked[shard_of]
        if unchecked.any():
            for number in np.unique(shard_of[unchecked]).tolist():
                shard = self._shards[number]
                assert isinstance(shard, TokenShard)
                shard.check(sample_ids[shard_of == number] - (self._ends[number] - shard.samples))
                self._checked[number] = shard.checked
        self._mapped.copy(sample_ids * self._stride_bytes + self._origins[shard_of], tokens)

    def _pieces(self, sample_ids: SampleIds) -> Iterator[tuple[TokenShard | PackedShard, SampleIds, SampleIds]]:
        """Cut a request into pieces of one shard each: the shard, where its samples are wanted, and its rows."""
        shard_of = np.searchsorted(self._ends, sample_ids, side="right")
        # NumPy sorts 16-bit integers by radix, several times faster than wider ones.
        by_shard = np.argsort(shard_of.astype(np.uint16) if len(self._entries) < 1 << 16 else shard_of, kind="stable")
        counts = np.bincount(shard_of)
        piece_samples = max(1, PIECE_BYTES // self.sample_bytes)
        start = 0
        for number in np.flatnonzero(counts).tolist():
            shard, stop = self._shards[number], start + int(counts[number])
            first_id = self._ends[number] - shard.samples
            for at in range(start, stop, piece_samples):
                slots = by_shard[at : min(at + piece_samples, stop)]
                yield shard, slots, sample_ids[slots] - first_id
            start = stop

    def mix(self, fields: Fields, partners: npt.NDArray[np.int64], words: Hashes) -> Fields:
        raise AssertionError("samples are not mixed")

    def expect(self, start: int, stop: int, sample_ids: SampleIds) -> None:
        self._shards.expect(start, stop, np.searchsorted(self._ends, sample_ids, side="right"))

    def reached(self, position: int) -> None:
        self._store.reached(position)

    def _forget(self, closed: dict[int, TokenShard | PackedShard]) -> None:
        """Drop the maps of shards that were closed."""
        for number, shard in closed.items():
            self._checked[number] = False
            if isinstance(shard, TokenShard):
                self._mapped.remove(shard.map)

    def _open(self, number: int) -> TokenShard | PackedShard:
        shard = self._open_shard(number)
        if isinstance(shard, TokenShard):
            self._mapped.add(shard.map)
            first_id = int(self._ends[number]) - shard.samples
            self._origins[number] = address_of(shard.map) - first_id * self._stride_bytes
        return shard

    def _open_shard(self, number: int) -> TokenShard | PackedShard:
        entry = self._entries[number]
        if self._packed is None:
            return TokenShard(self._store, entry, self._dtype, self._sequence_tokens)
        return PackedShard(
            self._store,
            entry,
            self._packed[number],
            self._dtype,
            self._sequence_tokens,
            end_of_document=self._end_of_document,
            separate_documents=self._separate_documents,
        )

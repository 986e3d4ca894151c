"""Tokens of a prepared dataset, cut into samples of one length: random access by sample id, checked as they are read."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from data.manifest import Manifest, Split
from data.samples import Choices, DatasetFacts, Fields, Hashes, SampleIds, check_range
from data.shards import TokenShard, samples_of
from data.store import Store

# What is copied out of a shard at once: it is hashed and put in its place while it is in the processor's cache.
PIECE_BYTES = 256 * 1024


class TokenDataset:
    """Tokens of one split. A sample is T tokens and the one after them; samples never cross shards."""

    def __init__(self, store: Store, manifest: Manifest, split: Split, sequence_tokens: int) -> None:
        assert manifest.tokenizer is not None
        assert manifest.dtype is not None
        self.address = store.address
        self._store = store
        self.fingerprint = manifest.fingerprint
        self._dtype = manifest.dtype
        self._sequence_tokens = sequence_tokens
        self._entries = manifest.splits[split].shards
        for entry in self._entries:
            for file in entry.files():
                store.check(file)
        counts = [samples_of(entry.tokens or 0, sequence_tokens) for entry in self._entries]
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
        self._shards: list[TokenShard | None] = [None] * len(self._entries)
        self.sample_bytes = (sequence_tokens + 1) * np.dtype(manifest.dtype).itemsize
        self.facts = DatasetFacts(
            kind="tokens", vocabulary_size=manifest.tokenizer.vocabulary_size, sequence_tokens=sequence_tokens
        )

    def gather(self, sample_ids: SampleIds, choices: Choices | None = None) -> tuple[Fields, Hashes]:
        """`tokens` (n, T + 1) in the stored dtype, and the xxh3-64 of each sample's bytes (n,)."""
        check_range(sample_ids, self.samples)
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

    def mix(self, fields: Fields, partners: npt.NDArray[np.int64], words: Hashes) -> Fields:
        raise AssertionError("samples are not mixed")

    def _shard(self, number: int) -> TokenShard:
        shard = self._shards[number]
        if shard is None:
            shard = TokenShard(self._store, self._entries[number], self._dtype, self._sequence_tokens)
            self._shards[number] = shard
        return shard


def _hash_rows(rows: npt.NDArray[np.void]) -> Hashes:
    """The xxh3-64 of each of the rows (n,)."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, rows.tolist()), np.uint64, len(rows))

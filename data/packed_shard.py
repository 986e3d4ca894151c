"""A token shard read by its packing index: samples of whole documents, or pieces of long ones, side by side."""

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from data.errors import AlteredCopy, CorruptData
from data.manifest import ShardEntry
from data.packing import PackedShardEntry, rebuild_hint
from data.samples import Fields
from data.shards import CheckedFile, document_dtype, expand_ranges
from data.store import Store


class PackedShard:
    """One token shard. A sample is a bin of its index, padded to T + 1 tokens with the end-of-document token."""

    def __init__(
        self,
        store: Store,
        entry: ShardEntry,
        packed: PackedShardEntry,
        dtype: str,
        sequence_tokens: int,
        *,
        end_of_document: int,
        separate_documents: bool,
    ) -> None:
        assert entry.tokens is not None
        self._data = CheckedFile(store, entry.data)
        self._stored = np.dtype(dtype).newbyteorder("<")
        self._tokens: npt.NDArray[np.integer] = np.ndarray((entry.tokens,), self._stored, self._data.map)
        self._sequence_tokens = sequence_tokens
        self._end_of_document = end_of_document
        self._separate_documents = separate_documents
        self.samples = packed.bins
        with index_errors(sequence_tokens):
            index = CheckedFile(store, packed.index)
            index.check_all()
            numbers: npt.NDArray[np.int64] = np.frombuffer(index.map, dtype="<i8")
            self._bin_ends, self._starts, self._lengths = np.split(
                numbers, [packed.bins + 1, packed.bins + 1 + packed.pieces]
            )
            if not self._fits(entry.tokens):
                raise CorruptData(f"{index.path}: pieces that are not of this shard, or do not fit into its samples")

    def _fits(self, tokens: int) -> bool:
        """Whether the index can be followed: what a forger could have written into it, and hashed."""
        ends, starts, lengths = self._bin_ends, self._starts, self._lengths
        if ends[0] != 0 or ends[-1] != len(starts) or (ends[1:] <= ends[:-1]).any():
            return False
        room = self._sequence_tokens + 1
        if not len(starts):
            return True
        if lengths.min() < 2 or lengths.max() > room or starts.min() < 0 or (starts > tokens - lengths).any():
            return False
        return bool(np.add.reduceat(lengths, ends[:-1]).max() <= room)

    def gather(self, rows: npt.NDArray[np.int64]) -> Fields:
        """Samples (n,) by their rows: `tokens` (n, T + 1), `loss_mask` and, with documents apart, `documents`, as
        `data.samples.Dataset` has them. Padding counts as a document of its own."""
        room = self._sequence_tokens + 1
        low = self._bin_ends[rows]
        counts = self._bin_ends[rows + 1] - low
        pieces = expand_ranges(low, counts)
        starts, lengths = self._starts[pieces], self._lengths[pieces]
        self._data.check_ranges(starts * self._stored.itemsize, (starts + lengths) * self._stored.itemsize)
        # A last piece for each sample is the room left over: what is copied there is written over.
        after = np.cumsum(counts)
        room_left = room - np.add.reduceat(lengths, after - counts)
        starts, lengths = np.insert(starts, after, 0), np.insert(lengths, after, room_left)
        numbers = expand_ranges(np.zeros_like(counts), counts + 1).astype(document_dtype(self._sequence_tokens))
        documents = np.repeat(numbers, lengths).reshape(len(rows), room)
        padding = documents == counts[:, np.newaxis].astype(documents.dtype)
        tokens = self._tokens.take(expand_ranges(starts, lengths), mode="clip").reshape(len(rows), room)
        tokens[padding] = self._end_of_document
        fields = {
            "tokens": tokens,
            "loss_mask": (documents[:, 1:] == documents[:, :-1]) & ~padding[:, 1:],
        }
        return fields | {"documents": documents[:, :-1]} if self._separate_documents else fields


@contextlib.contextmanager
def index_errors(sequence_tokens: int) -> Iterator[None]:
    """Whatever is wrong with an index file, it can be built anew."""
    try:
        yield
    except AlteredCopy:
        raise
    except CorruptData as error:
        raise CorruptData(f"{error}; or {rebuild_hint(sequence_tokens)}") from None

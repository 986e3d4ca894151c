"""Shards: how their files are written, and read with every block checked the first time it is touched; and those of tokens.

Tokens lie in a headerless little-endian `.bin`, cut at document ends, with the documents' ends in a `.docs` beside it.
"""

import hashlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from data.errors import AlteredCopy, CorruptData
from data.manifest import BLOCK_BYTES, RESTORE, FileEntry, ShardEntry
from data.samples import Fields
from data.store import Store


class HashingFile:
    """A file written once from start to end, hashed on the way. Enough of a file object for Arrow to write to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Written in large pieces, a file lies in large pages of the cache, and mapping it costs a third.
        self._file = path.open("wb", buffering=BLOCK_BYTES)
        self._sha256 = hashlib.sha256()
        self._block = xxhash.xxh3_64()
        self._blocks: list[str] = []
        self._bytes = 0

    def write(self, data: Any) -> int:
        """Append the bytes of any buffer; OSError as the file system raises it."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._sha256.update(view)
        start = 0
        while start < len(view):
            part = view[start : start + BLOCK_BYTES - self._bytes % BLOCK_BYTES]
            self._block.update(part)
            self._bytes += len(part)
            start += len(part)
            if self._bytes % BLOCK_BYTES == 0:
                self._end_block()
        return len(view)

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block.reset()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.flush()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        """Close; without `finish` before it, the file is given up."""
        self._file.close()

    def finish(self) -> FileEntry:
        """Sync to disk, close, and say what was written."""
        if self._bytes % BLOCK_BYTES:
            self._end_block()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(
            name=self.path.name, bytes=self._bytes, sha256=self._sha256.hexdigest(), blocks=tuple(self._blocks)
        )


class TokenShardWriter:
    """Writes one token shard."""

    def __init__(self, stem: Path, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._data = HashingFile(stem.with_name(stem.name + ".bin"))
        self._stem = stem
        self._ends: list[npt.NDArray[np.uint64]] = []
        self._tokens = 0

    @property
    def bytes(self) -> int:
        """Bytes of tokens so far."""
        return self._tokens * self._dtype.itemsize

    def extend(self, tokens: npt.NDArray[Any], ends: npt.NDArray[np.uint64]) -> None:
        """Append documents, each with the token that ends it; `ends` counts from the first of `tokens` on."""
        self._data.write(np.ascontiguousarray(tokens, dtype=self._dtype))
        self._ends.append(ends + np.uint64(self._tokens))
        self._tokens += len(tokens)

    def finish(self) -> ShardEntry:
        """Write the document ends and close."""
        with HashingFile(self._stem.with_name(self._stem.name + ".docs")) as docs:
            all_ends = np.concatenate(self._ends).astype("<u8")
            docs.write(all_ends)
            ends = docs.finish()
        return ShardEntry(documents=len(all_ends), tokens=self._tokens, data=self._data.finish(), docs=ends)

    def close(self) -> None:
        """Give the shard up."""
        self._data.close()


class CheckedFile:
    """A memory-mapped file whose blocks are hashed the first time they are asked for."""

    def __init__(self, store: Store, entry: FileEntry) -> None:
        self.path = f"{store.address}/{entry.name}"
        with store.open(entry) as file:
            self.map = mmap.mmap(file.fileno(), entry.bytes, access=mmap.ACCESS_READ)
        self._entry, self._is_copy = entry, store.opens_copies
        self._unchecked = np.ones(len(entry.blocks), dtype=np.bool_)
        self.checked = False

    def check(self, start: int, stop: int) -> None:
        """Make sure that the blocks holding bytes [start, stop) are as prepared; CorruptData if not."""
        assert 0 <= start <= stop <= self._entry.bytes
        self.check_blocks(np.arange(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)))

    def check_blocks(self, blocks: npt.NDArray[np.int64]) -> None:
        """Make sure that these blocks, repeats allowed, are as prepared; CorruptData if not, AlteredCopy where it is of a cache,
        in which it was so when it was opened."""
        if self.checked:
            return
        for block in np.unique(blocks[self._unchecked[blocks]]).tolist():
            start = block * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, self._entry.bytes)
            with memoryview(self.map) as view, view[start:stop] as part:
                found = xxhash.xxh3_64_hexdigest(part)
            if found != self._entry.blocks[block]:
                what = f"{self.path}: block {block} (bytes {start} to {stop - 1}) was altered"
                if self._is_copy:
                    raise AlteredCopy(
                        f"{what} in data.cache_directory while it was open; see to it that nothing else writes there",
                        self._entry.sha256,
                    )
                raise CorruptData(f"{what}; {RESTORE}")
            self._unchecked[block] = False
        self.checked = not self._unchecked.any()

    def check_ranges(self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> None:
        """`check` for many ranges (n,) that are not empty."""
        if self.checked or not len(starts):
            return
        first, last = starts // BLOCK_BYTES, (stops - 1) // BLOCK_BYTES
        for step in range(int((last - first).max()) + 1):  # a range may span several blocks
            self.check_blocks(np.minimum(first + step, last))

    def check_all(self) -> None:
        """Check every block."""
        self.check(0, self._entry.bytes)


class TokenShard:
    """One token shard, cut into samples of `sequence_tokens` inputs and the target after the last."""

    def __init__(self, store: Store, entry: ShardEntry, dtype: str, sequence_tokens: int) -> None:
        assert entry.tokens is not None
        self._data = CheckedFile(store, entry.data)
        stored = np.dtype(dtype).newbyteorder("<")
        self.samples = samples_of(entry.tokens, sequence_tokens)
        self._sequence_tokens = sequence_tokens
        self._stride_bytes = sequence_tokens * stored.itemsize
        self._row_bytes = (sequence_tokens + 1) * stored.itemsize
        # Blocks that no sample reaches are checked now, so that `checked` comes true once all samples have been read.
        reached = (self.samples - 1) * self._stride_bytes + self._row_bytes if self.samples else 0
        self._data.check(min(-(-reached // BLOCK_BYTES) * BLOCK_BYTES, entry.data.bytes), entry.data.bytes)
        self._document_ends = read_document_ends(store, entry)

    @property
    def map(self) -> mmap.mmap:
        """The shard's bytes. Row i is those of tokens [iT, iT + T]: each row's last token is the next one's first."""
        return self._data.map

    @property
    def checked(self) -> bool:
        """Whether every block has been checked."""
        return self._data.checked

    def check(self, rows: npt.NDArray[np.int64]) -> None:
        """Make sure that the blocks of rows (n,) are as prepared; CorruptData if not."""
        first = rows * self._stride_bytes
        self._data.check_ranges(first, first + self._row_bytes)

    def gather(self, rows: npt.NDArray[np.int64]) -> Fields:
        """What keeps the documents of samples (n,) apart: `documents` and `loss_mask`, as `data.samples.Dataset` has them.

        Their tokens are copied by `data.mapped_rows`, those of many shards at once.
        """
        return self._boundaries(rows * self._sequence_tokens)

    def _boundaries(self, first: npt.NDArray[np.int64]) -> Fields:
        """`documents` and `loss_mask` of the samples whose first tokens are at `first` (n,) in the shard."""
        ends, sequence_tokens = self._document_ends, self._sequence_tokens
        low = np.searchsorted(ends, first, side="right")
        counts = np.searchsorted(ends, first + sequence_tokens, side="right") - low
        samples = np.repeat(np.arange(len(first)), counts)
        begin_at = ends[expand_ranges(low, counts)] - first[samples]  # in [1, T]
        begins = np.zeros((len(first), sequence_tokens + 1), dtype=document_dtype(sequence_tokens))
        begins[samples, begin_at] = 1
        documents = np.cumsum(begins[:, :-1], axis=1, dtype=begins.dtype)
        return {"documents": documents, "loss_mask": begins[:, 1:] == 0}


def samples_of(tokens: int, sequence_tokens: int) -> int:
    """How many samples a shard of so many tokens holds."""
    return (tokens - 1) // sequence_tokens


def document_dtype(sequence_tokens: int) -> np.dtype[Any]:
    """What numbers the documents of a sample; signed, because torch can do little with other integers."""
    return np.dtype(np.int16 if sequence_tokens < 1 << 15 else np.int32)


def expand_ranges(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The integers of ranges [start, start + count), one range after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def read_document_ends(store: Store, entry: ShardEntry) -> npt.NDArray[np.int64]:
    """The ends (documents,) of a shard's documents, in tokens, every byte of them checked."""
    assert entry.docs is not None
    docs = CheckedFile(store, entry.docs)
    docs.check_all()
    # Stored unsigned; what does not fit a signed integer does not rise.
    ends: npt.NDArray[np.int64] = np.frombuffer(docs.map, dtype="<i8")
    if ends[-1] != entry.tokens or (ends[1:] <= ends[:-1]).any() or ends[0] <= 0:
        raise CorruptData(f"{docs.path}: document ends do not rise to the shard's {entry.tokens} tokens; {RESTORE}")
    return ends

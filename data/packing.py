"""Best-fit packing: whole documents into sequences, and the hashed index beside the shards that says which where.

Best-fit-decreasing bin packing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"), shard by shard: a bin
is a sample, T + 1 tokens. A document of more is cut into full pieces that overlap by one token, so that each of its
tokens but the first is a target exactly once; what is left of it is packed like a document. Imports no torch.
"""

import bisect
import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.config import DataConfig
from data.errors import CorruptData
from data.manifest import Count, FileEntry, Manifest, PlainName, Sha256, ShardEntry, Split, fingerprint_of
from data.shards import HashingFile, expand_ranges, read_document_ends
from data.store import LocalStore, Store, read_manifest

FORMAT_VERSION: Literal[1] = 1
# Raised when the same documents would be packed in another way: it is part of the packing's identity.
ALGORITHM: Literal["best_fit-1"] = "best_fit-1"
LOCK_NAME = ".packing.lock"

Integers = npt.NDArray[np.int64]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PackedShardEntry(_Entry):
    """How the documents of the shard whose tokens are in `shard` are packed.

    `index` holds little-endian 64-bit integers: for each bin the pieces before it, and the number of all (bins + 1); for
    each piece the token of the shard that it begins at (pieces); its tokens (pieces).
    """

    shard: PlainName
    bins: Annotated[int, Field(ge=0, lt=1 << 60)]
    pieces: Annotated[int, Field(ge=0, lt=1 << 60)]
    index: FileEntry

    @model_validator(mode="after")
    def _size_is_that_of_the_counts(self) -> "PackedShardEntry":
        if self.index.bytes != 8 * (self.bins + 1 + 2 * self.pieces):
            raise ValueError(f"{self.index.name}: {self.index.bytes} bytes do not hold {self.pieces} pieces")
        return self


class Packing(_Entry):
    """The head of a packing index, `packing-best_fit-T<tokens>.json`; `fingerprint` is the dataset's."""

    format_version: Literal[1] = FORMAT_VERSION
    algorithm: Literal["best_fit-1"] = ALGORITHM
    fingerprint: Sha256
    sequence_tokens: Count
    splits: dict[Split, tuple[PackedShardEntry, ...]]

    @property
    def identity(self) -> str:
        """The algorithm and the sha256 of the head's canonical JSON, which holds the hashes of all index files."""
        return f"{self.algorithm}:{fingerprint_of(self.model_dump(mode='json'))}"

    def to_bytes(self) -> bytes:
        """The one form in which the head is written."""
        return _head_bytes(self.model_dump(mode="json"))


def _head_bytes(packing: Any) -> bytes:
    document = {"packing": packing, "sha256": fingerprint_of(packing)}
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def head_name(sequence_tokens: int) -> str:
    """The name of the head, in the dataset's directory."""
    return f"packing-best_fit-T{sequence_tokens}.json"


def _index_name(sequence_tokens: int, shard: ShardEntry) -> str:
    return f"packing-best_fit-T{sequence_tokens}-{Path(shard.data.name).stem}.index"


def rebuild_hint(sequence_tokens: int) -> str:
    """What to do about an index that is not as it was written."""
    return f"remove {head_name(sequence_tokens)}, and `lockstep train` builds it anew"


def cut_documents(ends: Integers, sequence_tokens: int) -> tuple[Integers, Integers]:
    """The pieces of documents that end at `ends`: where each begins, and its tokens, from 2 to T + 1; in stored order.

    Pieces of one document overlap by a token: the last target of one is the first input of the next.
    """
    tokens = np.diff(ends, prepend=0)
    pieces = -(-(tokens - 1) // sequence_tokens)  # none of a document of one token: it has no target
    starts = np.repeat(ends - tokens, pieces) + sequence_tokens * expand_ranges(np.zeros_like(pieces), pieces)
    stops = np.minimum(starts + sequence_tokens + 1, np.repeat(ends, pieces))
    return starts, stops - starts


def best_fit(lengths: Integers, room: int) -> Integers:
    """The bin of each piece (n,): the longest first, each into the fullest bin of `room` tokens that still takes it."""
    bins = np.empty(len(lengths), dtype=np.int64)
    count = 0
    open_bins: dict[int, list[int]] = {}  # room left -> bins, the last one opened or filled is the next one used
    rooms: list[int] = []  # its keys, rising
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            number, left = count, room - length
            count += 1
        else:
            left = rooms[at] - length
            number = open_bins[rooms[at]].pop()
            if not open_bins[rooms[at]]:
                del open_bins[rooms.pop(at)]
        bins[piece] = number
        if left > 1:  # a piece has two tokens at least
            if left not in open_bins:
                open_bins[left] = []
                bisect.insort(rooms, left)
            open_bins[left].append(number)
    return bins


def pack_shard(ends: Integers, sequence_tokens: int) -> tuple[Integers, Integers, Integers]:
    """The index of a shard whose documents end at `ends`: ends of bins (bins + 1) in pieces, starts and tokens of pieces.

    Bins are in the order of their first pieces, pieces within one in the order of the shard: both say nothing of lengths,
    so that the first bins are as good a sample as any.
    """
    starts, lengths = cut_documents(ends, sequence_tokens)
    bins = best_fit(lengths, sequence_tokens + 1)
    _, first_pieces, inverse = np.unique(bins, return_index=True, return_inverse=True)
    ranks = np.empty_like(first_pieces)
    ranks[np.argsort(first_pieces)] = np.arange(len(first_pieces))
    numbers = ranks[inverse]
    order = np.argsort(numbers, kind="stable")
    bin_ends = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=len(ranks)))])
    return bin_ends.astype(np.int64), starts[order], lengths[order]


def ensure_packing(store: Store, config: DataConfig, tell: Callable[[str], None] = lambda _: None) -> None:
    """Make the packing index that the recipe needs, if it needs one and none is there; `tell` is told before.

    Index files appear under their names when complete, their head last, and their bytes are a function of the dataset:
    two processes may do this at once, and one may be killed. ValueError of one line: not a dataset of tokens, or it
    lies where nothing can be written.
    """
    if config.packing == "concatenate":
        return
    name = head_name(config.sequence_tokens)
    if store.read(name) is not None:
        return
    manifest = read_manifest(store)
    if manifest.kind == "images":
        config.refuse_options_of_other_data("images", store.address)
    missing = f"{store.address}: {name}, the packing of its documents, is not there and cannot be written"
    hint = "run `lockstep train` once with this recipe on a copy that can, and copy its packing-* files here"
    if not isinstance(store, LocalStore):
        raise ValueError(f"{missing}, because it is no directory of this machine; {hint}")
    try:
        with _locked(store.directory / LOCK_NAME):
            if store.read(name) is None:  # another process may have made it while this one waited
                tell(f"packing documents into sequences of {config.sequence_tokens} tokens, once")
                _build(store, manifest, config.sequence_tokens)
    except OSError as error:
        raise ValueError(f"{missing} ({error.strerror}); {hint}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # released when the process ends, however it ends
        yield
    finally:
        os.close(descriptor)


def _build(store: LocalStore, manifest: Manifest, sequence_tokens: int) -> None:
    splits: dict[Split, tuple[PackedShardEntry, ...]] = {}
    for split in sorted(manifest.splits):
        entries = []
        for shard in manifest.splits[split].shards:
            arrays = pack_shard(read_document_ends(store, shard), sequence_tokens)
            content = np.concatenate(arrays).astype("<i8")
            index = _write(store.directory / _index_name(sequence_tokens, shard), content)
            entries.append(
                PackedShardEntry(shard=shard.data.name, bins=len(arrays[0]) - 1, pieces=len(arrays[1]), index=index)
            )
        splits[split] = tuple(entries)
    packing = Packing(fingerprint=manifest.fingerprint, sequence_tokens=sequence_tokens, splits=splits)
    _write(store.directory / head_name(sequence_tokens), packing.to_bytes())


def _write(path: Path, content: Any) -> FileEntry:
    """Write a file under another name, and rename it when it is on the disk. One process at a time holds the lock."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)  # of one that was killed, or a link to who knows where
    with HashingFile(temporary) as file:
        file.write(content)
        entry = file.finish()
    os.rename(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return entry.model_copy(update={"name": path.name})


def read_packing(store: Store, manifest: Manifest, sequence_tokens: int) -> Packing:
    """Read and check the head of a dataset's packing index.

    CorruptData if any byte of it was altered or it is another dataset's; ValueError if there is none or a newer Lockstep
    wrote it.
    """
    path = f"{store.address}/{head_name(sequence_tokens)}"
    content = store.read(head_name(sequence_tokens))
    if content is None:
        raise ValueError(f"{path}: missing, so that data.packing=best_fit cannot be read; `lockstep train` builds it")
    packing = _parse_head(content, path, rebuild_hint(sequence_tokens))
    shards = {name: [shard.data.name for shard in split.shards] for name, split in manifest.splits.items()}
    found = {split: [entry.shard for entry in entries] for split, entries in packing.splits.items()}
    if (packing.fingerprint, packing.sequence_tokens, found) != (manifest.fingerprint, sequence_tokens, shards):
        raise CorruptData(f"{path}: is the packing of another dataset; {rebuild_hint(sequence_tokens)}")
    return packing


def _parse_head(content: bytes, path: str, hint: str) -> Packing:
    damaged = f"{path}: altered or damaged; {hint}"
    try:
        document = json.loads(content)
        stored = document["packing"]
        version, algorithm = stored["format_version"], stored["algorithm"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise CorruptData(damaged) from None
    if _head_bytes(stored) != content:
        raise CorruptData(damaged)
    if (version, algorithm) != (FORMAT_VERSION, ALGORITHM):
        raise ValueError(
            f"{path}: format {version!r} of algorithm {algorithm!r}, which this Lockstep does not read (it reads "
            f"{FORMAT_VERSION} of {ALGORITHM!r}); use the Lockstep that wrote it, or {hint}"
        )
    try:
        packing = Packing.model_validate_json(json.dumps(stored))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptData(f"{path}: {where}: {first['msg']}; {hint}") from None
    names = [entry.index.name for entries in packing.splits.values() for entry in entries]
    if any(a == b for a, b in itertools.pairwise(sorted(names))):
        raise CorruptData(damaged)
    return packing

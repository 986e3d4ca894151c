"""What lies in a prepared dataset, as a person reads it: documents as text, images by class, size and bytes."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from data.errors import CorruptData
from data.image_shards import ImageShard
from data.manifest import RESTORE, Manifest, ShardEntry, Split
from data.pictures import decode
from data.shards import CheckedFile, read_document_ends
from data.store import Store
from data.tokenizers import Tokenizer, load_tokenizer

# What is decoded of a document for each character that is shown: a token may be less than one.
_TOKENS_A_CHARACTER = 4


class Examples:
    """Documents of one split, by their number in stored order; only the bytes that are shown are read and checked."""

    def __init__(self, store: Store, manifest: Manifest, split: Split) -> None:
        self._store, self._manifest = store, manifest
        self._entries = manifest.splits[split].shards
        self._ends = np.cumsum([entry.documents for entry in self._entries], dtype=np.int64)
        self.documents = int(self._ends[-1])
        self._tokenizer: Tokenizer | None = None
        self._shards: dict[int, ImageShard] = {}

    def spread(self, count: int) -> Iterator[int]:
        """So many documents, or as many as there are, spread evenly over the split."""
        count = min(count, self.documents)
        return (number * self.documents // count for number in range(count))

    def describe(self, number: int, characters: int) -> str:
        """A document in a line of so many characters."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        entry = self._entries[shard]
        row = number - (int(self._ends[shard]) - entry.documents)
        if self._manifest.images is not None:
            return self._describe_image(shard, row)
        return self._describe_document(entry, row, characters)

    def describe_tokens(self, tokens: npt.NDArray[np.integer], characters: int) -> str:
        """Tokens (n,) as text, in a line of so many characters."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._store)
        text = self._tokenizer.decode(tokens[: _TOKENS_A_CHARACTER * characters].tolist())
        return shorten(text, characters)

    def _describe_document(self, entry: ShardEntry, row: int, characters: int) -> str:
        assert self._manifest.dtype is not None
        ends = read_document_ends(self._store, entry)
        start, stop = int(ends[row - 1]) if row else 0, int(ends[row])
        shown = min(stop - 1, start + _TOKENS_A_CHARACTER * characters)  # without the token that ends a document
        file = CheckedFile(self._store, entry.data)
        dtype = np.dtype(self._manifest.dtype).newbyteorder("<")
        file.check(start * dtype.itemsize, shown * dtype.itemsize)
        tokens = np.frombuffer(file.map, dtype, shown - start, start * dtype.itemsize)
        count = f"{stop - start:,} tokens: "
        return count + self.describe_tokens(tokens, characters - len(count))

    def _describe_image(self, number: int, row: int) -> str:
        assert self._manifest.images is not None
        shard = self._shards.get(number)
        if shard is None:
            shard = self._shards[number] = ImageShard(
                self._store, self._entries[number], len(self._manifest.images.class_names)
            )
        encoded, label = shard.read(row)
        name = self._manifest.images.class_names[label]
        try:
            image = decode(encoded)
        except ValueError as error:
            where = f"{self._store.address}/{self._entries[number].data.name}"
            raise CorruptData(f"{where}: row {row} is not an image ({error}); {RESTORE}") from None
        kind = f"{image.width} x {image.height} pixels, {image.mode}"
        return f"{shorten(name, 40)} ({label}), {kind}, {len(encoded):,} bytes"


def shorten(text: str, characters: int) -> str:
    """The beginning of a text in a line of so many characters; what a terminal would not print is written out."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:characters])
    whole = len(text) <= characters and len(shown) <= characters
    return shown if whole else shown[: max(0, characters - 3)] + "..."

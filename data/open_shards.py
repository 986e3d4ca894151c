"""The shards of a split that are open: each when it is first read, and closed once nothing more is expected of it."""

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from data.errors import AlteredCopy, CorruptData
from data.manifest import FileEntry
from data.store import Store

log = logging.getLogger("lockstep")

# Shards stay mapped though nothing more is known to need them: what is read without looking ahead, as evaluations are.
MOST_UNEXPECTED = 16

Shard = TypeVar("Shard")
Result = TypeVar("Result")


class OpenShards(Generic[Shard]):
    """The shards of a split by their number. A map that is dropped lets the disk space of an evicted file go."""

    def __init__(self, store: Store, files: Sequence[Sequence[FileEntry]], open_shard: Callable[[int], Shard]) -> None:
        """`files` are those of each shard, the samples first; `open_shard` opens one by its number."""
        self._store, self._files, self._open_shard = store, files, open_shard
        self._shards: dict[int, Shard] = {}
        # (S,) what each shard's files hold.
        self.bytes = np.array([sum(file.bytes for file in of_shard) for of_shard in files], dtype=np.int64)
        for file in itertools.chain.from_iterable(files):
            store.check(file)

    def __getitem__(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            shard = self._shards[number] = self._open_shard(number)
        return shard

    def __len__(self) -> int:
        """How many are open."""
        return len(self._shards)

    def expect(self, start: int, stop: int, numbers: npt.NDArray[np.int64]) -> None:
        """Shards (n,), repeats allowed, that are read between two positions."""
        wanted = [self._files[number] for number in np.unique(numbers).tolist()]
        self._store.expect(start, stop, [*itertools.chain.from_iterable(wanted)])

    def looks_ahead_samples(self, samples: int) -> int:
        """How many samples, of so many in all, it is worth to look ahead."""
        return min(samples, self._store.looks_ahead_bytes * samples // int(self.bytes.sum()))

    def close_some(self, wanted: Callable[[], npt.NDArray[np.int64]]) -> dict[int, Shard]:
        """Close shards neither expected nor among the `wanted` (n,), once they are more than a few: these, by number.

        It is for the reader to call when nothing of them is in use. `wanted` is asked for only where it matters.
        """
        if len(self._shards) <= MOST_UNEXPECTED or self._store.looks_ahead_bytes == 0:
            return {}
        unexpected = [number for number in self._shards if not self._store.expects(self._files[number][0])]
        if len(unexpected) <= MOST_UNEXPECTED:
            return {}
        needed = {*np.unique(wanted()).tolist()}
        return {number: self._shards.pop(number) for number in unexpected if number not in needed}

    def read(
        self, read: Callable[[], Result], closed: Callable[[dict[int, Shard]], object] = lambda shards: None
    ) -> Result:
        """What `read` gives of these shards.

        Where a file of the cache was altered after it was opened, the shards of that file are closed, which `closed` is
        told, and all is read again from a file that is fetched anew: once for each file, and then it is CorruptData.
        """
        fetched_again: set[str] = set()
        while True:
            try:
                return read()
            except AlteredCopy as error:
                if error.sha256 in fetched_again:
                    raise CorruptData(str(error)) from None
                log.warning("%s; reading it again", error)
                fetched_again.add(error.sha256)
                closed(self._close(error.sha256))

    def _close(self, sha256: str) -> dict[int, Shard]:
        """Close the shards that have a file of this content: these, by number."""
        numbers = [number for number in self._shards if sha256 in {file.sha256 for file in self._files[number]}]
        return {number: self._shards.pop(number) for number in numbers}

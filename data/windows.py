"""The windowed order: a shuffle that reads a few shards at a time, for data that must be fetched.

Shards are put in a random order, anew each epoch, and laid end to end: a line of all samples. The line is cut into equal
lanes, which are read side by side, and each lane into windows of a few shards, which are shuffled whole. At any time a
lane's reader touches one window, so about lanes x window_shards shards are in use, in all nodes together.
"""

from dataclasses import dataclass

import numpy as np

from data.digest import mix64
from data.order import IntegerArray, WordArray, derive_key, permute_each

WINDOWED_ORDER = "windowed-1"
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Layouts of so many epochs are kept: a step may lie in two, and what is fetched ahead in a third.
_KEPT_EPOCHS = 4


def _words(key: int, count: int) -> WordArray:
    """`count` independent words of a key: SplitMix64's sequence."""
    return mix64(np.uint64(key) + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


@dataclass(frozen=True)
class _Layout:
    """One epoch's line: where its shards end and its windows begin."""

    shards: IntegerArray
    """(S,) the shards in the order of the line."""
    shard_ends: IntegerArray
    """(S,) where each of them ends on the line."""
    window_starts: IntegerArray
    """(W,) where the windows of all lanes begin, rising."""
    window_samples: IntegerArray
    window_keys: WordArray


class WindowedOrder:
    """Memory and the start of an epoch cost O(shards); an ordinal's sample id then costs O(log shards)."""

    def __init__(
        self, shard_samples: IntegerArray, seed: int, *, lanes: int, window_shards: int, stream: str = ""
    ) -> None:
        self.samples = int(shard_samples.sum())
        if not 0 < lanes <= self.samples:
            raise ValueError(f"data.lanes {lanes}: must be between 1 and the {self.samples} samples there are")
        self._shard_samples = shard_samples
        self._first_ids = np.cumsum(shard_samples) - shard_samples
        self._seed, self._stream = seed, stream
        self.lanes, self._window_shards = lanes, window_shards
        lane_samples, longer = divmod(self.samples, lanes)  # the first `longer` lanes have one sample more
        numbers = np.arange(lanes + 1, dtype=np.int64)
        self._lane_starts = numbers * lane_samples + np.minimum(numbers, longer)
        self._layouts: dict[int, _Layout] = {}

    def lanes_of(self, ordinals: IntegerArray) -> IntegerArray:
        """The lane (n,) that each ordinal (n,) is read from."""
        return ordinals % self.samples % self.lanes

    def sample_ids(self, ordinals: IntegerArray) -> tuple[IntegerArray, IntegerArray]:
        """Epochs and sample ids, both int64 (n,), of ordinals (n,)."""
        epochs = ordinals // self.samples
        offsets = ordinals - epochs * self.samples
        ids = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            ids[chosen] = self._ids(self._layout(epoch), offsets[chosen])
        return epochs, ids

    def _ids(self, layout: _Layout, offsets: IntegerArray) -> IntegerArray:
        lanes = offsets % self.lanes
        places = self._lane_starts[lanes] + offsets // self.lanes
        windows = np.searchsorted(layout.window_starts, places, side="right") - 1
        starts = layout.window_starts[windows]
        places = starts + permute_each(places - starts, layout.window_samples[windows], layout.window_keys[windows])
        slots = np.searchsorted(layout.shard_ends, places, side="right")
        shards = layout.shards[slots]
        rows = places - (layout.shard_ends[slots] - self._shard_samples[shards])
        return self._first_ids[shards] + rows

    def _layout(self, epoch: int) -> _Layout:
        if epoch not in self._layouts:
            for old in sorted(self._layouts)[: -(_KEPT_EPOCHS - 1)]:
                del self._layouts[old]
            self._layouts[epoch] = self._lay_out(epoch)
        return self._layouts[epoch]

    def _lay_out(self, epoch: int) -> _Layout:
        key = derive_key(seed=self._seed, epoch=epoch, stream=self._stream, purpose="shards")
        shards = np.argsort(_words(key, len(self._shard_samples)))  # the words all differ: mix64 is a bijection
        ends = np.cumsum(self._shard_samples[shards])
        starts = ends - self._shard_samples[shards]
        cuts: list[IntegerArray] = []
        for first, stop in zip(self._lane_starts[:-1].tolist(), self._lane_starts[1:].tolist(), strict=True):
            # A lane's first window begins where the lane does, most often within a shard.
            shard = int(np.searchsorted(ends, first, side="right"))
            later = starts[shard + self._window_shards :: self._window_shards]
            cuts += [np.array([first]), later[: int(np.searchsorted(later, stop))]]
        windows = np.unique(np.concatenate(cuts))
        key = derive_key(seed=self._seed, epoch=epoch, stream=self._stream, purpose="windows")
        return _Layout(shards, ends, windows, np.diff(windows, append=self.samples), _words(key, len(windows)))

"""The order of samples: a keyed permutation that is computed, never stored.

An alternating Feistel network over a rectangle of `rows` x `columns` cells, with modular addition in place of XOR
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), and cycle walking for the few cells past the end.
Integers only and versioned: no library's random stream can change the order of a run between two of its attempts.
"""

import hashlib
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data.digest import mix64

GLOBAL_ORDER = "global-1"
# Part of every key, whatever is derived from it.
KEY_VERSION = "global-1"

# Ten rounds pass every test on large rectangles; a small one needs more, because each round mixes only a few bits.
ROUNDS = 10
SMALL_ROUNDS = 24
SMALL_SAMPLES = 4096
# Rows x columns at least this, or the permutations of very few samples come from too small a family.
MINIMUM_SIDE = 4

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_MASK = (1 << 64) - 1

IntegerArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]
Words = np.uint64 | WordArray
"""One word for all, or one for each."""


def derive_key(*, seed: int, epoch: int, stream: str = "", purpose: str = "order") -> int:
    """A 64-bit key that depends on every part: seed 7 of epoch 1 shares nothing with seed 8 of epoch 0.

    `stream` is the name of a stream of a mixture, empty where there is only one."""
    text = f"lockstep {KEY_VERSION} seed={seed} epoch={epoch} stream={stream or 0} purpose={purpose}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(indices: IntegerArray, samples: int, keys: WordArray) -> IntegerArray:
    """Send each index (n,) in [0, samples) through the permutation of its key: keys has shape (1,) or (n,)."""
    # An even number of rows: with both sides odd, every round would be an even permutation, and half of all
    # permutations could never occur.
    rows = max(MINIMUM_SIDE, math.isqrt(samples - 1) + 1)
    rows += rows % 2
    columns = max(MINIMUM_SIDE, -(-samples // rows))
    rounds = SMALL_ROUNDS if samples <= SMALL_SAMPLES else ROUNDS
    limits = np.uint64(samples)
    return _walk(indices, limits, (np.uint64(rows), np.uint64(columns)), _subkeys(keys, rounds))


def permute_each(indices: IntegerArray, samples: IntegerArray, keys: WordArray) -> IntegerArray:
    """`permute` where every index (n,) has a number of samples (n,) and a key (n,) of its own."""
    permuted = np.empty_like(indices)
    small = samples <= SMALL_SAMPLES
    for rounds, chosen in ((SMALL_ROUNDS, np.flatnonzero(small)), (ROUNDS, np.flatnonzero(~small))):
        if chosen.size:
            limits = samples[chosen].astype(np.uint64)
            rows = np.maximum(MINIMUM_SIDE, _root(limits - np.uint64(1)) + np.uint64(1))
            rows += rows % np.uint64(2)
            columns = np.maximum(MINIMUM_SIDE, (limits + rows - np.uint64(1)) // rows)
            permuted[chosen] = _walk(indices[chosen], limits, (rows, columns), _subkeys(keys[chosen], rounds))
    return permuted


def _root(squares: WordArray) -> WordArray:
    """The integer square roots (n,) of words below 2^62, exact where floating point is not."""
    roots = np.sqrt(squares.astype(np.float64)).astype(np.uint64)
    roots -= roots * roots > squares
    roots += (roots + np.uint64(1)) ** np.uint64(2) <= squares
    return roots


def _subkeys(keys: WordArray, rounds: int) -> list[WordArray]:
    return [mix64(keys + np.uint64(_GOLDEN * (number + 1) & _MASK)) for number in range(rounds)]


def _walk(indices: IntegerArray, limits: Words, sides: tuple[Words, Words], subkeys: list[WordArray]) -> IntegerArray:
    """Encipher, and follow the cycle of a cell that lies past its limit until it comes back among the samples."""
    cells = _encipher(indices.astype(np.uint64), sides, subkeys)
    outside = np.flatnonzero(cells >= limits)
    while outside.size:
        chosen = [subkey if subkey.size == 1 else subkey[outside] for subkey in subkeys]
        cells[outside] = _encipher(cells[outside], (_at(sides[0], outside), _at(sides[1], outside)), chosen)
        outside = outside[cells[outside] >= _at(limits, outside)]
    return cells.astype(np.int64)


def _at(words: Words, chosen: npt.NDArray[np.intp]) -> Words:
    return words[chosen] if isinstance(words, np.ndarray) else words


def _encipher(cells: WordArray, sides: tuple[Words, Words], subkeys: list[WordArray]) -> WordArray:
    """One pass of the network over cells (n,) of rectangles of `sides` (rows, columns), `cell = row * columns + column`."""
    row = cells // sides[1]
    halves = [row, cells - row * sides[1]]
    for number, subkey in enumerate(subkeys):
        moved, other = number % 2, 1 - number % 2
        size = sides[moved]
        word = (halves[other] + subkey) * _MULTIPLIER
        word ^= word >> _HALF
        word *= _MULTIPLIER
        word >>= _HALF
        word *= size  # sides are below 2^32: the product's upper half is uniform over [0, size)
        word >>= _HALF
        word += halves[moved]
        # Modulo `size`, of a word below twice that: where it is smaller already, the difference wraps to a huge one.
        halves[moved] = np.minimum(word, word - size)
    return halves[0] * sides[1] + halves[1]


class Order(Protocol):
    """The order of one stream's samples: its ordinals 0, 1, ... -> (epoch, sample id), epochs running on into each other."""

    samples: int

    def sample_ids(self, ordinals: IntegerArray) -> tuple[IntegerArray, IntegerArray]:
        """Epochs and sample ids, both int64 (n,), of ordinals (n,)."""
        ...


class GlobalOrder:
    """One permutation of all samples an epoch: the best shuffle, for data that is as near everywhere."""

    def __init__(self, samples: int, seed: int, stream: str = "") -> None:
        if not 0 < samples < 1 << 62:
            raise ValueError(f"an order needs between 1 and 2^62 samples, not {samples}")
        self.samples = samples
        self._seed, self._stream = seed, stream
        self._keys: dict[int, int] = {}

    def sample_ids(self, ordinals: IntegerArray) -> tuple[IntegerArray, IntegerArray]:
        """Epochs and sample ids, both int64 (n,), of ordinals (n,). Cost and memory do not depend on `samples`."""
        if ordinals.size == 0:
            return ordinals.astype(np.int64), ordinals.astype(np.int64)
        epochs = ordinals // self.samples
        indices = ordinals - epochs * self.samples
        if epochs.min() == epochs.max():
            keys = np.array([self._key(int(epochs[0]))], dtype=np.uint64)
        else:
            distinct, inverse = np.unique(epochs, return_inverse=True)
            keys = np.array([self._key(int(epoch)) for epoch in distinct], dtype=np.uint64)[inverse]
        return epochs, permute(indices, self.samples, keys)

    def _key(self, epoch: int) -> int:
        if epoch not in self._keys:
            if len(self._keys) > 4096:  # a stream visits epochs in order: old ones are not needed again
                self._keys.clear()
            self._keys[epoch] = derive_key(seed=self._seed, epoch=epoch, stream=self._stream)
        return self._keys[epoch]

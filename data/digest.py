"""The proof of what was read: a fold that sums over ranks, and a chain that sums up a run."""

import numpy as np
import numpy.typing as npt
import xxhash

EMPTY_DIGEST = "0" * 32
# In the digest a sample's id stands beside the number of its stream: no stream has 2^48 samples.
STREAM_SHIFT = 48

WordArray = npt.NDArray[np.uint64]

_POSITION_SALT = np.uint64(0x9E3779B97F4A7C15)


def mix64(words: WordArray) -> WordArray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words, shape kept."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def mix_samples(positions: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], hashes: WordArray) -> WordArray:
    """One 64-bit word per sample (n,) that depends on its position, its id and its content hash."""
    words = mix64(positions.view(np.uint64) + _POSITION_SALT)
    words += ids.view(np.uint64)
    words = mix64(words)
    words ^= hashes
    return mix64(words)


def fold_samples(positions: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], hashes: WordArray) -> int:
    """The wrapping sum of the samples' words, as a signed 64-bit integer (what an int64 tensor can hold).

    A sum does not depend on grouping: added over micro-batches and ranks it is the same however a step was split.
    """
    return to_int64(int(mix_samples(positions, ids, hashes).sum(dtype=np.uint64)))


def to_int64(word: int) -> int:
    """The signed 64-bit integer with the lowest 64 bits of `word`: also what a wrapping sum over ranks is."""
    return ((word + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def chain(previous_digest: str, total: int) -> str:
    """The run's digest after a step: xxh3-128, in hex, of the digest before it and the step's fold over all ranks."""
    message = bytes.fromhex(previous_digest) + to_int64(total).to_bytes(8, "little", signed=True)
    return xxhash.xxh3_128_hexdigest(message)

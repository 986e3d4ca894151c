"""Mixtures: which stream a position belongs to. Every block of 4,096 positions holds exactly each stream's quota."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from data.order import IntegerArray, derive_key, permute

MIXTURE_VERSION: Literal["blocks-1"] = "blocks-1"
BLOCK_SAMPLES = 4096
# Blocks whose assignment is kept: what is read now, and what is fetched ahead.
_KEPT_BLOCKS = 64


def quotas_of(weights: Mapping[str, float]) -> tuple[int, ...]:
    """Positive whole numbers that sum to 4,096, as near to the weights' shares as whole numbers can be.

    By largest remainder (Hamilton's method), the earlier stream first where remainders are equal. ValueError for a
    stream whose share is less than half a position of a block.
    """
    total = sum(weights.values())
    exact = [weight / total * BLOCK_SAMPLES for weight in weights.values()]
    for name, share in zip(weights, exact, strict=True):
        if share < 0.5:
            raise ValueError(
                f"data.streams.{name}.weight: {share / BLOCK_SAMPLES:.2e} of the whole is less than a sample in "
                f"{2 * BLOCK_SAMPLES}; raise it or leave the stream out"
            )
    quotas = [max(1, int(share)) for share in exact]
    order = sorted(range(len(exact)), key=lambda number: (quotas[number] - exact[number], number))
    for number in order[: max(0, BLOCK_SAMPLES - sum(quotas))]:
        quotas[number] += 1
    while sum(quotas) > BLOCK_SAMPLES:  # streams of less than one position were given a whole one
        quotas[int(np.argmax(quotas))] -= 1
    return tuple(quotas)


class Mixture:
    """Assigns the positions from a segment's origin on: stream and ordinal within the stream's share."""

    def __init__(self, quotas: Sequence[int], seed: int, origin: int) -> None:
        assert sum(quotas) == BLOCK_SAMPLES
        self._quotas = np.array(quotas, dtype=np.int64)
        self._stops = np.cumsum(self._quotas)
        self._seed, self._origin = seed, origin
        self._blocks: dict[int, tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]] = {}

    def assign(self, offsets: IntegerArray) -> tuple[IntegerArray, IntegerArray]:
        """Streams and ordinals, both int64 (n,), of positions (n,) counted from the origin."""
        blocks, slots = offsets // BLOCK_SAMPLES, offsets % BLOCK_SAMPLES
        streams, ordinals = np.empty_like(offsets), np.empty_like(offsets)
        for block in np.unique(blocks).tolist():
            chosen = np.flatnonzero(blocks == block)
            block_streams, block_ranks = self._block(block)
            streams[chosen] = block_streams[slots[chosen]]
            ordinals[chosen] = block_ranks[slots[chosen]]
        ordinals += blocks * self._quotas[streams]
        return streams, ordinals

    def counts(self, offset: int) -> IntegerArray:
        """Samples of each stream (S,) among the first `offset` positions."""
        block, slot = divmod(offset, BLOCK_SAMPLES)
        begun = np.bincount(self._block(block)[0][:slot], minlength=len(self._quotas)) if slot else 0
        return block * self._quotas + begun

    def _block(self, block: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
        """Stream and rank among the stream's slots, both (4096,), of each slot of a block."""
        if block not in self._blocks:
            if len(self._blocks) >= _KEPT_BLOCKS:
                del self._blocks[min(self._blocks)]
            key = derive_key(seed=self._seed, epoch=block, stream=str(self._origin), purpose="mixture")
            shuffled = permute(np.arange(BLOCK_SAMPLES), BLOCK_SAMPLES, np.array([key], dtype=np.uint64))
            streams = np.searchsorted(self._stops, shuffled, side="right").astype(np.int16)
            ranks = np.empty(BLOCK_SAMPLES, dtype=np.int16)
            by_stream = np.argsort(streams, kind="stable")  # slots in order within each stream
            ranks[by_stream] = np.arange(BLOCK_SAMPLES) - (self._stops - self._quotas)[streams[by_stream]]
            self._blocks[block] = streams, ranks
        return self._blocks[block]

"""Looking ahead of what is read, for datasets that must be fetched: a cursor that runs along the plan and takes samples of it."""

from collections.abc import Iterator

from data.mixture import BLOCK_SAMPLES
from data.plan import Plan
from data.reading import Reader
from data.steps import Integers, Steps

# Looks that the cursor is ahead of reading at most: what is fetched ahead is known about so finely.
LOOKS = 1024
# Of a rank's samples, at each look, at most: enough that hardly a shard in use goes unseen. Where shards hold few samples
# a look is short too, or shards would seem to be in use together that are not.
LOOK_SAMPLES = 512
LOOKS_PER_SHARD = 4
# Looks for each chunk that is read, so that the first one need not wait for all of them.
LOOKS_AT_ONCE = 16


class LookAhead:
    """Tells the datasets of a plan what this rank reads next, and how far it has come.

    Not every sample is looked at: shards are what is fetched, and those that are missed are fetched when they are read.
    """

    def __init__(
        self,
        reader: Reader,
        plan: Plan,
        *,
        rank: int,
        world_size: int,
        micro_samples: int,
        position: int,
        stop_position: int,
    ) -> None:
        self._reader, self._stop_position = reader, stop_position
        part = max(1, max(segment.global_samples for segment in plan.segments) // world_size)
        shard = min(reader.samples_of(number) // len(samples) for number, samples in _read_streams(reader))
        self._look_steps = -(-max(1, min(LOOK_SAMPLES, shard // LOOKS_PER_SHARD)) // part)
        # As if each rank had a cache of its own. Where ranks share one they see more than fits, and fetch the nearest.
        self._ahead = world_size * max(
            reader.looks_ahead_samples(plan.number_of(stream)) * BLOCK_SAMPLES // stream.quota
            for stream in plan.segment_at(position).streams
        )
        self._stride = max(self._look_steps * part * world_size, self._ahead // LOOKS)
        self._cursor = position
        # Its own, because they keep what was asked for last.
        self._steps = Steps(
            plan,
            reader.shard_samples,
            rank=rank,
            world_size=world_size,
            micro_samples=micro_samples,
            stop_position=stop_position,
            pairs=reader.mixes,
        )

    def go_on(self, position: int) -> None:
        """Look ahead of `position`, which is read next. Costs nothing where all samples are on this machine."""
        if self._ahead == 0:
            return
        self._reader.reached(position)
        self._cursor = max(self._cursor, position)
        for _ in range(LOOKS_AT_ONCE):
            if self._cursor >= min(position + self._ahead, self._stop_position):
                return
            block = self._steps.block(self._cursor, self._look_steps)
            start, self._cursor = self._cursor, self._cursor + self._stride
            self._reader.expect(start, self._cursor, block.samples.followed_by(block.guests))


def _read_streams(reader: Reader) -> Iterator[tuple[int, Integers]]:
    """The number of each stream that is read, and the samples of its shards (S,)."""
    for number, samples in enumerate(reader.shard_samples):
        if samples is not None:
            yield number, samples

"""Plans of many segments, over many of a mixture's blocks: streams join and leave, weights and batches change."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import quotas_of
from data.order import GLOBAL_ORDER
from data.plan import Plan, Segment, StreamPart
from data.steps import Integers, Samples, Steps, order_of
from data.windows import WINDOWED_ORDER

NAMES = ("a", "b", "c", "d")


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, list[Integers]]:
    """A plan, and the shards of its streams; shards may be empty."""
    shards = {name: np.array([*draw(st.lists(st.integers(0, 400), max_size=8)), 50]) for name in NAMES}
    orders = {}
    for name in NAMES:
        lanes, window = draw(st.integers(1, 9)), draw(st.integers(1, 4))
        windowed = draw(st.booleans())
        orders[name] = (
            {"order": WINDOWED_ORDER, "lanes": lanes, "window_shards": window} if windowed else {"order": GLOBAL_ORDER}
        )
    segments: list[Segment] = []
    start, seed = 0, draw(st.integers(0, 2**40))
    weights: dict[str, float] = {}
    for _ in range(draw(st.integers(1, 5))):
        if not weights or draw(st.booleans()):  # else only the batch changes
            chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
            weights = {name: draw(st.sampled_from([0.003, 1.0, 2.0, 7.0])) for name in chosen}
        global_samples = draw(st.integers(1, 60))
        parts = tuple(
            StreamPart(name=name, fingerprint=name, sequence_tokens=None, quota=quota, **orders[name])
            for name, quota in zip(weights, quotas_of(weights), strict=True)
        )
        segments.append(Segment(start_position=start, seed=seed, global_samples=global_samples, streams=parts))
        start += global_samples * draw(st.integers(1, 150)) + draw(st.integers(0, global_samples - 1))
    plan = Plan.of(segments)
    return plan, [shards[stream.name] for stream in plan.streams]


def read(
    plan: Plan, shards: list[Integers], position: int, stop: int, *, world_size: int, micro: int, steps: int
) -> tuple[Samples, list[int]]:
    """The samples from `position` to `stop`, rank after rank within each step, asked for in blocks of so many steps; and
    where the steps begin."""
    ranks = [
        Steps(plan, shards, rank=rank, world_size=world_size, micro_samples=micro, stop_position=stop)
        for rank in range(world_size)
    ]
    found: list[Samples] = []
    firsts: list[int] = []
    while position < stop:
        blocks = [rank.block(position, steps) for rank in ranks]
        firsts += blocks[0].firsts
        for number in range(len(blocks[0].firsts)):
            for block in blocks:
                row = block.rows[number]
                found.append(block.samples.part(row, row + block.shares[number].own_samples))
        position += sum(blocks[0].step_samples)
    return Samples(*(np.concatenate(fields) for fields in zip(*found, strict=True))), firsts


@settings(deadline=None, max_examples=40)
@given(
    planned=plans(),
    more=st.integers(1, 9000),
    world_size=st.integers(2, 7),
    micro=st.integers(1, 9),
    steps=st.integers(1, 90),
    data=st.data(),
)
def test_any_world_reads_what_one_process_reads_and_each_stream_in_its_own_order(
    planned: tuple[Plan, list[Integers]], more: int, world_size: int, micro: int, steps: int, data: st.DataObject
) -> None:
    plan, shards = planned
    stop = plan.segments[-1].start_position + more
    alone, firsts = read(plan, shards, 0, stop, world_size=1, micro=60, steps=64)
    assert np.array_equal(np.sort(alone.positions), np.arange(stop))

    restart = data.draw(st.sampled_from(firsts), label="restart")
    split, _ = read(plan, shards, restart, stop, world_size=world_size, micro=micro, steps=steps)
    for whole, part in zip(alone, split, strict=True):
        assert np.array_equal(part, whole[restart:])

    by_position = np.argsort(alone.positions)
    for number, stream in enumerate(plan.streams):
        mine = by_position[alone.streams[by_position] == number]
        epochs, ids = order_of(stream, shards[number], plan.segments[0].seed).sample_ids(np.arange(len(mine)))
        assert np.array_equal(alone.epochs[mine], epochs)
        assert np.array_equal(alone.ids[mine], ids)
        assert plan.consumed(stop)[number] == len(mine)

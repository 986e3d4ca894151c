"""The windowed order: golden values, exactness over any shards, locality, uniformity, and its cost far out."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from data.order import GlobalOrder, permute, permute_each
from data.windows import WINDOWED_ORDER, WindowedOrder

SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any)


GOLDEN = [
    [2, 35, 21, 16, 1, 34, 8, 20, 0, 32, 9, 13],
    [5570657636057, 878825920199, 1463277865656, 4497225047586, 4257646477915, 8829189027742],
]


def test_golden_orders() -> None:
    # These never change under this version: a run that continues must read what it would have read.
    assert WINDOWED_ORDER == "windowed-1"
    order = WindowedOrder(np.array([7, 0, 5, 9, 4, 11]), 3, lanes=4, window_shards=2)
    assert order.sample_ids(np.arange(12))[1].tolist() == GOLDEN[0]
    large = WindowedOrder(np.full(1000, 10**10), 42, lanes=64, window_shards=8, stream="web")
    assert large.sample_ids(10**12 + np.arange(6))[1].tolist() == GOLDEN[1]


@settings(deadline=None, max_examples=80)
@given(shards=SHARDS, lanes=st.integers(1, 20), window_shards=st.integers(1, 6), seed=st.integers(0, 99))
def test_every_epoch_holds_every_sample_once(shards: list[int], lanes: int, window_shards: int, seed: int) -> None:
    samples = sum(shards)
    order = WindowedOrder(np.array(shards), seed, lanes=min(lanes, samples), window_shards=window_shards)
    epochs, ids = order.sample_ids(np.arange(5 * samples, 7 * samples))
    assert epochs.tolist() == [5] * samples + [6] * samples
    assert np.array_equal(np.sort(ids[:samples]), np.arange(samples))
    assert np.array_equal(np.sort(ids[samples:]), np.arange(samples))


@settings(deadline=None, max_examples=40)
@given(shards=SHARDS, start=st.integers(0, 3000), count=st.integers(0, 200), lanes=st.integers(1, 9))
def test_an_ordinal_has_its_sample_whatever_else_is_asked(
    shards: list[int], start: int, count: int, lanes: int
) -> None:
    def order() -> WindowedOrder:
        return WindowedOrder(np.array(shards), 1, lanes=min(lanes, sum(shards)), window_shards=2)

    ordinals = np.arange(start, start + count)
    together = order().sample_ids(ordinals)[1]
    alone = [int(order().sample_ids(np.array([ordinal]))[1][0]) for ordinal in ordinals[::17]]
    assert together[::17].tolist() == alone


def test_a_lane_reads_one_window_at_a_time() -> None:
    shards, rows, lanes, window_shards = 64, 100, 4, 3
    order = WindowedOrder(np.full(shards, rows), 5, lanes=lanes, window_shards=window_shards)
    ordinals = np.arange(order.samples)
    ids, lane_of = order.sample_ids(ordinals)[1], order.lanes_of(ordinals)
    for lane in range(lanes):
        touched = ids[lane_of == lane] // rows
        windows = [
            set(touched[at : at + window_shards * rows].tolist()) for at in range(0, len(touched), window_shards * rows)
        ]
        assert all(len(window) == window_shards for window in windows[:-1])
        assert sum(map(len, windows)) == len(set(touched.tolist())) == shards // lanes
    # A span of the global order touches nearly all shards; of this one, at most a window or two of each lane.
    span = ids[1000 : 1000 + 2 * rows]
    assert len(set((span // rows).tolist())) <= 2 * lanes * window_shards
    everywhere = GlobalOrder(order.samples, 5).sample_ids(ordinals[1000 : 1000 + 2 * rows])[1]
    assert len(set((everywhere // rows).tolist())) > 2 * lanes * window_shards


def test_shards_and_rows_are_shuffled_uniformly() -> None:
    shards, rows, epochs = 8, 5, 3000
    order = WindowedOrder(np.full(shards, rows), 9, lanes=2, window_shards=2)
    ids = order.sample_ids(np.arange(order.samples * epochs))[1].reshape(epochs, order.samples)
    for place in (0, 1, 7, order.samples - 1):
        counts = np.bincount(ids[:, place], minlength=order.samples)
        statistic = ((counts - epochs / order.samples) ** 2 / (epochs / order.samples)).sum()
        assert 1e-4 < chi2.sf(statistic, order.samples - 1) < 1 - 1e-4
    other_seed = WindowedOrder(np.full(shards, rows), 10, lanes=2, window_shards=2)
    assert (other_seed.sample_ids(np.arange(order.samples))[1] != ids[0]).any()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 1 << 61), st.integers(0, 1 << 63)), min_size=1, max_size=20))
def test_permuting_together_is_permuting_alone(domains: list[tuple[int, int]]) -> None:
    samples = np.array([size for size, _ in domains])
    keys = np.array([key for _, key in domains], dtype=np.uint64)
    together = permute_each(samples - 1, samples, keys)
    alone = [permute(samples[i : i + 1] - 1, int(samples[i]), keys[i : i + 1])[0] for i in range(len(domains))]
    assert together.tolist() == alone


def test_far_out_costs_memory_for_the_shards_alone() -> None:
    shard_samples = np.full(20_000, 500_000_000)  # 10^13 samples
    tracemalloc.start()
    order = WindowedOrder(shard_samples, 1, lanes=64, window_shards=16)
    ids = order.sample_ids(10**12 + np.arange(256))[1]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(ids)) == 256
    assert peak_bytes < 20_000 * 8 * 12


@pytest.mark.parametrize("lanes", [0, 13])
def test_impossible_lanes_are_refused(lanes: int) -> None:
    with pytest.raises(ValueError, match=f"data.lanes {lanes}: must be between 1 and the 12 samples"):
        WindowedOrder(np.array([5, 7]), 0, lanes=lanes, window_shards=2)

"""Mixtures: exact quotas in every block, ordinals without gaps, and quotas as near to the weights as can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from data.mixture import BLOCK_SAMPLES, MIXTURE_VERSION, Mixture, quotas_of

WEIGHTS = st.lists(st.floats(0.1, 100), min_size=2, max_size=6)


def quotas(weights: list[float]) -> tuple[int, ...]:
    return quotas_of({f"s{number}": weight for number, weight in enumerate(weights)})


GOLDEN = [
    [0, 0, 2, 1, 0, 0, 0, 0, 1, 0],
    [750000000, 750000001, 50048836, 199951164, 750000002, 750000003, 750000004, 750000005, 199951165, 750000006],
]


def test_golden_assignments() -> None:
    # These never change under this version: a run that continues must read what it would have read.
    assert MIXTURE_VERSION == "blocks-1"
    streams, ordinals = Mixture((3072, 819, 205), 7, 0).assign(10**9 + np.arange(10))
    assert streams.tolist() == GOLDEN[0]
    assert ordinals.tolist() == GOLDEN[1]


@settings(deadline=None, max_examples=60)
@given(weights=WEIGHTS, seed=st.integers(0, 99), origin=st.integers(0, 10**6), block=st.integers(0, 10**6))
def test_every_block_holds_each_quota_and_ordinals_have_no_gaps(
    weights: list[float], seed: int, origin: int, block: int
) -> None:
    wanted = quotas(weights)
    offsets = np.arange(block * BLOCK_SAMPLES, (block + 2) * BLOCK_SAMPLES)
    streams, ordinals = Mixture(wanted, seed, origin).assign(offsets)
    for half in np.split(streams, 2):
        assert np.bincount(half, minlength=len(wanted)).tolist() == list(wanted)
    for stream, quota in enumerate(wanted):
        assert ordinals[streams == stream].tolist() == list(range(block * quota, (block + 2) * quota))


@settings(deadline=None, max_examples=40)
@given(weights=WEIGHTS, start=st.integers(0, 20_000), count=st.integers(0, 300))
def test_counts_are_those_of_the_positions_before(weights: list[float], start: int, count: int) -> None:
    mixture = Mixture(quotas(weights), 3, 11)
    streams, ordinals = mixture.assign(np.arange(start, start + count))
    counts = mixture.counts(start)
    assert counts.sum() == start
    for stream in range(len(weights)):
        mine = ordinals[streams == stream]
        assert mine.tolist() == list(range(counts[stream], counts[stream] + len(mine)))
    assert np.array_equal(mixture.counts(start + count) - counts, np.bincount(streams, minlength=len(weights)))


def test_neighbours_in_a_block_are_independent() -> None:
    streams, _ = Mixture((2048, 1024, 1024), 1, 0).assign(np.arange(64 * BLOCK_SAMPLES))
    pairs = np.bincount(streams[:-1] * 3 + streams[1:], minlength=9)
    expected = np.outer([0.5, 0.25, 0.25], [0.5, 0.25, 0.25]).ravel() * (len(streams) - 1)
    assert chi2.sf(((pairs - expected) ** 2 / expected).sum(), 8) > 1e-4
    other = Mixture((2048, 1024, 1024), 1, 4096).assign(np.arange(BLOCK_SAMPLES))[0]
    assert (other != streams[:BLOCK_SAMPLES]).any()  # a mixture that begins elsewhere has blocks of its own


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS)
def test_quotas_are_whole_and_nearest(weights: list[float]) -> None:
    found = quotas(weights)
    assert sum(found) == BLOCK_SAMPLES
    assert min(found) >= 1
    exact = [weight / sum(weights) * BLOCK_SAMPLES for weight in weights]
    assert all(abs(quota - share) < 1 for quota, share in zip(found, exact, strict=True))


def test_exact_shares_stay_exact_and_too_small_ones_are_refused() -> None:
    assert quotas([3, 1]) == (3072, 1024)
    assert quotas([1, 1, 1]) == (1366, 1365, 1365)
    with pytest.raises(ValueError, match=r"data.streams.s1.weight: 1.00e-04 of the whole .* raise it or leave"):
        quotas([9999, 1])

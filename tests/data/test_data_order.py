"""The global order: golden values, exactness, uniformity, and independence of seeds and epochs."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from data.digest import EMPTY_DIGEST, chain, fold_samples, mix64
from data.order import GLOBAL_ORDER, GlobalOrder, derive_key

# These never change under this version: a run that continues must read what it would have read.
GOLDEN = {
    (5, 0): [2, 3, 4, 1, 0, 1, 0, 4],
    (10, 1): [3, 2, 7, 8, 4, 5, 0, 1],
    (1000, 7): [137, 50, 544, 325, 800, 555, 484, 25],
    (65_536, 3): [48579, 52789, 54747, 39978, 60019, 47236, 33764, 46138],
    (10**13, 42): [
        4168208057433,
        7624912952392,
        1589245168599,
        7845089310356,
        2704249812807,
        9708133537678,
        8182785389469,
        3662700665759,
    ],
}


def test_golden_orders() -> None:
    assert GLOBAL_ORDER == "global-1"
    for (samples, seed), expected in GOLDEN.items():
        assert GlobalOrder(samples, seed).sample_ids(np.arange(8))[1].tolist() == expected, (samples, seed)


def test_golden_keys_and_digests() -> None:
    assert derive_key(seed=7, epoch=1) == 7447143195113977313
    assert mix64(np.array([1, 2**63], dtype=np.uint64)).tolist() == [6238072747940578789, 2720858781877447050]
    positions, ids = np.array([0, 1, 10**12]), np.array([5, 0, 10**13])
    hashes = np.array([0, 2**64 - 1, 12345], dtype=np.uint64)
    total = fold_samples(positions, ids, hashes)
    assert total == 1492787528960389853
    assert chain(EMPTY_DIGEST, total) == "4751189867004c23392135538465b3a6"
    assert chain(chain(EMPTY_DIGEST, 1), 2) != chain(chain(EMPTY_DIGEST, 2), 1)


@settings(deadline=None, max_examples=60)
@given(samples=st.integers(1, 6000), seed=st.integers(-(2**63), 2**63), epoch=st.integers(0, 10**6))
def test_every_epoch_holds_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    epochs, ids = GlobalOrder(samples, seed).sample_ids(np.arange(epoch * samples, (epoch + 1) * samples))
    assert (epochs == epoch).all()
    assert np.array_equal(np.sort(ids), np.arange(samples))


@settings(deadline=None, max_examples=60)
@given(samples=st.integers(1, 300), seed=st.integers(0, 9), start=st.integers(0, 2000), count=st.integers(0, 500))
def test_a_position_has_its_sample_whatever_else_is_asked(samples: int, seed: int, start: int, count: int) -> None:
    positions = np.arange(start, start + count)
    together = GlobalOrder(samples, seed).sample_ids(positions)[1]
    alone = [int(GlobalOrder(samples, seed).sample_ids(np.array([position]))[1][0]) for position in positions[::37]]
    assert together[::37].tolist() == alone


@pytest.mark.parametrize(("samples", "epochs"), [(3, 6000), (5, 12000), (9, 6000), (10, 6000), (100, 3000)])
def test_small_permutations_are_uniform(samples: int, epochs: int) -> None:
    ids = GlobalOrder(samples, seed=11).sample_ids(np.arange(samples * epochs))[1].reshape(epochs, samples)
    places = np.stack([np.bincount(ids[:, place], minlength=samples) for place in range(samples)])
    # Rows and columns of a permutation matrix are tied: (n - 1)^2 degrees of freedom and the factor (n - 1) / n.
    statistic = ((places - epochs / samples) ** 2 / (epochs / samples)).sum() * (samples - 1) / samples
    assert 1e-4 < chi2.sf(statistic, (samples - 1) ** 2) < 1 - 1e-4
    pairs = np.bincount(ids[:, 0] * samples + ids[:, 1], minlength=samples**2).reshape(samples, samples)
    off_diagonal = pairs[~np.eye(samples, dtype=bool)]
    expected = epochs / off_diagonal.size
    statistic = ((off_diagonal - expected) ** 2 / expected).sum()
    assert 1e-4 < chi2.sf(statistic, off_diagonal.size - 1) < 1 - 1e-4


def test_every_permutation_of_five_occurs_equally_often() -> None:
    epochs = 24_000
    ids = GlobalOrder(5, seed=2).sample_ids(np.arange(5 * epochs))[1].reshape(epochs, 5)
    codes = (ids * 5 ** np.arange(5)).sum(axis=1)
    wanted = [sum(value * 5**place for place, value in enumerate(order)) for order in permutations(range(5))]
    counts = np.array([(codes == code).sum() for code in wanted])
    assert counts.sum() == epochs
    assert 1e-4 < chi2.sf(((counts - 200) ** 2 / 200).sum(), 119) < 1 - 1e-4


@pytest.mark.parametrize("samples", [4097, 10**6 + 3, 10**13])
def test_neighbours_in_a_large_order_are_independent(samples: int) -> None:
    count, buckets = 4096, 16
    order = GlobalOrder(samples, seed=5)
    ids = np.concatenate([order.sample_ids(epoch * samples + np.arange(count))[1] for epoch in range(8)])
    bucket = ids // (samples // buckets + 1)
    pairs = np.bincount(bucket[:-1] * buckets + bucket[1:], minlength=buckets**2)
    expected = (len(ids) - 1) / buckets**2
    assert chi2.sf(((pairs - expected) ** 2 / expected).sum(), buckets**2 - 1) > 1e-4


def test_seed_and_epoch_do_not_add_up() -> None:
    samples = 1000
    first = GlobalOrder(samples, 7).sample_ids(samples + np.arange(samples))[1]
    second = GlobalOrder(samples, 8).sample_ids(np.arange(samples))[1]
    assert (first == second).mean() < 0.02
    keys = {derive_key(seed=seed, epoch=epoch) for seed in range(20) for epoch in range(20)}
    assert len(keys) == 400
    assert derive_key(seed=1, epoch=2, stream="a") != derive_key(seed=1, epoch=2, stream="a", purpose="block")


def test_a_position_far_out_takes_no_memory_of_the_dataset() -> None:
    tracemalloc.start()
    ids = GlobalOrder(10**13, seed=1).sample_ids(10**12 + np.arange(256))[1]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(ids)) == 256
    assert ids.max() > 10**12
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize("samples", [0, -1, 1 << 62])
def test_an_impossible_size_is_refused(samples: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        GlobalOrder(samples, 0)

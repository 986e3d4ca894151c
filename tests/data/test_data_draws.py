"""Draws: accurate, of the laws they are named after, and the same on every machine."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from data.draws import cosine, exponential, integer, key_words, log_uniform, logarithm, symmetric_beta, uniform

GRID = np.linspace(0.0, 1.0, 4001)
# p-values of fixed words cannot flicker; below this a law would be wrong.
DOUBTFUL = 1e-3


def words(count: int, each: int, start: int = 0) -> list[list[int]]:
    return key_words(np.arange(start, start + count, dtype=np.uint64), each).tolist()


@pytest.mark.parametrize(
    ("own", "library", "arguments"),
    [
        (exponential, math.exp, GRID * 40 - 20),
        (exponential, math.exp, GRID * 1400 - 700),
        (logarithm, math.log, np.exp(GRID * 80 - 60)),
        (logarithm, math.log, 1 + (GRID - 0.5) * 1e-9),
        (cosine, math.cos, GRID * math.pi / 2),
    ],
)
def test_own_functions_are_as_accurate_as_they_say(own, library, arguments: npt.NDArray[np.float64]) -> None:
    for x in arguments.tolist():
        # exp's error grows with its argument, as that of x / ln 2 does.
        assert own(x) == pytest.approx(library(x), rel=1e-15 * max(4.0, abs(x)), abs=3e-16 if own is cosine else 0.0)


def test_words_are_splitmix64_of_every_part() -> None:
    many = key_words(np.arange(2000, dtype=np.uint64), 47)
    assert many.shape == (2000, 47)
    assert len(np.unique(many)) == many.size
    # More of them leave the first ones as they were.
    assert np.array_equal(many[:, :5], key_words(np.arange(2000, dtype=np.uint64), 5))
    bits = np.unpackbits(many.view(np.uint8), axis=None)
    assert stats.binomtest(int(bits.sum()), bits.size).pvalue > DOUBTFUL


def test_draws_that_must_never_change() -> None:
    """Golden values: another one means other crops on another machine, or for a run that was begun before."""
    [first, second], [third, fourth] = words(2, 2)
    assert [first, second, third, fourth] == [
        16294208416658607535,
        7960286522194355700,
        13830413928045401970,
        6869446166584666695,
    ]
    assert [uniform(first).hex(), uniform(second, -0.1, 0.1).hex(), log_uniform(third, 3 / 4, 4 / 3).hex()] == [
        "0x1.c4415072f63b9p-1",
        "-0x1.c0bcf5563a430p-7",
        "0x1.278f7e5d6fcf6p+0",
    ]
    assert [symmetric_beta(first, second, alpha).hex() for alpha in (0.05, 0.2, 1.0, 7.5)] == [
        "0x1.151876bb773d0p-5",
        "0x1.a877ea385ba42p-3",
        "0x1.74877b6a4af7ep-2",
        "0x1.ccbfefa54a054p-2",
    ]
    assert [integer(word, 6) for word in (first, second, third, fourth, 0, 2**64 - 1)] == [5, 2, 4, 2, 0, 5]


def test_uniform_draws_are_uniform_and_stay_in_their_interval() -> None:
    drawn = [uniform(word, -2.0, 3.0) for [word] in words(20_000, 1)]
    assert stats.kstest(drawn, stats.uniform(-2.0, 5.0).cdf).pvalue > DOUBTFUL
    assert (uniform(0), uniform(2**64 - 1)) == (0.0, 1.0 - 2.0**-53)
    drawn = [math.log(log_uniform(word, 0.5, 8.0)) for [word] in words(20_000, 1)]
    assert stats.kstest(drawn, stats.uniform(math.log(0.5), math.log(16.0)).cdf).pvalue > DOUBTFUL


def test_integers_are_uniform() -> None:
    counts = np.bincount([integer(word, 24) for [word] in words(48_000, 1)], minlength=24)
    assert stats.chisquare(counts).pvalue > DOUBTFUL
    assert (integer(0, 24), integer(2**64 - 1, 24), integer(2**64 - 1, 1)) == (0, 23, 0)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2, 0.4, 1.0, 1.5, 8.0, 100.0, 1e6])
def test_beta_draws_have_their_law(alpha: float) -> None:
    drawn = np.array([symmetric_beta(*pair, alpha) for pair in words(20_000, 2)])
    law = stats.beta(alpha, alpha)
    assert drawn.min() >= 0.0
    assert drawn.max() <= 1.0
    # Where alpha is small most of the law lies nearer to 0 and 1 than a double can tell from them, so not with kstest.
    inner = (
        law.ppf([1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]) if alpha >= 0.2 else np.array([1e-6, 1e-3, 0.1, 0.5, 0.9])
    )
    cells = np.diff(law.cdf(inner), prepend=0.0, append=1.0)
    counts = np.diff(np.searchsorted(np.sort(drawn), inner), prepend=0, append=len(drawn))
    assert stats.chisquare(counts, cells * len(drawn)).pvalue > DOUBTFUL
    assert drawn.mean() == pytest.approx(0.5, abs=4 * law.std() / math.sqrt(len(drawn)))
    if alpha >= 0.2:
        assert stats.kstest(drawn, law.cdf).pvalue > DOUBTFUL


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1.0, 1e300])
def test_beta_draws_of_extreme_words_and_alphas_are_numbers(alpha: float) -> None:
    for first in (0, 2**11, 2**63, 2**64 - 1):
        for second in (0, 1, 2**63, 2**64 - 2, 2**64 - 1):
            assert 0.0 <= symmetric_beta(first, second, alpha) <= 1.0

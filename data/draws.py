"""Draws from hashed words that are the same on every machine: uniform, log-uniform, symmetric beta.

Only integers, and of floating point only what IEEE 754 defines to the last bit (+, -, *, /, the square root and scaling by a
power of two): exp, log and cos of the C library differ between platforms in the last bit, and one bit may move a crop.
"""

import math

import numpy as np
import numpy.typing as npt

from data.digest import mix64

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_LN2 = 0.6931471805599453
_HALF_PI = 1.5707963267948966
# exp(700) is the last power of e but a few that a double holds, and far more than any draw needs.
_LARGEST_EXPONENT = 700.0


def key_words(words: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.uint64]:
    """`count` words (n, count) from each of words (n,): SplitMix64 (Steele, Lea and Flood, 2014) started from each."""
    steps = np.array([_GOLDEN * (number + 1) & _MASK for number in range(count)], dtype=np.uint64)
    return mix64(mix64(words)[:, None] + steps)


def integer(word: int, count: int) -> int:
    """An integer of [0, count)."""
    return word * count >> 64


def uniform(word: int, low: float = 0.0, high: float = 1.0) -> float:
    """A number of [low, high), rounded: the word's upper 53 bits of the way."""
    return low + (high - low) * ((word >> 11) * 2.0**-53)


def log_uniform(word: int, low: float, high: float) -> float:
    """A number between two positive ones, its logarithm uniform."""
    return exponential(uniform(word, logarithm(low), logarithm(high)))


def symmetric_beta(first: int, second: int, alpha: float) -> float:
    """A number of [0, 1] with the law Beta(alpha, alpha), alpha > 0, from two words.

    Devroye, "Random variate generation in one line of code" (1996): with U and V uniform and S a random sign,
    1/2 + S/2 * (q / (1 + q))^(1/2), where q = (U^(-1/alpha) - 1) cos^2(2 pi V). Nothing is rejected, so the number of words is
    fixed. The sign is the second word's lowest bit, which V does not hold.
    """
    u = ((first >> 11) + 1) * 2.0**-53  # of (0, 1]
    power = exponential(min(-logarithm(u) / alpha, _LARGEST_EXPONENT)) - 1.0
    # Over a quarter of the circle cos^2 has the law that it has over the whole.
    q = power * cosine(_HALF_PI * uniform(second)) ** 2
    half = 0.5 * math.sqrt(q / (1.0 + q))
    return 0.5 + half if second & 1 else 0.5 - half


def exponential(x: float) -> float:
    """e to the power of x, |x| at most 700, to a few units in the last place."""
    assert abs(x) <= _LARGEST_EXPONENT
    twos = round(x / _LN2)
    rest = x - twos * _LN2  # of [-0.35, 0.35], give or take
    total = 1.0
    for number in range(17, 0, -1):  # Taylor's series, from the smallest term on
        total = 1.0 + total * rest / number
    return math.ldexp(total, twos)


def logarithm(x: float) -> float:
    """The natural logarithm of x > 0, to a few units in the last place."""
    fraction, twos = math.frexp(x)
    if fraction < 0.7071067811865476:
        fraction, twos = 2.0 * fraction, twos - 1
    ratio = (fraction - 1.0) / (fraction + 1.0)  # |ratio| < 0.172
    square, total = ratio * ratio, 0.0
    for number in range(25, 0, -2):  # log f = 2 artanh((f - 1) / (f + 1))
        total = total * square + 1.0 / number
    return twos * _LN2 + 2.0 * ratio * total


def cosine(x: float) -> float:
    """The cosine of x in [0, pi/2], to about 1e-16."""
    square, total = x * x, 1.0
    for number in range(24, 0, -2):  # Taylor's series, from the smallest term on
        total = 1.0 - total * square / (number * (number - 1))
    return total
